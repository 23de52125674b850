# SPDX-License-Identifier: MIT
"""Grounded Contrastive Learning (GCL): a frozen CLIP, a trained adapter, and masks for any text. Figures 2 and 3.

    clip, tokenizer = load_clip("ViT-B-16-quickgelu", "openai")     # frozen; the name, a tag or a local file
    net = GCL(clip)                                                 # train it: losses = net(images, tokens)
    net = load("runs/gcl/last.pt")                                  # or take a checkpoint, the authors' tcl.pth too
    text = net.encode_classes(["moon", "boat"], tokenizer, ["a photo of a {}."])
    masks = net.segment(images, text)                               # [B, K, h, w] in [0, 1]

Legend for every shape: B local images, N texts of the global batch, K classes, C embedding size, D width of the ViT,
L patches, H W mask grid, h w pixels. The paper's letters: t text embeddings, v_d dense CLIP features, v_s the adapter's
dense embedding. Needs ops.py, adapter.py, backbone.py, release.py and files.py beside it, torch and open_clip.

>>> config = {"embed_dim": 8, "quick_gelu": True, "text_cfg": {"width": 64, "heads": 1, "layers": 1}}
>>> clip = backbone.build_clip({**config, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2}})
>>> net, tokens = GCL(clip), tokenizer_of(clip)(["a moon", "a boat"])
>>> sorted(net(torch.rand(2, 3, 32, 32), tokens))
['area_neg', 'area_pos', 'gcl_f', 'gcl_v', 'tv_dense', 'tv_mask']
>>> net.segment(torch.rand(1, 3, 45, 37), net.encode_text(tokens)).shape
torch.Size([1, 2, 45, 37])
"""

import copy
import math
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import backbone
import ops
import release
from adapter import Adapter
from backbone import CLIP_NORM, full, load_clip, load_strict
from files import InputError, first_line
from ops import normalize

IMAGENET_NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


LOSSES = ("gcl_v", "gcl_f", "cl")


WEIGHTS = {"gcl": 0.1, "area": 0.4, "tv": 1.0}  # the lambdas of Sec. 4.1


FORMAT = "gcl-1"


@dataclass(frozen=True)
class Recipe:
    """Where the authors' release differs from the paper; one line per difference. It travels inside checkpoints."""

    name: str
    own_head: bool  # Release differs: trains a copy of ln_post and projection from step 0
    unfreeze_block_at: (
        int | None
    )  # Release differs: trains a copy of the last block from this step on
    normalize_dense: bool  # pooling and TV take the L2-normalised dense embedding (Sec. 3.2); Release differs: raw
    norm: tuple  # mean and std of the images; Release differs: ImageNet's
    strong_augmentation: (
        bool  # Release differs: RandAugment and random erasing; Paper silent: crop and flip alone
    )


RECIPES = {
    "paper": Recipe("paper", False, None, True, CLIP_NORM, False),
    "release": Recipe("release", True, 30_000, False, IMAGENET_NORM, True),
}


def total_loss(losses, weights=None):
    """The weighted sum of the loss terms. losses: dict from GCL.forward. Returns a scalar.

    weights: {"gcl", "area", "tv"}, the paper's by default. Paper silent: the plain contrastive loss (row CL of Table 2)
    takes the weight of the GCL losses.
    """
    weights = {**WEIGHTS, **(weights or {})}
    group = {"gcl_v": "gcl", "gcl_f": "gcl", "cl": "gcl", "area_pos": "area", "area_neg": "area"}
    return sum(weights[group.get(name, "tv")] * value for name, value in losses.items())  # Eq. (12)


def in_slices(function, size, inputs, dim=0):
    """function(*inputs) -> dict of tensors, on slices of `size` rows of the inputs, its results joined along dim.

    With more than one slice the activations of each are dropped and computed again in the backward pass, so that only
    one slice's are held. Nothing in function may draw random numbers.
    """
    if len(inputs[0]) <= size:
        return function(*inputs)
    slices = zip(*(x.split(size) for x in inputs), strict=True)
    parts = [
        checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False)
        for part in slices
    ]
    return {name: torch.cat([part[name] for part in parts], dim) for name in parts[0]}


