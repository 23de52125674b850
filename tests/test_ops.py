# SPDX-License-Identifier: MIT
"""ops.py against plain loops written from the paper's equations, the golden tensors, and one rank
against two.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, golden, run_ranks

import ops

RANKS, LOCAL = 2, 3  # the golden batch of six pairs, three on each rank


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(actual, expected):
    assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# ---- InfoNCE


def loop_info_nce(s, scale):
    """-1/2 (mean_i log e^{s_ii} / sum_j e^{s_ij} + mean_i log e^{s_ii} / sum_j e^{s_ji}), all s
    times the scale.
    """
    n, rows, columns = len(s), 0.0, 0.0
    for i in range(n):
        rows += (
            math.log(math.exp(scale * s[i][i]) / sum(math.exp(scale * s[i][j]) for j in range(n)))
            / n
        )
        columns += (
            math.log(math.exp(scale * s[i][i]) / sum(math.exp(scale * s[j][i]) for j in range(n)))
            / n
        )
    return -(rows + columns) / 2


def test_info_nce_is_the_papers_symmetric_loss():
    """Eq. (7), value and gradient, the latter against differences of the loop."""
    s, log_scale, step = (
        rand(5, 5).requires_grad_(),
        torch.tensor(1.7, dtype=torch.float64, requires_grad=True),
        1e-6,
    )
    loss = ops.info_nce(s, log_scale)
    exact(loss, loop_info_nce(s.tolist(), math.exp(1.7)))
    loss.backward()
    for i, j in [(0, 0), (1, 3), (3, 1), (4, 2)]:
        up, down = s.tolist(), s.tolist()
        up[i][j], down[i][j] = up[i][j] + step, down[i][j] - step
        slope = (loop_info_nce(up, math.exp(1.7)) - loop_info_nce(down, math.exp(1.7))) / (2 * step)
        assert float(s.grad[i, j]) == pytest.approx(slope, abs=1e-7)
    up, down = (loop_info_nce(s.tolist(), math.exp(1.7 + d)) for d in (step, -step))
    assert float(log_scale.grad) == pytest.approx((up - down) / (2 * step), abs=1e-7)


@pytest.mark.parametrize(
    "log_scale, scale", [(math.log(1 / 0.07), 1 / 0.07), (4.0, math.exp(4.0)), (6.0, 100.0)]
)
def test_info_nce_clamps_the_scale_at_100(log_scale, scale):
    s = 0.1 * rand(4, 4)
    exact(
        ops.info_nce(s, torch.tensor(log_scale, dtype=torch.float64)),
        loop_info_nce(s.tolist(), scale),
    )


def test_info_nce_gradient_when_the_scale_is_clamped():
    s, log_scale = (
        (0.1 * rand(4, 4)).requires_grad_(),
        torch.tensor(6.0, dtype=torch.float64, requires_grad=True),
    )
    ops.info_nce(s, log_scale).backward()
    assert float(log_scale.grad) == 0.0
    other = s.detach().clone().requires_grad_()
    ops.info_nce(other, torch.tensor(math.log(100.0), dtype=torch.float64)).backward()
    exact(s.grad, other.grad)


def test_positives_are_the_diagonal_of_one_rank():
    assert ops.positives(torch.zeros(4, 4, 2, 2)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(3, 5), (3, 2), (3, 6)])
def test_positives_refuses_a_batch_without_one_text_per_image(shape):
    with pytest.raises(
        ValueError, match=f"{shape[0]} images x 1 ranks need 3 texts, got {shape[1]}"
    ):
        ops.positives(torch.zeros(shape))


def test_gather_is_the_identity_on_one_rank():
    x = rand(2, 3)
    assert ops.gather(x) is x


# ---- Gumbel sigmoid


@pytest.mark.parametrize("tau", ["1", "0.5"])
def test_gumbel_sigmoid_has_the_golden_samples_and_gradients(tau):
    z = golden("forward_A")
    logits = z["gumbel_logits"].requires_grad_()
    hard = ops.gumbel_sigmoid(logits, z["u"], float(tau))
    assert_close(hard, z[f"gumbel_hard_tau{tau}"])
    assert_close(hard, (z[f"gumbel_soft_tau{tau}"] > 0.5).float())
    (hard * z["gumbel_weights"]).sum().backward()
    assert_close(logits.grad, z[f"gumbel_grad_tau{tau}"])


def test_gumbel_gradient_is_that_of_the_relaxed_sample():
    logit, u, tau = 0.3, 0.8, 0.7
    x = torch.tensor(logit, dtype=torch.float64, requires_grad=True)
    ops.gumbel_sigmoid(x, torch.tensor(u, dtype=torch.float64), tau).backward()
    y = 1 / (1 + math.exp(-(logit + math.log(u) - math.log(1 - u)) / tau))
    exact(x.grad, y * (1 - y) / tau)


@pytest.mark.parametrize("logit", [-3.0, -0.5, 0.0, 1.0, 4.0])
def test_gumbel_sample_is_one_with_the_masks_probability(logit):
    n, p = 100_000, 1 / (1 + math.exp(-logit))
    mean = float(ops.gumbel_sigmoid(torch.full((n,), logit), torch.rand(n)).mean())
    assert abs(mean - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_gumbel_sample_is_binary_and_finite_at_the_ends_of_the_noise():
    sure = torch.tensor([30.0, -30.0])
    # torch.rand does draw 0.0
    assert_close(ops.gumbel_sigmoid(sure, torch.tensor([0.0, 1.0])), [1.0, 0.0])
    logits = torch.linspace(-30, 30, 61).requires_grad_()
    for u in (0.0, 1e-9, 0.3, 0.999999, 1.0):
        sample = ops.gumbel_sigmoid(logits, torch.full((61,), u))
        assert torch.minimum(sample.abs(), (sample - 1).abs()).max() < 1e-6
        assert torch.autograd.grad(sample.sum(), logits)[0].isfinite().all()


# ---- masked pooling


def test_masked_pool_is_the_mask_weighted_mean():
    """Eq. (8) for every pair: image i over the mask of text j."""
    dense, masks = rand(2, 3, 4, 5), rand(2, 4, 4, 5, seed=1)
    pooled = ops.masked_pool(dense, masks)
    assert pooled.shape == (2, 4, 3)
    for i in range(2):
        for j in range(4):
            for c in range(3):
                above = sum(
                    float(masks[i, j, h, w] * dense[i, c, h, w]) for h in range(4) for w in range(5)
                )
                below = sum(float(masks[i, j, h, w]) for h in range(4) for w in range(5))
                assert float(pooled[i, j, c]) == pytest.approx(above / below, rel=1e-6)


def test_masked_pool_has_a_floor_of_1e_6_under_the_area():
    dense = torch.full((1, 1, 2, 2), 3.0, dtype=torch.float64)
    masks = torch.full((1, 1, 2, 2), 0.25e-6, dtype=torch.float64)
    exact(ops.masked_pool(dense, masks), [[[1.5]]])  # area 1e-6: half of 3
    exact(ops.masked_pool(dense, masks * 0), [[[0.0]]])


# ---- area prior


def test_area_prior_compares_expected_areas_of_both_kinds_of_masks():
    """Eq. (10): |p+ - E[area of M_ii]| and |p- - E[area of M_ij, i != j]|; the norm is of the
    expectation.
    """
    masks, n = rand(4, 4, 3, 5), 4
    # areas on both sides of p+: the mean of |p - area| would differ
    masks[0, 0], masks[1, 1] = 0.95, 0.05
    area = [[sum(masks[i, j].flatten().tolist()) / 15 for j in range(n)] for i in range(n)]
    mean_pos = sum(area[i][i] for i in range(n)) / n
    mean_neg = sum(area[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    pos, neg = ops.area_prior(masks.mean((2, 3)), p_pos=0.4, p_neg=0.7)
    exact(pos, abs(0.4 - mean_pos))
    exact(neg, abs(0.7 - mean_neg))
    assert abs(float(pos) - sum(abs(0.4 - area[i][i]) for i in range(n)) / n) > 0.01


def test_area_prior_defaults_are_the_papers():
    masks = torch.full((2, 2, 3, 3), 0.25)
    masks[0, 0] = masks[1, 1] = 0.3
    pos, neg = ops.area_prior(masks.mean((2, 3)))
    assert (float(pos), float(neg)) == pytest.approx((0.1, 0.25), abs=1e-6)


def test_area_prior_tells_pairs_by_index_not_by_value():
    masks = torch.zeros(3, 3, 2, 2)
    masks[0, 1] = masks[1, 2] = masks[2, 0] = 1.0  # everything off the diagonal's place
    pos, neg = ops.area_prior(masks.mean((2, 3)))
    assert (float(pos), float(neg)) == pytest.approx((0.4, 0.5))


def test_area_prior_of_a_single_pair_has_no_negatives():
    masks = torch.full((1, 1, 2, 2), 0.9, requires_grad=True)
    pos, neg = ops.area_prior(masks.mean((2, 3)))
    (pos + neg).backward()
    assert_close(torch.stack([pos, neg]), [0.5, 0.0])
    assert_close(masks.grad, torch.full((1, 1, 2, 2), 0.25))


def test_area_prior_of_one_image_a_rank_has_the_other_ranks_texts(monkeypatch):
    monkeypatch.setattr(ops, "positives", lambda _: torch.tensor([1]))
    pos, neg = ops.area_prior(torch.tensor([[0.1, 0.3, 0.4]]))
    assert_close(torch.stack([pos, neg]), [0.1, 0.25])


# ---- total variation


def test_total_variation_is_anisotropic_and_a_mean_per_axis():
    """Eq. (11), one norm: mean |difference| down the columns plus that along the rows."""
    x = rand(2, 3, 4, 6)
    down = [
        abs(float(m[h + 1, w] - m[h, w]))
        for m in x.flatten(0, 1)
        for h in range(3)
        for w in range(6)
    ]
    along = [
        abs(float(m[h, w + 1] - m[h, w]))
        for m in x.flatten(0, 1)
        for h in range(4)
        for w in range(5)
    ]
    exact(ops.total_variation(x).mean(), sum(down) / len(down) + sum(along) / len(along))


def test_total_variations_gradient_is_the_sign_over_the_number_of_differences():
    x = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.5, 9.0]], requires_grad=True)
    ops.total_variation(x).backward()
    # three differences down, each a third of a mean; four along, each a quarter
    expected = [
        [-1 / 3 - 1 / 4, 1 / 3 + 1 / 2, -1 / 3 - 1 / 4],
        [1 / 3 - 1 / 4, -1 / 3, 1 / 3 + 1 / 4],
    ]
    assert_close(x.grad, torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 4), (4, 1)])
def test_total_variation_needs_neighbours_along_both_axes(size):
    with pytest.raises(ValueError, match=f"a map of {size[0]} x {size[1]} has no neighbours"):
        ops.total_variation(torch.zeros(2, *size))
    assert ops.total_variation(torch.tensor([[1.0, 2.0], [4.0, 8.0]])) == (3 + 6) / 2 + (1 + 4) / 2


def test_total_variation_of_stripes_and_of_a_constant():
    stripes = torch.arange(4.0).remainder(2).expand(1, 1, 3, 4)
    assert float(ops.total_variation(stripes).mean()) == 1.0
    assert float(ops.total_variation(stripes.mT).mean()) == 1.0
    assert ops.total_variation(torch.full((1, 2, 3, 4), 0.7)).tolist() == [[0.0, 0.0]]


# ---- one rank and two


def feature_similarity(pooled, texts):
    """[B, N] cosines of image i pooled with text j, and text j."""
    return torch.einsum("ijc,jc->ij", F.normalize(pooled, dim=-1), F.normalize(texts, dim=-1))


def plain_loss(images, texts, log_scale):
    return ops.info_nce(
        F.normalize(images, dim=-1) @ ops.gather(F.normalize(texts, dim=-1)).T, log_scale
    )


def feature_loss(pooled, texts, log_scale):
    return ops.info_nce(feature_similarity(pooled, ops.gather(texts)), log_scale)


def area_loss(masks):
    pos, neg = ops.area_prior(masks.mean((2, 3)), p_pos=0.4, p_neg=0.7)
    return pos + 3 * neg


def similarity_loss(similarity, log_scale):
    return ops.info_nce(similarity, log_scale)


def area_masks():
    masks = 0.2 * rand(6, 6, 3, 4)
    for i in range(6):
        masks[i, i] += 0.7 * (i < LOCAL)  # positive areas: above p+ on rank 0, below on rank 1
    return masks


def cases():
    """name -> (loss, inputs whose first axis is split over ranks, inputs that every rank holds)."""
    z = golden("infonce_ddp")
    return {
        "plain": (plain_loss, [z["img"], z["txt"]], [z["infonce_logit_scale"]]),
        "feature": (feature_loss, [z["ext_img"], z["txt"]], [z["ext_logit_scale"]]),
        "similarity": (similarity_loss, [rand(6, 6)], [torch.tensor(1.9, dtype=torch.float64)]),
        "area": (area_loss, [area_masks()], []),
    }


def run(loss, split, shared, rank=0, ranks=1):
    """[loss, gradients of the split inputs, gradients of the shared ones] on one of the ranks."""
    rows = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
    inputs = [x[rows].clone().requires_grad_() for x in split] + [
        x.clone().requires_grad_() for x in shared
    ]
    value = loss(*inputs)
    value.backward()
    return [value.detach(), *(x.grad for x in inputs)]


def on_rank(rank):
    results = {name: run(*case, rank=rank, ranks=RANKS) for name, case in cases().items()}
    refused = 0
    for shape in [(3, 3), (3, 5), (2, 6)]:
        try:
            ops.positives(torch.zeros(shape))
        except ValueError:
            refused += 1
    return {
        **results,
        "positives": ops.positives(torch.zeros(3, 6)),
        "refused": torch.tensor(refused),
        "per_rank": ops.area_prior(
            area_masks()[rank * LOCAL : (rank + 1) * LOCAL].mean((2, 3)), per_rank=True
        ),
    }


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(on_rank, ranks=RANKS)


def ddp(results, n_split):
    """What DistributedDataParallel makes of the ranks' results: means, for split inputs side by
    side.
    """
    value = torch.stack([r[0] for r in results]).mean(0)
    split = [torch.cat([r[1 + k] for r in results]) / len(results) for k in range(n_split)]
    shared = [
        torch.stack(g).mean(0) for g in zip(*(r[1 + n_split :] for r in results), strict=True)
    ]
    return [value, *split, *shared]


@pytest.mark.parametrize("name", ["plain", "feature", "similarity", "area"])
def test_two_ranks_give_the_loss_and_gradients_of_one(ranks, name):
    loss, split, shared = cases()[name]
    tolerance = 1e-10 if split[0].dtype == torch.float64 else 1e-5
    for ours, truth in zip(
        ddp([r[name] for r in ranks], len(split)), run(loss, split, shared), strict=True
    ):
        assert_close(ours, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name, prefix", [("plain", "infonce"), ("feature", "ext")])
def test_info_nce_has_the_golden_loss_and_gradients(ranks, name, prefix, world):
    z = golden("infonce_ddp")
    ours = run(*cases()[name]) if world == 1 else ddp([r[name] for r in ranks], n_split=2)
    keys = ["loss", "grad_img", "grad_txt", "grad_logit_scale"]
    for value, key in zip(ours, keys, strict=True):
        assert_close(value, z[f"{prefix}_w1_{key}"])


def test_every_ranks_own_plain_loss_is_the_releases(ranks):
    z = golden("infonce_ddp")
    for rank in range(RANKS):
        for value, key in zip(
            ranks[rank]["plain"], ["loss", "grad_img", "grad_txt", "grad_logit_scale"], strict=True
        ):
            assert_close(value, z[f"infonce_w2_rank{rank}_{key}"])


def test_release_differs_on_two_ranks_and_ours_does_not(ranks):
    """The release pairs other ranks' images with the wrong texts: 3 % of the loss, up to half of
    the gradients.
    """
    z = golden("infonce_ddp")
    truth = float(z["ext_w1_loss"])
    release = float(z["ext_w2_rank0_loss"] + z["ext_w2_rank1_loss"]) / 2
    ours = float(ddp([r["feature"] for r in ranks], n_split=2)[0])
    assert abs(ours / truth - 1) < 1e-6
    assert 0.025 < abs(release / truth - 1) < 0.035
    gradient = torch.cat([z["ext_w2_rank0_grad_img"], z["ext_w2_rank1_grad_img"]]) / 2
    assert (gradient - z["ext_w1_grad_img"]).norm() / z["ext_w1_grad_img"].norm() > 0.1


def test_area_prior_averages_over_ranks_before_the_norm(ranks):
    areas = area_masks().mean((2, 3)).diagonal()
    per_rank = [(0.4 - areas[:LOCAL].mean()).abs(), (0.4 - areas[LOCAL:].mean()).abs()]
    value = (0.4 - areas.mean()).abs() + 3 * (
        0.7 - (area_masks().mean((2, 3)).sum() - areas.sum()) / 30
    ).abs()
    for r in ranks:
        exact(r["area"][0], value)  # the same on every rank
    assert sum(per_rank) / 2 > (0.4 - areas.mean()).abs() + 0.1
    for r, own in zip(ranks, per_rank, strict=True):  # the release's
        exact(r["per_rank"][0], own)


def test_positives_of_each_rank_are_its_own_texts(ranks):
    assert [r["positives"].tolist() for r in ranks] == [[0, 1, 2], [3, 4, 5]]
    assert [int(r["refused"]) for r in ranks] == [3, 3]


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("length", [1.0, 2e-6, 5e-7])  # the last is below the floor
def test_normalize_divides_by_the_length_but_never_by_less_than_1e_6(dim, length):
    x = length * F.normalize(rand(2, 3, 4, 5) + 0.1, dim=dim)
    exact(ops.normalize(x, dim), x / max(length, 1e-6))


def test_normalize_of_zero_is_zero():
    assert ops.normalize(torch.zeros(2, 3)).abs().sum() == 0


# ---- plain autograd ----

FUNCTIONS = {
    "normalize": lambda x: ops.normalize(x),
    "info_nce": lambda x: ops.info_nce(x[:, :3], x.mean()),
    "gumbel_sigmoid": lambda x: torch.sigmoid(ops.gumbel_sigmoid(x, torch.full_like(x, 0.3)) * x),
    "masked_pool": lambda x: ops.masked_pool(x.view(1, 3, 2, 2), x.sigmoid().view(1, 3, 2, 2)),
    "area_prior": lambda x: torch.stack(ops.area_prior(x[:, :3].sigmoid().square())),
    "total_variation": lambda x: ops.total_variation(x.square().view(3, 2, 2)),
}


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "gumbel_sigmoid"])
def test_every_operation_is_differentiable_twice(name):
    x = (rand(3, 4) + 0.1).requires_grad_()
    torch.autograd.gradcheck(FUNCTIONS[name], x)
    torch.autograd.gradgradcheck(FUNCTIONS[name], x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_operation_works_under_vmap(name):
    x = rand(5, 3, 4)
    exact(torch.vmap(FUNCTIONS[name])(x), torch.stack([FUNCTIONS[name](part) for part in x]))
