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

TILES = 256  # tiles at a time: enough for a fast matrix product, few enough that their buffers stay small
R, Q = 0.5**0.5, 2**0.5


class Scheme(NamedTuple):
    """Neighbouring outputs of a 3-tap kernel w over inputs y as A^T [(G w) * (B y)], twice for two axes."""

    step: int  # inputs from one tile to the next
    out: int  # outputs of a tile
    b: tuple  # [products, inputs of a tile]
    g: tuple  # [products, 3]
    a: tuple  # [products, out]: A, not transposed


# Winograd's F(4, 3) (Lavin and Gray 2016): a product of polynomials from its values at 0, R, -R, Q, -Q and infinity: 6
# products for 4 outputs instead of 12. With f(s) = s (s^2 - 1/2) (s^2 - 2), row p of B is f(s) / (s - p), lowest power
# first, of G it is 1 p p^2 over f'(p), of A 1 p p^2 p^3; for infinity they are f and the last unit rows. In float32 the
# error is 2 times the plain sum's, of the weights' gradient 4 times; with 1, -1, 2, -2 it would be twice that.
PLAIN = Scheme(
    step=4,
    out=4,
    b=(
        (1, 0, -2.5, 0, 1, 0),
        (0, -Q, -2, R, 1, 0),
        (0, Q, -2, -R, 1, 0),
        (0, -R, -0.5, Q, 1, 0),
        (0, R, -0.5, -Q, 1, 0),
        (0, 1, 0, -2.5, 0, 1),
    ),
    g=(
        (1, 0, 0),
        (-2 / 3, -2 / 3 * R, -1 / 3),
        (-2 / 3, 2 / 3 * R, -1 / 3),
        (1 / 6, Q / 6, 1 / 3),
        (1 / 6, -Q / 6, 1 / 3),
        (0, 0, 1),
    ),
    a=((1, 0, 0, 0), (1, R, 0.5, R / 2), (1, -R, 0.5, -R / 2), (1, Q, 2, 2 * Q), (1, -Q, 2, -2 * Q), (0, 0, 0, 1)),
)
# After nearest upsampling, outputs 0 and 2 have the taps w0, w1+w2 on y0 y1 y2, outputs 1 and 3 the taps w0+w1, w2 on
# y1 y2 y3. At the point 1 both pairs have one value, w0+w1+w2, and share that product: 5 for 4 outputs instead of 12.
# The points are 0, 1, -1 for the first pair, and 1, -1, infinity for the second.
UPSAMPLED = Scheme(
    step=2,
    out=4,
    b=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, -1, 0), (0, -1, 0, 1)),
    g=((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, -0.5), (0.5, 0.5, -0.5), (0, 0, 1)),
    a=((1, 0, 0, 0), (1, 1, 1, 1), (1, 0, -1, 0), (0, 1, 0, -1), (0, 0, 0, 1)),
)


def _both_axes(matrix, like):
    """A matrix that acts on one axis as one that acts on two: [t, n] -> [t*t, n*n], dtype and device of like."""
    matrix = torch.tensor(matrix, dtype=like.dtype, device=like.device)
    return torch.kron(matrix, matrix)


def _patches(x, size, step, rows, columns):
    """rows x columns patches of size x size, one every step: [B, H, W, D] -> [size*size, B*rows*columns*D]."""
    x = x.unfold(1, size, step)[:, :rows].unfold(2, size, step)[:, :, :columns]  # [B, rows, columns, D, size, size]
    return x.permute(4, 5, 0, 1, 2, 3).reshape(size * size, -1)  # [size, size, B, ...] -> [size*size, ...]


def _add_patches(x, patches, size, step, rows, columns):
    """The adjoint, in place: each patch is added where it was cut from x [B, H, W, D]."""
    patches = patches.view(size, size, len(x), rows, columns, -1)  # [size, size, B, rows, columns, D]
    for i in range(size):
        for j in range(size):
            x[:, i : i + step * (rows - 1) + 1 : step, j : j + step * (columns - 1) + 1 : step] += patches[i, j]


def _tiles_at_once(dtype):
    """In bfloat16 more: there each sum over tiles costs a pass to add it up in float32."""
    return 4 * TILES if dtype == torch.bfloat16 else TILES


