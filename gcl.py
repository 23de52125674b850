# SPDX-License-Identifier: MIT
"""Grounded Contrastive Learning (GCL): a frozen CLIP, a trained adapter, masks for any text.

    clip, tokenizer = load_clip("ViT-B-16-quickgelu", "openai")  # the name, a tag or a local file
    net = GCL(clip)                            # train it: losses = net(images, tokens)
    net = load("runs/gcl/last.pt")             # or take a checkpoint, the authors' tcl.pth too
    text = net.encode_classes(["moon", "boat"], tokenizer, ["a photo of a {}."])
    masks = net.segment(images, text)          # [B, K, h, w] in [0, 1]

Figures 2 and 3. Legend for every shape: B local images, N texts of the global batch, K classes,
C embedding size, D width of the ViT, L patches, H W their grid (the masks' is 4H 4W), h w pixels.
The paper's letters: t text embeddings, v_d dense CLIP features, v_s the adapter's dense embedding.
Needs ops.py, adapter.py, backbone.py, release.py and files.py beside it, torch and open_clip.

>>> vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2}
>>> text = {"width": 64, "heads": 1, "layers": 1}
>>> clip = backbone.build_clip({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text})
>>> net, tokens = GCL(clip), tokenizer_of(clip)(["a moon", "a boat"])
>>> sorted(net(torch.rand(2, 3, 32, 32), tokens))
['area_neg', 'area_pos', 'gcl_f', 'gcl_v', 'tv_dense', 'tv_mask']
>>> net.segment(torch.rand(1, 3, 45, 37), net.encode_text(tokens)).shape
torch.Size([1, 2, 45, 37])
"""

import copy
import math
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import backbone
import ops
import release
from adapter import Adapter
from backbone import CLIP_NORM, full, load_clip, load_strict, tokenizer_of  # noqa: F401
from files import InputError, first_line, write_whole
from ops import normalize

IMAGENET_NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOSSES = ("gcl_v", "gcl_f", "cl")
WEIGHTS = {"gcl": 0.1, "area": 0.4, "tv": 1.0}  # the lambdas of Sec. 4.1
FORMAT = "gcl-1"
FIELDS = {"format": str, "recipe": dict, "losses": tuple, "area_prior": float, "clip": dict}


@dataclass(frozen=True)
class Recipe:
    """Where the authors' release differs from the paper, a line each. It travels inside
    checkpoints."""

    name: str
    # Release differs: trains a copy of ln_post and projection from step 0,
    own_head: bool
    # Release differs: and a copy of the last block from this step on.
    unfreeze_block_at: int | None
    # Pooling and TV take the L2-normalised dense embedding (Sec. 3.2); Release differs: raw.
    normalize_dense: bool
    # Mean and std of the images, CLIP's; Release differs: ImageNet's.
    norm: tuple
    # Paper silent: crop and flip alone; Release differs: RandAugment and random erasing too.
    strong_augmentation: bool
    # The area prior's norm after the mean over ranks; Release differs: on each rank, before it.
    area_per_rank: bool = False
    # Evaluation's pictures are resized as floats; Release differs: as bytes, so rounded.
    resize_bytes: bool = False


RECIPES = {
    "paper": Recipe("paper", False, None, True, CLIP_NORM, False),
    "release": Recipe("release", True, 30_000, False, IMAGENET_NORM, True, True, True),
}


def total_loss(losses, weights=None):
    """The weighted sum of the loss terms, a scalar. losses: dict from GCL.forward.

    weights: {"gcl", "area", "tv"}, the paper's by default. Paper silent: the plain contrastive loss
    (row CL of Table 2) takes the weight of the GCL losses.
    """
    weights = WEIGHTS | (weights or {})
    weights["cl"] = weights["gcl"]
    # gcl_v is of the group gcl, area_pos of area, ...
    return sum(weights[name.split("_")[0]] * x for name, x in losses.items())  # Eq. (12)


