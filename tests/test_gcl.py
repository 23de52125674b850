# SPDX-License-Identifier: MIT
"""gcl.py: the golden tensors of the released model, plain loops of the paper, checkpoints."""

import dataclasses
import itertools
import json
import math
import os
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CLIP_JSON,
    CLIP_WEIGHTS,
    RELEASE,
    RELEASE_STRIPPED,
    assert_close,
    golden,
    run_ranks,
)
from test_ops import loop_info_nce
from torch.utils._python_dispatch import TorchDispatchMode

import backbone
import files
import gcl
import ops
from pamr import pamr

# Shaped unlike the golden CLIP: other patch, heads, context, and patches that do not divide 64.
CONFIG = {
    "embed_dim": 20,
    "vision_cfg": {"image_size": 35, "layers": 3, "width": 48, "head_width": 24, "patch_size": 7},
    "text_cfg": {"context_length": 11, "vocab_size": 60, "width": 40, "heads": 4, "layers": 2},
}
ACTIVE = ("gcl_v", "gcl_f", "cl")


def shake(parameters, size=0.05):
    """Moves every parameter off its start, so that none hides behind an identity."""
    with torch.no_grad():
        for p in parameters:
            p.add_(size * torch.randn(p.shape))


def write_config(folder, vision=(), **changes):
    path = Path(folder) / "clip.json"
    path.write_text(
        json.dumps({**CONFIG, **changes, "vision_cfg": {**CONFIG["vision_cfg"], **dict(vision)}})
    )
    return str(path)


def make_clip(folder, vision=(), **changes):
    """A small random CLIP of CONFIG with changes."""
    clip, _ = gcl.load_clip(write_config(folder, vision, **changes), pretrained=None)
    shake(clip.parameters())
    return clip


def make_net(folder, recipe="paper", losses=ACTIVE, area_prior=0.4, vision=(), **changes):
    """A GCL on it whose adapter, head, block and scalars have moved too."""
    net = gcl.GCL(make_clip(folder, vision, **changes), recipe, losses, area_prior)
    shake((p for p in net.parameters() if p.requires_grad), size=0.2)
    return net


def make_batch(n=3, height=35, width=35, context=11):
    """images [n, 3, height, width], tokens [n, context] that end with the largest number."""
    tokens = torch.zeros(n, context, dtype=torch.int64)
    for i in range(n):
        tokens[i, : 4 + i] = torch.randint(1, 58, (4 + i,))
        tokens[i, 4 + i] = 59
    return torch.randn(n, 3, height, width), tokens


def files_in(folder):
    return sorted(p.name for p in Path(folder).iterdir())


@pytest.fixture(scope="module")
def z():
    return golden("forward_A")


@pytest.fixture(scope="module")
def seg():
    return golden("segment_A")


@pytest.fixture(scope="module")
def released():
    """The released model of the golden tensors; read it, do not change it."""
    return gcl.load(RELEASE)


def embed(net, images):
    """Dense embedding [B, C, 4H, 4W], not normalised, as forward and segment compute it."""
    return net.dense_embedding(
        backbone.dense_features(
            net.last_block,
            backbone.trunk(net.clip.visual, images),
            backbone.patch_grid(images, net.patch),
        )
    )


# ---- the released model, tensor by tensor ----


def test_encoders_have_the_golden_features(released, z):
    """Eq. (3): text embedding, global image embedding and dense features of the frozen CLIP."""
    assert_close(released.encode_text(z["tokens"]), gcl.normalize(z["text_emb"]))
    tokens = backbone.trunk(released.clip.visual, z["image"])
    assert_close(tokens.transpose(0, 1), z["image_feat"])
    assert_close(
        backbone.dense_features(released.clip.visual.transformer.resblocks[-1], tokens, (8, 8)),
        z["dense_feat"],
    )
    assert_close(backbone.dense_features(released.block, tokens, (8, 8)), z["masker_backbone_feat"])
    assert_close(
        backbone.global_embedding(released.clip.visual, z["image"]), gcl.normalize(z["clip_global"])
    )
    assert_close(
        backbone.global_embedding(released.clip.visual, z["image"] * z["fixed_mask"]),
        gcl.normalize(z["clip_global_masked"]),
    )


def test_preserved_masks_are_of_the_golden_features(released, z):
    t = gcl.normalize(z["text_emb"])
    cosine = torch.einsum("bchw,kc->bkhw", F.normalize(z["kp_feat"], dim=1), t)
    ours = backbone.cosines(released.clip.visual, z["dense_feat"], t)
    assert_close(backbone.frozen_mask(ours), torch.sigmoid(10 * cosine - 2.5))


def test_adapter_and_head_have_the_golden_embedding(released, z):
    """Eq. (4): both stages of the adapter, then the head."""
    first = released.adapter.stages[0](z["masker_backbone_feat"])
    assert_close(first[:1], z["decoder_block0_img0"])
    assert_close(released.adapter.stages[1](first)[:1], z["decoder_block1_img0"])
    assert_close(released.dense_embedding(z["masker_backbone_feat"]), z["image_emb"])


def test_masks_of_all_pairs_are_golden(released, z):
    v_n, t = gcl.normalize(embed(released, z["image"]), dim=1), released.encode_text(z["tokens"])
    logits = released.mask_logits(v_n, t)
    assert_close((logits - released.b) / released.w, z["simmap"])
    assert_close(torch.sigmoid(logits), z["soft_mask"])
    assert ((torch.sigmoid(logits) > 0.5).float() == z["hard_mask"]).float().mean() > 0.999
    assert_close(ops.masked_pool(z["image_emb"], z["soft_mask"]), z["pooled_emb"])


def half_noise(net, images):
    """With noise 0.5 the logistic noise is 0: the sample is soft > 0.5."""
    height, width = backbone.patch_grid(images, net.patch)
    return torch.full((len(images), 1, 4 * height, 4 * width), 0.5)


def test_masked_images_are_golden(released, z, monkeypatch):
    seen, encode = [], backbone.global_embedding
    record = lambda visual, images: seen.append(encode(visual, images)) or seen[-1]  # noqa: E731
    monkeypatch.setattr(backbone, "global_embedding", record)
    released(z["image"], z["tokens"], half_noise(released, z["image"]))
    assert_close(seen[0], gcl.normalize(z["masked_img_emb_det"]))


LOSS_KEYS = {"gcl_f": "tclf", "gcl_v": "tcli", "area_pos": "area_pos", "area_neg": "area_neg"}
LOSS_KEYS |= {"tv_dense": "tv_img", "tv_mask": "tv_mask"}
GROUPS = {
    "gcl_f": 0.1,
    "gcl_v": 0.1,
    "area_pos": 0.4,
    "area_neg": 0.4,
    "tv_dense": 1.0,
    "tv_mask": 1.0,
}