class Head(nn.Module):
    """CLIP's ln_post and projection as a trained copy (release recipe). [..., D] -> [..., C]."""

    def __init__(self, visual):
        super().__init__()
        self.ln_post = copy.deepcopy(visual.ln_post)
        self.proj = nn.Parameter(visual.proj.detach().clone())

    def forward(self, x):
        return self.ln_post(x) @ self.proj


class GCL(nn.Module):
    """The grounder of Figure 2: frozen CLIP, adapter, scalar projection w and b, and the losses' temperatures.

    clip: an open_clip ViT CLIP (from load_clip, or your own). recipe: a name of RECIPES or a Recipe. losses: which of
    gcl_v, gcl_f, cl the forward pass computes. area_prior: p+ of Sec. 3.3.
    Raises InputError for a CLIP without the plain ViT that dense features need, ValueError for an unknown name.
    """

    def __init__(self, clip, recipe="paper", losses=("gcl_v", "gcl_f"), area_prior=0.4):
        super().__init__()
        if unknown := set(losses) - set(LOSSES):
            raise ValueError(
                f"unknown loss {sorted(unknown)[0]!r}; choose from {', '.join(LOSSES)}"
            )
        if isinstance(recipe, str) and recipe not in RECIPES:
            raise ValueError(f"unknown recipe {recipe!r}; choose from {', '.join(RECIPES)}")
        backbone.check_vit(clip)
        self.recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
        self.losses, self.p_pos = tuple(losses), area_prior
        self.clip = clip.float().eval().requires_grad_(False)
        visual = clip.visual
        self.patch = visual.conv1.kernel_size[0]
        self.adapter = Adapter(visual.conv1.out_channels)
        self.w = nn.Parameter(torch.tensor(10.0))  # Paper silent: start values; the release's
        self.b = nn.Parameter(torch.tensor(-2.5))
        self.log_scale = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(math.log(1 / 0.07))) for name in LOSSES}
        )
        self.head = Head(visual) if self.recipe.own_head else None
        block = visual.transformer.resblocks[-1]
        self.block = copy.deepcopy(block) if self.recipe.unfreeze_block_at is not None else None
        self.to(visual.conv1.weight.device)
        self.set_trainable(step=0)

    def set_trainable(self, step):
        """Sets requires_grad for a training step; returns whether anything changed (then wrap in DDP again)."""
        before = [p.requires_grad for p in self.parameters()]
        self.requires_grad_(True)
        self.clip.requires_grad_(False)
        for name, scale in self.log_scale.items():
            scale.requires_grad_(name in self.losses)
        if self.block is not None:
            self.block.requires_grad_(step >= self.recipe.unfreeze_block_at)
        return before != [p.requires_grad for p in self.parameters()]

    def train(self, mode=True):
        """Training mode for the adapter alone: CLIP stays in eval mode, always."""
        super().train(mode)
        self.clip.eval()
        return self

    @property
    def last_block(self):
        """The block that makes dense features: CLIP's own, or its trained copy (release recipe)."""
        return self.block if self.block is not None else self.clip.visual.transformer.resblocks[-1]

    # ---- encoders -------------------------------------------------------------------------------------------------

    def encode_text(self, tokens):
        """L2-normalised text embeddings t = E_t(x_t). tokens: [..., context] int64. Returns [..., C] float32."""
        flat = tokens.reshape(-1, tokens.shape[-1])  # [N, context]
        with torch.no_grad():
            t = full(backbone.text_features(self.clip, flat))  # [N, C]
        return normalize(t).reshape(*tokens.shape[:-1], -1)  # [..., C]

    @torch.no_grad()
    def encode_classes(self, names, tokenizer, templates):
        """One embedding per class: the mean over raw per-template embeddings, then L2-normalised. Returns [K, C]."""
        rows = []
        for name in names:
            prompts = [template.replace("{}", name) for template in templates]
            tokens = tokenizer(prompts).to(self.w.device)  # [T, context], T templates
            if tokens.max() >= self.clip.vocab_size:
                raise InputError(
                    f"the tokenizer is larger than this CLIP's vocabulary ({self.clip.vocab_size})"
                )
            rows.append(full(backbone.text_features(self.clip, tokens)).mean(0))  # [T, C] -> [C]
        return normalize(torch.stack(rows))  # [K, C]

    def dense_embedding(self, v_d):
        """V_s = F(V_d), then CLIP's ln_post and projection (or their trained copy), not normalised.

        v_d: [B, D, H, W]. Returns [B, C, 4H, 4W].
        """
        visual = self.clip.visual
        x = self.adapter(v_d).permute(0, 2, 3, 1)  # Eq. (4), [B, 4H, 4W, D]
        x = self.head(x) if self.head is not None else visual.ln_post(x) @ visual.proj
        return x.permute(0, 3, 1, 2)  # [B, C, 4H, 4W]

    # ---- training: Figure 3, line by line -------------------------------------------------------------------------

    def forward(self, images, tokens, noise=None, micro_batch=None):
        """Unweighted loss terms of this rank's B pairs within the global batch of N.

        images: [B, 3, h, w] normalised, sides multiples of the patch. tokens: [B, context]. noise: uniform in (0, 1),
        [B, 1, 4H, 4W] (drawn when None). micro_batch: images at a time, to bound memory; the same result. Returns a
        dict of scalars: gcl_v, gcl_f, cl (those asked for), area_pos, area_neg, tv_mask, tv_dense. Masks, pooling and
        InfoNCE are computed in float32 under autocast too. mask_areas then holds the mean areas (positive, negative).
        """
        size, (height, width) = micro_batch or len(images), backbone.patch_grid(images, self.patch)
        own = self.encode_text(tokens)  # [B, C]
        t = ops.gather(own)  # [N, C]
        if noise is None:  # before the slices, so that what is computed again has the same
            noise = torch.rand(len(images), 1, 4 * height, 4 * width, device=images.device)
        with torch.no_grad():
            x = torch.cat(
                [backbone.trunk(self.clip.visual, part) for part in images.split(size)]
            )  # [B, 1+L, D]
        rows = in_slices(partial(self.pair_rows, t), size, (images, x, own, noise))
        terms = {}  # Eq. (2): gcl_v and gcl_f bound I(masked image; text), of pixels and of features
        with torch.autocast(images.device.type, enabled=False):
            if "gcl_v" in self.losses:
                terms["gcl_v"] = ops.info_nce(rows["s_m"], self.log_scale["gcl_v"])  # Eq. (6)
            if "gcl_f" in self.losses:
                terms["gcl_f"] = ops.info_nce(rows["s_f"], self.log_scale["gcl_f"])  # Eq. (9)
            if "cl" in self.losses:
                terms["cl"] = ops.info_nce(
                    rows["s"], self.log_scale["cl"]
                )  # Eq. (1): InfoNCE bounds I(image; text)
            terms["area_pos"], terms["area_neg"] = ops.area_prior(rows["areas"], self.p_pos)
            terms["tv_mask"], terms["tv_dense"] = rows["tv_mask"].mean(), rows["tv_dense"].mean()
            self.mask_areas = ops.pair_areas(
                rows["areas"].detach()
            )  # [2], of this rank, for the log
        return terms

    def pair_rows(self, t, images, x, own, noise):
        """What the losses need of b images against all N texts, small: a dict of rows [b, N] and [b, C].

        t: [N, C]. images: [b, 3, h, w]. x: [b, 1+L, D] from trunk. own: [b, C], each image's own text. noise as in
        forward. s_m, s_f and s are the similarities S of the image-level, feature-level and plain contrastive losses.
        """
        v_d = backbone.dense_features(
            self.last_block, x, backbone.patch_grid(images, self.patch)
        )  # [b, D, H, W]
        v_s = self.dense_embedding(v_d)  # [b, C, H, W]
        with torch.autocast(images.device.type, enabled=False):
            v_s = full(v_s)
            v_n = normalize(v_s, dim=1)
            dense = v_n if self.recipe.normalize_dense else v_s
            # Masks of C texts at a time: never larger than the dense embedding, which is held anyhow.
            rows = in_slices(partial(self.mask_rows, v_n, dense), t.shape[1], (t,), dim=1)
            rows["tv_dense"] = ops.total_variation(dense)  # [b, C]
            if "cl" in self.losses:  # row CL of Table 2a: a mask of ones
                rows["s"] = normalize(dense.mean((2, 3))) @ t.T  # [b, N]
            pos = self.mask_logits(v_n, own.unsqueeze(1))  # [b, 1, H, W]
        if "gcl_v" in self.losses:
            v_g = self.masked_embedding(images, pos, noise)  # [b, C]
            with torch.autocast(images.device.type, enabled=False):
                rows["s_m"] = v_g @ t.T  # [b, N]
        return rows

    def mask_rows(self, v_n, dense, t):
        """Similarity s_f, area and total variation of the masks of n texts t [n, C], each [b, n].

        S_f[i, j] is the cosine of t_j and image i pooled over the mask of text j. Fig. 3 line 21 writes "ijc,ic", which
        is not the text's t_j; the text is right, and the release has it.
        """
        mask = torch.sigmoid(self.mask_logits(v_n, t))  # [b, n, H, W]
        rows = {"areas": mask.mean((2, 3)), "tv_mask": ops.total_variation(mask)}
        if "gcl_f" in self.losses:
            v_f = normalize(ops.masked_pool(dense, mask))  # [b, n, C]
            rows["s_f"] = torch.einsum("bnc,nc->bn", v_f, t)  # [b, n]
        return rows

    def masked_embedding(self, images, pos, noise):
        """Global embedding of the images under their own texts' binary masks, by the frozen CLIP. Returns [b, C]."""
        pos_mask_b = ops.gumbel_sigmoid(pos, noise)  # [b, 1, H, W]
        pos_mask_b = F.interpolate(
            pos_mask_b, size=images.shape[-2:], mode="nearest"
        )  # [b, 1, h, w]
        return backbone.global_embedding(self.clip.visual, pos_mask_b * images)

    def mask_logits(self, v_n, t):
        """w * t_j . v_s + b, masks before their sigmoid. v_n: [B, C, H, W], t: [N, C] or [B, N, C], L2-normalised."""
        t = t.expand(len(v_n), -1, -1)  # [B, N, C]
        return self.w * torch.einsum("bchw,bnc->bnhw", v_n, t) + self.b  # Eq. (5), [B, N, H, W]

    # ---- inference ------------------------------------------------------------------------------------------------

    def preserved_masks(self, v_d, t, size):
        """M_KP, the knowledge preservation branch: CLIP's own dense features, head, w = 10, b = -2.5. [B, K, *size]."""
        mask = backbone.frozen_mask(self.frozen_cosine(v_d, t))  # [B, K, H, W]
        return F.interpolate(mask, size=size, mode="bilinear", align_corners=False)  # [B, K, *size]

    def frozen_cosine(self, v, t):
        """Cosines of texts and dense features v [B, D, H, W] through CLIP's own head. Returns [B, K, H, W] float32."""
        visual = self.clip.visual
        v = (
            visual.ln_post(v.permute(0, 2, 3, 1).to(visual.proj.dtype)) @ visual.proj
        )  # [B, H, W, C]
        return torch.einsum("bhwc,kc->bkhw", normalize(full(v)), t)  # [B, K, H, W]

    @torch.no_grad()
    def segment(self, images, text, refine=None, kp_weight=0.3):
        """Masks of K texts at the images' own size. The adapter's masks, refined, then mixed with CLIP's.

        images: [B, 3, h, w], normalised with recipe.norm, any size (padded with zeros to the patch, cropped back).
        text: [K, C] from encode_classes or encode_text. refine: a function (image, mask) -> mask at the mask's grid,
        such as pamr.pamr. kp_weight: w_kp of Appendix A. Returns [B, K, h, w] float32 in [0, 1].
        """
        padded, (left, top) = backbone.pad_to_patch(images, self.patch)
        tokens, grid = (
            backbone.trunk(self.clip.visual, padded),
            backbone.patch_grid(padded, self.patch),
        )
        v_d = backbone.dense_features(
            self.clip.visual.transformer.resblocks[-1], tokens, grid
        )  # [B, D, H, W]
        v_s = self.dense_embedding(
            v_d if self.block is None else backbone.dense_features(self.block, tokens, grid)
        )
        with torch.autocast(images.device.type, enabled=False):
            mask = torch.sigmoid(
                self.mask_logits(normalize(full(v_s), dim=1), text)
            )  # [B, K, 4H, 4W]
            mask = refine_at_mask_size(refine, padded, mask)
            if kp_weight:
                kp = self.preserved_masks(v_d, text, mask.shape[-2:])
                mask = (1 - kp_weight) * mask + kp_weight * kp  # Eq. (14)
            return to_pixels(mask, padded, images.shape[-2:], left, top)

    @torch.no_grad()
    def segment_clip(self, images, text, method="maskclip", refine=None):
        """Masks of the frozen CLIP alone, its last block under one of METHODS; the other arguments as in segment.

        "maskclip" is MaskCLIP† of Table 1, "maskclip-refined" its MaskCLIP. Masks are made, refined and resized
        as those of the knowledge preservation branch. ValueError for an unknown method.
        """
        if method not in backbone.METHODS:
            raise ValueError(
                f"unknown method {method!r}; choose from {', '.join(backbone.METHODS)}"
            )
        padded, (left, top) = backbone.pad_to_patch(images, self.patch)
        grid = backbone.patch_grid(padded, self.patch)
        v, keys = backbone.last_block(
            self.clip.visual.transformer.resblocks[-1],
            backbone.trunk(self.clip.visual, padded),
            grid,
            method,
        )
        with torch.autocast(images.device.type, enabled=False):
            cosine = self.frozen_cosine(v, text)  # [B, K, H, W]
            mask = (
                backbone.maskclip_refined(cosine, full(keys))
                if method == "maskclip-refined"
                else backbone.frozen_mask(cosine)
            )
            size = 4 * grid[0], 4 * grid[1]  # the adapter's grid, so that PAMR sees the same pixels
            mask = F.interpolate(
                mask, size=size, mode="bilinear", align_corners=False
            )  # [B, K, 4H, 4W]
            return to_pixels(
                refine_at_mask_size(refine, padded, mask), padded, images.shape[-2:], left, top
            )

    # ---- files ----------------------------------------------------------------------------------------------------

    def save(self, path, **extra):
        """Writes the trained part, with the name and backbone.fingerprint of the frozen CLIP; a CLIP of load_clip that has no
        weights file is written too, one of your own has to be given again at load.

        extra: more entries, plain values and tensors. The file loads with torch.load(path, weights_only=True) and
        appears under its name only when it is complete.
        """
        source = getattr(self.clip, "source", {"model": None, "pretrained": None, "config": None})
        inside = source["config"] is not None and source["pretrained"] is None
        state = {k: v for k, v in self.state_dict().items() if inside or not k.startswith("clip.")}
        fields = {"format": FORMAT, "recipe": asdict(self.recipe), "losses": self.losses}
        fields |= {
            "area_prior": self.p_pos,
            "clip": source,
            "clip_crc": backbone.fingerprint(self.clip),
            "model": state,
        }
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            torch.save({**fields, **extra}, temporary)
            os.replace(temporary, path)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{path}: could not be written ({first_line(error)})") from error
        finally:
            Path(temporary).unlink(missing_ok=True)


