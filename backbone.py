# SPDX-License-Identifier: MIT
"""The frozen CLIP of the grounder: loading by open_clip, dense features, CLIP alone as a segmenter.

Whatever file of weights it reads, no code in it runs. METHODS are the variants of the last block
that segment without training.

    clip, tokenizer = load_clip("ViT-B-16-quickgelu", "openai")  # the name, a tag or a local file

Legend for every shape: B images, K classes, C embedding size, D width of the ViT, L patches, H W
patch grid, h w pixels. Needs ops.py, release.py and files.py beside it, torch and open_clip.

>>> vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2}
>>> text = {"width": 64, "heads": 1, "layers": 1}
>>> visual = build_clip({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}).visual
>>> tokens = trunk(visual, torch.rand(1, 3, 24, 40))
>>> dense_features(visual.transformer.resblocks[-1], tokens, grid=(3, 5)).shape
torch.Size([1, 64, 3, 5])
"""

import difflib
import io
import json
import math
import os
import re
import sys
import zipfile
import zlib
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F

import release
from files import InputError, first_line, read_text
from ops import normalize

CLIP_NORM = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def full(x):
    """x in float32 at least: what autocast left in half precision is raised before norms, masks and
    losses."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- features ----


def patch_grid(images, patch):
    """(H, W) in patches; ValueError when a side is not a multiple of the patch (segment pads,
    training does not)."""
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(
            f"image sides {height}x{width} must be multiples of this CLIP's patch size {patch}"
        )
    return height // patch, width // patch


def resize_positions(embedding, native, grid):
    """Positional embeddings [1 + L, D] of the native (H, W) grid for another grid: [1 + L', D].

    Paper silent: bicubic, as the release.
    """
    patches = full(embedding[1:]).unflatten(0, native).permute(2, 0, 1).unsqueeze(0)  # [1, D, H, W]
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    patches = patches[0].flatten(1).T  # [1, D, H', W'] -> [L', D]
    return torch.cat([embedding[:1], patches.to(embedding.dtype)])


def trunk(visual, images):
    """The ViT up to its last block. images: [B, 3, h, w], sides multiples of the patch. Returns [B,
    1 + L, D]."""
    x = visual.conv1(images)  # [B, D, H, W]
    positions = resize_positions(visual.positional_embedding, visual.grid_size, x.shape[-2:])
    x = x.flatten(2).transpose(1, 2)  # [B, L, D]
    class_token = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)  # [B, 1, D]
    x = visual.ln_pre(torch.cat([class_token, x], dim=1) + positions.to(x.dtype))
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    return x


def project(visual, x):
    """CLIP's own head: ln_post and projection. [..., D] -> [..., C]."""
    return visual.ln_post(x) @ visual.proj


def global_embedding(visual, images):
    """v_g, CLIP's own image embedding, L2-normalised, at any image size. Returns [B, C]."""
    x = visual.transformer.resblocks[-1](trunk(visual, images))
    return normalize(full(project(visual, x[:, 0])))  # of the class token


def dense_features(block, tokens, grid):
    """v_d: the last block with attention as the identity (MaskCLIP). Returns [B, D, H, W].

    block: CLIP's last block, or a copy of it. tokens: [B, 1 + L, D] from trunk. grid: (H, W), L = H
    * W. Only the value path is computed: each patch keeps its own value projection; residual and
    MLP stay.
    """
    x, attn = tokens[:, 1:], block.attn  # [B, L, D]
    # Of queries, keys, values, each [D, D], the last.
    weight, bias = (p.chunk(3)[2] for p in (attn.in_proj_weight, attn.in_proj_bias))
    value = F.linear(block.ln_1(x), weight, bias)  # Eq. (3), [B, L, D]
    x = finish_block(block, x, attn.out_proj(value))
    return x.transpose(1, 2).unflatten(2, grid)  # [B, L, D] -> [B, D, H, W]


def finish_block(block, x, attended):
    """A block after its attention: residual and MLP. x, attended: [B, L, D]. Returns the same."""
    x = x + block.ls_1(attended)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


# ---- CLIP alone: other attention in the last block, its masks ----

# Of queries q and keys k, which attend to which in the last block (none: each token to itself), and
# whether its residual and MLP are kept.
METHODS = {
    "clip": (["qk"], True),  # the ordinary block
    "maskclip": ([], True),  # Zhou et al. 2022, without its refinements
    "maskclip-refined": ([], True),  # and with them: maskclip_refined
    "sclip": (["qq", "kk"], True),  # Wang et al. 2024; a sum, so rows add to 2
    "clearclip": (["qq"], False),  # Lan et al. 2024
    "naclip": (["kk"], False),  # Hajimiri et al. 2025, with nearness
}


def nearness(grid):
    """NACLIP's omega: exp(-|p_i - p_j|^2 / 2 sigma^2) of patches at p_i, p_j with sigma 5, 0 for
    CLS. grid: (H, W). [1+L, 1+L]."""
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))  # [L, 2]
    omega = torch.exp(-torch.cdist(places, places).square() / (2 * 5**2))  # [L, L]
    return F.pad(omega, (1, 0, 1, 0))