def _grid(y, scheme):
    """(rows, columns) of the tiles that cover the inputs y [B, H, W, D]."""
    return tuple(-(-side // scheme.step) for side in y.shape[1:3])


def _bands(y, scheme):
    """y with a border of zeros [B, H', W', D], and (first, rows, columns) of bands of tiles that cover y."""
    (rows, columns), beyond = _grid(y, scheme), len(scheme.b[0]) - scheme.step - 1  # of the border; above and left 1
    border = (1, columns * scheme.step - y.shape[2] + beyond, 1, rows * scheme.step - y.shape[1] + beyond)
    high = max(1, _tiles_at_once(y.dtype) // (len(y) * columns))
    return F.pad(y, (0, 0, *border)), [(k, min(high, rows - k), columns) for k in range(0, rows, high)]


def _kernels(weight, scheme):
    """G w G^T, flat: weight [O, I, 3, 3] -> [t*t, O, I]."""
    kernels = _both_axes(scheme.g, weight) @ weight.reshape(-1, 9).T  # [t*t, 9] [9, O*I]
    return kernels.unflatten(1, weight.shape[:2])  # [t*t, O, I]


def _conv_add(out, y, kernels, scheme):
    """out += Conv(y), no bias, in place. y: [B, H, W, I], kernels: [t*t, O, I], out: [B, H', W', O], whole tiles."""
    a, b, (padded, bands) = _both_axes(scheme.a, y), _both_axes(scheme.b, y), _bands(y, scheme)
    for k, *grid in bands:
        tiles = b @ _patches(padded[:, k * scheme.step :], len(scheme.b[0]), scheme.step, *grid)  # [t*t, tiles*I]
        product = tiles.unflatten(1, (-1, y.shape[-1])) @ kernels.mT  # [t*t, tiles, I] [t*t, I, O]
        outputs = a.T @ product.flatten(1)  # [out*out, t*t] [t*t, tiles*O]
        _add_patches(out[:, k * scheme.out :], outputs, scheme.out, scheme.out, *grid)


def _add_product(total, left, right):
    """total + left @ right of stacked matrices, in place, in float32 at least; total None at first."""
    if total is not None and total.dtype == left.dtype:
        return total.baddbmm_(left, right)
    product = left @ right
    return product.to(torch.promote_types(left.dtype, torch.float32)) if total is None else total.add_(product)


def _conv_gradients(gradient, y, kernels, of_kernels, scheme):
    """The gradient of y, and of_kernels (None at first) plus that of the kernels. gradient: as out, whole tiles."""
    a, b, (padded, bands) = _both_axes(scheme.a, y), _both_axes(scheme.b, y), _bands(y, scheme)
    of_padded, size = torch.zeros_like(padded), len(scheme.b[0])
    for k, *grid in bands:
        tiles = b @ _patches(padded[:, k * scheme.step :], size, scheme.step, *grid)  # [t*t, tiles*I]
        tiles = tiles.unflatten(1, (-1, y.shape[-1]))  # [t*t, tiles, I]
        of_product = a @ _patches(gradient[:, k * scheme.out :], scheme.out, scheme.out, *grid)  # [t*t, tiles*O]
        of_product = of_product.unflatten(1, (-1, gradient.shape[-1]))  # [t*t, tiles, O]
        of_kernels = _add_product(of_kernels, of_product.mT, tiles)  # [t*t, O, tiles] [t*t, tiles, I]
        of_tiles = (of_product @ kernels).flatten(1)  # [t*t, tiles, O] [t*t, O, I]
        _add_patches(of_padded[:, k * scheme.step :], b.T @ of_tiles, size, scheme.step, *grid)
    return of_padded[:, 1 : y.shape[1] + 1, 1 : y.shape[2] + 1], of_kernels


def _whole_tiles(x, scheme):
    """x [B, H, W, D] with zeros below and on the right, up to whole tiles of outputs; x itself where it has them."""
    below, right = (-side % scheme.out for side in x.shape[1:3])
    return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x


def scheme_of(weight, up):
    """The shortcut that pays, or None for the library's own convolution; they differ in rounding alone.

    Measured on CPUs: both in float32, after upsampling alone in bfloat16. float16 has not the range for sums of a tile,
    other devices were not measured.
    """
    if weight.device.type != "cpu" or weight.dtype == torch.float16:
        return None
    if up:
        return UPSAMPLED
    return None if weight.dtype == torch.bfloat16 else PLAIN


def upsample(x):
    """Nearest x2 of [B, H, W, D]."""
    batch, height, width, depth = x.shape
    x = x[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)  # [B, H, 2, W, 2, D]
    x = x.clone(memory_format=torch.contiguous_format)
    return x.view(batch, 2 * height, 2 * width, depth)  # [B, 2H, 2W, D]


def sum_2x2(x):
    """The adjoint of upsample: [B, 2H, 2W, D] -> [B, H, W, D]."""
    return x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).sum((2, 4))  # [B, H, 2, W, 2, D] -> [B, H, W, D]


def _library_gradients(gradient, y, weight, up):
    """Gradients (of y, of weight) of Conv(up(y)), no bias, as torch computes them. gradient: [B, H', W', O]."""
    y, gradient = ((upsample(y) if up else y).permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2))  # [B, I or O, H', W']
    of_y = torch.nn.grad.conv2d_input(y.shape, weight, gradient, padding=1).permute(0, 2, 3, 1)  # [B, H', W', I]
    return sum_2x2(of_y) if up else of_y, torch.nn.grad.conv2d_weight(y, weight.shape, gradient, padding=1)


class _Residual(torch.autograd.Function):
    """up(x) + Conv(GELU(LayerNorm(up(x)))) on [B, H, W, D]. Keeps x alone, and computes the cheap rest again.

    CPUs take a few images at a time, so that what lies between x and the result is never held for all of them.
    """

    @staticmethod
    def activate(x, norm_weight, norm_bias, dtype):
        """GELU(LayerNorm(x)), what the convolution takes, in its dtype. [B, H, W, D]."""
        return F.gelu(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps=1e-5)).to(dtype)

    @staticmethod
    def parts(x, scheme, dtype):
        """Slices of the batch: images of a band's tiles, at least one; all of them on other devices than CPUs."""
        if x.device.type != "cpu":
            return [slice(None)]
        rows, columns = _grid(x, scheme or PLAIN)
        n = max(1, (TILES if scheme is None else _tiles_at_once(dtype)) // (rows * columns))
        return [slice(k, k + n) for k in range(0, len(x), n)]

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, up):
        """x: [B, H, W, D], weight: [D, D, 3, 3]. Returns [B, H, W, D], twice as high and wide if up."""
        ctx.save_for_backward(x, norm_weight, norm_bias, weight)
        ctx.up, scheme = up, scheme_of(weight, up)
        if scheme is None:
            height, width = (side * (2 if up else 1) for side in x.shape[1:3])
            out = x.new_empty(len(x), height, width, len(weight))
            for part in _Residual.parts(x, scheme, weight.dtype):
                y = _Residual.activate(x[part], norm_weight, norm_bias, weight.dtype)
                y = (upsample(y) if up else y).permute(0, 3, 1, 2)  # [b, I, height, width]
                y = F.conv2d(y, weight, bias.to(weight.dtype), padding=1).permute(0, 2, 3, 1)  # [b, height, width, O]
                torch.add(upsample(x[part]) if up else x[part], y, out=out[part])
            return out
        identity = upsample(x + bias) if up else x + bias
        out, kernels = _whole_tiles(identity, scheme), _kernels(weight, scheme)
        for part in _Residual.parts(x, scheme, weight.dtype):
            _conv_add(out[part], _Residual.activate(x[part], norm_weight, norm_bias, weight.dtype), kernels, scheme)
        return out[:, : identity.shape[1], : identity.shape[2]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        """Autocast may be on around a backward pass; what is computed again must be in the forward pass's precision."""
        with torch.autocast(gradient.device.type, enabled=False):
            return _Residual.gradients(ctx, gradient)

    @staticmethod
    def gradients(ctx, gradient):
        """One for each argument of forward, None where none is wanted. gradient: as what forward returns."""
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        wanted, scheme = ctx.needs_input_grad, scheme_of(weight, ctx.up)
        kernels, of_kernels = None if scheme is None else _kernels(weight, scheme), None
        of_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        of_x = (sum_2x2(gradient) if ctx.up else gradient.clone()).to(x.dtype).contiguous()
        norm = [v.detach().requires_grad_(w) for v, w in zip((norm_weight, norm_bias), wanted[1:3], strict=True)]
        for part in _Residual.parts(x, scheme, weight.dtype):
            leaf = x[part].detach().requires_grad_(wanted[0])
            leaf.grad = of_x[part]  # autograd adds in place, to what came past the convolution
            with torch.enable_grad():
                y = _Residual.activate(leaf, *norm, weight.dtype)
            arrived = gradient[part].to(weight.dtype)
            if scheme is None:
                of_y, of_part = _library_gradients(arrived, y.detach(), weight, ctx.up)
                of_weight += of_part
            else:
                arrived = _whole_tiles(arrived, scheme)
                of_y, of_kernels = _conv_gradients(arrived, y.detach(), kernels, of_kernels, scheme)
            if y.requires_grad:
                y.backward(of_y)
        if of_kernels is not None:
            of_weight = _both_axes(scheme.g, of_kernels).T @ of_kernels.flatten(1)  # [9, t*t] [t*t, O*I]
            of_weight = of_weight.T.reshape(weight.shape)  # [9, O*I] -> [O, I, 3, 3]
        of_x = of_x if wanted[0] else None
        return of_x, *(v.grad for v in norm), of_weight.to(weight.dtype), gradient.sum((0, 1, 2)), None


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
        """[B, D, H, W] -> the same, or [B, D, 2H, 2W] if up. Under autocast the convolution is in its dtype."""
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
        """Any dtype and H, W; a gradient for x and for all parameters, once differentiable."""
        for _, first, second in self.stages:
            x = second(first(x, up=True))  # [B, D, H, W] -> [B, D, 2H, 2W]; the first block takes in the upsampling
        return x
