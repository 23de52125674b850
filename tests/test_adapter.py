# SPDX-License-Identifier: MIT
"""adapter.py against plain loops written from Appendix A."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close

import adapter
from adapter import Adapter, GatedBlock


def randomize(module, seed=0):
    """Every parameter away from its start, so that none hides behind an identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return module.double()


def loop_block(x, norm_weight, norm_bias, weight, bias, gate):
    """x + tanh(g) * Conv3x3(GELU(LayerNorm over channels)), zeros outside; x [D][H][W] and all parameters as lists."""
    depth, height, width = len(x), len(x[0]), len(x[0][0])
    y = [[[0.0] * width for _ in range(height)] for _ in range(depth)]
    for h in range(height):
        for w in range(width):
            column = [x[d][h][w] for d in range(depth)]
            mean = sum(column) / depth
            variance = sum((value - mean) ** 2 for value in column) / depth
            for d in range(depth):
                z = (column[d] - mean) / math.sqrt(variance + 1e-5) * norm_weight[d] + norm_bias[d]
                y[d][h][w] = z * (1 + math.erf(z / math.sqrt(2))) / 2
    out = [[[0.0] * width for _ in range(height)] for _ in range(depth)]
    for o in range(depth):
        for h in range(height):
            for w in range(width):
                total = bias[o]
                for d in range(depth):
                    for i in range(3):
                        for j in range(3):
                            if 0 <= h + i - 1 < height and 0 <= w + j - 1 < width:
                                total += weight[o][d][i][j] * y[d][h + i - 1][w + j - 1]
                out[o][h][w] = x[o][h][w] + math.tanh(gate) * total
    return out


