# SPDX-License-Identifier: MIT
"""Grounded Contrastive Learning (GCL): a frozen CLIP, a trained adapter, and masks for any text. Figures 2 and 3.

    clip, tokenizer = load_clip("ViT-B-16-quickgelu", "openai")     # frozen; the name, a tag or a local file
    net = GCL(clip)                                                 # train it: losses = net(images, tokens)
    net = load("runs/gcl/last.pt")                                  # or take a checkpoint, the authors' tcl.pth too
    text = net.encode_classes(["moon", "boat"], tokenizer, ["a photo of a {}."])
    masks = net.segment(images, text)                               # [B, K, h, w] in [0, 1]

Legend for every shape: B local images, N texts of the global batch, K classes, C embedding size, D width of the ViT,
L patches, H W mask grid, h w pixels. The paper's letters: t text embeddings, v_d dense CLIP features, v_s the adapter's
dense embedding. Needs ops.py and adapter.py beside it, torch and open_clip.

>>> config = {"embed_dim": 8, "quick_gelu": True, "text_cfg": {"width": 64, "heads": 1, "layers": 1}}
>>> clip = build_clip({**config, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2}})
>>> net, tokens = GCL(clip), tokenizer_of(clip)(["a moon", "a boat"])
>>> sorted(net(torch.rand(2, 3, 32, 32), tokens))
['area_neg', 'area_pos', 'gcl_f', 'gcl_v', 'tv_dense', 'tv_mask']
>>> net.segment(torch.rand(1, 3, 45, 37), net.encode_text(tokens)).shape
torch.Size([1, 2, 45, 37])
"""

import copy
import json
import math
import os
import sys
import zipfile
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ops
from adapter import Adapter
from ops import normalize

CLIP_NORM = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOSSES = ("gcl_v", "gcl_f", "cl")
WEIGHTS = {"gcl": 0.1, "area": 0.4, "tv": 1.0}  # the lambdas of Sec. 4.1
FORMAT = "gcl-1"


class CheckpointError(ValueError):
    """A model, a weights file or a checkpoint that cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class Recipe:
    """Where the authors' release differs from the paper; one line per difference. It travels inside checkpoints."""

    name: str
    own_head: bool  # Release differs: trains a copy of ln_post and projection from step 0
    unfreeze_block_at: int | None  # Release differs: trains a copy of the last block from this step on
    normalize_dense: bool  # pooling and TV take the L2-normalised dense embedding (Sec. 3.2); Release differs: raw
    norm: tuple  # mean and std of the images; Release differs: ImageNet's
    strong_augmentation: bool  # Release differs: RandAugment and random erasing; Paper silent: crop and flip alone


RECIPES = {
    "paper": Recipe("paper", False, None, True, CLIP_NORM, False),
    "release": Recipe("release", True, 30_000, False, IMAGENET_NORM, True),
}


def first_line(error):
    """What another library's error says, in one line."""
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def total_loss(losses, weights=None):
    """The weighted sum of the loss terms. losses: dict from GCL.forward. Returns a scalar.

    weights: {"gcl", "area", "tv"}, the paper's by default. Paper silent: the plain contrastive loss (row CL of Table 2)
    takes the weight of the GCL losses.
    """
    weights = {**WEIGHTS, **(weights or {})}
    group = {"gcl_v": "gcl", "gcl_f": "gcl", "cl": "gcl", "area_pos": "area", "area_neg": "area"}
    return sum(weights[group.get(name, "tv")] * value for name, value in losses.items())  # Eq. (12)


