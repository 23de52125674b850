# SPDX-License-Identifier: MIT
"""CLIP alone under evaluate.py --method: the last block and MaskCLIP's refinements as loops."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from PIL import Image
from tiny import CONFIG, make_clip, make_set

import backbone
import evaluate
import gcl

GRID = (3, 4)  # patches, so that rows and columns cannot be confused


@pytest.fixture(scope="module")
def net():
    """A GCL in float64 on a random CLIP of two heads; its LayerScale and norms have moved too."""
    torch.manual_seed(3)
    config = CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"ls_init_value": 0.7}}
    clip = backbone.build_clip(config)
    with torch.no_grad():
        for p in clip.visual.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return gcl.GCL(clip).double()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(4)).double()


@pytest.fixture(scope="module")
def text():
    return F.normalize(
        torch.randn(5, 24, generator=torch.Generator().manual_seed(5)).double(), dim=-1
    )


# ---- oracles: one head, one row, one pair at a time ----


def softmax(logits):
    powers = [math.exp(v - max(logits)) for v in logits]
    return [p / sum(powers) for p in powers]


def omega(i, j):
    """NACLIP's bias of tokens i, j; token 0 is CLS, then patches in rows of four."""
    if i == 0 or j == 0:
        return 0.0
    (yi, xi), (yj, xj) = divmod(i - 1, GRID[1]), divmod(j - 1, GRID[1])
    return math.exp(-((yi - yj) ** 2 + (xi - xj) ** 2) / (2 * 5**2))


def row_of_attention(method, q, k, i):
    """The weights of all tokens in row i of one head. q, k: [1+L, d]."""
    s, n = q.shape[1] ** -0.5, range(len(q))
    match method:
        case "clip":
            return softmax([s * float(q[i] @ k[j]) for j in n])
        case "maskclip" | "maskclip-refined":
            return [float(i == j) for j in n]
        case "sclip":
            of_q, of_k = (softmax([s * float(x[i] @ x[j]) for j in n]) for x in (q, k))
            return [a + b for a, b in zip(of_q, of_k, strict=True)]
        case "clearclip":
            return softmax([s * float(q[i] @ q[j]) for j in n])
        case "naclip":
            return softmax([s * float(k[i] @ k[j]) + omega(i, j) for j in n])


def plain_block(block, x, method):
    """The last block on x [1+L, D]: (patches [L, D], keys [L, D])."""
    n, width = x.shape
    y, d = block.ln_1(x), width // block.attn.num_heads
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    q, k, v = (y @ weight[a : a + width].T + bias[a : a + width] for a in (0, width, 2 * width))
    mixed = torch.zeros_like(x)
    for i, h in itertools.product(range(n), range(block.attn.num_heads)):
        head = slice(h * d, (h + 1) * d)
        for j, a in enumerate(row_of_attention(method, q[:, head], k[:, head], i)):
            mixed[i, head] += a * v[j, head]
    out = mixed @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    if method not in ("clearclip", "naclip"):
        out = x + out * block.ls_1.gamma
        out = out + block.mlp(block.ln_2(out)) * block.ls_2.gamma
    return out[1:], k[1:]


def plain_cosine(visual, patches, text):
    """Cosines [K, L] of texts and patches [L, D] through ln_post and the projection."""
    v = visual.ln_post(patches) @ visual.proj
    return torch.tensor(
        [[float(t @ row) / float(row.norm()) for row in v] for t in text], dtype=torch.float64
    )


def plain_refined(cosine, keys):
    """MaskCLIP's two steps on cosine [K, L], keys [L, D], and their mask [K, L]."""
    classes, patches = range(len(cosine)), range(cosine.shape[1])
    p = [softmax([100 * float(cosine[c, i]) for c in classes]) for i in patches]
    kept = [c for c in classes if any(p[i][c] >= 0.5 for i in patches)] or list(classes)
    masks = torch.zeros(cosine.shape, dtype=torch.float64)
    p = [
        dict(zip(kept, softmax([100 * float(cosine[c, i]) for c in kept]), strict=True))
        for i in patches
    ]
    for i in patches:
        near = [float(keys[i] @ keys[j]) / float(keys[i].norm() * keys[j].norm()) for j in patches]
        near = [max(value, 0.0) for value in near]
        smooth = {c: sum(w * p[j][c] for j, w in enumerate(near)) / sum(near) for c in kept}
        best = max(1 / (1 + math.exp(-10 * (float(cosine[c, i]) - 0.25))) for c in kept)
        for c in kept:
            masks[c, i] = best * smooth[c] / max(smooth.values())
    return masks