def last_block(block, tokens, grid, method):
    """CLIP's last block under one of METHODS. tokens: [B, 1 + L, D]. Returns [B, D, H, W], and its
    keys [B, L, D]."""
    pairs, whole = METHODS[method]
    attn = block.attn
    qkv = F.linear(block.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias)  # [B, 1+L, 3D]
    qkv = qkv.unflatten(2, (3, attn.num_heads, -1))  # [B, 1+L, 3, heads, D/heads]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, 1+L, D/heads]
    of, bias = {"q": q, "k": k}, nearness(grid).to(v) if method == "naclip" else None
    # softmax(s a b^T + bias) v a head, s = (head width)^-1/2
    heads = [F.scaled_dot_product_attention(of[a], of[b], v, bias) for a, b in pairs] or [v]
    outputs = sum(heads), k
    attended, keys = (y[:, :, 1:].transpose(1, 2).flatten(2) for y in outputs)  # each [B, L, D]
    x = attn.out_proj(attended)
    x = finish_block(block, tokens[:, 1:], x) if whole else x
    return x.transpose(1, 2).unflatten(2, grid), keys  # [B, D, H, W], [B, L, D]


def cosines(visual, v, text):
    """Cosines of texts [K, C] and dense features v [B, D, H, W] through CLIP's own head: [B, K, H,
    W] float32."""
    v = project(visual, full(v).permute(0, 2, 3, 1))  # [B, H, W, C]
    return torch.einsum("bhwc,kc->bkhw", normalize(full(v)), text)  # [B, K, H, W]


def frozen_mask(cosine):
    """Masks of CLIP's own cosines. Paper silent: w and b of this branch; their start values, as the
    release."""
    return torch.sigmoid(10.0 * (cosine - 0.25))


def maskclip_refined(cosine, keys):
    """Masks [B, K, H, W] after MaskCLIP's prompt denoising and key smoothing. cosine: [B, K, H, W],
    keys: [B, L, D].

    Paper silent: both run inside each window, as PAMR does. A class whose p stays below 0.5 there
    gets the mask 0 and leaves the softmax (none does where all would); cosines of keys below 0
    weigh nothing, so that a mean stays one. Smoothing decides between classes alone: the best class
    of the smoothed p takes the highest mask value of its pixel, the others their share, so the
    background channel meets the same scale of values as for every method.
    """
    flat = cosine.flatten(2)  # [B, K, L]
    scores = 100.0 * flat
    seen = scores.softmax(1).amax(2, keepdim=True) >= 0.5  # [B, K, 1]
    kept = seen | ~seen.any(1, keepdim=True)
    p = scores.masked_fill(~kept, -math.inf).softmax(1)  # [B, K, L]
    k = normalize(keys)
    weight = (k @ k.mT).clamp(min=0)  # [B, L, L], symmetric
    p = p @ F.normalize(weight, p=1, dim=1)  # [B, K, L], mean of p_j
    best = (frozen_mask(flat) * kept).amax(1, keepdim=True)  # [B, 1, L]
    return (best * p / p.amax(1, keepdim=True)).unflatten(2, cosine.shape[2:])  # [B, K, H, W]


