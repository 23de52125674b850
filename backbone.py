# SPDX-License-Identifier: MIT
"""The frozen CLIP of the grounder: loading by open_clip, tokens, dense features (Eq. 3 is marked below), and the
variants of its last block that segment without training (METHODS).

    clip, tokenizer = load_clip("ViT-B-16-quickgelu", "openai")     # frozen; the name, a tag or a local file

Legend for every shape: B local images, N texts of the global batch, K classes, C embedding size, D width of the ViT,
L patches, H W patch grid, h w pixels. Needs files.py and ops.py beside it, torch and open_clip.
"""

import copy
import json
import math
import os
import sys
import zipfile
import zlib
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

from files import InputError, first_line
from ops import normalize

CLIP_NORM = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def run_block(block, x, n=None):
    """open_clip's residual attention block without its detours. x: [B, L, D]. Returns the first n tokens, or all.

    Tokens meet in keys and values alone: where n tokens leave, only they need a query, the projection and the MLP.
    """
    width, heads, y = x.shape[-1], block.attn.num_heads, block.ln_1(x)
    weight, bias = (
        block.attn.in_proj_weight,
        block.attn.in_proj_bias,
    )  # [3D, D]: queries, keys, values
    q = F.linear(y[:, :n], weight[:width], bias[:width])  # [B, n, D]
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, n, D/heads]
    kv = F.linear(y, weight[width:], bias[width:])  # [B, L, 2D]
    k, v = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, L, D/heads]
    z = (
        F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    )  # [B, heads, n, D/heads] -> [B, n, D]
    x = x[:, :n] + block.ls_1(block.attn.out_proj(z))
    return x + block.ls_2(run_mlp(block.mlp, block.ln_2(x)))


def run_mlp(mlp, x):
    """open_clip's MLP. QuickGELU, x sigmoid(1.702 x), is silu(1.702 x) / 1.702: the factors go into the two products,
    and the gradient needs one tensor instead of two. x: [B, L, D]."""
    if not isinstance(mlp.gelu, open_clip.transformer.QuickGELU):
        return mlp(x)
    into, out = mlp.c_fc, mlp.c_proj
    y = torch.addmm(1.702 * into.bias, x.flatten(0, 1), into.weight.T, alpha=1.702)  # [B*L, 4D]
    return torch.addmm(out.bias, F.silu(y), out.weight.T, alpha=1 / 1.702).view_as(x)


def text_features(clip, tokens):
    """open_clip's encode_text, [N, context] -> [N, C], up to the last end of text: attention is causal, so what stands
    behind the end (the largest token) changes nothing."""
    if clip.attn_mask is None or getattr(clip, "text_pool_type", "argmax") != "argmax":
        return clip.encode_text(tokens)
    ends = tokens.argmax(-1)  # [N]
    n = int(ends.max()) + 1
    x = clip.token_embedding(tokens[:, :n]) + clip.positional_embedding[:n]  # [N, n, width]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:n, :n]))
    x = x[torch.arange(len(x), device=x.device), ends]  # [N, width]
    return (
        clip.text_projection(x)
        if isinstance(clip.text_projection, nn.Linear)
        else x @ clip.text_projection
    )


attend = (
    F.scaled_dot_product_attention
)  # softmax(s q k^T + bias) v of each head, s = (head width)^-1/2; CLS included


METHODS = {  # attention(q, k, v, grid) of the last block, each [B, heads, 1 + L, D / heads]; are residual and MLP kept
    "clip": (lambda q, k, v, grid: attend(q, k, v), True),  # the ordinary block
    "maskclip": (lambda q, k, v, grid: v, True),  # Zhou et al. 2022, without its refinements
    "maskclip-refined": (lambda q, k, v, grid: v, True),  # and with them: maskclip_refined
    "sclip": (
        lambda q, k, v, grid: attend(q, q, v) + attend(k, k, v),
        True,
    ),  # Wang et al. 2024; rows add to 2
    "clearclip": (lambda q, k, v, grid: attend(q, q, v), False),  # Lan et al. 2024
    "naclip": (
        lambda q, k, v, grid: attend(k, k, v, nearness(grid).to(k)),
        False,
    ),  # Hajimiri et al. 2025
}


def nearness(grid, sigma=5.0):
    """NACLIP's omega: exp(-|p_i - p_j|^2 / 2 sigma^2) of patches at p_i, p_j, 0 for CLS. grid: (H, W). [1+L, 1+L]."""
    places = (torch.arange(n) for n in grid)
    rows, columns = (
        torch.exp(-((p[:, None] - p) ** 2) / (2 * sigma**2)) for p in places
    )  # [H, H], [W, W]
    return F.pad(
        torch.kron(rows, columns), (1, 0, 1, 0)
    )  # the exponential of a sum over y and x is a product