def test_losses_with_the_deterministic_mask_are_golden(released, z):
    losses = released(z["image"], z["tokens"], half_noise(released, z["image"]))
    assert losses.keys() == LOSS_KEYS.keys()
    for name, key in LOSS_KEYS.items():
        assert_close(losses[name], z[f"loss_raw_{key}"])
        assert_close(gcl.total_loss({name: losses[name]}), z[f"loss_w_{key}"])
    assert_close(gcl.total_loss(losses), z["loss_total_det"])


def diagonal_noise(z):
    return torch.stack([z["u"][i, i] for i in range(4)]).unsqueeze(1)


def our_name(name):
    """Our parameter name of the release's."""
    name = name.replace("masker.image_encoder.backbone.transformer.resblocks.2.", "block.")
    name = re.sub(
        r".*decoder\.net\.(\d)\.conv(2?)\.", lambda m: f"adapter.stages.{m[1]}.{m[2] or 1}.", name
    )
    name = name.replace("masker.image_encoder.decoder.image_proj.ln", "head.ln_post").replace(
        "gate.gate", "gate"
    )
    name = name.replace("masker.image_encoder.decoder.image_proj.proj", "head.proj").replace(
        "masker.sim2mask.", ""
    )
    return re.sub(
        r"tcl([if])_loss\.logit_scale",
        lambda m: "log_scale.gcl_" + {"i": "v", "f": "f"}[m[1]],
        name,
    )


def gradients(net):
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("prefix, step", [("train", 0), ("train", 29_999), ("ft", 30_000)])
def test_training_step_has_the_golden_losses_and_gradient_norms(z, prefix, step):
    net = gcl.load(RELEASE)
    assert net.set_trainable(step) == (prefix == "ft")
    losses = net(z["image"], z["tokens"], diagonal_noise(z))
    for name, key in LOSS_KEYS.items():
        assert_close(GROUPS[name] * losses[name], z[f"train_loss_w_{key}"])
    total = gcl.total_loss(losses)
    assert_close(total, z["train_loss_total"])
    total.backward()
    expected = dict(
        zip(map(our_name, z[f"{prefix}_trainable_names"]), z[f"{prefix}_grad_norms"], strict=True)
    )
    ours = gradients(net)
    assert (
        ours.keys() == expected.keys() == {k for k, p in net.named_parameters() if p.requires_grad}
    )
    for name, norm in expected.items():
        assert_close(ours[name].norm(), norm)
    if prefix == "ft":
        assert_close(ours["block.attn.in_proj_bias"], z["ft_grad_in_proj_bias"])
        assert_close(ours["block.attn.out_proj.weight"], z["ft_grad_out_proj_weight"])
    else:
        assert_close(
            torch.cat([g.flatten() for g in ours.values()]).norm(), z["train_grad_global_norm"]
        )


def gates(net):
    return [block.gate for stage in net.adapter.stages for block in (stage[1], stage[2])]


def test_training_step_has_the_golden_gradients(z):
    net = gcl.load(RELEASE)
    gcl.total_loss(net(z["image"], z["tokens"], diagonal_noise(z))).backward()
    assert_close(torch.stack([gate.grad for gate in gates(net)]), z["grad_gates"])
    assert_close(net.w.grad, z["grad_sim2mask_w"])
    assert_close(net.b.grad, z["grad_sim2mask_b"])
    assert_close(net.log_scale["gcl_v"].grad, z["grad_tcli_logit_scale"])
    assert_close(net.log_scale["gcl_f"].grad, z["grad_tclf_logit_scale"])
    assert_close(net.adapter.stages[0][1].conv.weight.grad, z["grad_conv0_weight"])
    assert_close(net.head.proj.grad, z["grad_image_proj_proj"])
    assert_close(net.head.ln_post.weight.grad, z["grad_image_proj_ln_weight"])


@pytest.mark.parametrize("name", LOSS_KEYS)
def test_every_loss_alone_has_its_golden_gradients(z, name):
    net = gcl.load(RELEASE)
    loss = gcl.total_loss({name: net(z["image"], z["tokens"], diagonal_noise(z))[name]})
    grads = torch.autograd.grad(loss, [net.w, net.b, *gates(net)], allow_unused=True)
    ours = torch.stack([torch.zeros(()) if g is None else g for g in grads])
    assert_close(ours, z["grad_per_loss"][z["grad_per_loss_names"].index(LOSS_KEYS[name])])


# ---- segmentation with the released model ----


class GoldenTokenizer:
    """Turns the prompt "class:template" into the golden tokens."""

    def __init__(self, tokens):
        self.tokens, self.prompts = tokens, []

    def __call__(self, prompts):
        self.prompts += prompts
        return torch.stack(
            [self.tokens[int(p.split(":")[0]), int(p.split(":")[1])] for p in prompts]
        )


@pytest.fixture(scope="module")
def text(released, seg):
    templates = ["{}:0", "{}:1", "{}:2"]
    return released.encode_classes(list("01234"), GoldenTokenizer(seg["cls_tokens"]), templates)


def agree(masks, labels, background):
    """99.9 % of the labels with a constant background channel in front."""
    channels = torch.cat([torch.full_like(masks[:, :1], background), masks], dim=1)
    assert (channels.argmax(1) == labels).float().mean() >= 0.999


def test_class_embeddings_are_the_normalised_mean_over_raw_prompts(released, seg, text):
    assert_close(text, seg["text_embedding"])
    raw = released.clip.encode_text(seg["cls_tokens"].flatten(0, 1)).unflatten(0, (5, 3))
    assert_close(text, F.normalize(raw.mean(1), dim=-1))
    assert (text - F.normalize(F.normalize(raw, dim=-1).mean(1), dim=-1)).abs().max() > 1e-4


@pytest.mark.parametrize("kp", ["0", "0.3"])
@pytest.mark.parametrize("refined", [0, 1])
def test_masks_and_labels_of_an_odd_image_are_golden(released, seg, text, refined, kp):
    masks = released.segment(
        seg["image"], text, refine=pamr if refined else None, kp_weight=float(kp)
    )
    assert_close(masks, seg[f"mask_pamr{refined}_kp{kp}"])
    agree(masks, seg[f"labels_bg_pamr{refined}_kp{kp}"], background=0.4 if refined else 0.5)


@pytest.mark.parametrize("refined", [0, 1])
def test_masks_and_labels_of_a_native_image_are_golden(released, seg, text, refined):
    masks = released.segment(seg["image2"], text, refine=pamr if refined else None)
    assert_close(masks, seg[f"mask2_pamr{refined}_kp0.3"])
    agree(masks, seg[f"labels_bg2_pamr{refined}_kp0.3"], background=0.4 if refined else 0.5)


def test_masks_of_plain_tokens_are_golden(released, seg):
    masks = released.segment(seg["image2"], released.encode_text(seg["cls_tokens"][:, 0]))
    assert_close(masks, seg["mask2_tokenroute_pamr0_kp0.3"])