def full(x):
    """x in float32 at least: what autocast left in half precision is raised before norms, masks and losses."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_slices(function, size, inputs, dim=0):
    """function(*inputs) -> dict of tensors, on slices of `size` rows of the inputs, its results joined along dim.

    With more than one slice the activations of each are dropped and computed again in the backward pass, so that only
    one slice's are held. Nothing in function may draw random numbers.
    """
    if len(inputs[0]) <= size:
        return function(*inputs)
    slices = zip(*(x.split(size) for x in inputs), strict=True)
    parts = [checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in slices]
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
    Raises CheckpointError for a CLIP without the plain ViT that dense features need, ValueError for an unknown name.
    """

    def __init__(self, clip, recipe="paper", losses=("gcl_v", "gcl_f"), area_prior=0.4):
        super().__init__()
        if unknown := set(losses) - set(LOSSES):
            raise ValueError(f"unknown loss {sorted(unknown)[0]!r}; choose from {', '.join(LOSSES)}")
        if isinstance(recipe, str) and recipe not in RECIPES:
            raise ValueError(f"unknown recipe {recipe!r}; choose from {', '.join(RECIPES)}")
        check_vit(clip)
        self.recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
        self.losses, self.p_pos = tuple(losses), area_prior
        self.clip = clip.float().eval().requires_grad_(False)
        visual = clip.visual
        self.patch = visual.conv1.kernel_size[0]
        self.adapter = Adapter(visual.conv1.out_channels)
        self.w = nn.Parameter(torch.tensor(10.0))  # Paper silent: start values; the release's
        self.b = nn.Parameter(torch.tensor(-2.5))
        self.log_scale = nn.ParameterDict({name: nn.Parameter(torch.tensor(math.log(1 / 0.07))) for name in LOSSES})
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

    # ---- encoders -------------------------------------------------------------------------------------------------

    def encode_text(self, tokens):
        """L2-normalised text embeddings t = E_t(x_t). tokens: [..., context] int64. Returns [..., C] float32."""
        flat = tokens.reshape(-1, tokens.shape[-1])  # [N, context]
        with torch.no_grad():
            t = full(text_features(self.clip, flat))  # [N, C]
        return normalize(t).reshape(*tokens.shape[:-1], -1)  # [..., C]

    @torch.no_grad()
    def encode_classes(self, names, tokenizer, templates):
        """One embedding per class: the mean over raw per-template embeddings, then L2-normalised. Returns [K, C]."""
        rows = []
        for name in names:
            prompts = [template.replace("{}", name) for template in templates]
            tokens = tokenizer(prompts).to(self.w.device)  # [T, context], T templates
            if tokens.max() >= self.clip.vocab_size:
                raise CheckpointError(f"the tokenizer is larger than this CLIP's vocabulary ({self.clip.vocab_size})")
            rows.append(full(text_features(self.clip, tokens)).mean(0))  # [T, C] -> [C]
        return normalize(torch.stack(rows))  # [K, C]

    def trunk(self, images):
        """The ViT up to its last block. images: [B, 3, h, w], sides multiples of the patch. Returns [B, 1 + L, D]."""
        visual = self.clip.visual
        x = visual.conv1(images)  # [B, D, H, W], H W the patch grid
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # [B, L, D]
        x = torch.cat([visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)  # [B, 1+L, D]
        x = visual.ln_pre(x + resize_positions(visual.positional_embedding, visual.grid_size, grid).to(x.dtype))
        for block in visual.transformer.resblocks[:-1]:
            x = run_block(block, x)
        return x

    def global_embedding(self, images):
        """v_g, CLIP's own image embedding, L2-normalised, at any image size. Returns [B, C]."""
        visual = self.clip.visual
        x = run_block(visual.transformer.resblocks[-1], self.trunk(images), 1)[:, 0]  # [B, D], the class token alone
        return normalize(full(visual.ln_post(x) @ visual.proj))

    def dense_features(self, tokens, grid, block=None):
        """v_d: the last block with attention as the identity (MaskCLIP). Returns [B, D, H, W].

        tokens: [B, 1 + L, D] from trunk. grid: (H, W), L = H * W. block: a last block other than CLIP's own.
        Only the value path is computed: each patch keeps its own value projection; residual and MLP stay.
        """
        block = block or self.clip.visual.transformer.resblocks[-1]
        x = tokens[:, 1:]  # [B, L, D]
        width = x.shape[-1]
        weight, bias = block.attn.in_proj_weight[2 * width :], block.attn.in_proj_bias[2 * width :]  # values: [D, D]
        value = F.linear(block.ln_1(x), weight, bias)  # Eq. (3), [B, L, D]
        x = x + block.ls_1(block.attn.out_proj(value))
        x = x + block.ls_2(run_mlp(block.mlp, block.ln_2(x)))
        return x.transpose(1, 2).unflatten(2, grid)  # [B, L, D] -> [B, D, H, W]

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
        size, (height, width) = micro_batch or len(images), self.patch_grid(images)
        own = self.encode_text(tokens)  # [B, C]
        t = ops.gather(own)  # [N, C]
        if noise is None:  # before the slices, so that what is computed again has the same
            noise = torch.rand(len(images), 1, 4 * height, 4 * width, device=images.device)
        with torch.no_grad():
            x = torch.cat([self.trunk(part) for part in images.split(size)])  # [B, 1+L, D]
        rows = in_slices(partial(self.pair_rows, t), size, (images, x, own, noise))
        terms = {}  # Eq. (2): gcl_v and gcl_f bound I(masked image; text), of pixels and of features
        with torch.autocast(images.device.type, enabled=False):
            if "gcl_v" in self.losses:
                terms["gcl_v"] = ops.info_nce(rows["s_m"], self.log_scale["gcl_v"])  # Eq. (6)
            if "gcl_f" in self.losses:
                terms["gcl_f"] = ops.info_nce(rows["s_f"], self.log_scale["gcl_f"])  # Eq. (9)
            if "cl" in self.losses:
                terms["cl"] = ops.info_nce(rows["s"], self.log_scale["cl"])  # Eq. (1): InfoNCE bounds I(image; text)
            terms["area_pos"], terms["area_neg"] = ops.area_prior(rows["areas"], self.p_pos)
            terms["tv_mask"], terms["tv_dense"] = rows["tv_mask"].mean(), rows["tv_dense"].mean()
            self.mask_areas = ops.pair_areas(rows["areas"].detach())  # [2], of this rank, for the log
        return terms

    def pair_rows(self, t, images, x, own, noise):
        """What the losses need of b images against all N texts, small: a dict of rows [b, N] and [b, C].

        t: [N, C]. images: [b, 3, h, w]. x: [b, 1+L, D] from trunk. own: [b, C], each image's own text. noise as in
        forward. s_m, s_f and s are the similarities S of the image-level, feature-level and plain contrastive losses.
        """
        v_d = self.dense_features(x, self.patch_grid(images), self.block)  # [b, D, H, W]
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
        pos_mask_b = F.interpolate(pos_mask_b, size=images.shape[-2:], mode="nearest")  # [b, 1, h, w]
        return self.global_embedding(pos_mask_b * images)

    def patch_grid(self, images):
        """(H, W) in patches; ValueError when a side is not a multiple of the patch (segment pads, forward does not)."""
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"image sides {height}x{width} must be multiples of this CLIP's patch size {self.patch}")
        return height // self.patch, width // self.patch

    def mask_logits(self, v_n, t):
        """w * t_j . v_s + b, masks before their sigmoid. v_n: [B, C, H, W], t: [N, C] or [B, N, C], L2-normalised."""
        t = t.expand(len(v_n), -1, -1)  # [B, N, C]
        return self.w * torch.einsum("bchw,bnc->bnhw", v_n, t) + self.b  # Eq. (5), [B, N, H, W]

    # ---- inference ------------------------------------------------------------------------------------------------

    def preserved_masks(self, v_d, t, size):
        """M_KP, the knowledge preservation branch: CLIP's own dense features, head, w = 10, b = -2.5. [B, K, *size]."""
        mask = frozen_mask(self.frozen_cosine(v_d, t))  # [B, K, H, W]
        return F.interpolate(mask, size=size, mode="bilinear", align_corners=False)  # [B, K, *size]

    def frozen_cosine(self, v, t):
        """Cosines of texts and dense features v [B, D, H, W] through CLIP's own head. Returns [B, K, H, W] float32."""
        visual = self.clip.visual
        v = visual.ln_post(v.permute(0, 2, 3, 1).to(visual.proj.dtype)) @ visual.proj  # [B, H, W, C]
        return torch.einsum("bhwc,kc->bkhw", normalize(full(v)), t)  # [B, K, H, W]

    @torch.no_grad()
    def segment(self, images, text, refine=None, kp_weight=0.3):
        """Masks of K texts at the images' own size. The adapter's masks, refined, then mixed with CLIP's.

        images: [B, 3, h, w], normalised with recipe.norm, any size (padded with zeros to the patch, cropped back).
        text: [K, C] from encode_classes or encode_text. refine: a function (image, mask) -> mask at the mask's grid,
        such as pamr.pamr. kp_weight: w_kp of Appendix A. Returns [B, K, h, w] float32 in [0, 1].
        """
        padded, (left, top) = pad_to_patch(images, self.patch)
        tokens, grid = self.trunk(padded), self.patch_grid(padded)
        v_d = self.dense_features(tokens, grid)  # [B, D, H, W]
        v_s = self.dense_embedding(v_d if self.block is None else self.dense_features(tokens, grid, self.block))
        with torch.autocast(images.device.type, enabled=False):
            mask = torch.sigmoid(self.mask_logits(normalize(full(v_s), dim=1), text))  # [B, K, 4H, 4W]
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
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
        padded, (left, top) = pad_to_patch(images, self.patch)
        grid = self.patch_grid(padded)
        v, keys = last_block(self.clip.visual.transformer.resblocks[-1], self.trunk(padded), grid, method)
        with torch.autocast(images.device.type, enabled=False):
            cosine = self.frozen_cosine(v, text)  # [B, K, H, W]
            mask = maskclip_refined(cosine, full(keys)) if method == "maskclip-refined" else frozen_mask(cosine)
            size = 4 * grid[0], 4 * grid[1]  # the adapter's grid, so that PAMR sees the same pixels
            mask = F.interpolate(mask, size=size, mode="bilinear", align_corners=False)  # [B, K, 4H, 4W]
            return to_pixels(refine_at_mask_size(refine, padded, mask), padded, images.shape[-2:], left, top)

    # ---- files ----------------------------------------------------------------------------------------------------

    def save(self, path, **extra):
        """Writes the trained part, with the name and fingerprint of the frozen CLIP; a CLIP of load_clip that has no
        weights file is written too, one of your own has to be given again at load.

        extra: more entries, plain values and tensors. The file loads with torch.load(path, weights_only=True) and
        appears under its name only when it is complete.
        """
        source = getattr(self.clip, "source", {"model": None, "pretrained": None, "config": None})
        inside = source["config"] is not None and source["pretrained"] is None
        state = {k: v for k, v in self.state_dict().items() if inside or not k.startswith("clip.")}
        fields = {"format": FORMAT, "recipe": asdict(self.recipe), "losses": self.losses}
        fields |= {"area_prior": self.p_pos, "clip": source, "clip_crc": fingerprint(self.clip), "model": state}
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            torch.save({**fields, **extra}, temporary)
            os.replace(temporary, path)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{path}: could not be written ({first_line(error)})") from error
        finally:
            Path(temporary).unlink(missing_ok=True)