def in_slices(function, size, inputs, dim=0):
    """function(*inputs) -> dict of tensors, on slices of `size` rows of the inputs, its results
    joined along dim.

    With more than one slice the activations of each are dropped and computed again in the backward
    pass, so that only one slice's are held. Nothing in function may draw random numbers.
    """
    if len(inputs[0]) <= size:
        return function(*inputs)
    again = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    parts = [again(*part) for part in zip(*(x.split(size) for x in inputs), strict=True)]
    return {name: torch.cat([part[name] for part in parts], dim) for name in parts[0]}


class GCL(nn.Module):
    """The grounder of Figure 2: frozen CLIP, adapter, scalar projection w and b, and the losses'
    temperatures.

    clip: an open_clip ViT CLIP (from load_clip, or your own). recipe: a name of RECIPES or a
    Recipe. losses: which of gcl_v, gcl_f, cl the forward pass computes. area_prior: p+ of Sec. 3.3.
    Raises InputError for a CLIP without the plain ViT that dense features need; an unknown name is
    a KeyError or, of a loss, an AttributeError.
    """

    def __init__(self, clip, recipe="paper", losses=("gcl_v", "gcl_f"), area_prior=0.4):
        super().__init__()
        self.recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
        backbone.check_vit(clip)
        self.losses, self.p_pos = tuple(losses), area_prior
        self.clip = clip.float().eval().requires_grad_(False)
        visual = clip.visual
        self.patch = visual.conv1.kernel_size[0]
        self.adapter = Adapter(visual.conv1.out_channels)
        self.w = nn.Parameter(torch.tensor(10.0))  # Paper silent: start values; the release's
        self.b = nn.Parameter(torch.tensor(-2.5))
        # Paper silent: whether the losses share it. One each, as the release.
        self.log_scale = nn.ParameterDict(
            {name: torch.tensor(math.log(1 / 0.07)) for name in LOSSES}
        )
        self.head = self.block = None
        if self.recipe.own_head:
            self.head = nn.Module()  # for backbone.project
            self.head.ln_post, self.head.proj = copy.deepcopy((visual.ln_post, visual.proj))
        if self.recipe.unfreeze_block_at is not None:
            self.block = copy.deepcopy(visual.transformer.resblocks[-1])
        self.to(visual.conv1.weight.device)
        self.set_trainable(step=0)

    def set_trainable(self, step):
        """Sets requires_grad for a training step; returns whether anything changed (then wrap in
        DDP again)."""
        before = [p.requires_grad for p in self.parameters()]
        self.requires_grad_(True)
        for frozen in (self.clip, self.log_scale):
            frozen.requires_grad_(False)
        for name in self.losses:
            self.log_scale[name].requires_grad_(True)
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
        return self.block or self.clip.visual.transformer.resblocks[-1]

    # ---- encoders ----

    @torch.no_grad()
    def encode_text(self, tokens):
        """L2-normalised text embeddings t = E_t(x_t). tokens: [..., context] int64. Returns [...,
        C] float32."""
        t = self.clip.encode_text(tokens.flatten(0, -2))  # [N, C]
        return normalize(full(t)).unflatten(0, tokens.shape[:-1])  # [..., C]

    @torch.no_grad()
    def encode_classes(self, names, tokenizer, templates):
        """One embedding per class: the mean over raw per-template embeddings, then L2-normalised.
        Returns [K, C]."""
        rows = []
        for name in names:
            tokens = tokenizer([template.replace("{}", name) for template in templates])
            if tokens.max() >= self.clip.vocab_size:
                raise InputError(f"not in this CLIP's vocabulary of {self.clip.vocab_size}: {name}")
            t = self.clip.encode_text(tokens.to(self.w.device))  # [T, C], T templates
            rows.append(full(t).mean(0))
        return normalize(torch.stack(rows))  # [K, C]

    def dense_embedding(self, v_d):
        """V_s = F(V_d), then CLIP's ln_post and projection (or their trained copy), not normalised.

        v_d: [B, D, H, W]. Returns [B, C, 4H, 4W]. Release differs, we with it: the adapter comes
        before ln_post and projection, so V_d is D wide where the paper has [B, L, C].
        """
        x = self.adapter(v_d).permute(0, 2, 3, 1)  # Eq. (4), [B, 4H, 4W, D]
        x = backbone.project(self.head or self.clip.visual, x)  # [B, 4H, 4W, C]
        return x.permute(0, 3, 1, 2)  # [B, C, 4H, 4W]

    # ---- training: Figure 3, its lines named ----

    def forward(self, images, tokens, noise=None, micro_batch=None):
        """Unweighted loss terms of this rank's B pairs within the global batch of N.

        images: [B, 3, h, w] normalised, sides multiples of the patch. tokens: [B, context]. noise:
        uniform in (0, 1), [B, 1, 4H, 4W] (drawn when None). micro_batch: images at a time, to bound
        memory; the same result. Returns a dict of scalars: gcl_v, gcl_f, cl (those asked for),
        area_pos, area_neg, tv_mask, tv_dense. Masks, pooling and InfoNCE are computed in float32
        under autocast too. mask_areas then holds the mean areas (positive, negative).
        """
        size, grid = micro_batch or len(images), backbone.patch_grid(images, self.patch)
        if noise is None:  # before the slices, so that what is computed again has the same
            noise = torch.rand(len(images), 1, *(4 * n for n in grid), device=images.device)
        own = self.encode_text(tokens)  # line 8, [B, C]
        t = ops.gather(own)  # [N, C], the texts of all ranks
        with torch.no_grad():  # line 9 up to the last block, which may be trained
            x = torch.cat([backbone.trunk(self.clip.visual, part) for part in images.split(size)])
        pair_rows = partial(self.pair_rows, t, t.shape[1] if micro_batch else len(t))
        rows = in_slices(pair_rows, size, (images, x, own, noise))  # lines 9-15 and 19-21
        with torch.autocast(images.device.type, enabled=False):
            # InfoNCE bounds the mutual information of text-grounded images and texts, Eq. (2).
            if "gcl_v" in self.losses:
                rows["gcl_v"] = rows["v_g"] @ t.T  # line 16, S^m of Eq. (6), [B, N]
            terms = {name: ops.info_nce(rows[name], self.log_scale[name]) for name in self.losses}
            terms["area_pos"], terms["area_neg"] = ops.area_prior(
                rows["areas"], self.p_pos, per_rank=self.recipe.area_per_rank
            )
            terms["tv_mask"], terms["tv_dense"] = rows["tv_mask"].mean(), rows["tv_dense"].mean()
            self.mask_areas = ops.pair_areas(rows["areas"].detach())  # [2], of this rank, to log
        return terms

    def pair_rows(self, t, texts_at_once, images, x, own, noise):
        """What the losses need of b images against all N texts, small: a dict of rows [b, N] and
        [b, C].

        t: [N, C], texts_at_once of them at a time. images: [b, 3, h, w]. x: [b, 1+L, D] from trunk.
        own: [b, C], each image's own text. noise as in forward. Similarities have their loss's
        name.
        """
        grid = backbone.patch_grid(images, self.patch)
        v_d = backbone.dense_features(self.last_block, x, grid)  # line 9, [b, D, H, W]
        v_s = full(self.dense_embedding(v_d))  # line 10, [b, C, 4H, 4W]
        with torch.autocast(images.device.type, enabled=False):
            v_n = normalize(v_s, dim=1)
            dense = v_n if self.recipe.normalize_dense else v_s
            rows = in_slices(partial(self.mask_rows, v_n, dense), texts_at_once, (t,), dim=1)
            rows["tv_dense"] = ops.total_variation(dense)  # [b, C]
            if "cl" in self.losses:  # row CL of Table 2a, the same with a mask of ones
                rows["cl"] = normalize(dense.mean((2, 3))) @ t.T  # S of Eq. (1), [b, N]
            # A sum, as in line 21: a product's backward pass would have an inner size of 1, and for
            # that CUDA wants a C compiler (torch 2.14).
            cosine = (v_n * own[..., None, None]).sum(1, keepdim=True)  # [b, 1, 4H, 4W]
            pos_mask = self.w * cosine + self.b  # line 13, [b, 1, 4H, 4W]
        if "gcl_v" in self.losses:
            pos_mask_b = ops.gumbel_sigmoid(pos_mask, noise)  # line 14, [b, 1, 4H, 4W]
            # Paper silent: nearest; where the mask is 0, the mean colour (0 after normalisation).
            pos_mask_b = F.interpolate(pos_mask_b, size=images.shape[-2:], mode="nearest")
            masked = pos_mask_b * images  # [b, 3, h, w]
            rows["v_g"] = backbone.global_embedding(self.clip.visual, masked)  # line 15, [b, C]
        return rows

    def mask_rows(self, v_n, dense, t):
        """Similarity gcl_f, area and total variation of the masks of n texts t [n, C], [b, n] each.

        S^f[i, j] is the cosine of t_j and image i pooled over the mask of text j. Fig. 3 line 21
        writes "ijc,ic", which is not the text's t_j; the text is right, and the release has it.
        """
        mask = torch.sigmoid(self.mask_logits(v_n, t))  # line 11, [b, n, 4H, 4W]
        rows = {"areas": mask.mean((2, 3)), "tv_mask": ops.total_variation(mask)}
        if "gcl_f" in self.losses:
            v_f = normalize(ops.masked_pool(dense, mask))  # lines 19-20, [b, n, C]
            rows["gcl_f"] = (v_f * t).sum(-1)  # [b, n, C] -> [b, n], line 21, S^f of Eq. (9)
        return rows

    def mask_logits(self, v_n, t):
        """w * t_j . v_s + b, masks before their sigmoid. v_n: [B, C, 4H, 4W], t: [N, C],
        L2-normalised."""
        t = (self.w * t).expand(len(v_n), -1, -1)  # [B, N, C]: fewer numbers than masks have
        return torch.einsum("bchw,bnc->bnhw", v_n, t) + self.b  # Eq. (5), [B, N, 4H, 4W]

    # ---- inference ----

    @torch.no_grad()
    def segment(self, images, text, refine=None, kp_weight=0.3):
        """Masks of K texts at the images' own size. The adapter's masks, refined, then mixed with
        CLIP's.

        images: [B, 3, h, w], normalised with recipe.norm, any size (padded with zeros to the patch,
        cropped back). text: [K, C] from encode_classes or encode_text. refine: a function (image,
        mask) -> mask at the mask's grid, such as pamr.pamr. kp_weight: w_kp of Appendix A. Returns
        [B, K, h, w] float32 in [0, 1].
        """
        visual, (padded, padding) = self.clip.visual, backbone.pad_to_patch(images, self.patch)
        x, grid = backbone.trunk(visual, padded), backbone.patch_grid(padded, self.patch)
        v_d = backbone.dense_features(visual.transformer.resblocks[-1], x, grid)  # [B, D, H, W]
        # The adapter takes the features of the block that was trained with it, if one was; the
        # knowledge preservation branch takes CLIP's own.
        own = v_d if self.block is None else backbone.dense_features(self.block, x, grid)
        v_s = full(self.dense_embedding(own))  # [B, C, 4H, 4W]
        with torch.autocast(images.device.type, enabled=False):
            mask = torch.sigmoid(self.mask_logits(normalize(v_s, dim=1), text))  # [B, K, 4H, 4W]
            # Paper silent: which of the two comes first. Refinement, as the release.
            mask = backbone.refine_at_mask_size(refine, padded, mask)
            if kp_weight:
                # M_KP, the knowledge preservation branch: CLIP's own dense features and head.
                kp = backbone.frozen_mask(backbone.cosines(visual, v_d, text))  # [B, K, H, W]
                kp = backbone.resize(kp, mask.shape[-2:])  # [B, K, 4H, 4W]
                mask = (1 - kp_weight) * mask + kp_weight * kp  # Eq. (14)
            return backbone.to_pixels(mask, padded, padding)

    def segment_clip(self, images, text, method="maskclip", refine=None):
        """Masks of the frozen CLIP alone, its last block under one of METHODS; the other arguments
        as in segment."""
        return backbone.segment_clip(self.clip.visual, images, text, method, refine)

    # ---- files ----

    def save(self, path, **extra):
        """Writes the trained part, with the name and fingerprint of the frozen CLIP; a CLIP of
        load_clip that has no weights file is written too, one of your own has to be given again at
        load.

        extra: more entries, plain values and tensors. The file loads with torch.load(path,
        weights_only=True) and appears under its name only when it is complete.
        """
        source = getattr(self.clip, "source", {})
        # Nobody could find random weights again.
        inside = source and source["pretrained"] in (None, "random")
        fields = {
            "format": FORMAT,
            "recipe": asdict(self.recipe),
            "losses": self.losses,
            "area_prior": self.p_pos,
            "clip": source,
            "clip_crc": backbone.fingerprint(self.clip),
            "model": {k: v for k, v in self.state_dict().items() if inside or k[:5] != "clip."},
        }
        write_whole(path, lambda file: torch.save(fields | extra, file))