def loop_of(block, x):
    parameters = (block.norm.weight, block.norm.bias, block.conv.weight, block.conv.bias, block.gate)
    return torch.tensor([loop_block(m, *(p.tolist() for p in parameters)) for m in x.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("spread", [1.0, 3e-3])  # the small one makes the floor of LayerNorm's variance matter
def test_gated_block_is_the_appendix_equation(spread):
    """Eq. (13), x' = x + tanh(g) Conv(x)."""
    block, x = randomize(GatedBlock(3)), spread * torch.randn(2, 3, 3, 4, dtype=torch.float64)
    assert_close(block(x), loop_of(block, x), rtol=1e-10, atol=1e-10)


def nearest_x2(x):
    """[B, D, H, W] -> [B, D, 2H, 2W]"""
    rows = [torch.stack([x[..., h // 2, w // 2] for w in range(2 * x.shape[-1])], -1) for h in range(2 * x.shape[-2])]
    return torch.stack(rows, -2)


def test_adapter_is_two_stages_of_upsampling_and_two_blocks():
    adapter, x = randomize(Adapter(2)), torch.randn(1, 2, 2, 1, dtype=torch.float64)
    expected = x
    for stage in adapter.stages:
        expected = loop_of(stage[2], loop_of(stage[1], nearest_x2(expected)))
    assert expected.shape == (1, 2, 8, 4)
    assert_close(adapter(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(14, 14), (3, 5), (1, 7)])
def test_untrained_adapter_only_upsamples(size):
    x = torch.randn(2, 8, *size)
    upsampled = Adapter(8)(x)
    assert upsampled.shape == (2, 8, 4 * size[0], 4 * size[1])
    for h in range(4 * size[0]):
        for w in range(4 * size[1]):
            assert torch.equal(upsampled[:, :, h, w], x[:, :, h // 4, w // 4])


def test_untrained_adapter_learns_through_its_gates():
    adapter = Adapter(4)
    adapter(torch.randn(1, 4, 2, 3)).square().sum().backward()
    for name, p in adapter.named_parameters():
        assert bool(p.grad.abs().sum() > 0) == name.endswith("gate"), name


def test_adapter_has_these_parameters():
    names = ["gate", "norm.weight", "norm.bias", "conv.weight", "conv.bias"]
    expected = {f"stages.{stage}.{block}.{name}" for stage in (0, 1) for block in (1, 2) for name in names}
    adapter = Adapter(6)
    assert {name for name, _ in adapter.named_parameters()} == set(adapter.state_dict()) == expected
    assert sum(p.numel() for p in adapter.parameters()) == 4 * (1 + 2 * 6 + 9 * 6 * 6 + 6)
    assert all(p.shape == () and p == 0 for name, p in adapter.named_parameters() if name.endswith("gate"))


def plain_block(block, x, up):
    """The block as torch's own layers, one after the other."""
    x = F.interpolate(x, scale_factor=2, mode="nearest") if up else x
    y = F.gelu(block.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    return x + torch.tanh(block.gate) * F.conv2d(y, block.conv.weight, block.conv.bias, padding=1)


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (5, 8), (7, 3), (2, 40)])  # the last has rows of more tiles than a band
def test_shortcuts_are_the_plain_layers_forward_and_backward(monkeypatch, shortcut, up, size):
    if not shortcut:
        monkeypatch.setattr(adapter, "scheme_of", lambda *_: None)
    monkeypatch.setattr(adapter, "TILES", 7)  # several bands, the last one shorter
    block, x = randomize(GatedBlock(4)), torch.randn(3, *size[::-1], 4, dtype=torch.float64).permute(0, 3, 2, 1)
    leaves = [x.requires_grad_(), *block.parameters()]
    ours, plain = block(x, up), plain_block(block, x, up)
    assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    gradient = torch.randn_like(plain)
    for actual, expected in zip(
        torch.autograd.grad(ours, leaves, gradient), torch.autograd.grad(plain, leaves, gradient), strict=True
    ):
        assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", ["x", "norm", "gate", "conv"])
def test_frozen_parts_get_no_gradient_and_the_others_the_same(frozen):
    block, x = randomize(GatedBlock(3)), torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=frozen != "x")
    for name, p in block.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    leaves = [v for v in (x, *block.parameters()) if v.requires_grad]
    found = [torch.autograd.grad(f(x).square().sum(), leaves) for f in (block, lambda x: plain_block(block, x, False))]
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("up", [True, False])
def test_shortcuts_are_as_exact_in_float32_as_the_plain_layers(up):
    block = GatedBlock(64)
    block.gate.data.fill_(10.0)
    x, gradient = torch.randn(2, 64, 12, 12), torch.randn(2, 64, 12 * (1 + up), 12 * (1 + up))

    def run(function, dtype):
        leaves = [v.detach().to(dtype).requires_grad_() for v in (x, block.conv.weight)]
        block.to(dtype).conv.weight = torch.nn.Parameter(leaves[1])
        out = function(block, leaves[0], up)
        return [out, *torch.autograd.grad(out, (leaves[0], block.conv.weight), gradient.to(dtype))]

    exact = run(plain_block, torch.float64)
    apart = [
        [(a - e).square().mean() for a, e in zip(run(function, torch.float32), exact, strict=True)]
        for function in (lambda block, x, up: block(x, up), plain_block)
    ]
    for ours, plain in zip(*apart, strict=True):
        assert ours < 5**2 * plain  # with the points 0, 1, -1, 2, -2 the weights' gradient is 8 times worse


@pytest.mark.parametrize("up", [True, False])
def test_bfloat16_is_as_near_as_the_plain_layers_in_bfloat16(up):
    block, x = randomize(GatedBlock(32)).float(), torch.randn(2, 32, 6, 6)
    exact = plain_block(block, x, up)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = block(x, up), plain_block(block, x, up)
    assert ours.dtype == torch.float32
    assert (ours - exact).square().mean() < 4 * (plain - exact).square().mean()


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_gradients_in_bfloat16_are_those_of_the_plain_layers_for_any_batch(monkeypatch, x_dtype, up, shortcut):
    """Sums over images and tiles are in float32: what one image gives, many copies give as well."""
    if not shortcut:
        monkeypatch.setattr(adapter, "scheme_of", lambda *_: None)
    monkeypatch.setattr(adapter, "TILES", 9)
    block, x = randomize(GatedBlock(16)).float(), torch.randn(1, 16, 6, 6).repeat(256, 1, 1, 1)
    half = x.to(x_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(half, up)
    gradient = torch.randn_like(out[:1]).repeat(256, 1, 1, 1)
    out.backward(gradient)  # outside of autocast, as train.py has it
    ours, x = block.conv.weight.grad, half.detach().float().requires_grad_()
    block.zero_grad()
    plain_block(block, x, up).backward(gradient)
    assert half.grad.dtype == x_dtype and ours.dtype == torch.float32
    for actual, expected in ((half.grad, x.grad), (ours, block.conv.weight.grad)):
        assert (actual - expected).square().mean() < 0.01**2 * expected.square().mean()


@pytest.mark.parametrize("up", [True, False])
def test_backward_inside_autocast_stays_in_the_precision_of_its_forward(up):
    block, x = randomize(GatedBlock(8)).float(), torch.randn(2, 8, 6, 6)
    gradient, found = torch.randn(2, 8, 6 * (1 + up), 6 * (1 + up)), []
    for enabled in (False, True):
        out = block(x, up)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(out, list(block.parameters()), gradient))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_shortcuts_are_taken_where_they_were_measured():
    expected = {
        torch.float32: (adapter.PLAIN, adapter.UPSAMPLED),
        torch.bfloat16: (None, adapter.UPSAMPLED),
        torch.float16: (None, None),
    }
    for dtype, schemes in expected.items():
        assert tuple(adapter.scheme_of(torch.empty(1, dtype=dtype), up) for up in (False, True)) == schemes
    assert adapter.scheme_of(torch.empty(1, device="meta"), True) is None
    maps = torch.empty(600, 4, 4, 1)
    assert adapter._Residual.parts(maps.to("meta"), None, maps.dtype) == [slice(None)]
    assert [len(maps[part]) for part in adapter._Residual.parts(maps, adapter.PLAIN, maps.dtype)] == [256, 256, 88]


def test_no_images_give_no_gradient_and_a_second_derivative_is_refused():
    block = GatedBlock(4)
    block(torch.zeros(0, 4, 3, 3), up=True).sum().backward()
    assert block.conv.weight.grad.abs().sum() == 0
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