def to_pixels(mask, padded, size, left, top):
    """Masks [B, K, H, W] of a padded image resized to its pixels, and the padding cut off: [B, K, *size]."""
    mask = F.interpolate(
        mask, size=padded.shape[-2:], mode="bilinear", align_corners=False
    )  # [B, K, h', w']
    return mask[..., top : top + size[0], left : left + size[1]]


def refine_at_mask_size(refine, images, mask):
    """refine(image resized to the mask's grid, mask), or the mask itself. images: [B, 3, h, w], mask: [B, K, H, W].

    Paper silent: PAMR's resolution. The release's: the mask's own, a quarter of the window.
    """
    if refine is None:
        return mask
    images = F.interpolate(
        full(images), size=mask.shape[-2:], mode="bilinear", align_corners=True
    )  # [B, 3, H, W]
    return refine(images, mask)


class Inert:
    """Stands in for a class of a library that is not installed here: takes anything, does nothing, runs no code."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read_checkpoint(path):
    """The dict of a checkpoint file. Nothing in its pickle is executed: classes that torch does not know are inert."""
    if not os.path.isfile(path):
        raise InputError(
            f"{path}: {'a folder, not a checkpoint' if os.path.isdir(path) else 'no such file'}"
        )
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # truncated zip, foreign pickle, blocked module: the file is what is wrong
        raise InputError(
            f"{path}: not a checkpoint that can be read ({first_line(error)})"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise InputError(
            f"{path}: not a GCL checkpoint (no 'model' entry); CLIP weights go to --pretrained"
        )
    return checkpoint


def load(path, model=None, pretrained=None, device="cpu"):
    """A GCL from this project's checkpoint or the authors' tcl.pth, with or without its CLIP part, in eval mode.

    model, pretrained: override the CLIP that the file names (or holds); a stripped tcl.pth names none and gets
    ViT-B-16-quickgelu / openai. Raises InputError when they do not fit, naming the first mismatching tensor.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.get("format") == FORMAT:
        return _load_own(checkpoint, path, model, pretrained).to(device).eval()
    if any(key.startswith("masker.") for key in checkpoint["model"]):
        return _load_release(checkpoint["model"], path, model, pretrained).to(device).eval()
    raise InputError(f"{path}: neither a checkpoint of this project nor the authors' release")