def read_checkpoint(path):
    """The dict of this project's checkpoint, or the authors' tcl.pth translated into one.

    Nothing in its pickle is executed. Raises InputError for any other file.
    """
    checkpoint = backbone.read_file(path)
    try:
        model = {str(key): value for key, value in checkpoint["model"].items()}
    except (AttributeError, KeyError, TypeError):
        model, checkpoint = {}, {}
    if any(key.startswith("masker.") for key in model):
        fields = {"format": FORMAT, "recipe": asdict(RECIPES["release"])}
        return fields | release.translate(model)
    wrong = [name for name in FIELDS if not isinstance(checkpoint.get(name), FIELDS[name])]
    if wrong or checkpoint["format"] != FORMAT:
        raise InputError(
            f"{path}: no checkpoint of GCL that this version reads, wrong or missing: {wrong}; "
            "CLIP weights go to --pretrained"
        )
    return checkpoint | {"model": model}


def load(path, model=None, pretrained=None, device="cpu"):
    """A GCL from this project's checkpoint or the authors' tcl.pth, in eval mode.

    model, pretrained: override the CLIP that the file names (or holds); a stripped tcl.pth names
    none and gets ViT-B-16-quickgelu / openai. Raises InputError when they do not fit, naming the
    first mismatching tensor.
    """
    checkpoint = read_checkpoint(path)
    state, source = checkpoint["model"], checkpoint["clip"]
    frozen = {k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")}
    if frozen and pretrained is None:
        config = backbone.clip_config(model or source.get("config"))
        clip = backbone.build_clip(config, frozen, path)
        clip.source = {"model": model, "pretrained": source.get("pretrained"), "config": config}
    else:
        model, pretrained = model or source.get("model"), pretrained or source.get("pretrained")
        if model is None or pretrained is None:
            raise InputError(f"{path}: does not name its CLIP; give --model and --pretrained")
        clip, _ = load_clip(model, str(pretrained))
    try:
        recipe = Recipe(**checkpoint["recipe"])
        torch.tensor(recipe.norm).view(2, 3)  # [2, 3], mean and std of three channels
        net = GCL(clip, recipe, checkpoint["losses"], checkpoint["area_prior"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: not a recipe and losses that this version has ({first_line(error)})"
        ) from error
    restore(net, checkpoint, path)
    return net.to(device).eval()


def restore(net, checkpoint, path):
    """Puts the trained part of a checkpoint into net; InputError when recipe or CLIP do not fit."""
    recipe, own = checkpoint["recipe"], asdict(net.recipe)
    if own | recipe != own:  # one of an older version lacks what was added since
        raise InputError(f"{path}: has the recipe {recipe.get('name')!r}, not {own['name']!r}")
    frozen = {f"clip.{key}": value for key, value in net.clip.state_dict().items()}
    load_strict(net, checkpoint["model"] | frozen, path)
    if checkpoint.get("clip_crc") not in (None, backbone.fingerprint(net.clip)):
        raise InputError(
            f"{path}: was trained on another CLIP than this one, though the shapes fit"
        )