@pytest.mark.parametrize("which", ["", "2"])
def test_padding_and_similarity_maps_are_golden(released, seg, text, which):
    image, (left, right, top, bottom) = seg[f"image{which}"], seg[f"pad_lrtb{which}"].tolist()
    padded, padding = backbone.pad_to_patch(image, 8)
    assert padding == (left, right, top, bottom)
    assert_close(padded, F.pad(image, (left, right, top, bottom)), rtol=0, atol=0)
    similarity = torch.einsum("bchw,kc->bkhw", gcl.normalize(embed(released, padded), dim=1), text)
    assert_close(similarity, seg[f"simmap{which}"])


def test_stripped_release_with_clip_beside_it_gives_the_same_masks(released, seg, text):
    stripped = gcl.load(RELEASE_STRIPPED, model=CLIP_JSON, pretrained=CLIP_WEIGHTS)
    assert stripped.recipe == gcl.RECIPES["release"] and not stripped.training
    assert torch.equal(
        stripped.segment(seg["image"], text, pamr), released.segment(seg["image"], text, pamr)
    )


# ---- the paper's equations, as loops ----


def loop_masks(v_s, t, w, b):
    masks = torch.zeros(len(v_s), len(t), *v_s.shape[2:])
    for i, j, y, x in itertools.product(*map(range, masks.shape)):
        v = v_s[i, :, y, x]
        masks[i, j, y, x] = 1 / (1 + math.exp(-(w * float(t[j] @ v) / float(v.norm()) + b)))
    return masks


def loop_pooled_cosine(dense, mask, text):
    above, below = torch.zeros(dense.shape[0]), 0.0
    for y, x in itertools.product(range(dense.shape[1]), range(dense.shape[2])):
        above, below = above + mask[y, x] * dense[:, y, x], below + mask[y, x]
    v_f = above / below
    return float(v_f @ text) / float(v_f.norm())


class Case:
    """A small net, a batch at CLIP's native size, and everything the losses are made of."""

    def __init__(self, folder, recipe="paper"):
        self.net = make_net(folder, recipe, area_prior=0.3)
        self.images, self.tokens = make_batch()
        self.noise = torch.rand(3, 1, 20, 20)
        with torch.no_grad():
            self.losses = self.net(self.images, self.tokens, self.noise)
            self.t = self.net.encode_text(self.tokens)
            self.v_s = embed(self.net, self.images)
            self.masks = loop_masks(self.v_s, self.t, float(self.net.w), float(self.net.b))
            self.dense = F.normalize(self.v_s, dim=1) if recipe == "paper" else self.v_s

    def info_nce(self, similarity, name):
        return loop_info_nce(similarity, math.exp(float(self.net.log_scale[name].detach())))


@pytest.fixture(scope="module", params=["paper", "release"])
def case(request, tmp_path_factory):
    torch.manual_seed(1)
    return Case(tmp_path_factory.mktemp("clip"), request.param)


def test_masks_are_sigmoids_of_scaled_cosines(case):
    """Eq. (5)"""
    v_n = gcl.normalize(case.v_s, dim=1)
    assert_close(torch.sigmoid(case.net.mask_logits(v_n, case.t)), case.masks)


def test_masks_start_at_10_cosine_minus_2_5_and_temperatures_at_007(tmp_path):
    net = gcl.GCL(make_clip(tmp_path))
    assert net.w == 10.0 and net.b == -2.5 and net.p_pos == 0.4
    assert_close(torch.stack([torch.exp(-scale) for scale in net.log_scale.values()]), [0.07] * 3)
    assert net.log_scale.keys() == {"gcl_v", "gcl_f", "cl"}