def last_block(block, tokens, grid, method):
    """CLIP's last block under one of METHODS. tokens: [B, 1 + L, D]. Returns [B, D, H, W], and its keys [B, L, D]."""
    attention, whole = METHODS[method]
    attn = block.attn
    qkv = F.linear(block.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias)  # [B, 1+L, 3D]
    q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(
        2, 0, 3, 1, 4
    )  # each [B, heads, 1+L, D/heads]
    x = attn.out_proj(attention(q, k, v, grid)[:, :, 1:].transpose(1, 2).flatten(2))  # [B, L, D]
    if whole:
        x = tokens[:, 1:] + block.ls_1(x)
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    keys = k[:, :, 1:].transpose(1, 2).flatten(2)  # [B, heads, L, D/heads] -> [B, L, D]
    return x.transpose(1, 2).unflatten(2, grid), keys  # [B, D, H, W], [B, L, D]


def frozen_mask(cosine):
    """Masks of CLIP's own cosines. Paper silent: w and b of this branch; their start values, as the release."""
    return torch.sigmoid(10.0 * (cosine - 0.25))


def maskclip_refined(cosine, keys):
    """Masks [B, K, H, W] after MaskCLIP's prompt denoising and key smoothing. cosine: [B, K, H, W], keys: [B, L, D].

    Paper silent: both run inside each window, as PAMR does. A class whose p stays below 0.5 there gets the mask 0 and
    leaves the softmax (none does where all would); cosines of keys below 0 weigh nothing, so that a mean stays one.
    Smoothing decides between classes alone: the best class of the smoothed p takes the highest mask value of its
    pixel, the others their share, so the background channel meets the same scale of values as for every method.
    """
    flat = cosine.flatten(2)  # [B, K, L]
    seen = (100.0 * flat).softmax(1).amax(2, keepdim=True) >= 0.5  # [B, K, 1]
    kept = seen | ~seen.any(1, keepdim=True)
    p = (100.0 * flat).masked_fill(~kept, -math.inf).softmax(1)  # [B, K, L]
    k = normalize(keys)
    weight = (k @ k.mT).clamp(min=0)  # [B, L, L], symmetric
    p = p @ (weight / weight.sum(1, keepdim=True))  # [B, K, L], mean of p_j
    best = (frozen_mask(flat) * kept).amax(1, keepdim=True)  # [B, 1, L]
    return (best * p / p.amax(1, keepdim=True)).unflatten(
        2, cosine.shape[2:]
    )  # [B, K, L] -> [B, K, H, W]


def pad_to_patch(images, patch):
    """Zero-pads [B, 3, h, w] to multiples of the patch, the smaller half left and top. Returns images, (left, top)."""
    height, width = images.shape[-2:]
    extra_h, extra_w = -height % patch, -width % patch
    left, top = extra_w // 2, extra_h // 2
    return F.pad(images, (left, extra_w - left, top, extra_h - top)), (left, top)


def resize_positions(embedding, native, grid):
    """Positional embeddings [1 + L, D] of the native (H, W) grid for another grid: [1 + L', D], bicubic."""
    if tuple(native) == tuple(grid):
        return embedding
    patches = full(embedding[1:]).unflatten(0, native).permute(2, 0, 1).unsqueeze(0)  # [1, D, H, W]
    patches = F.interpolate(
        patches, size=tuple(grid), mode="bicubic", align_corners=False
    )  # [1, D, H', W']
    return torch.cat([embedding[:1], patches[0].flatten(1).T.to(embedding.dtype)])  # [1 + L', D]


def check_vit(clip):
    """InputError unless this open_clip model has the plain ViT whose last block can be taken apart."""
    visual = getattr(clip, "visual", None)
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    plain = (
        blocks is not None
        and hasattr(blocks[-1], "ls_1")
        and isinstance(blocks[-1].attn, nn.MultiheadAttention)
    )
    pooled = (
        getattr(visual, "attn_pool", None) is None and getattr(visual, "pool_type", "tok") == "tok"
    )
    if not (plain and pooled and not getattr(visual, "final_ln_after_pool", False)):
        raise InputError(
            f"{type(visual).__name__}: GCL needs a plain ViT with class token, as ViT-B-16-quickgelu"
        )
    if not getattr(visual.transformer, "batch_first", True):
        raise InputError(
            "this open_clip's transformer is not batch first; install a newer open_clip_torch"
        )