@torch.no_grad()
def segment_clip(visual, images, text, method, refine):
    """Masks [B, K, h, w] of CLIP alone, made, refined and resized as those of the knowledge
    preservation branch.

    "maskclip" is MaskCLIP† of Table 1, "maskclip-refined" its MaskCLIP.
    """
    padded, padding = pad_to_patch(images, visual.patch_size[0])
    tokens, grid = trunk(visual, padded), patch_grid(padded, visual.patch_size[0])
    v, keys = last_block(visual.transformer.resblocks[-1], tokens, grid, method)
    with torch.autocast(images.device.type, enabled=False):
        cosine = cosines(visual, v, text)  # [B, K, H, W]
        refined = method == "maskclip-refined"
        mask = maskclip_refined(cosine, full(keys)) if refined else frozen_mask(cosine)
        # At the adapter's grid, so that PAMR sees the same pixels.
        mask = resize(mask, [4 * n for n in grid])  # [B, K, 4H, 4W]
        return to_pixels(refine_at_mask_size(refine, padded, mask), padded, padding)


def resize(x, size):
    """Bilinear, [B, K, H, W] -> [B, K, *size]. Paper silent: without antialiasing, as the
    release."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def pad_to_patch(images, patch):
    """Zero-pads [B, 3, h, w] to multiples of the patch, the smaller half left and top. Returns
    images, (left, right, top, bottom).

    Paper silent: sizes that the patch does not divide; as the release.
    """
    height, width = (-side % patch for side in images.shape[-2:])
    padding = width // 2, -(-width // 2), height // 2, -(-height // 2)
    return F.pad(images, padding), padding


def to_pixels(mask, padded, padding):
    """Masks [B, K, H, W] of a padded image at its pixels, the padding cut off again."""
    return F.pad(resize(mask, padded.shape[-2:]), [-side for side in padding])


def refine_at_mask_size(refine, images, mask):
    """refine(image resized to the mask's grid, mask), or the mask itself. images: [B, 3, h, w],
    mask: [B, K, H, W].

    Paper silent: PAMR's resolution. The release's: the mask's own, a quarter of the window.
    """
    if refine is None:
        return mask
    size = mask.shape[-2:]
    return refine(F.interpolate(full(images), size, mode="bilinear", align_corners=True), mask)


# ---- loading ----

# A weights file, or in a folder of Hugging Face's layout one of these.
FILES = ("", "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
PREFIX = r"^((module|_orig_mod|model)\.)+"  # of DistributedDataParallel, torch.compile, wrappers
# OpenAI's archive and transformers have these beside the weights.
BESIDE = r"\b(input_resolution|context_length|vocab_size|attn_mask|position_ids)$"
CODE = r"/code/|/constants\.pkl$"  # in a TorchScript archive


def pick_device(name=None):
    """torch.device of a name, or the best there is; under torchrun, CUDA takes LOCAL_RANK.

    Raises InputError.
    """
    name = name or next((k for k in ("cuda", "mps") if getattr(torch, k).is_available()), "cpu")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device).cpu()  # what is not there, or holds nothing, fails here
    except (AssertionError, ImportError, RuntimeError) as error:
        raise InputError(
            f"--device {name}: no such device here; choose cuda, mps or cpu ({first_line(error)})"
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def load_clip(model="ViT-B-16-quickgelu", pretrained="openai", device="cpu"):
    """A frozen open_clip CLIP and its tokenizer.

    model: a name of open_clip.list_models(), or a JSON file in open_clip's model-config format.
    pretrained: a tag, or a local weights file (state dict, OpenAI's TorchScript archive,
    safetensors), or "random" to try things out (None: the same, unnamed). A config with the wrong
    activation for its weights is corrected, and said on stderr: plain ViT-B-16 with OpenAI's
    weights would otherwise run GELU where they were trained with QuickGELU. Raises InputError.
    """
    config = clip_config(model)
    has, told = config.get("quick_gelu", False), None
    if pretrained in (None, "random"):
        state = path = None
        told = f"warning: {model} with random weights"
    else:
        path, quick = find_weights(model, pretrained)
        state, archive = read_weights(path)
        quick = archive or quick
        if quick is None and str(model) in open_clip.list_models():  # not a config of one's own
            # LAION's weights under the default model would run QuickGELU, and nothing would tell.
            told = f"note: {path} does not tell its activation: quick_gelu={has}, as {model} has it"
            told += "; names of models end in -quickgelu or do not"
        elif quick not in (None, has):
            config = config | {"quick_gelu": quick}
            told = f"warning: {pretrained} needs quick_gelu={quick}: corrected for {model}"
    if told:
        print(told, file=sys.stderr)
    clip = build_clip(config, state, path, model)
    clip.source = {"model": whole(model), "pretrained": whole(pretrained), "config": config}
    return clip.to(device), tokenizer_of(clip)


def whole(name):
    """An existing path from the root, so that a checkpoint finds its CLIP from any folder; or what
    else it is."""
    there = isinstance(name, str | Path) and os.path.exists(name)
    return os.path.abspath(name) if there else name


def tokenizer_of(clip):
    """CLIP's own BPE tokenizer at this model's context length: list of strings -> int64 [n,
    context]."""
    return open_clip.SimpleTokenizer(context_length=clip.context_length)


def build_clip(config, state=None, path=None, model=None):
    """open_clip's CLIP from a model config and a state dict (random weights when None), float32,
    frozen.

    path, model: the names of both in an InputError.
    """
    try:
        for tower in (config["vision_cfg"], config["text_cfg"]):
            # Other libraries would build those, and fetch them from the network.
            if re.search("timm_|hf_", " ".join(tower)) or tower.get("layers", 12) > 1000:
                raise ValueError("of another library, or of more than 1000 layers")
        for device in ("meta", "cpu"):  # first where it takes no memory
            with torch.device(device):
                clip = open_clip.CLIP(**config)
            size = sum(x.numel() for x in [*clip.parameters(), *clip.buffers()])
            if size > 10**10:  # the largest CLIP there is has 2.5
                raise ValueError(f"{size / 10**9:,.0f} thousand million weights")
    except Exception as error:  # whatever it stumbles over; the config is what is wrong
        raise InputError(
            f"--model {first_line(model or config)}: "
            f"not a model config that open_clip.CLIP takes: {first_line(error)}"
        ) from error
    check_vit(clip)
    if state is not None:
        load_strict(clip, state, path)
    return clip.eval().requires_grad_(False)


def check_vit(clip):
    """InputError unless this open_clip model has the plain ViT whose last block can be taken
    apart."""
    visual, block = clip.visual, open_clip.transformer.ResidualAttentionBlock
    try:
        pooling = visual.pool_type, visual.attn_pool, visual.final_ln_after_pool
        plain = type(visual.transformer.resblocks[-1]) is block and pooling == ("tok", None, False)
    except AttributeError:  # a ResNet, a model of timm
        plain = False
    if not plain:
        raise InputError(
            f"{type(visual).__name__}: "
            "GCL needs a plain ViT with class token, as ViT-B-16-quickgelu"
        )


def clip_config(model):
    """The model config (a dict) of an open_clip name, a JSON file or a dict; InputError."""
    names = open_clip.list_models()
    if model in names:
        return open_clip.get_model_config(model)
    try:
        config = model if isinstance(model, dict) else json.loads(read_text(model))
        return dict(config.get("model_cfg", config))
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        near = ", ".join(difflib.get_close_matches(str(model), names)) or "none"
        raise InputError(
            f"--model {model}: neither a name of open_clip (near: {near}) nor a model config in "
            f"JSON ({first_line(error)})"
        ) from error


def offline_without_hub():
    """Where the hub does not answer within seconds, its client takes what it has stored, or fails
    at once, where it would try again for minutes."""
    hub = sys.modules["huggingface_hub"]  # open_clip's own client
    try:
        hub.get_session().head(hub.constants.ENDPOINT, timeout=5)
    except Exception:  # of whichever library it asks by
        hub.constants.HF_HUB_OFFLINE = True


def find_weights(model, pretrained):
    """(path of the weights of a tag, a local file or a folder, quick_gelu of a tag or None).

    Downloads a tag's file once (open_clip). InputError.
    """
    for name in FILES:
        if (path := Path(pretrained, name)).is_file():
            return path, None
    tag = open_clip.get_pretrained_cfg(str(model), str(pretrained))
    why = f"no such file, and no tag of {model}, nor a folder with {FILES[1]}"
    if tag:
        try:
            offline_without_hub()
            return open_clip.download_pretrained(tag), tag.get("quick_gelu", False)
        except Exception as error:  # every hub client has its own errors
            why = f"the weights of {model} could not be downloaded ({first_line(error)})"
    hint = "give a local file: --pretrained FILE (state dict, OpenAI's archive or safetensors)"
    raise InputError(f"--pretrained {pretrained}: {why}; {hint}")


class Attributes(dict):
    """Stands in for every class that torch does not know: takes attributes, runs no code.

    Those of modules within modules, as TorchScript has them, get the names of a state dict.
    """

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        for name, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, Attributes):
                # A hostile file cannot nest them without end nor, as they are cleared, double them.
                inner = {k: x for k, x in value.items() if len(name) + len(k) < 200}
                self.update({f"{name}.{k}": x for k, x in inner.items()})
                value.clear()
            else:
                self[name] = value


def read_file(path):
    """What torch.save or TorchScript put into a file, or its safetensors; no code in it runs.

    Objects of classes that torch does not know come back as Attributes. The CRC-32 that torch.save
    stores with every tensor is compared. Raises InputError that says what the file is instead.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file, or a folder")
    with open(path, "rb") as file:
        begin = file.read(40)
    try:
        if begin[8:9] == b"{":  # after the size of this header of safetensors
            return open_clip.factory.load_state_dict(path)
        if not zipfile.is_zipfile(path):  # torch's format until 2020
            return torch.load(path, map_location="cpu", weights_only=True)
        file = tensors_alone(path)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        file.seek(0)
        with torch.serialization.safe_globals([(Attributes, name) for name in unknown]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever it stumbles over; the file is what is wrong
        raise InputError(
            f"{path}: not a checkpoint that can be read: damaged, or a web page, a Git LFS pointer "
            "(git lfs pull fetches the file), safetensors that are not named .safetensors, or "
            "holds more than tensors and numbers "
            f"({type(error).__name__}; begins with {begin[:16]})"
        ) from error


def tensors_alone(path):
    """A zip file in memory, each part compared with its CRC-32, without the code of TorchScript,
    beside which torch.load takes nothing.

    ValueError where it would unpack to more than it is: torch.save never compresses.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as alone:
        parts = [part for part in archive.infolist() if not re.search(CODE, part.filename)]
        if sum(part.file_size for part in parts) > os.path.getsize(path):
            raise ValueError("compressed")
        for part in parts:
            alone.writestr(part.filename, archive.read(part))
    copy.seek(0)
    return copy


def read_weights(path):
    """(CLIP's state dict in open_clip's names, True for OpenAI's archive: trained with QuickGELU).

    The file is of open_clip, OpenAI or Hugging Face. Raises InputError when it holds no CLIP.
    """
    state = read_file(path)
    quick = isinstance(state, Attributes) or None  # only OpenAI hands out TorchScript archives
    for wrapper in ("state_dict", "model_state_dict", "model"):
        state = state.get(wrapper, state) if isinstance(state, dict) else {}
    state = {
        re.sub(PREFIX, "", str(key)): value
        for key, value in state.items()
        if torch.is_tensor(value) and not re.search(BESIDE, str(key))
    }
    if "visual_projection.weight" in state:
        state = release.from_hugging_face(state)
    if "visual.proj" not in state:
        raise InputError(
            f"{path}: no CLIP state dict; of a pickled model save its state_dict(); "
            "a checkpoint of GCL goes to --checkpoint or --resume"
        )
    return state, quick


def load_strict(module, state, path):
    """Loads state into module; InputError names the first tensor that does not fit."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:  # torch names all, a line each
        what = str(error).splitlines()[1].strip()[:300]
        raise InputError(f"{path}: not of this model: {what}") from error
    for key, value in module.state_dict().items():
        if not value.isfinite().all():
            raise InputError(f"{path}: {key} has values that are NaN or infinite")


def fingerprint(clip):
    """CRC-32 over heads, activation and all weights as float32: tells apart two CLIPs of one
    shape."""
    blocks = [*clip.visual.transformer.resblocks, *clip.transformer.resblocks]
    shape = [(block.attn.num_heads, type(block.mlp.gelu).__name__) for block in blocks]
    crc = zlib.crc32(repr(shape).encode())
    for key, value in sorted(clip.state_dict().items()):
        crc = zlib.crc32(key.encode() + value.float().cpu().numpy().tobytes(), crc)
    return crc