# ---- CLIP's layers -------------------------------------------------------------------------------------------------


def run_block(block, x, n=None):
    """open_clip's residual attention block without its detours. x: [B, L, D]. Returns the first n tokens, or all.

    Tokens meet in keys and values alone: where n tokens leave, only they need a query, the projection and the MLP.
    """
    width, heads, y = x.shape[-1], block.attn.num_heads, block.ln_1(x)
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias  # [3D, D]: queries, keys, values
    q = F.linear(y[:, :n], weight[:width], bias[:width])  # [B, n, D]
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, n, D/heads]
    kv = F.linear(y, weight[width:], bias[width:])  # [B, L, 2D]
    k, v = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, L, D/heads]
    z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, heads, n, D/heads] -> [B, n, D]
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
    return clip.text_projection(x) if isinstance(clip.text_projection, nn.Linear) else x @ clip.text_projection


# ---- CLIP alone: other last blocks (evaluate.py --method) -----------------------------------------------------------

attend = F.scaled_dot_product_attention  # softmax(s q k^T + bias) v of each head, s = (head width)^-1/2; CLS included
METHODS = {  # attention(q, k, v, grid) of the last block, each [B, heads, 1 + L, D / heads]; are residual and MLP kept
    "clip": (lambda q, k, v, grid: attend(q, k, v), True),  # the ordinary block
    "maskclip": (lambda q, k, v, grid: v, True),  # Zhou et al. 2022, without its refinements
    "maskclip-refined": (lambda q, k, v, grid: v, True),  # and with them: maskclip_refined
    "sclip": (lambda q, k, v, grid: attend(q, q, v) + attend(k, k, v), True),  # Wang et al. 2024; rows add to 2
    "clearclip": (lambda q, k, v, grid: attend(q, q, v), False),  # Lan et al. 2024
    "naclip": (lambda q, k, v, grid: attend(k, k, v, nearness(grid).to(k)), False),  # Hajimiri et al. 2025
}


