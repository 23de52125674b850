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

import copy
import difflib
import io
import json
import math
import os
import re
import sys
import urllib.error
import urllib.request
import zipfile
import zlib

import open_clip
import torch
import torch.nn.functional as F

import release
from files import InputError, first_line, read_text
from ops import normalize

CLIP_NORM = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


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
    if tuple(native) == tuple(grid):
        return embedding
    patches = full(embedding[1:]).unflatten(0, native).permute(2, 0, 1).unsqueeze(0)  # [1, D, H, W]
    patches = F.interpolate(patches, size=tuple(grid), mode="bicubic", align_corners=False)
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
    _, _, weight = attn.in_proj_weight.chunk(3)  # queries, keys, values: [D, D] each
    _, _, bias = attn.in_proj_bias.chunk(3)
    value = F.linear(block.ln_1(x), weight, bias)  # Eq. (3), [B, L, D]
    x = finish_block(block, x, attn.out_proj(value))
    return x.transpose(1, 2).unflatten(2, grid)  # [B, L, D] -> [B, D, H, W]


def finish_block(block, x, attended):
    """A block after its attention: residual and MLP. x, attended: [B, L, D]. Returns the same."""
    x = x + block.ls_1(attended)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


# ---- CLIP alone: other attention in the last block, its masks ----

attend = F.scaled_dot_product_attention  # softmax(s q k^T + bias) v a head, s = (head width)^-1/2

# attention(q, k, v, grid) of the last block, [B, heads, 1 + L, D / heads] each, the class token
# first; and whether residual and MLP are kept
METHODS = {
    "clip": (lambda q, k, v, grid: attend(q, k, v), True),  # the ordinary block
    "maskclip": (lambda q, k, v, grid: v, True),  # Zhou et al. 2022, without its refinements
    "maskclip-refined": (lambda q, k, v, grid: v, True),  # and with them: maskclip_refined
    # SCLIP, Wang et al. 2024; rows add to 2
    "sclip": (lambda q, k, v, grid: attend(q, q, v) + attend(k, k, v), True),
    "clearclip": (lambda q, k, v, grid: attend(q, q, v), False),  # Lan et al. 2024
    # NACLIP, Hajimiri et al. 2025
    "naclip": (lambda q, k, v, grid: attend(k, k, v, nearness(grid).to(k)), False),
}


def nearness(grid, sigma=5.0):
    """NACLIP's omega: exp(-|p_i - p_j|^2 / 2 sigma^2) of patches at p_i, p_j, 0 for CLS. grid: (H,
    W). [1+L, 1+L]."""
    # The exponential of a sum over rows and columns is a product.
    places = [torch.arange(n) for n in grid]
    rows, columns = (torch.exp(-((p[:, None] - p) ** 2) / (2 * sigma**2)) for p in places)
    return F.pad(torch.kron(rows, columns), (1, 0, 1, 0))  # [H, H] x [W, W] -> [1+L, 1+L]


def last_block(block, tokens, grid, method):
    """CLIP's last block under one of METHODS. tokens: [B, 1 + L, D]. Returns [B, D, H, W], and its
    keys [B, L, D]."""
    attention, whole = METHODS[method]
    attn = block.attn
    qkv = F.linear(block.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias)  # [B, 1+L, 3D]
    qkv = qkv.unflatten(2, (3, attn.num_heads, -1))  # [B, 1+L, 3, heads, D/heads]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, 1+L, D/heads]
    outputs = attention(q, k, v, grid), k
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
    seen = (100.0 * flat).softmax(1).amax(2, keepdim=True) >= 0.5  # [B, K, 1]
    kept = seen | ~seen.any(1, keepdim=True)
    p = (100.0 * flat).masked_fill(~kept, -math.inf).softmax(1)  # [B, K, L]
    k = normalize(keys)
    weight = (k @ k.mT).clamp(min=0)  # [B, L, L], symmetric
    p = p @ (weight / weight.sum(1, keepdim=True))  # [B, K, L], mean of p_j
    best = (frozen_mask(flat) * kept).amax(1, keepdim=True)  # [B, 1, L]
    return (best * p / p.amax(1, keepdim=True)).unflatten(2, cosine.shape[2:])  # [B, K, H, W]