# ---- the last block ----


@pytest.mark.parametrize("method", backbone.METHODS)
def test_the_last_block_is_the_plain_loops(net, images, method):
    tokens, block = (
        backbone.trunk(net.clip.visual, images),
        net.clip.visual.transformer.resblocks[-1],
    )
    features, keys = backbone.last_block(block, tokens, GRID, method)
    for b, x in enumerate(tokens):
        patches, plain_keys = plain_block(block, x, method)
        assert_close(features[b].flatten(1).T, patches, rtol=1e-6, atol=1e-6)
        assert_close(keys[b], plain_keys, rtol=1e-9, atol=1e-9)


def test_clip_is_open_clips_own_block_and_maskclip_the_dense_features(net, images):
    tokens, block = (
        backbone.trunk(net.clip.visual, images),
        net.clip.visual.transformer.resblocks[-1],
    )
    assert isinstance(block.attn, torch.nn.MultiheadAttention)
    own = block(tokens)[:, 1:].transpose(1, 2).unflatten(2, GRID)
    assert_close(backbone.last_block(block, tokens, GRID, "clip")[0], own, rtol=1e-10, atol=1e-10)
    for method in ("maskclip", "maskclip-refined"):
        features, _ = backbone.last_block(block, tokens, GRID, method)
        assert_close(
            features, backbone.dense_features(net.last_block, tokens, GRID), rtol=1e-10, atol=1e-10
        )


def test_omega_falls_with_the_distance_in_patches_and_is_zero_for_cls():
    bias = backbone.nearness(GRID)
    assert bias.shape == (13, 13)
    assert_close(bias, [[omega(i, j) for j in range(13)] for i in range(13)], rtol=1e-6, atol=1e-7)


# ---- masks ----