def nearness(grid, sigma=5.0):
    """NACLIP's omega: exp(-|p_i - p_j|^2 / 2 sigma^2) of patches at p_i, p_j, 0 for CLS. grid: (H, W). [1+L, 1+L]."""
    places = (torch.arange(n) for n in grid)
    rows, columns = (torch.exp(-((p[:, None] - p) ** 2) / (2 * sigma**2)) for p in places)  # [H, H], [W, W]
    return F.pad(torch.kron(rows, columns), (1, 0, 1, 0))  # the exponential of a sum over y and x is a product


def last_block(block, tokens, grid, method):
    """CLIP's last block under one of METHODS. tokens: [B, 1 + L, D]. Returns [B, D, H, W], and its keys [B, L, D]."""
    attention, whole = METHODS[method]
    attn = block.attn
    qkv = F.linear(block.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias)  # [B, 1+L, 3D]
    q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, 1+L, D/heads]
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
    return (best * p / p.amax(1, keepdim=True)).unflatten(2, cosine.shape[2:])  # [B, K, L] -> [B, K, H, W]


# ---- geometry -----------------------------------------------------------------------------------------------------


def pad_to_patch(images, patch):
    """Zero-pads [B, 3, h, w] to multiples of the patch, the smaller half left and top. Returns images, (left, top)."""
    height, width = images.shape[-2:]
    extra_h, extra_w = -height % patch, -width % patch
    left, top = extra_w // 2, extra_h // 2
    return F.pad(images, (left, extra_w - left, top, extra_h - top)), (left, top)