@torch.no_grad()
def segment_clip(visual, images, text, method, refine):
    """Masks [B, K, h, w] of CLIP alone, made, refined and resized as those of the knowledge
    preservation branch.

    "maskclip" is MaskCLIP† of Table 1, "maskclip-refined" its MaskCLIP. ValueError for an unknown
    method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    padded, corner = pad_to_patch(images, visual.patch_size[0])
    tokens, grid = trunk(visual, padded), patch_grid(padded, visual.patch_size[0])
    v, keys = last_block(visual.transformer.resblocks[-1], tokens, grid, method)
    with torch.autocast(images.device.type, enabled=False):
        cosine = cosines(visual, v, text)  # [B, K, H, W]
        steps = method == "maskclip-refined"
        mask = maskclip_refined(cosine, full(keys)) if steps else frozen_mask(cosine)
        # At the adapter's grid, so that PAMR sees the same pixels.
        mask = resize(mask, [4 * n for n in grid])  # [B, K, 4H, 4W]
        mask = refine_at_mask_size(refine, padded, mask)
        return to_pixels(mask, padded, images.shape[-2:], corner)


def resize(x, size):
    """Bilinear, [B, K, H, W] -> [B, K, *size]. Paper silent: without antialiasing, as the
    release."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def pad_to_patch(images, patch):
    """Zero-pads [B, 3, h, w] to multiples of the patch, the smaller half left and top. Returns
    images, (left, top).

    Paper silent: sizes that the patch does not divide; as the release.
    """
    height, width = images.shape[-2:]
    extra_h, extra_w = -height % patch, -width % patch
    left, top = extra_w // 2, extra_h // 2
    return F.pad(images, (left, extra_w - left, top, extra_h - top)), (left, top)


def to_pixels(mask, padded, size, corner):
    """Masks [B, K, H, W] of a padded image at its pixels, the padding cut off: [B, K, *size].
    corner: (left, top)."""
    left, top = corner
    mask = resize(mask, padded.shape[-2:])  # [B, K, h', w']
    return mask[..., top : top + size[0], left : left + size[1]]


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

# A folder of the Hugging Face hub has one of these.
FOLDER = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
NOT_WEIGHTS = (  # how files begin that are often taken for weights
    (rb"^$", "an empty file"),
    (rb"git-lfs", "a Git LFS pointer, not the weights; git lfs pull fetches them"),
    (rb"<html|<!doctype", "a web page, not the weights; download them again"),
    (rb'^.{8}\{"', "safetensors; its name has to end in .safetensors"),
)
PREFIX = r"^((module|_orig_mod|model)\.)+"  # of DistributedDataParallel, torch.compile, wrappers
# OpenAI's archive and transformers have these beside the weights.
BESIDE = {"input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids"}


