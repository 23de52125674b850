# SPDX-License-Identifier: MIT
"""The small operations of Grounded Contrastive Learning, each one equation of the paper.

Needs torch alone; copy it. Legend for every shape: B local images, N texts of the global batch
(N = B x ranks), C embedding size, H W mask grid. Each rank holds the rows of its own B images;
without torch.distributed there is one rank and N = B. Every loss here is this rank's share: the
mean over ranks, which DistributedDataParallel takes of the gradients, is the global batch's.

>>> similarity = torch.eye(4)
>>> round(float(info_nce(similarity, torch.tensor(0.0))), 4)
0.7437
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

EPS = 1e-6  # Paper silent: the release's floor for L2 norms and mask areas


def _distributed():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)  # ranks x [B, ...] -> [N, ...]

    @staticmethod
    def backward(ctx, gradient):
        """[N, ...] of this rank's loss -> [B, ...] of all ranks' losses for this rank's rows."""
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)  # every rank's loss counts for this rank's rows
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]  # [N, ...] -> [B, ...]


def gather(x):
    """Concatenates x of all ranks along the first axis; differentiable, the identity on one rank.

    x: [B, ...], the same shape on every rank. Returns [N, ...], rank 0's rows first. The backward
    pass sums the gradients that every rank's loss sends to this rank's rows (a plain all_gather
    would drop the other ranks' part).
    """
    return _Gather.apply(x.contiguous()) if _distributed() else x  # [N, ...]


def positives(rows):
    """Column indices [B] of this rank's own texts among the N of the global batch.

    rows: [B, N, ...]. Raises ValueError unless N = B x ranks.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if _distributed() else (1, 0)
    n_images, n_texts = rows.shape[:2]
    if n_texts != n_images * ranks:
        raise ValueError(
            f"{n_images} images x {ranks} ranks need {n_images * ranks} texts, got {n_texts}"
        )
    return torch.arange(n_images, device=rows.device) + rank * n_images  # [B]


def normalize(x, dim=-1):
    """x / |x| along dim, with a floor of 1e-6 for |x|, which half precision can hold."""
    return F.normalize(x, dim=dim, eps=EPS)


def info_nce(similarity, log_scale):
    """Symmetric InfoNCE of this rank's B images and its B texts against the global batch.

    similarity: [B, N] cosines, row i is local image i against every text. log_scale: scalar, log(1
    / tau); the scale is clamped to at most 100 as in CLIP. Returns a scalar. The text-to-image
    direction needs whole columns, so the rows of the matrix are gathered. Release differs: for the
    feature-level loss it gathers pooled features, which pairs other ranks' images with the wrong
    texts.
    """
    targets = positives(similarity)  # [B]
    scale = log_scale.exp().clamp(max=100.0)
    columns = gather(similarity)[:, targets].T  # [B, N]: local text j against every image
    image_to_text = F.cross_entropy(scale * similarity, targets)
    text_to_image = F.cross_entropy(scale * columns, targets)
    return (image_to_text + text_to_image) / 2  # Eq. (7)


def gumbel_sigmoid(logits, noise, tau=1.0):
    """Binary sample of a mask with the gradient of its relaxation, Fig. 3 line 14 (Jang et al.
    2017).

    logits: mask logits of any shape. noise: uniform in (0, 1), same shape. Returns 0 or 1, straight
    through. Fig. 3 samples the mask after its sigmoid, but a sample needs logits: the release takes
    them, and so do we.
    """
    soft = torch.sigmoid((logits + torch.logit(noise, eps=1e-7)) / tau)
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())


def masked_pool(dense, masks):
    """Feature-level grounded image embeddings v_f: image i averaged over the mask of text j.

    dense: [B, C, H, W]. masks: [B, N, H, W] in [0, 1]. Returns [B, N, C].
    """
    total = torch.einsum("bchw,bnhw->bnc", dense, masks)  # [B, N, C]
    return total / (masks.sum((2, 3))[..., None] + EPS)  # Eq. (8), [B, N, C]


def pair_areas(areas):
    """Mean area of this rank's positive and of its negative masks: [2].

    areas: [B, N], one mask's mean over H, W each. The mask of local image i and its own text is
    positive, the others are negative; without negatives their mean is 0.
    """
    targets = positives(areas)
    is_positive = F.one_hot(targets, areas.shape[1]).to(areas)  # [B, N]
    pos = (areas * is_positive).sum() / is_positive.sum()
    neg = (areas * (1 - is_positive)).sum() / (1 - is_positive).sum().clamp(min=1)
    return torch.stack([pos, neg])  # [2]


def area_prior(areas, p_pos=0.4, p_neg=0.0, per_rank=False):
    """The two terms of the area prior over the global batch: (positive, negative), two scalars.

    areas: [B, N] in [0, 1], the mean over H, W of the mask of local image i and text j. A global
    batch of one pair has no negatives: their mean area is taken for 0.
    per_rank: Release differs: the absolute value is of each rank's own mean.
    """
    # The absolute value is of the expectation, so the mean over ranks comes first: |E| is not E| |.
    means = pair_areas(areas).unsqueeze(0)  # [1, 2]
    mean_pos, mean_neg = (means if per_rank else gather(means)).mean(0)  # [ranks, 2] -> 2 scalars
    return (p_pos - mean_pos).abs(), (p_neg - mean_neg).abs()  # Eq. (10)


def total_variation(x):
    """Anisotropic total variation of the smooth prior, one value a map: the loss is their mean.

    x: [..., H, W]. Returns [...]. Paper silent: the mean of |difference| along each axis, summed
    over the two axes (as the release). Raises ValueError for a map of one row or one column: it has
    no differences along an axis.
    """
    if min(x.shape[-2:]) < 2:
        raise ValueError(f"a map of {x.shape[-2]} x {x.shape[-1]} has no neighbours along one axis")
    # Sums of |differences| down the columns [..., H-1, W] and along the rows [..., H, W-1]: [...].
    down, along = (torch.linalg.vector_norm(x.diff(dim=axis), 1, (-2, -1)) for axis in (-2, -1))
    height, width = x.shape[-2:]
    return down / ((height - 1) * width) + along / (height * (width - 1))  # Eq. (11)
