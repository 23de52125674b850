# SPDX-License-Identifier: MIT
"""The adapter F of the grounder, Appendix A. Needs torch alone; copy it.

Four gated convolution blocks in two stages, each stage after a x2 upsampling, on the patch grid of a frozen ViT.
With all gates at 0 it only upsamples: an untrained grounder is exactly MaskCLIP.

What is computed is x + tanh(g) * Conv(GELU(LayerNorm(up(x)))), with fewer products on CPUs and less memory everywhere:
Conv is linear in its weights, so the gate scales them and no map; LayerNorm and GELU work pixel by pixel, so they come
before the upsampling, and the backward pass computes them again; and convolutions take the shortcuts below.

>>> Adapter(width=8)(torch.zeros(1, 8, 14, 14)).shape
torch.Size([1, 8, 56, 56])
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

TILES = 512  # tiles at a time: enough for a fast matrix product, few enough that their buffers stay small


class Scheme(NamedTuple):
    """Two neighbouring outputs of a 3-tap kernel w over inputs y as A^T [(G w) * (B y)], twice for two axes."""

    step: int  # inputs from one tile to the next
    b: tuple
    g: tuple
    a: tuple  # A, not transposed: one row a product


# Winograd's F(2, 3) (Lavin and Gray 2016): m = (y0-y2) w0, (y1+y2) (w0+w1+w2)/2, (y2-y1) (w0-w1+w2)/2, (y1-y3) w2;
# the outputs are m0+m1+m2 and m1-m2-m3: 4 products instead of 6, in two dimensions 16 instead of 36.
PLAIN = Scheme(
    step=2,
    b=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    g=((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)),
    a=((1, 0), (1, 1), (1, -1), (0, -1)),
)
# After nearest upsampling the inputs are y0 y1 y1 y2: m = (y0-y1) w0, y1 (w0+w1+w2), (y2-y1) w2; the outputs are m0+m1
# and m1+m2: 3 products on the small grid instead of 6, in two dimensions 9 instead of 36.
UPSAMPLED = Scheme(
    step=1,
    b=((1, -1, 0), (0, 1, 0), (0, -1, 1)),
    g=((1, 0, 0), (1, 1, 1), (0, 0, 1)),
    a=((1, 0), (1, 1), (0, 1)),
)


def _sum(coefficients, parts, out):
    """out = sum of coefficient * part; coefficients are 0, 1 or -1."""
    (first, x), *rest = sorted([(c, x) for c, x in zip(coefficients, parts, strict=True) if c], key=lambda cx: -cx[0])
    torch.mul(x, first, out=out) if not rest else torch.add(x, rest[0][1], alpha=rest[0][0], out=out)
    for c, x in rest[1:]:
        out.add_(x, alpha=c)


def _to_tiles(x, matrix, step, rows, columns):
    """tiles[a, b] = sum_ij matrix[a][i] matrix[b][j] x[i::step, j::step]: [B, H, W, D] -> [t, t, B, h, w, D]."""
    taps = range(len(matrix[0]))
    tiles = x.new_empty(len(matrix), len(matrix), len(x), rows, columns, x.shape[-1])
    line = x.new_empty(len(x), rows, *x.shape[2:])  # [B, rows, W, D]
    for a, of_rows in enumerate(matrix):
        _sum(of_rows, [x[:, i : i + step * (rows - 1) + 1 : step] for i in taps], line)
        shifted = [line[:, :, j : j + step * (columns - 1) + 1 : step] for j in taps]
        for b, of_columns in enumerate(matrix):
            _sum(of_columns, shifted, tiles[a, b])
    return tiles


def _add_tiles(x, tiles, matrix, step):
    """The adjoint: x[i::step, j::step] += sum_ab matrix[a][i] matrix[b][j] tiles[a, b]."""
    rows, columns = tiles.shape[3:5]
    for i, of_rows in enumerate(zip(*matrix, strict=True)):
        line = torch.empty_like(tiles[0])  # [t, B, rows, columns, D]
        _sum(of_rows, tiles, line)
        for j, of_columns in enumerate(zip(*matrix, strict=True)):
            part = x[:, i : i + step * (rows - 1) + 1 : step, j : j + step * (columns - 1) + 1 : step]
            for c, term in zip(of_columns, line, strict=True):
                if c:
                    part.add_(term, alpha=c)


def _bands(y, scheme):
    """y with a border of zeros [B, H', W', D], and (first, rows, columns) of bands of tiles that cover y."""
    batch, height, width, _ = y.shape
    rows, columns = -(-height // scheme.step), -(-width // scheme.step)  # of tiles
    border = (1, columns * scheme.step - width + 1, 1, rows * scheme.step - height + 1)
    high = max(1, TILES // (batch * columns))
    return F.pad(y, (0, 0, *border)), [(k, min(high, rows - k), columns) for k in range(0, rows, high)]


def _kernels(weight, scheme):
    """G w G^T, flat: weight [O, I, 3, 3] -> [t*t, O, I], and the matrix [t*t, 9] that does it."""
    g = torch.tensor(scheme.g, dtype=weight.dtype, device=weight.device)
    g = torch.kron(g, g)  # [t*t, 9]
    return (g @ weight.reshape(-1, 9).T).unflatten(1, weight.shape[:2]), g


def _conv_add(out, y, weight, scheme):
    """out += Conv(y), no bias, in place. out: [B, 2 rows, 2 columns, O], y: [B, H, W, I], weight: [O, I, 3, 3]."""
    kernels, _ = _kernels(weight, scheme)
    padded, bands = _bands(y, scheme)
    for k, rows, columns in bands:
        tiles = _to_tiles(padded[:, k * scheme.step :], scheme.b, scheme.step, rows, columns)
        product = tiles.flatten(0, 1).flatten(1, 3) @ kernels.mT  # [t*t, tiles, I] [t*t, I, O]
        _add_tiles(out[:, 2 * k :], product.view(*tiles.shape[:-1], -1), scheme.a, 2)


def _conv_gradients(gradient, y, weight, scheme):
    """Gradients (of y, of weight) of that convolution, with as few products. gradient: [B, 2 rows, 2 columns, O]."""
    kernels, g = _kernels(weight, scheme)
    padded, bands = _bands(y, scheme)
    of_padded = torch.zeros_like(padded)
    of_kernels = torch.zeros_like(kernels)
    for k, rows, columns in bands:
        tiles = _to_tiles(padded[:, k * scheme.step :], scheme.b, scheme.step, rows, columns)
        of_tiles = _to_tiles(gradient[:, 2 * k :], scheme.a, 2, rows, columns).flatten(0, 1).flatten(1, 3)
        of_kernels.baddbmm_(of_tiles.mT, tiles.flatten(0, 1).flatten(1, 3))  # [t*t, O, tiles] [t*t, tiles, I]
        product = (of_tiles @ kernels).view_as(tiles)  # [t*t, tiles, O] [t*t, O, I]
        _add_tiles(of_padded[:, k * scheme.step :], product, scheme.b, scheme.step)
    of_weight = (g.T @ of_kernels.flatten(1)).T.reshape(weight.shape)  # [9, O*I] -> [O, I, 3, 3]
    return of_padded[:, 1 : y.shape[1] + 1, 1 : y.shape[2] + 1], of_weight


def scheme_of(weight, up):
    """The shortcut that pays, or None for the library's own convolution; both are exact.

    Measured on CPUs: both in float32, after upsampling alone in half precision. Other devices were not measured.
    """
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return None if weight.device.type != "cpu" or half and not up else UPSAMPLED if up else PLAIN


def upsample(x):
    """Nearest x2 of [B, H, W, D]."""
    batch, height, width, depth = x.shape
    x = x[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)  # [B, H, 2, W, 2, D]
    return x.clone(memory_format=torch.contiguous_format).view(batch, 2 * height, 2 * width, depth)


def sum_2x2(x):
    """The adjoint of upsample: [B, 2H, 2W, D] -> [B, H, W, D]."""
    return x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).sum((2, 4))


class _Residual(torch.autograd.Function):
    """up(x) + Conv(GELU(LayerNorm(up(x)))) on [B, H, W, D]. Keeps x alone, and computes the cheap rest again."""

    @staticmethod
    def activate(x, norm_weight, norm_bias, dtype):
        return F.gelu(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps=1e-5)).to(dtype)

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, up):
        ctx.save_for_backward(x, norm_weight, norm_bias, weight)
        ctx.up, (_, height, width, _) = up, x.shape
        y = _Residual.activate(x, norm_weight, norm_bias, weight.dtype)
        scheme = scheme_of(weight, up)
        if scheme is None:
            y = (upsample(y) if up else y).permute(0, 3, 1, 2)
            y = F.conv2d(y, weight, bias.to(weight.dtype), padding=1).permute(0, 2, 3, 1)
            return (upsample(x) if up else x) + y
        out = upsample(x + bias) if up else F.pad(x + bias, (0, 0, 0, width % 2, 0, height % 2))
        _conv_add(out, y, weight, scheme)
        return out if up else out[:, :height, :width]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:3]]
        with torch.enable_grad():
            leaves = [v.detach().requires_grad_(w) for v, w in zip((x, norm_weight, norm_bias), wanted, strict=True)]
            y = _Residual.activate(*leaves, weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            of_y, of_weight = _Residual.conv_backward(gradient.to(weight.dtype), y.detach(), weight, ctx.up)
            found = iter(torch.autograd.grad(y, [v for v in leaves if v.requires_grad], of_y) if any(wanted) else ())
        of_leaves = [next(found) if w else None for w in wanted]
        if wanted[0]:
            of_leaves[0] += sum_2x2(gradient) if ctx.up else gradient
        return *of_leaves, of_weight, gradient.sum((0, 1, 2)), None

    @staticmethod
    def conv_backward(gradient, y, weight, up):
        """Gradients (of y, of weight) of Conv(up(y)) without its bias; gradient: [B, H, W, O]."""
        scheme = scheme_of(weight, up)
        if scheme is not None:
            odd = [side % 2 for side in gradient.shape[1:3]]
            return _conv_gradients(F.pad(gradient, (0, 0, 0, odd[1], 0, odd[0])), y, weight, scheme)
        y, gradient = ((upsample(y) if up else y).permute(0, 3, 1, 2)), gradient.permute(0, 3, 1, 2)
        of_y = torch.nn.grad.conv2d_input(y.shape, weight, gradient, padding=1).permute(0, 2, 3, 1)
        return sum_2x2(of_y) if up else of_y, torch.nn.grad.conv2d_weight(y, weight.shape, gradient, padding=1)


class GatedBlock(nn.Module):
    """x + tanh(g) * Conv(x) on maps [B, D, H, W] of any size, upsampled x2 first if asked; g starts at 0.

    Paper silent: what stands before the convolution. The release's: LayerNorm over channels, then exact GELU.
    """

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x, up=False):
        kind, gate = x.device.type, torch.tanh(self.gate)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.conv.weight.dtype
        weight, bias = gate * self.conv.weight, gate * self.conv.bias  # tanh(g) Conv(x) has tanh(g) times the weights
        with torch.autocast(kind, enabled=False):
            x = x.permute(0, 2, 3, 1).contiguous()  # [B, H, W, D], which the convolution and LayerNorm take as it is
            # Eq. (13): x + tanh(g) * Conv(GELU(LayerNorm(x))), the gate inside weight and bias
            x = _Residual.apply(x, self.norm.weight, self.norm.bias, weight.to(dtype), bias, up)
        return x.permute(0, 3, 1, 2)  # [B, D, H, W]


class Adapter(nn.Module):
    """[B, D, H, W] -> [B, D, 4H, 4W]: two stages of nearest x2 upsampling and two gated blocks."""

    def __init__(self, width, stages=2):
        super().__init__()
        self.stages = nn.ModuleList(
            # The first is what the block after it takes in; it stands here for the names of the weights.
            nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), GatedBlock(width), GatedBlock(width))
            for _ in range(stages)
        )

    def forward(self, x):
        for _, first, second in self.stages:
            x = second(first(x, up=True))  # [B, D, H, W] -> [B, D, 2H, 2W]; the first block takes in the upsampling
        return x