def pick_device(name=None):
    """torch.device of a name, or the best there is; under torchrun, CUDA takes LOCAL_RANK.

    Raises InputError.
    """
    name = name or next((k for k in ("cuda", "mps") if getattr(torch, k).is_available()), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cuda", "mps", "cpu"):
        raise InputError(f"--device {name}: no such device; choose cuda, mps or cpu")
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        found = torch.cuda.device_count()
        if index >= found:
            raise InputError(f"--device {name}: GPU {index} is asked for, {found} found")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.mps.is_available():
        raise InputError(f"--device {name}: not available on this machine")
    return device


def load_clip(model="ViT-B-16-quickgelu", pretrained="openai", device="cpu"):
    """A frozen open_clip CLIP and its tokenizer.

    model: a name of open_clip.list_models(), or a JSON file in open_clip's model-config format.
    pretrained: a tag, or a local weights file (state dict, OpenAI's TorchScript archive,
    safetensors), or None for random weights. A config with the wrong activation for its weights is
    corrected, and said on stderr: plain ViT-B-16 with OpenAI's weights would otherwise run GELU
    where they were trained with QuickGELU. Raises InputError.
    """
    config, path = clip_config(model), find_weights(model, pretrained)
    state, quick = read_weights(path) if path else (None, None)
    tag = open_clip.get_pretrained_cfg(str(model), str(pretrained))
    if tag and not os.path.exists(str(pretrained)):
        quick = tag.get("quick_gelu", False)
    has = config.get("quick_gelu", False)
    told = None
    if path is None:
        told = f"warning: {model} with random weights (pretrained=None)"
    elif quick not in (None, has):
        config["quick_gelu"] = quick
        told = f"warning: {pretrained} needs quick_gelu={quick}: corrected in the config of {model}"
    elif quick is None and str(model) in open_clip.list_models():  # not a config of one's own
        # LAION's weights under the default model would run QuickGELU, and nothing would tell.
        told = f"note: {path} does not tell its activation: quick_gelu={has}, as {model} has it"
        told += "; names of models end in -quickgelu or do not"
    if told:
        print(told, file=sys.stderr)
    clip = build_clip(config, state, path)
    # Whole paths, so that a checkpoint finds its CLIP from any folder.
    names = {"model": None if isinstance(model, dict) else model, "pretrained": pretrained}
    for name, value in names.items():
        if value is not None:
            names[name] = os.path.abspath(value) if os.path.exists(value) else str(value)
    clip.source = {**names, "config": config}
    return clip.to(device), tokenizer_of(clip)


def tokenizer_of(clip):
    """CLIP's own BPE tokenizer at this model's context length: list of strings -> int64 [n,
    context]."""
    return open_clip.SimpleTokenizer(context_length=clip.context_length)


def build_clip(config, state=None, path=None):
    """open_clip's CLIP from a model config and a state dict (random weights when None), float32,
    frozen."""
    try:
        if max(config[name].get("layers", 12) for name in ("vision_cfg", "text_cfg")) > 1000:
            raise ValueError("more than 1000 layers")
        with torch.device("meta"):  # takes no memory
            clip = open_clip.CLIP(**copy.deepcopy(config))
        size = sum(x.numel() for x in [*clip.parameters(), *clip.buffers()])
        if size > 10**10:  # the largest CLIP there is has 2.5
            raise ValueError(f"{size / 10**9:,.0f} thousand million weights")
        clip = open_clip.CLIP(**copy.deepcopy(config))
    except Exception as error:  # whatever it stumbles over; the config is what is wrong
        what = f"not a model config that open_clip.CLIP takes: {first_line(error)}"
        raise InputError(what) from error
    check_vit(clip)
    if state is not None:
        load_strict(clip, state, path)
    return clip.eval().requires_grad_(False)


def check_vit(clip):
    """InputError unless this open_clip model has the plain ViT whose last block can be taken
    apart."""
    visual = clip.visual
    try:
        plain = (
            type(visual.transformer.resblocks[-1]) is open_clip.transformer.ResidualAttentionBlock
        )
        plain = plain and (visual.pool_type, visual.attn_pool) == ("tok", None)
    except AttributeError:  # a ResNet, a model of timm
        plain = False
    if not plain or visual.final_ln_after_pool:
        what = "GCL needs a plain ViT with class token, as ViT-B-16-quickgelu"
        raise InputError(f"{type(visual).__name__}: {what}")


def clip_config(model):
    """The model config (a dict) of an open_clip name, a JSON file or a dict; InputError for no
    plain CLIP of a sane size."""
    if isinstance(model, dict):
        config = copy.deepcopy(model)
    elif str(model).endswith(".json"):
        try:
            config = json.loads(read_text(model))
        except (ValueError, RecursionError) as error:
            what = f"cannot be read as a model config ({first_line(error)})"
            raise InputError(f"--model {model}: {what}") from error
        config = config.get("model_cfg", config) if isinstance(config, dict) else None
    elif str(model) in (names := open_clip.list_models()):
        config = open_clip.get_model_config(str(model))
    else:
        near = ", ".join(difflib.get_close_matches(str(model), names))
        what = "neither a name that open_clip knows nor a .json file"
        raise InputError(f"--model {model}: {what}{near and '; near: '}{near}")
    needed = {"embed_dim", "vision_cfg", "text_cfg"}
    # The others build models of other libraries, and fetch them from the network.
    other = re.search("timm_|hf_|custom_text|multimodal_cfg", repr(config))
    if other or not isinstance(config, dict) or not needed <= config.keys():
        what = f"not a plain CLIP config ({', '.join(sorted(needed))} and no other library's)"
        raise InputError(f"--model {model}: {what}")
    return config


def offline_without_hub():
    """Where the hub does not answer within seconds, its client takes what it has stored, or fails
    at once, where it would try again for minutes."""
    constants = sys.modules["huggingface_hub"].constants  # of open_clip's own client
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:  # an answer
        pass
    except OSError:
        constants.HF_HUB_OFFLINE = True


def find_weights(model, pretrained):
    """Path of the weights file for a tag, a local file or a folder of Hugging Face's layout; None
    for None. Downloads a tag's file once (open_clip)."""
    if pretrained is None or os.path.isfile(pretrained):
        return pretrained
    for name in FOLDER:
        if os.path.isfile(path := os.path.join(pretrained, name)):
            return path
    hint = "give a local file: --pretrained FILE (state dict, OpenAI's archive or safetensors)"
    tag = open_clip.get_pretrained_cfg(str(model), str(pretrained))
    if not tag:
        what = f"no such file, and no tag of {model}, nor a folder with {FOLDER[0]}"
        raise InputError(f"--pretrained {pretrained}: {what}; {hint}")
    try:
        offline_without_hub()
        return open_clip.download_pretrained(tag)
    except Exception as error:  # every hub client has its own errors; the cause is kept
        what = f"the weights of {model} could not be downloaded ({first_line(error)})"
        raise InputError(f"--pretrained {pretrained}: {what}; {hint}") from error


class Attributes(dict):
    """Stands in for every class that torch does not know: takes attributes, runs no code."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})


def read_file(path, verify=False):
    """What torch.save or TorchScript put into a file, or its safetensors; no code in it runs.

    Objects of classes that torch does not know come back as Attributes. verify: compare the CRC-32
    that torch.save stores with every tensor. Raises InputError that says what the file is instead.
    """
    if not os.path.isfile(path):
        what = "a folder, not a file" if os.path.isdir(path) else "no such file"
        raise InputError(f"{path}: {what}")
    try:
        with open(path, "rb") as file:
            head = file.read(40)
        named = str(path).endswith(".safetensors")
        for start, what in NOT_WEIGHTS[: 3 if named else 4]:
            if re.search(start, head, re.DOTALL | re.IGNORECASE):
                raise InputError(f"{path}: {what}")
        if named:
            return open_clip.factory.load_state_dict(str(path))
        if not zipfile.is_zipfile(path):  # torch's format until 2020
            return torch.load(path, map_location="cpu", weights_only=True)
        with tensors_alone(path, verify) as file:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            file.seek(0)
            with torch.serialization.safe_globals([(Attributes, name) for name in unknown]):
                return torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # truncated zip, foreign pickle, blocked module: the file is wrong
        what = "not a checkpoint that can be read: damaged, or more than tensors and numbers"
        raise InputError(f"{path}: {what} ({type(error).__name__})") from error


def tensors_alone(path, verify):
    """A zip file as torch.load takes it, open: of a TorchScript archive all but its code.

    Raises InputError where it would unpack to more than it is, or (verify) where a bit is wrong.
    """
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "/code/" not in name]
        if sum(archive.getinfo(name).file_size for name in names) > os.path.getsize(path):
            raise InputError(f"{path}: compressed, which torch.save never does")
        if verify and (broken := archive.testzip()):
            raise InputError(f"{path}: damaged: {broken} is not what was written")
        if len(names) == len(archive.namelist()):
            return open(path, "rb")
        copy_of = io.BytesIO()
        with zipfile.ZipFile(copy_of, "w") as alone:
            for name in names:
                if not name.endswith("/constants.pkl"):  # torch.load refuses these
                    alone.writestr(name, archive.read(name))
    copy_of.seek(0)
    return copy_of


def flatten(attributes):
    """State dict of the modules of a TorchScript archive: {"a": {"b": tensor}} -> {"a.b":
    tensor}."""
    state, modules = {}, [("", attributes)]
    for prefix, module in modules:  # a list that grows
        for name, value in module.items():
            if isinstance(value, Attributes):
                modules.append((f"{prefix}{name}.", value))
            elif torch.is_tensor(value):
                state[prefix + name] = value
        module.clear()  # so that it ends where a hostile file holds a module within itself
    return state


def read_weights(path):
    """(CLIP's state dict in open_clip's names, True for OpenAI's archive: trained with QuickGELU).

    The file is of open_clip, OpenAI or Hugging Face. Raises InputError when it holds no CLIP.
    """
    state, quick = read_file(path), None
    if isinstance(state, Attributes):
        if "_modules" in state:
            raise InputError(f"{path}: a pickled model; save its state_dict() instead")
        state, quick = flatten(state), True  # only OpenAI hands out TorchScript archives
    for wrapper in ("state_dict", "model_state_dict", "model"):
        state = state.get(wrapper, state) if isinstance(state, dict) else {}
    state = {re.sub(PREFIX, "", str(key)): value for key, value in state.items()}
    state = {k: v for k, v in state.items() if k.split(".")[-1] not in BESIDE}
    other = any(key.startswith(("adapter.", "masker.")) for key in state)
    if not state or other or not all(map(torch.is_tensor, state.values())):
        what = "no CLIP state dict; a checkpoint of GCL goes to --checkpoint or --resume"
        raise InputError(f"{path}: {what}")
    if "visual_projection.weight" in state:
        state = release.from_hugging_face(state)
    return state, quick


def load_strict(module, state, path):
    """Loads state into module; InputError names the first key or shape that does not fit."""
    own = {k: v for k, v in module.state_dict().items() if not k.startswith("clip.")}
    for key, value in own.items():
        if key not in state:
            raise InputError(f"{path}: {key} is missing; is this a checkpoint of another model?")
        found = state[key]
        if not is_dense(found):
            raise InputError(f"{path}: {key} is no dense float tensor; save it as one")
        if found.shape != value.shape:
            shapes = f"has shape {tuple(found.shape)}, this model needs {tuple(value.shape)}"
            raise InputError(f"{path}: {key} {shapes}: a checkpoint of another CLIP?")
        if not found.isfinite().all():
            raise InputError(f"{path}: {key} has values that are NaN or infinite")
    if extra := sorted(state.keys() - own.keys()):
        what = f"{extra[0]} is not part of this model: a checkpoint of another CLIP?"
        raise InputError(f"{path}: {what}")
    module.load_state_dict(state, strict=False)  # strict already, but for the frozen CLIP of a GCL


def is_dense(x):
    """Whether x is a plain tensor of floats: not sparse, quantised, on meta, or expanded."""
    plain = torch.is_tensor(x) and x.layout is torch.strided and x.is_floating_point()
    return plain and not x.is_meta and x.untyped_storage().nbytes() >= x.nbytes


def fingerprint(clip):
    """CRC-32 over heads, activation and all weights as float32: tells apart two CLIPs of one
    shape."""
    blocks = [*clip.visual.transformer.resblocks, *clip.transformer.resblocks]
    shape = [(block.attn.num_heads, type(block.mlp.gelu).__name__) for block in blocks]
    crc = zlib.crc32(repr(shape).encode())
    for key, value in sorted(clip.state_dict().items()):
        value = value.detach().float().cpu().contiguous().numpy()
        crc = zlib.crc32(value, zlib.crc32(key.encode(), crc))
    return crc
