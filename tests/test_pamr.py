# SPDX-License-Identifier: MIT
"""pamr.py against a plain loop over pixels, the golden tensors, and its promises on memory, types
and gradients.
"""

import math
import statistics
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_close, golden

import pamr

ALL = (1, 2, 4, 8, 12, 24)


def loop_resize(mask, height, width):
    """Bilinear with align_corners=True; mask [h][w] -> [height][width]."""
    h, w = len(mask), len(mask[0])
    out = [[0.0] * width for _ in range(height)]
    for i in range(height):
        for j in range(width):
            y = i * (h - 1) / (height - 1) if height > 1 else 0.0
            x = j * (w - 1) / (width - 1) if width > 1 else 0.0
            y0, x0 = min(int(y), h - 1), min(int(x), w - 1)
            y1, x1, fy, fx = min(y0 + 1, h - 1), min(x0 + 1, w - 1), y - int(y), x - int(x)
            top = mask[y0][x0] * (1 - fx) + mask[y0][x1] * fx
            out[i][j] = top * (1 - fy) + (mask[y1][x0] * (1 - fx) + mask[y1][x1] * fx) * fy
    return out


def loop_pamr(image, mask, iterations, dilations):
    """image [C][H][W], mask [h][w] of one class, lists of floats -> [H][W]."""
    height, width = len(image[0]), len(image[0][0])
    mask = loop_resize(mask, height, width)

    def inside(h, w):  # replicate padding
        return min(max(h, 0), height - 1), min(max(w, 0), width - 1)

    weights, around = {}, {}
    for h in range(height):
        for w in range(width):
            ring = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            nine = [[inside(h + d * i, w + d * j) for i, j in ring] for d in dilations]
            near = [q for pixels in nine for k, q in enumerate(pixels) if k != 4]
            logits = [0.0] * len(near)
            for plane in image:
                sigma = statistics.stdev(plane[y][x] for pixels in nine for y, x in pixels)
                for n, (y, x) in enumerate(near):
                    logits[n] += -abs(plane[h][w] - plane[y][x]) / (1e-8 + 0.1 * sigma) / len(image)
            total = sum(math.exp(value) for value in logits)
            weights[h, w], around[h, w] = [math.exp(value) / total for value in logits], near
    for _ in range(iterations):
        mask = [
            [
                sum(a * mask[y][x] for a, (y, x) in zip(weights[h, w], around[h, w], strict=True))
                for w in range(width)
            ]
            for h in range(height)
        ]
    return mask


