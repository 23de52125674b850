# SPDX-License-Identifier: MIT
"""adapter.py against plain loops written from Appendix A."""

import copy
import math

import pytest
import torch
from conftest import assert_close
from torch import nn

from adapter import Adapter, GatedBlock


def randomize(module, seed=0):
    """Every parameter away from its start, so that none hides behind an identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return module.double()


def loop_block(x, norm_weight, norm_bias, weight, bias, gate):
    """x + tanh(g) * Conv3x3(GELU(LayerNorm over channels)), zeros outside; x [D][H][W] and all
    parameters as lists.
    """
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
    parameters = (
        block.norm.weight,
        block.norm.bias,
        block.conv.weight,
        block.conv.bias,
        block.gate,
    )
    return torch.tensor(
        [loop_block(m, *(p.tolist() for p in parameters)) for m in x.tolist()], dtype=torch.float64
    )


# the small one makes the floor of LayerNorm's variance matter
@pytest.mark.parametrize("spread", [1.0, 3e-3])
def test_gated_block_is_the_appendix_equation(spread):
    """Eq. (13), x' = x + tanh(g) Conv(x)."""
    block, x = randomize(GatedBlock(3)), spread * torch.randn(2, 3, 3, 4, dtype=torch.float64)
    assert_close(block(x), loop_of(block, x), rtol=1e-10, atol=1e-10)


def nearest_x2(x):
    """[B, D, H, W] -> [B, D, 2H, 2W]"""
    rows = [
        torch.stack([x[..., h // 2, w // 2] for w in range(2 * x.shape[-1])], -1)
        for h in range(2 * x.shape[-2])
    ]
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
    expected = {
        f"stages.{stage}.{block}.{name}" for stage in (0, 1) for block in (1, 2) for name in names
    }
    adapter = Adapter(6)
    assert {name for name, _ in adapter.named_parameters()} == set(adapter.state_dict()) == expected
    assert sum(p.numel() for p in adapter.parameters()) == 4 * (1 + 2 * 6 + 9 * 6 * 6 + 6)
    assert all(
        p.shape == () and p == 0 for name, p in adapter.named_parameters() if name.endswith("gate")
    )


def test_a_replaced_layer_takes_effect_and_hooks_fire():
    adapter, x, seen = randomize(Adapter(4)), torch.randn(1, 4, 2, 3).double(), []
    before = adapter(x)
    adapter.stages[0][1].conv.register_forward_hook(lambda *_: seen.append(1))
    adapter(x)
    assert seen == [1]
    for k, layer in ((0, nn.Upsample(scale_factor=2, mode="bilinear")), (1, nn.Identity())):
        changed = copy.deepcopy(adapter)
        changed.stages[1][k] = layer
        assert not torch.allclose(changed(x), before)
    for name, layer in (("norm", nn.Identity()), ("conv", nn.Conv2d(4, 4, 1).double())):
        changed = copy.deepcopy(adapter)
        setattr(changed.stages[1][2], name, layer)
        assert not torch.allclose(changed(x), before)
    assert torch.equal(adapter(x), before)  # the copies have their own


def test_it_is_differentiable_twice_and_a_function_of_its_parameters():
    block, x = randomize(GatedBlock(2)), torch.randn(1, 2, 2, 3).double().requires_grad_()
    torch.autograd.gradcheck(block, x)
    torch.autograd.gradgradcheck(block, x)
    parameters = dict(block.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(block, parameters, (x[None],)).square().sum()

    images = torch.randn(3, 2, 2, 3).double()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    loss(parameters, images[1]).backward()
    for name, p in block.named_parameters():
        assert_close(each[name][1], p.grad, rtol=1e-10, atol=1e-10)


def test_export_and_channels_last_give_the_same():
    adapter, x = randomize(Adapter(4)).float(), torch.randn(2, 4, 3, 2)
    exported = torch.export.export(adapter, (x,)).module()
    assert_close(exported(x), adapter(x), rtol=1e-5, atol=1e-5)
    last = copy.deepcopy(adapter).to(memory_format=torch.channels_last)
    y = last(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, adapter(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_the_convolution_alone(dtype):
    """The sum of block after block, and the norms, stay in float32 for float32 maps."""
    block, x = randomize(GatedBlock(8)).float(), torch.randn(2, 8, 5, 5)
    exact = block(x)
    with torch.autocast("cpu", dtype):
        y = block(x)
    assert y.dtype == torch.float32
    # 72 products a sum of numbers of size one, each rounded to 2^-8 or 2^-11 of itself
    assert (y - exact).abs().max() < 20 * torch.finfo(dtype).eps * exact.abs().max()
