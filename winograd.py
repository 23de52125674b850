# SPDX-License-Identifier: MIT
"""A faster 3x3 convolution for CPUs, in float32: optional. Needs torch alone.

use(net) swaps the fitting convolutions of a module for this one. Delete this file and its two calls
(train.py, evaluate.py) and nothing but time on CPUs is lost.

Winograd's F(4, 3), Lavin and Gray 2016, https://arxiv.org/abs/1509.09308. The product of two
polynomials u and w with 4 and 3 coefficients has 6, so its values at 6 points tell it, and each is
a product of two numbers. With V(n) the matrix that takes n coefficients to these values,

    u * w = V(6)^-1 ((V(4) u) (V(3) w))

4 neighbouring outputs of a kernel w with 3 taps, over 6 inputs y, are its transpose for u,

    A^T ((G w) (B y))    with A = V(4), G = V(3), B = V(6)^-T

so 6 multiplications instead of 12. One point is infinity, where the highest coefficient alone
counts. In float32 the points 0, +-sqrt(1/2), +-sqrt(2) err half as much as 0, +-1, +-2. Two
dimensions take the matrices on both axes, 36 products instead of 144; sums over channels become
matrix products.

>>> conv = use(torch.nn.Conv2d(4, 4, 3, padding=1))
>>> type(conv).__name__, conv(torch.zeros(1, 4, 9, 7)).shape
('Winograd', torch.Size([1, 4, 9, 7]))
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

TILES = 256  # at a time: enough for a fast matrix product, few enough that their buffers stay small
POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))  # and infinity


def values(n):
    """V(n), [6, n]: 1, p, p^2, ... at the points, the highest power alone at infinity."""
    powers = torch.tensor(POINTS, dtype=torch.float64)[:, None] ** torch.arange(n)  # [5, n]
    return torch.cat([powers, torch.eye(n, dtype=torch.float64)[-1:]])


A, G, B = values(4), values(3), values(6).inverse().T


def on_both_axes(matrix, like):
    """A matrix for one axis as one for two: [m, n] -> [m*m, n*n], in the dtype of like."""
    return torch.kron(matrix, matrix).to(like.dtype)


def grid(x):
    """(rows, columns) of the 4x4 tiles that cover x [B, H, W, D]."""
    return -(-x.shape[1] // 4), -(-x.shape[2] // 4)


def parts(*maps):
    """Slices of the batch of maps [B, H, W, D], a few images each."""
    rows, columns = grid(maps[0])
    return zip(*(x.split(max(1, TILES // (rows * columns))) for x in maps), strict=True)


def values_of_inputs(x):
    """B y of the 6x6 inputs of every tile: [B, H, W, D] -> [36, tiles, D]."""
    (rows, columns), (height, width) = grid(x), x.shape[1:3]
    x = F.pad(x, (0, 0, 1, 4 * columns + 1 - width, 1, 4 * rows + 1 - height))
    x = x.unfold(1, 6, 4).unfold(2, 6, 4)  # [B, rows, columns, D, 6, 6], neighbours overlap by 2
    inputs = x.permute(4, 5, 0, 1, 2, 3).reshape(36, -1)  # [36, tiles * D]
    return (on_both_axes(B, x) @ inputs).unflatten(1, (-1, x.shape[3]))  # [36, tiles, D]


def convolve(x, weight):
    """3x3, a border of zeros. x: [B, H, W, I], weight: [O, I, 3, 3]. Returns [B, H, W, O]."""
    tiling, (height, width) = grid(x), x.shape[1:3]
    kernels = on_both_axes(G, weight) @ weight.flatten(2).flatten(0, 1).T  # [36, 9] [9, O*I]
    kernels = kernels.unflatten(1, weight.shape[:2])  # [36, O, I]
    a, out = on_both_axes(A, x), []
    for (part,) in parts(x):
        products = values_of_inputs(part) @ kernels.mT  # [36, tiles, I] [36, I, O]
        tiles = a.T @ products.flatten(1)  # [16, 36] [36, tiles * O]
        tiles = tiles.view(4, 4, len(part), *tiling, len(weight))  # [4, 4, B, rows, columns, O]
        tiles = tiles.permute(2, 3, 0, 4, 1, 5)  # [B, rows, 4, columns, 4, O]
        out.append(tiles.flatten(3, 4).flatten(1, 2)[:, :height, :width])  # [B, H, W, O]
    return torch.cat(out)


def weight_gradient(x, gradient):
    """Of convolve, its lines transposed. gradient: [B, H, W, O]. Returns [O, I, 3, 3]."""
    (rows, columns), (height, width) = grid(x), x.shape[1:3]
    a, of_kernels = on_both_axes(A, x), 0
    for part, arrived in parts(x, gradient):
        arrived = F.pad(arrived, (0, 0, 0, 4 * columns - width, 0, 4 * rows - height))
        tiles = arrived.unflatten(2, (-1, 4)).unflatten(1, (-1, 4))  # [B, rows, 4, columns, 4, O]
        tiles = tiles.permute(2, 4, 0, 1, 3, 5).reshape(16, -1)  # [16, tiles * O]
        of_products = (a @ tiles).unflatten(1, (-1, gradient.shape[3]))  # [36, tiles, O]
        of_kernels = of_kernels + of_products.mT @ values_of_inputs(part)  # [36, O, I]
    of_weight = on_both_axes(G, x).T @ of_kernels.flatten(1)  # [9, 36] [36, O*I]
    return of_weight.T.reshape(*of_kernels.shape[1:], 3, 3)  # [O, I, 3, 3]


class Convolve(torch.autograd.Function):
    """convolve with the gradients in the same scheme, where autograd would keep all tiles."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return convolve(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """[B, H, W, O]. The inputs' is a convolution too: kernels turned, channels swapped."""
        x, weight = ctx.saved_tensors
        of_x = convolve(gradient, weight.flip(2, 3).transpose(0, 1))
        return of_x, weight_gradient(x, gradient)


def fits(conv):
    """Whether a convolution is 3x3, dense, with a border of one zero."""
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and conv.padding_mode == "zeros"


class Winograd(nn.Conv2d):
    """nn.Conv2d by F(4, 3) on CPUs in float32 and float64; else, and under autocast, the library's.

    Differentiable once.
    """

    def forward(self, x):
        """[B, I, H, W] -> [B, O, H, W]."""
        exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
        if not (exact and x.device.type == "cpu" and x.ndim == 4 and fits(self)):
            return super().forward(x)
        y = Convolve.apply(x.permute(0, 2, 3, 1), self.weight)  # [B, H, W, O]
        return (y if self.bias is None else y + self.bias).permute(0, 3, 1, 2)  # [B, O, H, W]


def use(net):
    """Makes every fitting nn.Conv2d of net a Winograd, in place, and returns net."""
    for module in net.modules():
        if type(module) is nn.Conv2d and fits(module):
            module.__class__ = Winograd
    return net