def to_pixels(mask, padded, size, left, top):
    """Masks [B, K, H, W] of a padded image resized to its pixels, and the padding cut off: [B, K, *size]."""
    mask = F.interpolate(mask, size=padded.shape[-2:], mode="bilinear", align_corners=False)  # [B, K, h', w']
    return mask[..., top : top + size[0], left : left + size[1]]


def refine_at_mask_size(refine, images, mask):
    """refine(image resized to the mask's grid, mask), or the mask itself. images: [B, 3, h, w], mask: [B, K, H, W].

    Paper silent: PAMR's resolution. The release's: the mask's own, a quarter of the window.
    """
    if refine is None:
        return mask
    images = F.interpolate(full(images), size=mask.shape[-2:], mode="bilinear", align_corners=True)  # [B, 3, H, W]
    return refine(images, mask)


def resize_positions(embedding, native, grid):
    """Positional embeddings [1 + L, D] of the native (H, W) grid for another grid: [1 + L', D], bicubic."""
    if tuple(native) == tuple(grid):
        return embedding
    patches = full(embedding[1:]).unflatten(0, native).permute(2, 0, 1).unsqueeze(0)  # [1, D, H, W]
    patches = F.interpolate(patches, size=tuple(grid), mode="bicubic", align_corners=False)  # [1, D, H', W']
    return torch.cat([embedding[:1], patches[0].flatten(1).T.to(embedding.dtype)])  # [1 + L', D]


# ---- loading CLIP -------------------------------------------------------------------------------------------------


def check_vit(clip):
    """CheckpointError unless this open_clip model has the plain ViT whose last block can be taken apart."""
    visual = getattr(clip, "visual", None)
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    plain = blocks is not None and hasattr(blocks[-1], "ls_1") and isinstance(blocks[-1].attn, nn.MultiheadAttention)
    pooled = getattr(visual, "attn_pool", None) is None and getattr(visual, "pool_type", "tok") == "tok"
    if not (plain and pooled and not getattr(visual, "final_ln_after_pool", False)):
        raise CheckpointError(f"{type(visual).__name__}: GCL needs a plain ViT with class token, as ViT-B-16-quickgelu")
    if not getattr(visual.transformer, "batch_first", True):
        raise CheckpointError("this open_clip's transformer is not batch first; install a newer open_clip_torch")