@pytest.mark.parametrize("method", backbone.METHODS)
def test_masks_are_the_plain_ones_at_the_images_size(net, images, text, method):
    visual = net.clip.visual
    masks = net.segment_clip(images, text, method)
    for b, x in enumerate(backbone.trunk(net.clip.visual, images)):
        patches, keys = plain_block(visual.transformer.resblocks[-1], x, method)
        cosine = plain_cosine(visual, patches, text)
        plain = (
            plain_refined(cosine, keys)
            if "refined" in method
            else 1 / (1 + torch.exp(-10 * (cosine - 0.25)))
        )
        plain = F.interpolate(
            plain.view(1, 5, *GRID), scale_factor=4, mode="bilinear", align_corners=False
        )
        plain = F.interpolate(plain, (24, 32), mode="bilinear", align_corners=False)
        assert_close(masks[b], plain[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("spread", "kept"), [(0.02, 2), (0.0001, 4)])
def test_refinement_removes_what_is_sure_nowhere_and_smooths_by_keys(spread, kept):
    """Two of four classes reach p = 0.5 somewhere; or none does, and then none is removed."""
    cosine = (
        0.2 + spread * torch.randn(1, 4, *GRID, generator=torch.Generator().manual_seed(1)).double()
    )
    if kept == 2:
        cosine[:, 2:] -= 0.04  # never sure
        cosine[:, 0, 0, 0] += 0.1
        cosine[:, 1, 2, 3] += 0.1
    keys = torch.randn(1, 12, 6, generator=torch.Generator().manual_seed(2)).double() + 0.3
    masks = backbone.maskclip_refined(cosine, keys)
    assert_close(
        masks[0].flatten(1), plain_refined(cosine[0].flatten(1), keys[0]), rtol=1e-9, atol=1e-9
    )
    assert (masks.amax((0, 2, 3)) > 0).tolist() == [True] * kept + [False] * (4 - kept)
    k = F.normalize(keys[0], dim=-1)
    assert (k @ k.T).min() < 0  # a weight that must not count
    best = torch.sigmoid(10 * (cosine[:, :kept] - 0.25)).amax(1)
    assert_close(
        masks.amax(1), best, rtol=1e-9, atol=1e-9
    )  # so the background channel meets MaskCLIP's own values


@pytest.mark.parametrize(("peak", "kept"), [(0.49, False), (0.51, True)])
def test_a_class_is_removed_where_its_probability_stays_below_a_half(peak, kept):
    """Of two patches: class 0 is sure in the first, class 1 has the probability peak in the other,
    where class 2 is next."""
    p = torch.tensor([[0.9, 0.04], [0.05, peak], [0.05, 0.96 - peak]], dtype=torch.float64)
    cosine = p.log().view(1, 3, 1, 2) / 100  # any sum of the exponentials is taken out again
    keys = torch.eye(2, dtype=torch.float64).unsqueeze(0)  # nothing is smoothed
    masks = backbone.maskclip_refined(cosine, keys)
    assert bool((masks[0, 1] > 0).all()) is kept


def test_equal_keys_give_every_patch_the_mean_and_each_image_is_its_own():
    cosine = 0.2 + 0.02 * torch.randn(2, 3, *GRID).double()
    masks = backbone.maskclip_refined(cosine, torch.ones(2, 12, 6).double())
    assert (masks.argmax(1).flatten(1) == masks.argmax(1).flatten(1)[:, :1]).all()
    keys = torch.randn(2, 12, 6).double()
    whole = backbone.maskclip_refined(cosine, keys)
    for b in range(2):
        assert_close(
            backbone.maskclip_refined(cosine[b : b + 1], keys[b : b + 1])[0],
            whole[b],
            rtol=1e-9,
            atol=1e-9,
        )


@pytest.mark.parametrize("method", backbone.METHODS)
def test_any_image_size_under_autocast_and_refined_at_the_masks_grid(net, text, method):
    net, seen = gcl.GCL(backbone.build_clip(CONFIG)), []
    image, text = torch.randn(1, 3, 21, 37), text.float()  # padded to 3 x 5 patches
    masks = net.segment_clip(
        image, text, method, lambda image, mask: seen.append((image, mask)) or 0.5 * mask
    )
    assert masks.shape == (1, 5, 21, 37) and 0 <= masks.min() and masks.max() <= 0.5
    assert seen[0][0].shape == (1, 3, 12, 20) and seen[0][1].shape == (1, 5, 12, 20)
    with torch.autocast("cpu", torch.bfloat16):
        half = net.segment_clip(
            image, text, method, lambda image, mask: seen.append((image, mask)) or 0.5 * mask
        )
    assert half.dtype == seen[1][1].dtype == torch.float32
    if method != "maskclip-refined":  # whose softmax of 100 cos turns a rounding into another class
        assert_close(half, masks, rtol=0.1, atol=0.05)


# ---- under the protocol ----


@pytest.mark.parametrize("method", backbone.METHODS)
def test_every_method_runs_under_the_one_protocol_without_a_checkpoint(
    tmp_path, monkeypatch, method
):
    model, pretrained = make_clip(tmp_path / "clip", patch_size=16)
    spec = make_set(tmp_path / "set", n=2, background=True)
    seen, original = [], gcl.GCL.segment_clip

    def record(self, images, text, method, refine):
        seen.append((method, refine, images.shape))
        return original(self, images, text, method, refine)

    monkeypatch.setattr(gcl.GCL, "segment_clip", record)
    arguments = [
        "--datasets",
        spec,
        "--method",
        method,
        "--model",
        model,
        "--pretrained",
        pretrained,
    ]
    arguments += [
        "--workers",
        "0",
        "--save-predictions",
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    evaluate.main(evaluate.parse_args(arguments))
    results = json.loads((tmp_path / "out/results.json").read_text())
    settings = results["settings"]
    assert (
        settings["method"] == method
        and settings["unified_protocol"] is True
        and settings["bg_threshold"] == 0.4
    )
    assert "kp_weight" not in settings and settings["checkpoint"] is None
    # 40 x 32 pixels become 560 x 448: two windows; 32 x 48 become 448 x 672
    assert [(name, shape) for name, _, shape in seen] == [(method, (2, 3, 448, 448))] * 2
    assert all(refine is evaluate.pamr.pamr for _, refine, _ in seen)
    labels = [np.unique(Image.open(p)) for p in (tmp_path / "out/predictions/set").glob("*.png")]
    assert len(labels) == 2 and set(np.concatenate(labels)) <= {0, 1, 2, 3}