def test_image_level_loss_is_info_nce_of_masked_images(case):
    """Eq. (6): the image under a sample of its own text's mask, through open_clip's own encoder."""
    similarity = torch.zeros(3, 3)
    for i in range(3):
        own = case.masks[i, i]
        masked = torch.zeros(3, 35, 35)
        for y, x in itertools.product(range(35), range(35)):
            p, u = (
                float(own[y * 20 // 35, x * 20 // 35]),
                float(case.noise[i, 0, y * 20 // 35, x * 20 // 35]),
            )
            keep = math.log(p / (1 - p)) + math.log(u / (1 - u)) > 0
            masked[:, y, x] = case.images[i, :, y, x] * keep
        with torch.no_grad():
            v_g = F.normalize(case.net.clip.encode_image(masked[None]), dim=-1)[0]
        for j in range(3):
            similarity[i, j] = v_g @ case.t[j]
    assert_close(case.losses["gcl_v"], case.info_nce(similarity.tolist(), "gcl_v"))


def test_feature_level_loss_is_info_nce_of_pooled_pairs(case):
    """Eq. (9): S_ij is the cosine of t_j, not t_i, and image i pooled over the mask of text j."""
    similarity = [
        [loop_pooled_cosine(case.dense[i], case.masks[i, j], case.t[j]) for j in range(3)]
        for i in range(3)
    ]
    assert_close(case.losses["gcl_f"], case.info_nce(similarity, "gcl_f"))
    wrong = [
        [loop_pooled_cosine(case.dense[i], case.masks[i, j], case.t[i]) for j in range(3)]
        for i in range(3)
    ]
    assert abs(case.info_nce(similarity, "gcl_f") - case.info_nce(wrong, "gcl_f")) > 1e-3


def test_plain_loss_pools_with_a_mask_of_ones(case):
    ones = torch.ones(20, 20)
    similarity = [
        [loop_pooled_cosine(case.dense[i], ones, case.t[j]) for j in range(3)] for i in range(3)
    ]
    assert_close(case.losses["cl"], case.info_nce(similarity, "cl"))


def test_priors_are_of_all_masks_and_the_recipes_dense_embedding(case):
    positive = torch.stack([case.masks[i, i] for i in range(3)]).mean()
    negative = torch.stack([case.masks[i, j] for i in range(3) for j in range(3) if i != j]).mean()
    assert_close(case.losses["area_pos"], abs(0.3 - positive))
    assert_close(case.losses["area_neg"], negative)
    assert_close(case.losses["tv_mask"], ops.total_variation(case.masks).mean())
    assert_close(case.losses["tv_dense"], ops.total_variation(case.dense).mean())


def test_total_loss_weighs_three_groups():
    """Eq. (12), with the paper's weights by default."""
    losses = {
        "gcl_v": 1.0,
        "gcl_f": 2.0,
        "cl": 4.0,
        "area_pos": 8.0,
        "area_neg": 16.0,
        "tv_mask": 32.0,
        "tv_dense": 64.0,
    }
    assert gcl.total_loss(losses) == pytest.approx(
        0.1 * (1 + 2 + 4) + 0.4 * (8 + 16) + 1.0 * (32 + 64)
    )
    assert gcl.total_loss(losses, {"gcl": 3, "area": 5, "tv": 7}) == 3 * 7 + 5 * 24 + 7 * 96
    assert gcl.total_loss(losses, {"tv": 0.0}) == pytest.approx(0.1 * 7 + 0.4 * 24)


def test_the_areas_to_log_hold_no_graph(case):
    """They stay until the next step, and would keep all its activations."""
    assert case.net(case.images, case.tokens)["area_pos"].requires_grad
    assert not case.net.mask_areas.requires_grad


def test_forward_draws_its_own_noise(case):
    torch.manual_seed(3)
    first = case.net(case.images, case.tokens)
    torch.manual_seed(3)
    again = case.net(case.images, case.tokens, torch.rand(3, 1, 20, 20))
    assert first["gcl_v"] == again["gcl_v"] != case.net(case.images, case.tokens)["gcl_v"]
    assert first["gcl_f"] == case.losses["gcl_f"]


def paired_and_permuted(net, images, t, name, monkeypatch):
    """The loss of the right pairing, and of all five others of three pairs."""
    tokens, losses = torch.zeros(3, 11, dtype=torch.int64), []
    for order in itertools.permutations(range(3)):
        monkeypatch.setattr(net, "encode_text", lambda _, order=order: t[list(order)])
        losses.append(net(images, tokens, half_noise(net, images))[name].item())
    return losses[0], losses[1:]


def test_plain_contrast_bounds_the_information_of_whole_images_and_texts(tmp_path, monkeypatch):
    """Eq. (1): log B - loss bounds I(x_v; x_t) from below: the right pairs have the lowest loss."""
    net, (images, _) = make_net(tmp_path), make_batch()
    t = F.normalize(F.normalize(embed(net, images), dim=1).mean((2, 3)), dim=-1).detach()
    paired, permuted = paired_and_permuted(net, images, t, "cl", monkeypatch)
    assert 0 < paired < min(permuted)
    assert paired < math.log(3) < max(permuted)
    net.b.data.fill_(-20.0)  # masks have no part in it
    assert paired_and_permuted(net, images, t, "cl", monkeypatch)[0] == paired


def test_grounded_contrast_bounds_the_information_of_masked_images_and_texts(tmp_path, monkeypatch):
    """Eq. (2): with full masks as above; with empty ones m * x_v tells nothing, and the bound
    log B - loss is not above 0."""
    net, (images, _) = make_net(tmp_path), make_batch()
    net.w.data.fill_(0.0)
    net.b.data.fill_(20.0)
    t = backbone.global_embedding(net.clip.visual, images).detach()
    paired, permuted = paired_and_permuted(net, images, t, "gcl_v", monkeypatch)
    assert paired < min(permuted)
    assert paired < math.log(3)
    net.b.data.fill_(-20.0)
    blind, blind_permuted = paired_and_permuted(net, images, t, "gcl_v", monkeypatch)
    assert min(blind, *blind_permuted) > math.log(3) - 1e-6


# ---- segmentation ----


def preserved(net, images, t):
    """CLIP's own masks on the mask grid: sigmoid(10 (cosine - 0.25)) a patch, then bilinear x4."""
    height, width = backbone.patch_grid(images, net.patch)
    v_d = backbone.dense_features(
        net.last_block, backbone.trunk(net.clip.visual, images), (height, width)
    )
    masks = torch.zeros(len(images), len(t), height, width)
    for i, k, y, x in itertools.product(*map(range, masks.shape)):
        v = net.clip.visual.ln_post(v_d[i, :, y, x]) @ net.clip.visual.proj
        masks[i, k, y, x] = 1 / (1 + math.exp(-10 * (float(v @ t[k]) / float(v.norm()) - 0.25)))
    return F.interpolate(masks, scale_factor=4, mode="bilinear", align_corners=False)


def test_knowledge_preservation_mixes_clips_masks_in_after_refinement(tmp_path):
    """Eq. (14)"""
    net, images = make_net(tmp_path), torch.randn(2, 3, 14, 21)
    t = F.normalize(torch.randn(3, 20), dim=-1)
    with torch.no_grad():
        masks, kept = (
            loop_masks(embed(net, images), t, float(net.w), float(net.b)),
            preserved(net, images, t),
        )
    for weight, refine, factor in [
        (0.3, None, 1.0),
        (0.75, None, 1.0),
        (0.3, lambda image, mask: 0.5 * mask, 0.5),
    ]:
        mixed = (1 - weight) * factor * masks + weight * kept
        expected = F.interpolate(mixed, (14, 21), mode="bilinear", align_corners=False)
        assert_close(net.segment(images, t, refine=refine, kp_weight=weight), expected)
    assert_close(net.segment(images, t), net.segment(images, t, kp_weight=0.3), rtol=0, atol=0)
    maskclip = F.interpolate(kept, (14, 21), mode="bilinear", align_corners=False)
    assert_close(net.segment_clip(images, t), maskclip)


def test_refinement_sees_the_image_at_the_masks_own_resolution(tmp_path):
    net, images, seen = make_net(tmp_path), torch.randn(2, 3, 13, 20), []
    padded = F.pad(images, (0, 1, 0, 1))
    small = F.interpolate(padded, (8, 12), mode="bilinear", align_corners=True)
    t = F.normalize(torch.randn(3, 20), dim=-1)
    for segment in (net.segment, net.segment_clip):
        segment(images, t, refine=lambda image, mask: seen.append((image, mask.shape)) or mask)
        assert_close(seen[-1][0], small, rtol=1e-6, atol=1e-6)
        assert seen[-1][1] == (2, 3, 8, 12)


@pytest.mark.parametrize("size", [(61, 83), (35, 35), (36, 34), (5, 90), (1, 1)])
def test_masks_have_the_images_own_size(tmp_path, size):
    net, t = make_net(tmp_path), F.normalize(torch.randn(2, 20), dim=-1)
    for segment in (net.segment, net.segment_clip):
        masks = segment(torch.randn(1, 3, *size), t)
        assert masks.shape == (1, 2, *size) and masks.dtype == torch.float32
        assert 0 <= masks.min() and masks.max() <= 1


def test_padded_pixels_are_zeros_and_are_cropped_from_the_masks(tmp_path):
    net, image = make_net(tmp_path), torch.randn(1, 3, 17, 26)
    t = F.normalize(torch.randn(2, 20), dim=-1)
    # To 21 x 28: 4 rows (2 and 2), 2 columns (1 and 1).
    whole = net.segment(F.pad(image, (1, 1, 2, 2)), t)
    assert_close(net.segment(image, t), whole[..., 2:-2, 1:-1], rtol=0, atol=0)
    whole = net.segment(
        F.pad(image[..., :16, :23], (2, 3, 2, 3)), t
    )  # 5 and 5: the smaller half left and top
    assert_close(net.segment(image[..., :16, :23], t), whole[..., 2:-3, 2:-3], rtol=0, atol=0)


def test_training_images_must_be_multiples_of_the_patch(tmp_path):
    net, (images, tokens) = make_net(tmp_path), make_batch(height=35, width=36)
    with pytest.raises(ValueError, match="35x36 must be multiples of this CLIP's patch size 7"):
        net(images, tokens)


def test_a_clip_of_any_shape_trains_on_images_of_any_multiple(tmp_path):
    net, (images, tokens) = make_net(tmp_path), make_batch(n=2, height=14, width=42)
    gcl.total_loss(net(images, tokens)).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


def test_norms_have_a_floor_of_1e_6():
    assert_close(gcl.normalize(torch.tensor([[3e-7, 4e-7], [3.0, 4.0]])), [[0.3, 0.4], [0.6, 0.8]])
    assert_close(
        gcl.normalize(torch.tensor([[3.0, 1.0], [4.0, 0.0]]), dim=0), [[0.6, 1.0], [0.8, 0.0]]
    )


def test_text_embeddings_keep_the_leading_axes_and_have_length_one(tmp_path):
    net, (_, tokens) = make_net(tmp_path), make_batch(n=6)
    t = net.encode_text(tokens.reshape(2, 3, 11))
    assert t.shape == (2, 3, 20)
    assert_close(t.flatten(0, 1), F.normalize(net.clip.encode_text(tokens), dim=-1))


def test_class_names_go_into_every_template(released, seg):
    tokenizer = GoldenTokenizer(seg["cls_tokens"])
    released.encode_classes(["2", "1"], tokenizer, ["{}:0", "{}:{}"])
    assert tokenizer.prompts == ["2:0", "2:2", "1:0", "1:1"]


def test_random_weights_are_named_and_travel_in_the_checkpoint(tmp_path):
    """--pretrained random, to try every command without any weights."""
    clip, _ = gcl.load_clip(write_config(tmp_path), "random")
    gcl.GCL(clip).save(tmp_path / "net.pt")
    net = gcl.load(tmp_path / "net.pt")
    assert net.clip.source["pretrained"] == "random"
    assert all(
        torch.equal(value, clip.state_dict()[k]) for k, value in net.clip.state_dict().items()
    )


def test_tokenizer_with_another_vocabulary_is_refused(tmp_path):
    clip, tokenizer = gcl.load_clip(write_config(tmp_path), pretrained=None)
    assert tokenizer(["a photo of a moon."]).shape == (1, 11)
    with pytest.raises(files.InputError, match="vocabulary"):
        gcl.GCL(clip).encode_classes(["moon"], tokenizer, ["a photo of a {}."])


# ---- what trains ----

ADAPTER = {
    f"adapter.stages.{stage}.{block}.{name}"
    for stage in (0, 1)
    for block in (1, 2)
    for name in ("gate", "norm.weight", "norm.bias", "conv.weight", "conv.bias")
}
HEAD = {"head.ln_post.weight", "head.ln_post.bias", "head.proj"}
LINEAR = ("attn.in_proj_", "attn.out_proj.", "mlp.c_fc.", "mlp.c_proj.")
BLOCK = {
    f"block.{layer}{kind}" for layer in ("ln_1.", "ln_2.", *LINEAR) for kind in ("weight", "bias")
}


def trainable(net):
    return {name for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("losses", [("gcl_v",), ("gcl_f",), ("cl",), ("gcl_v", "gcl_f"), ACTIVE])
def test_paper_recipe_trains_adapter_projection_and_active_temperatures(tmp_path, losses):
    net, (images, tokens) = gcl.GCL(make_clip(tmp_path), losses=losses), make_batch()
    assert trainable(net) == ADAPTER | {"w", "b"} | {f"log_scale.{name}" for name in losses}
    assert not net.set_trainable(30_000) and net.head is None and net.block is None
    terms = net(images, tokens)
    assert terms.keys() == set(losses) | {"area_pos", "area_neg", "tv_mask", "tv_dense"}
    gcl.total_loss(terms).backward()
    assert gradients(net).keys() == trainable(
        net
    )  # none is unused: DistributedDataParallel would wait for it


def test_release_recipe_trains_its_head_at_once_and_its_block_from_30000(tmp_path):
    net = gcl.GCL(make_clip(tmp_path), "release")
    scalars = {"w", "b", "log_scale.gcl_v", "log_scale.gcl_f"}
    assert trainable(net) == ADAPTER | HEAD | scalars
    assert not net.set_trainable(29_999) and trainable(net) == ADAPTER | HEAD | scalars
    assert net.set_trainable(30_000) and trainable(net) == ADAPTER | HEAD | BLOCK | scalars
    assert not net.set_trainable(30_001)
    assert net.set_trainable(0) and trainable(net) == ADAPTER | HEAD | scalars


@pytest.mark.parametrize("recipe, step", [("paper", 0), ("release", 0), ("release", 30_000)])
def test_clip_never_gets_gradients_nor_changes_and_stays_in_eval_mode(tmp_path, recipe, step):
    net, (images, tokens) = make_net(tmp_path, recipe), make_batch()
    net.train().set_trainable(step)
    before = backbone.fingerprint(net.clip)
    gcl.total_loss(net(images, tokens)).backward()
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    assert all(p.grad is None and not p.requires_grad for p in net.clip.parameters())
    assert backbone.fingerprint(net.clip) == before
    assert net.training and net.adapter.training and not any(m.training for m in net.clip.modules())


def test_trained_copies_are_apart_from_the_frozen_clip(tmp_path):
    net = gcl.GCL(make_clip(tmp_path), "release")
    shared = {p.data_ptr() for p in net.clip.parameters()}
    assert not shared & {
        p.data_ptr() for name, p in net.named_parameters() if not name.startswith("clip.")
    }
    assert torch.equal(net.head.proj, net.clip.visual.proj)


def test_recipes_differ_as_the_readme_says():
    paper, release = gcl.RECIPES["paper"], gcl.RECIPES["release"]
    assert (paper.own_head, paper.unfreeze_block_at, paper.normalize_dense) == (False, None, True)
    assert (release.own_head, release.unfreeze_block_at, release.normalize_dense) == (
        True,
        30_000,
        False,
    )
    assert paper.norm == ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    assert release.norm == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (paper.strong_augmentation, release.strong_augmentation) == (False, True)
    assert (paper.area_per_rank, release.area_per_rank) == (False, True)


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_area_prior_takes_its_norm_where_the_recipe_says(tmp_path, monkeypatch, recipe):
    seen, original = [], ops.area_prior

    def record(areas, p_pos, per_rank):
        seen.append((p_pos, per_rank))
        return original(areas, p_pos, per_rank=per_rank)

    monkeypatch.setattr(ops, "area_prior", record)
    make_net(tmp_path, recipe, area_prior=0.3)(*make_batch())
    assert seen == [(0.3, recipe == "release")]


@pytest.mark.parametrize("size, calls", [(2, 4), (4, 1), (9, 1)])
def test_only_slices_are_computed_again(size, calls):
    """Two slices of 2 rows run forward, and each once more in the backward pass."""
    seen, x = [], torch.randn(4, 3, requires_grad=True)
    rows = gcl.in_slices(lambda x: seen.append(len(x)) or {"y": x.square()}, size, (x,))
    rows["y"].sum().backward()
    assert seen == [min(size, 4)] * calls
    assert_close(x.grad, 2 * x)


def test_unknown_losses_and_recipes_are_refused(tmp_path):
    clip = make_clip(tmp_path)
    with pytest.raises((AttributeError, KeyError), match="gcl_x"):
        gcl.GCL(clip, losses=("gcl_v", "gcl_x"))
    with pytest.raises(KeyError, match="papers"):
        gcl.GCL(clip, recipe="papers")


def test_autocast_keeps_masks_pooling_and_losses_in_float32(tmp_path, monkeypatch):
    net, (images, tokens) = make_net(tmp_path), make_batch()
    noise, seen = half_noise(net, images), []
    for name in ("masked_pool", "area_prior", "total_variation", "info_nce", "gumbel_sigmoid"):
        original = getattr(ops, name)
        monkeypatch.setattr(
            ops,
            name,
            lambda x, *rest, f=original, **more: seen.append(x.dtype) or f(x, *rest, **more),
        )
    full = net(images, tokens, noise)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(images, tokens, noise)
    assert set(seen) == {torch.float32} and len(seen) == 2 * 8
    for name in full:
        assert half[name].dtype == torch.float32
        assert_close(half[name], full[name], rtol=0.1, atol=0.02)


def test_masks_under_autocast_are_float32_and_refined_in_float32(tmp_path):
    net, images, seen = make_net(tmp_path, "release"), torch.randn(1, 3, 21, 28), []
    t = F.normalize(torch.randn(4, 20), dim=-1)
    for segment in (net.segment, net.segment_clip):
        full = segment(images, t)
        with torch.autocast("cpu", torch.bfloat16):
            half = segment(
                images, t, refine=lambda image, mask: seen.append({image.dtype, mask.dtype}) or mask
            )
        assert half.dtype == torch.float32 and seen.pop() == {torch.float32}
        assert_close(half, full, rtol=0.1, atol=0.05)


def layer_norm_of_cuda(x, *args, norm=F.layer_norm):
    """CUDA's autocast computes norms in float32, that of CPUs leaves them as they come."""
    if not torch.is_autocast_enabled("cpu"):
        return norm(x, *args)
    with torch.autocast("cpu", enabled=False):
        return norm(x.float(), *(a.float() if torch.is_tensor(a) else a for a in args))


class RefuseMixedTypes(TorchDispatchMode):
    """What CUDA refuses and CPUs take, forward and backward, as the operators get it once autocast
    has done its part: two float types in one product, convolution or norm, and (torch 2.14, without
    a C compiler) batched products of inner size 1.
    """

    NAMES = "native_layer_norm native_batch_norm convolution mm addmm bmm baddbmm dot mv".split()

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        if name.removesuffix("_backward") in self.NAMES or "attention" in name:
            # All but what a forward pass left in float32: means, deviations, sums of exponentials.
            own = args[:2] + args[5:7] if name == "native_layer_norm_backward" else args
            own = args[:3] if "attention" in name else own
            kinds = {x.dtype for x in own if torch.is_tensor(x) and x.is_floating_point()}
            assert len(kinds) == 1, (name, kinds)
            assert name != "bmm" or args[0].shape[2] > 1, "an outer product"
            self.seen |= {(name, *kinds)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe, micro_batch", [("paper", None), ("release", 2)])
def test_a_step_and_a_segmentation_under_autocast_hold_no_mixed_types(
    tmp_path, monkeypatch, dtype, recipe, micro_batch
):
    net, (images, tokens) = make_net(tmp_path, recipe), make_batch()
    net.set_trainable(30_000)
    monkeypatch.setattr(F, "layer_norm", layer_norm_of_cuda)
    with RefuseMixedTypes() as mode:
        with torch.autocast("cpu", dtype):
            total = gcl.total_loss(net(images, tokens, micro_batch=micro_batch))
        total.backward()
        with torch.autocast("cpu", dtype):
            text = net.encode_text(tokens)
            net.segment(images, text, pamr)
            for method in backbone.METHODS:
                net.segment_clip(images, text, method, pamr)
    seen = {("convolution", dtype), ("convolution_backward", dtype), ("mm", dtype)}
    norms = {(f"native_layer_norm{way}", torch.float32) for way in ("", "_backward")}
    assert seen | norms | {("bmm", torch.float32)} <= mode.seen
    mixed = torch.zeros(1, 4, 5, 5, dtype=dtype), torch.zeros(4, 4, 3, 3)
    for function, pair in ((F.conv2d, mixed), (torch.mm, (mixed[0][0, 0], torch.zeros(5, 5)))):
        with RefuseMixedTypes(), pytest.raises(AssertionError, match="conv|mm"):
            function(*pair)
    with RefuseMixedTypes(), pytest.raises(AssertionError, match="an outer product"):
        torch.bmm(torch.ones(2, 3, 1), torch.ones(2, 1, 4))
    x, weight = torch.zeros(2, 5, dtype=dtype), torch.ones(5)
    with RefuseMixedTypes(), pytest.raises(AssertionError, match="native_layer_norm"):
        F.layer_norm(x, (5,), weight)


class Layouts(TorchDispatchMode):
    """Whether the maps that go into 3x3 convolutions lie channels last, by pass."""

    def __init__(self):
        super().__init__()
        self.last = {"convolution": [], "convolution_backward": []}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        if name in self.last and args[2 if "backward" in name else 1].shape[-1] == 3:
            maps = args[: 2 if "backward" in name else 1]  # gradient and input, or input
            layout = torch.channels_last
            self.last[name] += [x.is_contiguous(memory_format=layout) for x in maps]
        return function(*args, **(kwargs or {}))


def test_every_pass_through_the_adapter_is_channels_last(tmp_path):
    """As the library's tensor core kernels want them: nothing is transposed in between."""
    net, (images, tokens) = make_net(tmp_path), make_batch()
    with Layouts() as mode:
        with torch.autocast("cpu", torch.bfloat16):
            total = gcl.total_loss(net(images, tokens))
        total.backward()
    assert mode.last == {"convolution": [True] * 4, "convolution_backward": [True] * 8}


def test_double_precision_gives_the_same_losses_and_masks(tmp_path):
    net, (images, tokens) = make_net(tmp_path), make_batch()
    noise, t = half_noise(net, images), F.normalize(torch.randn(4, 20), dim=-1)
    losses, masks = net(images, tokens, noise), net.segment(images, t)
    double = net.double()(images.double(), tokens, noise.double())
    for name, loss in losses.items():
        assert double[name].dtype == torch.float64
        assert_close(loss, double[name])
    assert_close(masks, net.segment(images.double(), t.double()))


# ---- one rank and two ----


def ddp_case(recipe):
    """A trained net and a batch of four, the same on every rank, in float64: in float32 the smooth
    prior's gradient is the sign of rounding where neighbours are all but equal.
    """
    net = gcl.load(RELEASE)
    if recipe == "paper":
        trained = net
        net = gcl.GCL(trained.clip, "paper", ACTIVE)
        net.adapter.load_state_dict(trained.adapter.state_dict())
    net.set_trainable(30_000)
    z = golden("forward_A")
    return net.double(), z["image"].double(), z["tokens"], diagonal_noise(z).double()


def ddp_step(net, *batch):
    """Losses and gradients; on ranks, this one's part of the batch, and the gradients averaged."""
    model, rows = net, slice(None)
    if torch.distributed.is_initialized():
        model, rank = torch.nn.parallel.DistributedDataParallel(net), torch.distributed.get_rank()
        rows = slice(2 * rank, 2 * rank + 2)
    losses = model(*(x[rows] for x in batch))
    gcl.total_loss(losses).backward()
    return {k: v.detach() for k, v in losses.items()}, gradients(net)


def on_rank(rank):
    return {recipe: ddp_step(*ddp_case(recipe)) for recipe in gcl.RECIPES}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(on_rank)


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_two_ranks_train_as_one_on_the_whole_batch(ranks, recipe):
    losses, grads = ddp_step(*ddp_case(recipe))
    for name, loss in losses.items():
        assert_close(sum(r[recipe][0][name] for r in ranks) / 2, loss, rtol=1e-10, atol=1e-12)
    assert any(name.startswith("block.") for name in grads) == (recipe == "release")
    for r in ranks:
        assert r[recipe][1].keys() == grads.keys()
        for name, grad in grads.items():
            assert (r[recipe][1][name] - grad).norm() < 1e-9 * grad.norm(), name


# ---- checkpoints: own files ----


def tiny(recipe="paper", **changes):
    """A GCL on the tiny CLIP of the golden files, which has a name and a weights file."""
    net = gcl.GCL(gcl.load_clip(CLIP_JSON, CLIP_WEIGHTS)[0], recipe, **changes)
    shake((p for p in net.parameters() if p.requires_grad), size=0.2)
    return net


def masks_of(net):
    torch.manual_seed(5)
    width, size = net.clip.visual.proj.shape[1], net.patch * 3 + 1
    return net.segment(torch.randn(2, 3, size, size), F.normalize(torch.randn(3, width), dim=-1))


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_saved_net_comes_back_with_the_same_masks(tmp_path, recipe):
    net, path = tiny(recipe, losses=("cl", "gcl_f"), area_prior=0.2), tmp_path / "net.pt"
    net.save(path, step=7, optimizer={"lr": 1e-4, "moments": [torch.ones(2)]})
    again = gcl.load(path)
    assert torch.equal(masks_of(again), masks_of(net))
    assert (again.recipe, again.losses, again.p_pos) == (net.recipe, ("cl", "gcl_f"), 0.2)
    assert trainable(again) == trainable(net) and not again.training
    for name, p in net.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name
    saved = torch.load(path, weights_only=True)
    assert saved["step"] == 7 and saved["optimizer"]["lr"] == 1e-4
    assert not any(
        name.startswith("clip.") for name in saved["model"]
    )  # the frozen part is named, not copied
    assert files_in(tmp_path) == ["net.pt"]


def test_net_without_a_named_clip_carries_its_clip(tmp_path):
    net, path = make_net(tmp_path, losses=("gcl_v",)), tmp_path / "net.pt"
    net.save(path)
    (tmp_path / "clip.json").unlink()
    assert torch.equal(masks_of(gcl.load(path)), masks_of(net))


def test_released_checkpoint_saved_as_ours_gives_the_same_masks(tmp_path, released):
    released.save(tmp_path / "net.pt")
    again = gcl.load(tmp_path / "net.pt")
    assert torch.equal(masks_of(again), masks_of(released)) and again.recipe.name == "release"


def test_recipe_of_ones_own_travels_with_the_checkpoint(tmp_path):
    recipe = dataclasses.replace(
        gcl.RECIPES["paper"], name="mine", normalize_dense=False, norm=gcl.IMAGENET_NORM
    )
    net = tiny(recipe)
    net.save(tmp_path / "net.pt")
    assert gcl.load(tmp_path / "net.pt").recipe == recipe
    with pytest.raises(files.InputError, match="'mine'.*'paper'"):
        gcl.restore(tiny("paper"), gcl.read_checkpoint(tmp_path / "net.pt"), "net.pt")


def test_clip_without_a_name_has_to_be_given(tmp_path):
    net, path = tiny(), tmp_path / "net.pt"
    del net.clip.source  # as of a CLIP that load_clip did not make
    net.save(path)
    with pytest.raises(files.InputError, match="give --model and --pretrained"):
        gcl.load(path)
    assert torch.equal(masks_of(gcl.load(path, CLIP_JSON, CLIP_WEIGHTS)), masks_of(net))


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    net, path = tiny(), tmp_path / "net.pt"
    net.save(path)
    before = path.read_bytes()

    def full_disk(what, where):
        Path(where).write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        net.save(path)
    assert files_in(tmp_path) == ["net.pt"] and path.read_bytes() == before


def test_another_clip_of_the_same_shapes_is_refused(tmp_path):
    net, path = tiny(), tmp_path / "net.pt"
    net.save(path)
    state = torch.load(CLIP_WEIGHTS, weights_only=True)
    state["visual.class_embedding"][3] += 1e-2
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(files.InputError, match="was trained on another CLIP"):
        gcl.load(path, pretrained=tmp_path / "other.pt")
    torch.save(
        {k: v.float() for k, v in torch.load(CLIP_WEIGHTS, weights_only=True).items()},
        tmp_path / "same.pt",
    )
    assert torch.equal(masks_of(gcl.load(path, pretrained=tmp_path / "same.pt")), masks_of(net))


def test_another_clips_shapes_are_refused_naming_the_first_tensor(tmp_path):
    tiny().save(tmp_path / "net.pt")
    other = make_clip(tmp_path)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    expected = r"mismatch for adapter\.stages\.0\.1\.norm\.weight: .*\[64\].*\[48\]"
    for path in (tmp_path / "net.pt", RELEASE_STRIPPED):
        with pytest.raises(files.InputError, match=expected):
            gcl.load(path, model=tmp_path / "clip.json", pretrained=tmp_path / "other.pt")


def test_weights_of_another_shape_are_refused_naming_the_first_tensor(tmp_path):
    with pytest.raises(
        files.InputError, match=r"mismatch for positional_embedding: .*\[16, 64\].*\[11, 40\]"
    ):
        gcl.load_clip(write_config(tmp_path), CLIP_WEIGHTS)


def resave(tmp_path, change):
    """The released checkpoint with a change made to its model entry."""
    checkpoint = torch.load(RELEASE, weights_only=True)
    change(checkpoint["model"])
    torch.save(checkpoint, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


def test_missing_and_surplus_tensors_are_refused(tmp_path):
    with pytest.raises(files.InputError, match="Missing key.*: .b"):
        gcl.load(resave(tmp_path, lambda model: model.pop("masker.sim2mask.b")))
    surplus = {"masker.image_encoder.decoder.decoder.net.0.conv.spare": torch.ones(1)}
    with pytest.raises(files.InputError, match=r"Unexpected key.*adapter\.stages\.0\.1\.spare"):
        gcl.load(resave(tmp_path, lambda model: model.update(surplus)))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_missing_truncated_and_foreign_files_are_refused(tmp_path, content):
    path = tmp_path / "net.pt"
    with pytest.raises(files.InputError, match="net.pt: no such file"):
        gcl.load(path)
    if content is None:
        tiny().save(path)
        content = path.read_bytes()[:-2000]
    path.write_bytes(content)
    with pytest.raises(files.InputError, match="net.pt"):
        gcl.load(path)
    with pytest.raises(files.InputError, match="net.pt"):
        gcl.load_clip(CLIP_JSON, path)


def test_files_that_are_no_gcl_checkpoint_are_refused(tmp_path):
    for content in (
        [1, 2],
        {"weights": torch.ones(1)},
        {"model": {"conv.weight": torch.ones(1)}},
        {"model": 3},
    ):
        torch.save(content, tmp_path / "net.pt")
        with pytest.raises(files.InputError, match="net.pt"):
            gcl.load(tmp_path / "net.pt")
    with pytest.raises(files.InputError, match="CLIP weights go to --pretrained"):
        gcl.load(CLIP_WEIGHTS)


# ---- checkpoints: nothing in a pickle runs ----


class Call:
    """Unpickles as function(argument)."""

    def __init__(self, function, argument):
        self.function, self.argument = function, argument

    def __reduce__(self):
        return self.function, (self.argument,)


def calls(marker):
    return {
        "system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
    }


@pytest.mark.parametrize("kind", ["system", "eval"])
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_foreign_pickles_are_refused_and_not_executed(tmp_path, kind, form):
    path, marker = tmp_path / "net.pt", tmp_path / "executed"
    content = calls(marker)[kind]
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(files.InputError):
        gcl.load(path)
    with pytest.raises(files.InputError):
        gcl.load_clip(CLIP_JSON, path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists()  # so it would have


@pytest.mark.parametrize("kind", ["system", "eval"])
def test_calls_beside_good_weights_are_not_executed(tmp_path, released, kind):
    marker = tmp_path / "executed"
    torch.save(
        {**torch.load(RELEASE, weights_only=True), "config": calls(marker)[kind]},
        tmp_path / "net.pt",
    )
    try:
        assert torch.equal(masks_of(gcl.load(tmp_path / "net.pt")), masks_of(released))
    except files.InputError:
        assert kind == "system"  # torch itself refuses the module os
    assert not marker.exists()


def test_a_checkpoint_finds_its_clip_from_any_folder(tmp_path, monkeypatch):
    config = write_config(tmp_path)
    clip, _ = gcl.load_clip(config, None)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    monkeypatch.chdir(tmp_path)
    net = gcl.GCL(gcl.load_clip("clip.json", "clip.pt")[0])
    net.save("net.pt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(
        gcl.load("../net.pt").adapter.stages[0][1].conv.weight, net.adapter.stages[0][1].conv.weight
    )
    os.remove(config)  # then its place is named
    with pytest.raises(files.InputError, match="--model .*clip.json: neither"):
        gcl.load("../net.pt")


def test_an_incomplete_checkpoint_is_refused_by_name(tmp_path):
    torch.save({"format": gcl.FORMAT, "model": {}}, tmp_path / "net.pt")
    with pytest.raises(files.InputError, match="wrong or missing: .*'area_prior'"):
        gcl.load(tmp_path / "net.pt")


def test_another_head_width_is_another_clip(tmp_path):
    """Same weights, same shapes, other masks: the fingerprint tells."""
    clip = make_clip(tmp_path)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    gcl.GCL(gcl.load_clip(str(tmp_path / "clip.json"), tmp_path / "clip.pt")[0]).save(
        tmp_path / "net.pt"
    )
    (tmp_path / "other").mkdir()
    other = write_config(tmp_path / "other", {"head_width": 16})
    with pytest.raises(files.InputError, match="was trained on another CLIP"):
        gcl.load(tmp_path / "net.pt", model=other)


PAPER = dataclasses.asdict(gcl.RECIPES["paper"])
WRONG = {
    "area_prior": ["0.4", None],
    "clip": [3, {}, {"model": 5, "pretrained": 0}, {"config": [1]}, {"model": "x", "config": {}}],
    "clip_crc": ["x", 5],
    "losses": [5, ("gcl_x",), (1,)],
    "model": [5, {}, {3: 4}, {"w": "x"}],
    "recipe": [5, {}, {**PAPER, "norm": "x"}, {**PAPER, "norm": ((1, 2), (3, 4))}],
}
WRONG["recipe"] += [{**PAPER, "unfreeze_block_at": "x"}, {**PAPER, "more": 3}]


@pytest.mark.parametrize(
    "name, value", [(name, v) for name, values in WRONG.items() for v in values]
)
def test_fields_of_the_wrong_type_are_one_line(tmp_path, name, value):
    tiny().save(tmp_path / "net.pt", **{name: value})
    with pytest.raises(files.InputError) as error:
        gcl.load(tmp_path / "net.pt")
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_the_newest_field_of_the_recipe_loads(tmp_path):
    net, path = tiny("release"), tmp_path / "net.pt"
    recipe = dataclasses.asdict(net.recipe)
    recipe.popitem()
    net.save(path, recipe=recipe)
    saved = net.w.item()
    with torch.no_grad():
        net.w += 1
    gcl.restore(net, gcl.read_checkpoint(path), path)
    assert net.w.item() == saved


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    """The CRC-32 that torch.save writes with every tensor; padding between them may be anything."""
    path, generator = tmp_path / "net.pt", random.Random(0)
    tiny().save(path)
    whole, before = path.read_bytes(), gcl.read_checkpoint(path)["model"]
    noticed = 0
    for _ in range(40):
        broken = bytearray(whole)
        broken[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(broken)
        try:
            after = gcl.read_checkpoint(path)["model"]
            assert all(torch.equal(before[key], after[key]) for key in before)
        except files.InputError:
            noticed += 1
    assert noticed > 20