def pick_device(name=None):
    """torch.device of a name, or the best there is; under torchrun, CUDA takes LOCAL_RANK. Raises CheckpointError."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name or best)
    except RuntimeError as error:
        raise CheckpointError(f"--device {name}: no such device; choose cuda, mps or cpu") from error
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise CheckpointError(
                f"--device {name or best}: GPU {index} is asked for, {torch.cuda.device_count()} found"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise CheckpointError(f"--device {name}: not available on this machine")
    return device


def load_clip(model="ViT-B-16-quickgelu", pretrained="openai", device="cpu"):
    """A frozen open_clip CLIP and its tokenizer.

    model: a name of open_clip.list_models(), or a JSON file in open_clip's model-config format. pretrained: a tag, or a
    local weights file (state dict, OpenAI's TorchScript archive, safetensors), or None for random weights.
    A config with the wrong activation for its weights is corrected, and said on stderr: plain ViT-B-16 with OpenAI's
    weights would otherwise run GELU where they were trained with QuickGELU. Raises CheckpointError.
    """
    config = clip_config(model)
    path = find_weights(model, pretrained)
    if pretrained is None:
        print(f"warning: {model} with random weights (pretrained=None)", file=sys.stderr)
    quick = trained_with_quick_gelu(model, pretrained, path)
    if quick is not None and quick != config.get("quick_gelu", False):
        print(f"warning: {pretrained} needs quick_gelu={quick}: corrected in the config of {model}", file=sys.stderr)
        config["quick_gelu"] = quick
    clip = build_clip(config, read_weights(path) if path else None, path)
    names = {
        "model": None if isinstance(model, dict) else str(model),
        "pretrained": None if pretrained is None else str(pretrained),
    }
    # Whole paths, so that a checkpoint finds its CLIP from any folder.
    clip.source = {k: os.path.abspath(v) if v and os.path.isfile(v) else v for k, v in names.items()}
    clip.source["config"] = config
    return clip.to(device), tokenizer_of(clip)


def tokenizer_of(clip):
    """CLIP's own BPE tokenizer at this model's context length: list of strings -> int64 [n, context]."""
    return open_clip.SimpleTokenizer(context_length=clip.context_length)


def build_clip(config, state=None, path=None):
    """open_clip's CLIP from a model config and a state dict (random weights when None), float32, frozen."""
    try:
        clip = open_clip.CLIP(**copy.deepcopy(config))
    except (AssertionError, TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"not a model config that open_clip.CLIP takes: {first_line(error)}") from error
    check_vit(clip)
    if state is not None:
        load_strict(clip, state, path)
    return clip.eval().requires_grad_(False)


def clip_config(model):
    """The model config (a dict) of an open_clip name, a JSON file or a dict; CheckpointError for no plain CLIP."""
    if isinstance(model, dict):
        return copy.deepcopy(model)
    if str(model).endswith(".json"):
        try:
            config = json.loads(Path(model).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"--model {model}: cannot be read as a model config ({error})") from error
        config = config.get("model_cfg", config) if isinstance(config, dict) else None
    else:
        if str(model) not in open_clip.list_models():
            raise CheckpointError(f"--model {model}: neither a name that open_clip knows nor a .json file")
        config = open_clip.get_model_config(str(model))
    parts = [config.get(name) for name in ("vision_cfg", "text_cfg")] if isinstance(config, dict) else [None]
    plain = all(isinstance(part, dict) for part in parts) and "embed_dim" in config
    if not plain or {"custom_text", "multimodal_cfg"} & config.keys() or "hf_tokenizer_name" in parts[1]:
        raise CheckpointError(f"--model {model}: not a plain CLIP config (embed_dim, vision_cfg, text_cfg)")
    return config


def find_weights(model, pretrained):
    """Path of the weights file for a tag or a local file; None for None. Downloads a tag's file once (open_clip)."""
    if pretrained is None or os.path.isfile(pretrained):
        return pretrained
    hint = "give a local weights file instead: --pretrained FILE (state dict, OpenAI archive or safetensors)"
    tag = open_clip.get_pretrained_cfg(str(model), str(pretrained))
    if not tag:
        raise CheckpointError(f"--pretrained {pretrained}: no such file, and no tag of {model}; {hint}")
    try:
        return open_clip.download_pretrained(tag)
    except Exception as error:  # every hub client has its own errors; the cause is kept
        what = f"the weights of {model} could not be downloaded ({first_line(error)})"
        raise CheckpointError(f"--pretrained {pretrained}: {what}; {hint}") from error


def trained_with_quick_gelu(model, pretrained, path):
    """True or False where the weights' origin tells their activation, None where it does not (a plain local file)."""
    tag = open_clip.get_pretrained_cfg(str(model), str(pretrained)) if pretrained else None
    if tag and str(pretrained) != str(path):
        return bool(tag.get("quick_gelu", False))
    return True if path and is_torchscript(path) else None  # only OpenAI hands out TorchScript archives


def is_torchscript(path):
    """Whether a file is a TorchScript archive, such as OpenAI's ViT-B-16.pt."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def read_weights(path):
    """A CLIP state dict (float32 values) from a local file; CheckpointError when it holds none."""
    try:
        if is_torchscript(path):
            state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = open_clip.factory.load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors each raise their own; the file is what is wrong
        raise CheckpointError(f"{path}: not a weights file that can be read ({first_line(error)})") from error
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise CheckpointError(f"{path}: no CLIP state dict; a checkpoint of GCL goes to --checkpoint or --resume")
    extra = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # OpenAI's archive has these beside
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items() if k not in extra}


def load_strict(module, state, path):
    """Loads state into module; CheckpointError names the first key or shape that does not fit."""
    own = {k: v for k, v in module.state_dict().items() if not k.startswith("clip.")}
    for key, value in own.items():
        if key not in state:
            raise CheckpointError(f"{path}: {key} is missing; is this a checkpoint of another model?")
        if state[key].shape != value.shape:
            shapes = f"has shape {tuple(state[key].shape)}, this model needs {tuple(value.shape)}"
            raise CheckpointError(f"{path}: {key} {shapes}: a checkpoint of another CLIP?")
    if extra := sorted(state.keys() - own.keys()):
        raise CheckpointError(f"{path}: {extra[0]} is not part of this model: a checkpoint of another CLIP?")
    module.load_state_dict(state, strict=False)  # strict already, but for the frozen CLIP of a GCL


def fingerprint(clip):
    """CRC-32 over heads, activation and all weights as float32: tells apart two CLIPs of one shape."""
    blocks = [*clip.visual.transformer.resblocks, *clip.transformer.resblocks]
    crc = zlib.crc32(repr([(block.attn.num_heads, type(block.mlp.gelu).__name__) for block in blocks]).encode())
    for key, value in sorted(clip.state_dict().items()):
        crc = zlib.crc32(value.detach().float().cpu().contiguous().numpy(), zlib.crc32(key.encode(), crc))
    return crc


# ---- loading GCL --------------------------------------------------------------------------------------------------

RELEASE_CLIP = {  # Release's key prefixes of the frozen CLIP -> open_clip's; the first that fits counts
    "clip_text_encoder.": "",
    "clip_image_encoder.clip_proj.ln.": "visual.ln_post.",
    "clip_image_encoder.clip_proj.": "visual.",
    "clip_image_encoder.clip_visual.": "visual.",
}
DECODER = "masker.image_encoder.decoder."
RELEASE_GCL = {  # Release's key prefixes of the trained part -> ours; {last} is the last block's number
    "masker.image_encoder.backbone.transformer.resblocks.{last}.": "block.",
    DECODER + "decoder.net.0.conv.": "adapter.stages.0.1.",
    DECODER + "decoder.net.0.conv2.": "adapter.stages.0.2.",
    DECODER + "decoder.net.1.conv.": "adapter.stages.1.1.",
    DECODER + "decoder.net.1.conv2.": "adapter.stages.1.2.",
    DECODER + "image_proj.ln.": "head.ln_post.",
    DECODER + "image_proj.": "head.",
    "masker.sim2mask.": "",
    "tcli_loss.logit_scale": "log_scale.gcl_v",
    "tclf_loss.logit_scale": "log_scale.gcl_f",
}


class Inert:
    """Stands in for a class of a library that is not installed here: takes anything, does nothing, runs no code."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read_checkpoint(path):
    """The dict of a checkpoint file. Nothing in its pickle is executed: classes that torch does not know are inert."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: {'a folder, not a checkpoint' if os.path.isdir(path) else 'no such file'}")
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated zip, foreign pickle, blocked module: the file is what is wrong
        raise CheckpointError(f"{path}: not a checkpoint that can be read ({first_line(error)})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise CheckpointError(f"{path}: not a GCL checkpoint (no 'model' entry); CLIP weights go to --pretrained")
    return checkpoint


def load(path, model=None, pretrained=None, device="cpu"):
    """A GCL from this project's checkpoint or the authors' tcl.pth, with or without its CLIP part, in eval mode.

    model, pretrained: override the CLIP that the file names (or holds); a stripped tcl.pth names none and gets
    ViT-B-16-quickgelu / openai. Raises CheckpointError when they do not fit, naming the first mismatching tensor.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.get("format") == FORMAT:
        return _load_own(checkpoint, path, model, pretrained).to(device).eval()
    if any(key.startswith("masker.") for key in checkpoint["model"]):
        return _load_release(checkpoint["model"], path, model, pretrained).to(device).eval()
    raise CheckpointError(f"{path}: neither a checkpoint of this project nor the authors' release")


def _load_own(checkpoint, path, model, pretrained):
    if missing := {"clip", "clip_crc", "recipe", "losses", "area_prior"} - checkpoint.keys():
        raise CheckpointError(f"{path}: an incomplete checkpoint, {sorted(missing)[0]!r} is missing")
    source, state = checkpoint["clip"], checkpoint["model"]
    inside = {k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")}
    if inside and not pretrained:
        clip = build_clip(source["config"], inside, path)
        clip.source = source
    else:
        model, pretrained = model or source["model"], pretrained or source["pretrained"]
        if model is None or pretrained is None:
            raise CheckpointError(f"{path}: does not name its CLIP; give --model and --pretrained")
        if str(model).endswith(".json") and not os.path.isfile(model):
            model = source["config"]  # the config file has moved, its content is here
        clip, _ = load_clip(model, pretrained)
    net = GCL(clip, Recipe(**checkpoint["recipe"]), checkpoint["losses"], checkpoint["area_prior"])
    restore(net, checkpoint, path)
    return net


def restore(net, checkpoint, path):
    """Puts the trained part of this project's checkpoint into net; CheckpointError when recipe or CLIP do not fit."""
    if checkpoint.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this project")
    if Recipe(**checkpoint["recipe"]) != net.recipe:
        raise CheckpointError(f"{path}: has the recipe {checkpoint['recipe']['name']!r}, not {net.recipe.name!r}")
    load_strict(net, {k: v for k, v in checkpoint["model"].items() if not k.startswith("clip.")}, path)
    if fingerprint(net.clip) != checkpoint["clip_crc"]:
        raise CheckpointError(f"{path}: was trained on another CLIP than this one, though the shapes fit")


def _load_release(state, path, model, pretrained):
    frozen = rename(state, RELEASE_CLIP)
    if frozen and not pretrained:
        frozen["logit_scale"] = torch.tensor(math.log(1 / 0.07))  # the release drops it; nothing here uses it
        config = clip_config(model) if model else config_from_weights(frozen)
        clip = build_clip(config, frozen, path)
        clip.source = {"model": model, "pretrained": None, "config": config}
    else:
        clip, _ = load_clip(model or "ViT-B-16-quickgelu", pretrained or "openai")
    net = GCL(clip, "release")
    last = len(clip.visual.transformer.resblocks) - 1
    trained = rename(state, {old.format(last=last): new for old, new in RELEASE_GCL.items()})
    trained = {k.replace("gate.gate", "gate"): v for k, v in trained.items()}
    load_strict(net, trained | {"log_scale.cl": net.log_scale["cl"]}, path)
    return net


def config_from_weights(state):
    """Model config of an OpenAI-style CLIP from its tensors' shapes; its heads are 64 wide, its GELU quick."""
    layers = {
        prefix: len({key.split(".resblocks.")[1].split(".")[0] for key in state if key.startswith(prefix)})
        for prefix in ("visual.transformer.resblocks.", "transformer.resblocks.")
    }
    width, _, patch, _ = state["visual.conv1.weight"].shape  # [D, 3, patch, patch]
    size = patch * math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
    vocab, text_width = state["token_embedding.weight"].shape
    vision = {
        "width": width,
        "patch_size": patch,
        "image_size": size,
        "layers": layers["visual.transformer.resblocks."],
    }
    text = {"width": text_width, "heads": text_width // 64, "layers": layers["transformer.resblocks."]}
    text |= {"vocab_size": vocab, "context_length": state["positional_embedding"].shape[0]}
    sizes = {"embed_dim": state["text_projection"].shape[1], "vision_cfg": vision, "text_cfg": text}
    return {**sizes, "quick_gelu": True}


def rename(state, prefixes):
    """The entries of a state dict that start with one of the prefixes (old -> new), under their new names."""
    renamed = {}
    for key, value in state.items():
        old = next((old for old in prefixes if key.startswith(old)), None)
        if old is not None:
            renamed[prefixes[old] + key.removeprefix(old)] = value
    return renamed
