# SPDX-License-Identifier: MIT
"""Pixel-adaptive mask refinement (PAMR; Araslanov and Roth 2020), Sec. 3.4 of the paper.

Needs torch alone; copy it. One iteration replaces every mask value by a weighted mean of its
neighbours, with weights that depend on the image alone. So an iteration is a product with one fixed
sparse matrix, the same for all classes and iterations: no [B, K, neighbours, H, W] tensor is held.

>>> image, mask = torch.rand(1, 3, 20, 30), torch.rand(1, 5, 10, 15)
>>> pamr(image, mask).shape
torch.Size([1, 5, 20, 30])
"""

import warnings

import torch
import torch.nn.functional as F


def neighbours(height, width, dilations, device="cpu"):
    """Flat indices [H*W, 8 * len(dilations)] of each pixel's neighbours; outside the image the
    border pixel repeats.
    """
    y, x = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    # (dy, dx) from a pixel to each of its 8 neighbours, at every dilation.
    steps = [
        (d * i, d * j)
        for d in dilations
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
        if (i, j) != (0, 0)
    ]
    index = [
        (y + dy).clamp(0, height - 1) * width + (x + dx).clamp(0, width - 1) for dy, dx in steps
    ]
    return torch.stack(index, dim=-1).flatten(0, 1)  # [H, W, n] -> [H*W, n]


def affinity(image, index, n_dilations):
    """Weights [H*W, n] of each pixel's n neighbours, rows adding to 1. image: [C, H*W] float;
    index: [H*W, n].

    -|x_p - x_q| / (1e-8 + 0.1 sigma_p), averaged over channels, softmax over all neighbours.
    sigma_p is the unbiased standard deviation over the nine values of every dilation together, so
    the centre counts once per dilation.
    """
    near = image[:, index]  # [C, H*W, n]
    centre = image.unsqueeze(-1)  # [C, H*W, 1]
    sigma = torch.cat([near, centre.expand(-1, -1, n_dilations)], dim=-1).std(
        dim=-1, keepdim=True
    )  # [C, H*W, 1]
    weights = -(near - centre).abs() / (1e-8 + 0.1 * sigma)  # [C, H*W, n]
    return weights.mean(0).softmax(-1)  # [H*W, n]


def _iterate(weights, index, mask, iterations):
    """mask [H*W, K] after some iterations of mask[p] = sum_n weights[p, n] mask[index[p, n]]."""
    if mask.device.type not in ("cpu", "cuda"):
        # No sparse product there: one neighbour at a time, the same result.
        for _ in range(iterations):
            # [H*W, K]
            mask = sum(weights[:, n, None] * mask[index[:, n]] for n in range(index.shape[1]))
        return mask
    pixels, n = index.shape
    # Where each row of the matrix starts among all its entries: every row has n of them.
    starts = torch.arange(0, pixels * n + 1, n, dtype=torch.int32, device=index.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")  # torch's notices on its CSR layout
        # On CPUs a repeated border pixel stays as several entries of its row, which a product sums
        # up all the same.
        columns, values = index.flatten().int(), weights.flatten()  # [H*W, n] -> [H*W*n]
        matrix = torch.sparse_csr_tensor(starts, columns, values, (pixels, pixels))
        if mask.is_cuda:  # not promised there, so they are merged
            matrix = matrix.to_sparse_coo().coalesce().to_sparse_csr()
    for _ in range(iterations):
        mask = matrix @ mask  # [H*W, H*W] [H*W, K] -> [H*W, K]
    return mask


def pamr(image, mask, iterations=10, dilations=(1, 2, 4, 8, 12, 24)):
    """Refines mask values along the edges of an image.

    image: [B, 3, H, W] float; any affine scale of the colours gives the same weights. mask: [B, K,
    h, w], resized to the image first (bilinear, align_corners=True). Returns [B, K, H, W] in the
    mask's dtype. The gradient flows to the mask; the weights are constants.
    """
    batch, classes = mask.shape[:2]
    height, width = image.shape[-2:]
    work = torch.promote_types(mask.dtype, torch.float32)  # half precision is refined in float32
    # [B, K, H, W]
    values = F.interpolate(mask.to(work), size=(height, width), mode="bilinear", align_corners=True)
    index = neighbours(height, width, dilations, image.device)
    refined = []
    with torch.autocast(image.device.type, enabled=False):
        # There is no sparse product in half precision. Each image has a matrix of its own.
        for b in range(batch):
            with torch.no_grad():
                colours = image[b].to(work).flatten(1)  # [3, H, W] -> [3, H*W]
                weights = affinity(colours, index, len(dilations))
            flat = values[b].flatten(1).T.contiguous()  # [K, H, W] -> [H*W, K]
            flat = _iterate(weights, index, flat, iterations)
            refined.append(flat.T.view(classes, height, width))  # [H*W, K] -> [K, H, W]
    return torch.stack(refined).to(mask.dtype)