def loop(image, mask, iterations, dilations):
    rows = [
        [loop_pamr(x, m, iterations, dilations) for m in ms]
        for x, ms in zip(image.tolist(), mask.tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def rand(*shape):
    return torch.rand(*shape, dtype=torch.float64)


@pytest.mark.parametrize("iterations, dilations", [(1, (1,)), (3, (1, 2)), (2, (2, 24)), (0, (1,))])
@pytest.mark.parametrize("size, mask_size", [((5, 7), (5, 7)), ((6, 5), (3, 4)), ((3, 1), (2, 2))])
def test_pamr_is_the_plain_loop_over_pixels(iterations, dilations, size, mask_size):
    image, mask = rand(2, 3, *size), rand(2, 3, *mask_size)
    refined = pamr.pamr(image, mask, iterations=iterations, dilations=dilations)
    assert_close(refined, loop(image, mask, iterations, dilations), rtol=1e-9, atol=1e-9)


# the smallest are near the 1e-8 under the fraction
@pytest.mark.parametrize("contrast", [0.0, 1e-8, 1e3])
def test_pamr_is_the_plain_loop_at_any_contrast(contrast):
    image, mask = contrast * rand(1, 3, 4, 5), rand(1, 2, 4, 5)
    assert_close(
        pamr.pamr(image, mask, 2, (1, 3)), loop(image, mask, 2, (1, 3)), rtol=1e-9, atol=1e-9
    )


def test_pamr_defaults_are_ten_iterations_and_six_dilations():
    image, mask = rand(1, 3, 6, 5), rand(1, 1, 3, 2)
    assert_close(pamr.pamr(image, mask), loop(image, mask, 10, ALL), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("iterations", [1, 10])
@pytest.mark.parametrize("dilations", [(1,), ALL])
def test_pamr_has_the_golden_masks(iterations, dilations):
    z = golden("pamr")
    refined = pamr.pamr(z["x"], z["mask"], iterations=iterations, dilations=dilations)
    assert_close(refined, z[f"out_iter{iterations}_dil{'-'.join(map(str, dilations))}"])


def test_neighbours_at_a_corner_repeat_the_border():
    index = pamr.neighbours(3, 4, (1, 9))
    assert index.shape == (12, 16)
    assert index[0].tolist() == [0, 0, 1, 0, 1, 4, 4, 5, 0, 0, 3, 0, 3, 8, 8, 11]
    assert index[6].tolist() == [1, 2, 3, 5, 7, 9, 10, 11, 0, 2, 3, 4, 7, 8, 10, 11]


def test_affinities_are_positive_and_rows_add_to_one():
    image, index = rand(3, 6 * 7), pamr.neighbours(6, 7, ALL)
    weights = pamr.affinity(image, index, len(ALL))
    assert weights.shape == (42, 48) and bool((weights > 0).all())
    assert_close(weights.sum(1), torch.ones(42), rtol=1e-12, atol=1e-12)


def test_constant_mask_stays_constant_and_values_stay_in_range():
    image, mask, constant = (
        rand(1, 3, 16, 20),
        rand(1, 2, 16, 20),
        torch.tensor(0.37, dtype=torch.float64),
    )
    assert_close(
        pamr.pamr(image, constant.expand(1, 2, 8, 9)),
        constant.expand(1, 2, 16, 20),
        rtol=0,
        atol=1e-12,
    )
    refined = pamr.pamr(image, mask)
    assert mask.min() <= refined.min() and refined.max() <= mask.max()


def test_mask_follows_the_edges_of_the_image():
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 1.0
    mask = image[:, :1] * 0.8 + 0.2 * torch.rand(1, 1, 16, 16)
    refined = pamr.pamr(image, mask)[0, 0]
    assert refined[:, :8].std() < 0.3 * mask[0, 0, :, :8].std()
    assert (refined[:, 8:].mean() - refined[:, :8].mean()) > 0.7


def test_gradient_flows_to_the_mask_alone():
    image, mask = rand(1, 3, 3, 4).requires_grad_(), rand(1, 2, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m: pamr.pamr(image, m, iterations=2, dilations=(1, 2)), (mask,)
    )
    pamr.pamr(image, mask).sum().backward()
    assert image.grad is None and bool((mask.grad > 0).all())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_masks_keep_their_type_and_are_refined_in_float32(dtype, tolerance):
    image, mask = torch.rand(1, 3, 12, 13), torch.rand(1, 4, 6, 7).to(dtype)
    refined = pamr.pamr(image, mask)
    assert refined.dtype == dtype
    assert torch.equal(refined, pamr.pamr(image, mask.float()).to(dtype))
    assert_close(
        pamr.pamr(image.to(dtype), mask).float(),
        pamr.pamr(image.to(dtype).float(), mask.float()),
        tolerance,
        0,
    )


class Elsewhere(torch.Tensor):
    """A CPU tensor that says it is on a device without sparse products."""

    device = property(lambda self: torch.device("mps"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inside_an_autocast_region_masks_are_the_same(dtype):
    image, mask = torch.rand(1, 3, 9, 8), torch.rand(1, 2, 5, 4)
    with torch.autocast("cpu", dtype):
        inside = pamr.pamr(image, mask)
    assert inside.dtype == torch.float32 and torch.equal(inside, pamr.pamr(image, mask))


def test_devices_without_sparse_products_get_the_same_masks(monkeypatch):
    image, mask = torch.rand(2, 3, 9, 11), torch.rand(2, 3, 5, 6)
    expected = pamr.pamr(image, mask, iterations=4, dilations=(1, 3, 24))
    monkeypatch.delattr(torch, "sparse_csr_tensor")
    elsewhere = pamr.pamr(image, mask.as_subclass(Elsewhere), iterations=4, dilations=(1, 3, 24))
    assert_close(elsewhere.as_subclass(torch.Tensor), expected, rtol=1e-5, atol=1e-6)


def test_memory_does_not_hold_a_value_per_class_and_neighbour():
    """150 classes, 48 neighbours, 112 x 112 pixels: a tensor over all of them holds 361 MB."""
    script = """
import resource, torch, pamr
torch.set_num_threads(1)
pamr.pamr(torch.rand(1, 3, 16, 16), torch.rand(1, 2, 8, 8), iterations=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pamr.pamr(torch.rand(1, 3, 112, 112), torch.rand(1, 150, 112, 112), iterations=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kilobytes = int(done.stdout) / (1024 if sys.platform == "darwin" else 1)
    assert kilobytes < 180_000, f"{kilobytes / 1000:.0f} MB"


def test_the_defaults_and_the_scale_of_the_colours():
    """Ten iterations, six dilations; an affine change of the colours changes nothing, a faint image
    neither.
    """
    assert pamr.pamr.__defaults__ == (10, ALL)
    torch.manual_seed(1)
    image, mask = (
        torch.rand(1, 3, 12, 14, dtype=torch.float64),
        torch.rand(1, 2, 12, 14, dtype=torch.float64),
    )
    whole = pamr.pamr(image, mask)
    torch.testing.assert_close(pamr.pamr(image * 1e-4 + 0.3, mask), whole, rtol=0.01, atol=1e-3)