def pick_device(name=None):
    """torch.device of a name, or the best there is; under torchrun, CUDA takes LOCAL_RANK. Raises InputError."""
    best = (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    try:
        device = torch.device(name or best)
    except RuntimeError as error:
        raise InputError(f"--device {name}: no such device; choose cuda, mps or cpu") from error
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise InputError(
                f"--device {name or best}: GPU {index} is asked for, {torch.cuda.device_count()} found"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"--device {name}: not available on this machine")
    return device


def load_clip(model="ViT-B-16-quickgelu", pretrained="openai", device="cpu"):
    """A frozen open_clip CLIP and its tokenizer.

    model: a name of open_clip.list_models(), or a JSON file in open_clip's model-config format. pretrained: a tag, or a
    local weights file (state dict, OpenAI's TorchScript archive, safetensors), or None for random weights.
    A config with the wrong activation for its weights is corrected, and said on stderr: plain ViT-B-16 with OpenAI's
    weights would otherwise run GELU where they were trained with QuickGELU. Raises InputError.
    """
    config = clip_config(model)
    path = find_weights(model, pretrained)
    if pretrained is None:
        print(f"warning: {model} with random weights (pretrained=None)", file=sys.stderr)
    quick = trained_with_quick_gelu(model, pretrained, path)
    if quick is not None and quick != config.get("quick_gelu", False):
        print(
            f"warning: {pretrained} needs quick_gelu={quick}: corrected in the config of {model}",
            file=sys.stderr,
        )
        config["quick_gelu"] = quick
    clip = build_clip(config, read_weights(path) if path else None, path)
    names = {
        "model": None if isinstance(model, dict) else str(model),
        "pretrained": None if pretrained is None else str(pretrained),
    }
    # Whole paths, so that a checkpoint finds its CLIP from any folder.
    clip.source = {
        k: os.path.abspath(v) if v and os.path.isfile(v) else v for k, v in names.items()
    }
    clip.source["config"] = config
    return clip.to(device), tokenizer_of(clip)


def tokenizer_of(clip):
    """CLIP's own BPE tokenizer at this model's context length: list of strings -> int64 [n, context]."""
    return open_clip.SimpleTokenizer(context_length=clip.context_length)


def build_clip(config, state=None, path=None):
    """open_clip's CLIP from a model config and a state dict (random weights when None), float32, frozen."""
    try:
        clip = open_clip.CLIP(**copy.deepcopy(config))
    except (
        AssertionError,
        TypeError,
        ValueError,
        KeyError,
        RuntimeError,
        ZeroDivisionError,
    ) as error:
        raise InputError(
            f"not a model config that open_clip.CLIP takes: {first_line(error)}"
        ) from error
    check_vit(clip)
    if state is not None:
        load_strict(clip, state, path)
    return clip.eval().requires_grad_(False)


def clip_config(model):
    """The model config (a dict) of an open_clip name, a JSON file or a dict; InputError for no plain CLIP."""
    if isinstance(model, dict):
        return copy.deepcopy(model)
    if str(model).endswith(".json"):
        try:
            config = json.loads(Path(model).read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"--model {model}: cannot be read as a model config ({error})"
            ) from error
        config = config.get("model_cfg", config) if isinstance(config, dict) else None
    else:
        if str(model) not in open_clip.list_models():
            raise InputError(
                f"--model {model}: neither a name that open_clip knows nor a .json file"
            )
        config = open_clip.get_model_config(str(model))
    parts = (
        [config.get(name) for name in ("vision_cfg", "text_cfg")]
        if isinstance(config, dict)
        else [None]
    )
    plain = all(isinstance(part, dict) for part in parts) and "embed_dim" in config
    if (
        not plain
        or {"custom_text", "multimodal_cfg"} & config.keys()
        or "hf_tokenizer_name" in parts[1]
    ):
        raise InputError(
            f"--model {model}: not a plain CLIP config (embed_dim, vision_cfg, text_cfg)"
        )
    return config


def find_weights(model, pretrained):
    """Path of the weights file for a tag or a local file; None for None. Downloads a tag's file once (open_clip)."""
    if pretrained is None or os.path.isfile(pretrained):
        return pretrained
    hint = "give a local weights file instead: --pretrained FILE (state dict, OpenAI archive or safetensors)"
    tag = open_clip.get_pretrained_cfg(str(model), str(pretrained))
    if not tag:
        raise InputError(f"--pretrained {pretrained}: no such file, and no tag of {model}; {hint}")
    try:
        return open_clip.download_pretrained(tag)
    except Exception as error:  # every hub client has its own errors; the cause is kept
        what = f"the weights of {model} could not be downloaded ({first_line(error)})"
        raise InputError(f"--pretrained {pretrained}: {what}; {hint}") from error


def trained_with_quick_gelu(model, pretrained, path):
    """True or False where the weights' origin tells their activation, None where it does not (a plain local file)."""
    tag = open_clip.get_pretrained_cfg(str(model), str(pretrained)) if pretrained else None
    if tag and str(pretrained) != str(path):
        return bool(tag.get("quick_gelu", False))
    return (
        True if path and is_torchscript(path) else None
    )  # only OpenAI hands out TorchScript archives


def is_torchscript(path):
    """Whether a file is a TorchScript archive, such as OpenAI's ViT-B-16.pt."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def read_weights(path):
    """A CLIP state dict (float32 values) from a local file; InputError when it holds none."""
    try:
        if is_torchscript(path):
            state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = open_clip.factory.load_state_dict(str(path), device="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch, pickle and safetensors each raise their own; the file is what is wrong
        raise InputError(
            f"{path}: not a weights file that can be read ({first_line(error)})"
        ) from error
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise InputError(
            f"{path}: no CLIP state dict; a checkpoint of GCL goes to --checkpoint or --resume"
        )
    extra = (
        "input_resolution",
        "context_length",
        "vocab_size",
        "attn_mask",
    )  # OpenAI's archive has these beside
    return {
        k: v.float() if v.is_floating_point() else v for k, v in state.items() if k not in extra
    }


def load_strict(module, state, path):
    """Loads state into module; InputError names the first key or shape that does not fit."""
    own = {k: v for k, v in module.state_dict().items() if not k.startswith("clip.")}
    for key, value in own.items():
        if key not in state:
            raise InputError(f"{path}: {key} is missing; is this a checkpoint of another model?")
        if state[key].shape != value.shape:
            shapes = f"has shape {tuple(state[key].shape)}, this model needs {tuple(value.shape)}"
            raise InputError(f"{path}: {key} {shapes}: a checkpoint of another CLIP?")
    if extra := sorted(state.keys() - own.keys()):
        raise InputError(
            f"{path}: {extra[0]} is not part of this model: a checkpoint of another CLIP?"
        )
    module.load_state_dict(state, strict=False)  # strict already, but for the frozen CLIP of a GCL


def fingerprint(clip):
    """CRC-32 over heads, activation and all weights as float32: tells apart two CLIPs of one shape."""
    blocks = [*clip.visual.transformer.resblocks, *clip.transformer.resblocks]
    crc = zlib.crc32(
        repr([(block.attn.num_heads, type(block.mlp.gelu).__name__) for block in blocks]).encode()
    )
    for key, value in sorted(clip.state_dict().items()):
        crc = zlib.crc32(
            value.detach().float().cpu().contiguous().numpy(), zlib.crc32(key.encode(), crc)
        )
    return crc


def full(x):
    """x in float32 at least: what autocast left in half precision is raised before norms, masks and losses."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def trunk(visual, images):
    """The ViT up to its last block. images: [B, 3, h, w], sides multiples of the patch. Returns [B, 1 + L, D]."""
    x = visual.conv1(images)  # [B, D, H, W], H W the patch grid
    grid = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)  # [B, L, D]
    x = torch.cat(
        [visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1
    )  # [B, 1+L, D]
    x = visual.ln_pre(
        x + resize_positions(visual.positional_embedding, visual.grid_size, grid).to(x.dtype)
    )
    for block in visual.transformer.resblocks[:-1]:
        x = run_block(block, x)
    return x


def global_embedding(visual, images):
    """v_g, CLIP's own image embedding, L2-normalised, at any image size. Returns [B, C]."""
    x = run_block(visual.transformer.resblocks[-1], trunk(visual, images), 1)[
        :, 0
    ]  # [B, D], the class token alone
    return normalize(full(visual.ln_post(x) @ visual.proj))


def dense_features(block, tokens, grid):
    """v_d: the last block with attention as the identity (MaskCLIP). Returns [B, D, H, W].

    block: CLIP's last block, or a copy of it. tokens: [B, 1 + L, D] from trunk. grid: (H, W), L = H * W.
    Only the value path is computed: each patch keeps its own value projection; residual and MLP stay.
    """
    x = tokens[:, 1:]  # [B, L, D]
    width = x.shape[-1]
    weight, bias = (
        block.attn.in_proj_weight[2 * width :],
        block.attn.in_proj_bias[2 * width :],
    )  # values: [D, D]
    value = F.linear(block.ln_1(x), weight, bias)  # Eq. (3), [B, L, D]
    x = x + block.ls_1(block.attn.out_proj(value))
    x = x + block.ls_2(run_mlp(block.mlp, block.ln_2(x)))
    return x.transpose(1, 2).unflatten(2, grid)  # [B, L, D] -> [B, D, H, W]


def patch_grid(images, patch):
    """(H, W) in patches; ValueError when a side is not a multiple of the patch (segment pads, training does not)."""
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(
            f"image sides {height}x{width} must be multiples of this CLIP's patch size {patch}"
        )
    return height // patch, width // patch