def _load_own(checkpoint, path, model, pretrained):
    if missing := {"clip", "clip_crc", "recipe", "losses", "area_prior"} - checkpoint.keys():
        raise InputError(f"{path}: an incomplete checkpoint, {sorted(missing)[0]!r} is missing")
    source, state = checkpoint["clip"], checkpoint["model"]
    inside = {k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")}
    if inside and not pretrained:
        clip = backbone.build_clip(source["config"], inside, path)
        clip.source = source
    else:
        model, pretrained = model or source["model"], pretrained or source["pretrained"]
        if model is None or pretrained is None:
            raise InputError(f"{path}: does not name its CLIP; give --model and --pretrained")
        if str(model).endswith(".json") and not os.path.isfile(model):
            model = source["config"]  # the config file has moved, its content is here
        clip, _ = load_clip(model, pretrained)
    net = GCL(clip, Recipe(**checkpoint["recipe"]), checkpoint["losses"], checkpoint["area_prior"])
    restore(net, checkpoint, path)
    return net


def restore(net, checkpoint, path):
    """Puts the trained part of this project's checkpoint into net; InputError when recipe or CLIP do not fit."""
    if checkpoint.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this project")
    if Recipe(**checkpoint["recipe"]) != net.recipe:
        raise InputError(
            f"{path}: has the recipe {checkpoint['recipe']['name']!r}, not {net.recipe.name!r}"
        )
    load_strict(
        net, {k: v for k, v in checkpoint["model"].items() if not k.startswith("clip.")}, path
    )
    if backbone.fingerprint(net.clip) != checkpoint["clip_crc"]:
        raise InputError(
            f"{path}: was trained on another CLIP than this one, though the shapes fit"
        )


def _load_release(state, path, model, pretrained):
    frozen = release.rename(state, release.RELEASE_CLIP)
    if frozen and not pretrained:
        frozen["logit_scale"] = torch.tensor(
            math.log(1 / 0.07)
        )  # the release drops it; nothing here uses it
        config = backbone.clip_config(model) if model else release.config_from_weights(frozen)
        clip = backbone.build_clip(config, frozen, path)
        clip.source = {"model": model, "pretrained": None, "config": config}
    else:
        clip, _ = load_clip(model or "ViT-B-16-quickgelu", pretrained or "openai")
    net = GCL(clip, "release")
    last = len(clip.visual.transformer.resblocks) - 1
    trained = release.rename(
        state, {old.format(last=last): new for old, new in release.RELEASE_GCL.items()}
    )
    trained = {k.replace("gate.gate", "gate"): v for k, v in trained.items()}
    load_strict(net, trained | {"log_scale.cl": net.log_scale["cl"]}, path)
    return net
