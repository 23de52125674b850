# SPDX-License-Identifier: MIT
"""winograd.py against the library's convolution, forward and backward, and where it is used."""

import copy
import pickle

import pytest
import torch
from conftest import assert_close
from torch import nn

import winograd
from adapter import Adapter
from winograd import Winograd


def pair(inputs, outputs, dtype=torch.float64, **options):
    """A convolution of the library and its twin."""
    plain = nn.Conv2d(inputs, outputs, 3, padding=1, **options).to(dtype)
    return plain, winograd.use(copy.deepcopy(plain))


def run(conv, x, gradient):
    """[outputs, gradients of x, weight and bias]."""
    leaf = x.clone().requires_grad_()
    out = conv(leaf)
    parameters = list(conv.parameters())
    return [out, *torch.autograd.grad(out, [leaf, *parameters], gradient)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (5, 8), (7, 3), (4, 4), (2, 40)])
def test_it_is_the_librarys_convolution_forward_and_backward(monkeypatch, size, bias):
    monkeypatch.setattr(winograd, "TILES", 3)  # several parts of the batch
    plain, fast = pair(4, 6, bias=bias)
    x, gradient = torch.randn(5, 4, *size).double(), torch.randn(5, 6, *size).double()
    assert type(fast) is Winograd
    for actual, expected in zip(run(fast, x, gradient), run(plain, x, gradient), strict=True):
        assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_in_float32_it_errs_little_more_than_the_plain_sum():
    plain, fast = pair(64, 64, torch.float32)
    exact = copy.deepcopy(plain).double()
    x, gradient = torch.randn(2, 64, 12, 12), torch.randn(2, 64, 12, 12)
    truth = run(exact, x.double(), gradient.double())
    for ours, library, true in zip(
        run(fast, x, gradient), run(plain, x, gradient), truth, strict=True
    ):
        error, floor = ((v - true).square().mean().sqrt() for v in (ours, library))
        # with the points 0, 1, -1, 2, -2 the gradient of the weights is 8 times worse
        assert error < 5 * floor + 1e-7 * true.square().mean().sqrt()


def test_the_whole_adapter_keeps_its_names_and_results():
    adapter = Adapter(8).double()
    for p in adapter.parameters():
        nn.init.normal_(p)
    fast = winograd.use(copy.deepcopy(adapter))
    kinds = [type(m) for m in fast.modules() if isinstance(m, nn.Conv2d)]
    assert kinds == [Winograd] * 4
    assert list(fast.state_dict()) == list(adapter.state_dict())
    x = torch.randn(2, 8, 3, 5).double()
    assert_close(fast(x), adapter(x), rtol=1e-10, atol=1e-10)
    again = copy.deepcopy(pickle.loads(pickle.dumps(fast)))
    assert torch.equal(again(x), fast(x))


OTHERS = {
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 1},
    "groups": {"groups": 2, "padding": 1},
    "border": {"padding": 1, "padding_mode": "reflect"},
    "no border": {},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_stay_the_librarys(name):
    conv = nn.Conv2d(4, 4, 3, **OTHERS[name])
    assert type(winograd.use(conv)) is nn.Conv2d


def test_a_layer_that_is_changed_after_it_was_swapped_is_the_librarys():
    _, fast = pair(4, 4)
    fast.dilation, fast.padding = (2, 2), (2, 2)
    x = torch.randn(1, 4, 6, 6).double()
    assert torch.equal(fast(x), nn.Conv2d.forward(fast, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_the_librarys(dtype):
    plain, fast = pair(4, 4, torch.float32)
    x = torch.randn(1, 4, 6, 6)
    with torch.autocast("cpu", dtype):
        assert torch.equal(fast(x), plain(x)) and fast(x).dtype == dtype
    assert torch.equal(fast.to(dtype)(x.to(dtype)), plain.to(dtype)(x.to(dtype)))
    assert fast.to("meta")(x.to("meta", dtype)).shape == (1, 4, 6, 6)


def test_no_images_give_no_gradient_and_a_second_derivative_is_refused():
    _, fast = pair(4, 4)
    fast(torch.zeros(0, 4, 3, 3).double()).sum().backward()
    assert fast.weight.grad.abs().sum() == 0
    x = torch.randn(1, 4, 3, 3).double().requires_grad_()
    (gradient,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
