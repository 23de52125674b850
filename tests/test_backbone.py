# SPDX-License-Identifier: MIT
"""backbone.py: open_clip's own features, and every weights file that people have."""

import http.server
import json
import math
import shutil
import sys
import threading
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import CLIP_JSON, CLIP_WEIGHTS, RELEASE_STRIPPED, assert_close
from safetensors.torch import save_file
from test_gcl import CONFIG, embed, make_clip, make_net, write_config

import backbone
import files
import gcl

# ---- dense features ----

SHAPES = {
    "head width 24": ({}, {}),
    "QuickGELU": ({}, {"quick_gelu": True}),
    "layer scale": ({"ls_init_value": 0.7}, {}),
    "no ln_pre": ({"no_ln_pre": True}, {}),
    "wide MLP": ({"mlp_ratio": 3.0}, {}),
    "two sides": ({"image_size": [14, 28]}, {}),
}


@pytest.mark.parametrize("extra", ["qk_norm", "scale_heads", "scale_attn", "scale_attn_inner"])
def test_blocks_with_more_than_plain_attention_are_refused(tmp_path, extra):
    """They do more with their values than project them, so the last block has no such shortcut; an
    older open_clip does not know them.
    """
    known = hasattr(open_clip.CLIPVisionCfg, extra)
    words = "plain ViT" if known else f"unexpected keyword argument '{extra}'"
    with pytest.raises(files.InputError, match=words):
        make_net(tmp_path, vision={extra: True})


@pytest.mark.parametrize("shape", SHAPES)
def test_last_block_is_open_clips_with_tokens_that_see_themselves_alone(tmp_path, shape):
    vision, changes = SHAPES[shape]
    net = make_net(tmp_path, vision=vision, **changes)
    tokens = torch.randn(2, 1 + 6, 48)
    alone = torch.full((7, 7), -math.inf).fill_diagonal_(0)
    expected = net.clip.visual.transformer.resblocks[-1](tokens, attn_mask=alone)[:, 1:]
    assert_close(
        backbone.dense_features(net.last_block, tokens, (2, 3)),
        expected.transpose(1, 2).reshape(2, 48, 2, 3),
    )


@pytest.mark.parametrize(
    "shape", ["head width 24", "QuickGELU", "layer scale", "no ln_pre", "two sides"]
)
def test_global_embedding_is_open_clips_at_the_native_size(tmp_path, shape):
    vision, changes = SHAPES[shape]
    net = make_net(tmp_path, vision=vision, **changes)
    images = torch.randn(2, 3, *net.clip.visual.image_size)
    assert_close(
        backbone.global_embedding(net.clip.visual, images),
        F.normalize(net.clip.encode_image(images), dim=-1),
    )


@pytest.mark.parametrize("size", [(14, 49), (63, 35), (7, 7)])
def test_other_sizes_are_a_clip_with_resized_positions(tmp_path, size):
    net = make_net(tmp_path)
    state = net.clip.state_dict()
    grid = state["visual.positional_embedding"][1:].reshape(1, 5, 5, 48).permute(0, 3, 1, 2)
    resized = F.interpolate(
        grid, (size[0] // 7, size[1] // 7), mode="bicubic", align_corners=False, antialias=False
    )
    rows = resized.permute(0, 2, 3, 1).reshape(-1, 48)
    state["visual.positional_embedding"] = torch.cat(
        [state["visual.positional_embedding"][:1], rows]
    )
    other = backbone.build_clip(
        {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "image_size": size}}, state, "file"
    )
    images = torch.randn(2, 3, *size)
    assert_close(
        backbone.global_embedding(net.clip.visual, images),
        F.normalize(other.encode_image(images), dim=-1),
    )
    for block in other.visual.transformer.resblocks[:-1]:
        block.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    tokens = []
    other.encode_image(images)
    assert_close(backbone.trunk(net.clip.visual, images), tokens[-1])


def test_positions_of_the_native_grid_are_untouched():
    positions = torch.randn(1 + 15, 4)
    assert torch.equal(backbone.resize_positions(positions, (3, 5), (3, 5)), positions)
    other = backbone.resize_positions(positions, (3, 5), (5, 3))
    assert other.shape == (16, 4) and torch.equal(other[0], positions[0])


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_untrained_grounder_is_maskclip(tmp_path, recipe):
    net, images = gcl.GCL(make_clip(tmp_path), recipe), torch.randn(2, 3, 21, 28)
    visual, t = net.clip.visual, F.normalize(torch.randn(4, 20), dim=-1)
    v_d = backbone.dense_features(net.last_block, backbone.trunk(net.clip.visual, images), (3, 4))
    v = F.normalize(visual.ln_post(v_d.permute(0, 2, 3, 1)) @ visual.proj, dim=-1)
    maskclip = torch.sigmoid(10 * torch.einsum("bhwc,kc->bkhw", v, t) - 2.5)
    large = maskclip.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert_close(
        torch.sigmoid(net.mask_logits(gcl.normalize(embed(net, images), dim=1), t)),
        large,
        rtol=1e-5,
        atol=1e-6,
    )
    pixels = F.interpolate(large, (21, 28), mode="bilinear", align_corners=False)
    assert_close(net.segment(images, t, kp_weight=0), pixels, rtol=1e-5, atol=1e-6)


# ---- loading CLIP ----


class Node(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def write_archive(path, state):
    """A TorchScript archive with these tensors, as OpenAI hands its weights out."""
    root = Node()
    for key, value in state.items():
        node = root
        *parents, leaf = key.split(".")
        for name in parents:
            if name not in dict(node.named_children()):
                node.add_module(name, Node())
            node = getattr(node, name)
        node.register_buffer(leaf, value)
    torch.jit.save(torch.jit.script(root), path)


@pytest.fixture(scope="module")
def weights():
    return torch.load(CLIP_WEIGHTS, weights_only=True)


jit = pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning"
)


@jit
def test_archive_state_dict_and_safetensors_load_alike(tmp_path, weights):
    truth = backbone.fingerprint(gcl.load_clip(CLIP_JSON, CLIP_WEIGHTS)[0])
    numbers = {"input_resolution": torch.tensor(64), "context_length": torch.tensor(16)}
    write_archive(tmp_path / "archive.pt", {**weights, **numbers, "vocab_size": torch.tensor(512)})
    shutil.copy(safe(tmp_path, weights), tmp_path / "named.pt")
    with pytest.raises(files.InputError, match="safetensors that are not named .safetensors"):
        gcl.load_clip(CLIP_JSON, tmp_path / "named.pt")
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3},
        tmp_path / "training.pt",
    )
    for name in ("archive.pt", "clip.safetensors", "training.pt"):
        clip, tokenizer = gcl.load_clip(CLIP_JSON, tmp_path / name)
        assert backbone.fingerprint(clip) == truth, name
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in clip.parameters())
        assert not clip.training and tokenizer(["moon"]).shape == (1, 16)


def activation(clip):
    return type(clip.visual.transformer.resblocks[-1].mlp.gelu).__name__


@pytest.fixture
def gelu_json(tmp_path):
    """The tiny CLIP's config, but with the wrong activation."""
    config = json.loads(Path(CLIP_JSON).read_text())
    config["quick_gelu"] = False
    (tmp_path / "gelu.json").write_text(json.dumps(config))
    return tmp_path / "gelu.json"


@jit
def test_archive_of_openai_with_the_wrong_activation_is_corrected_loudly(
    tmp_path, weights, gelu_json, capsys
):
    write_archive(tmp_path / "archive.pt", weights)
    right, _ = gcl.load_clip(CLIP_JSON, tmp_path / "archive.pt")
    assert "quick_gelu" not in capsys.readouterr().err
    corrected, _ = gcl.load_clip(gelu_json, tmp_path / "archive.pt")
    assert "archive.pt needs quick_gelu=True: corrected" in capsys.readouterr().err
    assert activation(corrected) == activation(right) == "QuickGELU"
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(corrected.encode_image(images), right.encode_image(images))


def test_plain_file_keeps_the_configs_activation(gelu_json, capsys):
    clip, _ = gcl.load_clip(gelu_json, CLIP_WEIGHTS)
    assert activation(clip) == "GELU" and capsys.readouterr().err == ""


TAGS = [("ViT-B-16", "openai", True), ("ViT-B-16", "laion2b_s34b_b88k", False)]
TAGS += [("ViT-B-16-quickgelu", "metaclip_400m", True)]


@pytest.mark.parametrize("name, tag, needed", TAGS)
@pytest.mark.parametrize("configured", [True, False])
def test_activation_follows_the_tag(weights, monkeypatch, capsys, name, tag, needed, configured):
    config = {**json.loads(Path(CLIP_JSON).read_text()), "quick_gelu": configured}
    monkeypatch.setattr(open_clip, "get_model_config", lambda _: config)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *a, **k: CLIP_WEIGHTS)
    monkeypatch.setattr(backbone, "offline_without_hub", lambda: None)
    clip, _ = gcl.load_clip(name, tag)
    assert activation(clip) == ("QuickGELU" if needed else "GELU")
    assert (f"needs quick_gelu={needed}" in capsys.readouterr().err) == (needed != configured)
    assert clip.source["model"] == name and clip.source["pretrained"] == tag


def test_config_with_impossible_numbers_is_refused(tmp_path):
    with pytest.raises(files.InputError):
        gcl.load_clip(write_config(tmp_path, {"width": 50, "head_width": 16}), pretrained=None)


def test_config_may_stand_under_model_cfg(tmp_path):
    (tmp_path / "hub.json").write_text(
        json.dumps({"model_cfg": json.loads(Path(CLIP_JSON).read_text())})
    )
    clip, _ = gcl.load_clip(tmp_path / "hub.json", CLIP_WEIGHTS)
    assert backbone.fingerprint(clip) == backbone.fingerprint(
        gcl.load_clip(CLIP_JSON, CLIP_WEIGHTS)[0]
    )


def test_random_weights_are_said_aloud(tmp_path, capsys):
    gcl.load_clip(write_config(tmp_path), pretrained=None)
    assert "random weights" in capsys.readouterr().err
    gcl.load_clip(CLIP_JSON, CLIP_WEIGHTS)
    assert capsys.readouterr().err == ""


def test_weights_that_cannot_be_downloaded_lead_to_a_local_file(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    monkeypatch.setattr(backbone, "offline_without_hub", lambda: None)
    with pytest.raises(files.InputError, match="Name or service not known.*--pretrained FILE"):
        gcl.load_clip("ViT-B-16-quickgelu", "openai")
    with pytest.raises(files.InputError, match="--pretrained FILE"):
        gcl.load(RELEASE_STRIPPED)


def test_a_hub_that_does_not_answer_is_not_tried_for_minutes(monkeypatch):
    """A closed port, then a server that answers, though with 404."""
    constants = sys.modules["huggingface_hub"].constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        backbone.offline_without_hub()  # the handler knows no GET: 501
        thread.join()
        assert constants.HF_HUB_OFFLINE is False
    backbone.offline_without_hub()
    assert constants.HF_HUB_OFFLINE is True


def test_unknown_models_tags_and_files_are_refused(tmp_path):
    with pytest.raises(files.InputError, match="ViT-Q-17: neither a name"):
        gcl.load_clip("ViT-Q-17", "openai")
    with pytest.raises(
        files.InputError, match="nowhere.pt: no such file, and no tag.*--pretrained FILE"
    ):
        gcl.load_clip(CLIP_JSON, "nowhere.pt")
    with pytest.raises(files.InputError, match="openay: no such file, and no tag of ViT-B-16"):
        gcl.load_clip("ViT-B-16", "openay")
    for text in (
        None,
        "{",
        "[]",
        "{}",
        json.dumps({**CONFIG, "custom_text": True}),
        json.dumps({"embed_dim": 3}),
    ):
        path = tmp_path / "model.json"
        path.unlink(missing_ok=True) if text is None else path.write_text(text)
        with pytest.raises(files.InputError, match="model.json"):
            gcl.load_clip(path, CLIP_WEIGHTS)


OTHER_VISION = [
    {"layers": [1, 1, 1, 1]},
    {"pool_type": "avg"},
    {"attentional_pool": True, "attn_pooler_heads": 4},
]
OTHER_VISION += [{"final_ln_after_pool": True}, {"wings": 2}]


@pytest.mark.parametrize("vision", OTHER_VISION)
def test_models_without_a_plain_vit_are_refused(tmp_path, vision):
    with pytest.raises(files.InputError):
        gcl.load_clip(write_config(tmp_path, {**vision, "image_size": 64}), pretrained=None)


# ---- weights as people have them, and files that only look like them ----


def saved(folder, content, name="clip.pt", **options):
    torch.save(content, folder / name, **options)
    return folder / name


class Hostile(torch.nn.Module):
    """Empties the file at path where its code runs at loading."""

    def __init__(self, path: str):
        super().__init__()
        self.path, self.bytes = path, torch.zeros(4, dtype=torch.uint8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> str:
        return self.path

    @torch.jit.export
    def __setstate__(self, path: str) -> None:
        self.path, self.training = path, False
        self.bytes = torch.from_file(path, shared=True, size=4, dtype=torch.uint8).fill_(65)


@jit
def test_code_in_an_archive_does_not_run(tmp_path):
    victim, archive = tmp_path / "victim", tmp_path / "archive.pt"
    victim.write_bytes(b"mine")
    torch.jit.save(torch.jit.script(Hostile(str(victim))), archive)
    net = gcl.GCL(gcl.load_clip(CLIP_JSON, CLIP_WEIGHTS)[0])
    net.clip.source["pretrained"] = str(archive)  # and where a checkpoint names it
    net.save(tmp_path / "net.pt")
    for load in (lambda: gcl.load_clip(CLIP_JSON, archive), lambda: gcl.load(tmp_path / "net.pt")):
        with pytest.raises(files.InputError, match="archive.pt: no CLIP state dict"):
            load()
    assert victim.read_bytes() == b"mine"
    torch.jit.load(archive)
    assert victim.read_bytes() == b"AAAA"  # so it would have


def in_hugging_faces_names(weights):
    """The state dict of transformers' CLIPModel with open_clip's weights, written by hand."""
    theirs = {"logit_scale": weights["logit_scale"]}
    towers = {"visual.": ("vision_model.", 3), "": ("text_model.", 2)}
    layer_names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
    }
    layer_names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for ours, (tower, layers) in towers.items():
        for n in range(layers):
            here, there = f"{ours}transformer.resblocks.{n}.", f"{tower}encoder.layers.{n}."
            for kind in ("weight", "bias"):
                parts = weights[f"{here}attn.in_proj_{kind}"].chunk(3)
                for name, part in zip("qkv", parts, strict=True):
                    theirs[f"{there}self_attn.{name}_proj.{kind}"] = part.clone()
                for name, other in layer_names.items():
                    theirs[f"{there}{other}.{kind}"] = weights[f"{here}{name}.{kind}"]
        positions = weights[f"{ours}positional_embedding"]
        theirs[f"{tower}embeddings.position_embedding.weight"] = positions
        theirs[f"{tower}embeddings.position_ids"] = torch.arange(len(positions))[None]
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
    }
    norms["visual.ln_post"] = "vision_model.post_layernorm"
    for ours, other in norms.items():
        theirs |= {f"{other}.{kind}": weights[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    theirs["text_model.embeddings.token_embedding.weight"] = weights["token_embedding.weight"]
    theirs["vision_model.embeddings.class_embedding"] = weights["visual.class_embedding"]
    theirs["vision_model.embeddings.patch_embedding.weight"] = weights["visual.conv1.weight"]
    theirs["visual_projection.weight"] = weights["visual.proj"].T.contiguous()
    theirs["text_projection.weight"] = weights["text_projection"].T.contiguous()
    return theirs


def test_hugging_faces_names_prefixes_and_wrappers_load_alike(tmp_path, weights):
    truth = backbone.fingerprint(gcl.load_clip(CLIP_JSON, CLIP_WEIGHTS)[0])
    theirs = in_hugging_faces_names(weights)
    assert len(theirs) == 3 + 6 + 3 * 16 + 2 * 16 + 2 + 2 + 3
    wrapped = {f"_orig_mod.module.{key}": value for key, value in weights.items()}
    (tmp_path / "folder").mkdir()
    save_file(theirs, tmp_path / "folder/model.safetensors")
    for path in (
        saved(tmp_path, theirs, "pytorch_model.bin"),
        tmp_path / "folder",
        saved(tmp_path, {"model": wrapped, "epoch": 3}, "a.pt"),
        saved(tmp_path, {"model_state_dict": {f"module.model.{k}": weights[k] for k in weights}}),
        saved(tmp_path, weights, "old.pt", _use_new_zipfile_serialization=False),
    ):
        clip, _ = gcl.load_clip(CLIP_JSON, path)
        assert backbone.fingerprint(clip) == truth, path
    gcl.GCL(gcl.load_clip(CLIP_JSON, tmp_path / "folder")[0]).save(tmp_path / "net.pt")
    assert gcl.load(tmp_path / "net.pt").clip.source["pretrained"] == str(tmp_path / "folder")


def squeezed(folder, weights):
    """The same zip, compressed: a file of 2 MB could unpack to 2 GB."""
    with zipfile.ZipFile(saved(folder, weights)) as old:
        with zipfile.ZipFile(folder / "small.pt", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(
                    name, bytes(len(old.read(name))) if "/data/" in name else old.read(name)
                )
    return folder / "small.pt"


def written(folder, content, name="clip.pt"):
    (folder / name).write_bytes(content)
    return folder / name


def changed(weights, change):
    key = "visual.ln_post.weight"
    return {**weights, key: change(weights[key].float())}


NO_WEIGHTS = {
    "begins with b''": lambda d, w: written(d, b""),
    "a Git LFS pointer.*begins with b'version https": lambda d, w: written(
        d, b"version https://git-lfs.github.com/spec/v1\noid"
    ),
    "a web page.*begins with b'<!DOCTYPE": lambda d, w: written(
        d, b"<!DOCTYPE html><html>", "model.safetensors"
    ),
    "a pickled model": lambda d, w: saved(d, gcl.load_clip(CLIP_JSON, CLIP_WEIGHTS)[0]),
    "nor a folder with model.safetensors": lambda d, w: d,
    "more than tensors.*ValueError": squeezed,
    "ln_post.weight.*sparse": lambda d, w: saved(d, changed(w, lambda x: x.to_sparse())),
    "copying the parameter.*ln_post.weight": lambda d, w: saved(
        d, changed(w, lambda x: x.to("meta"))
    ),
    "mismatch for visual.ln_post.weight": lambda d, w: saved(
        d, changed(w, lambda x: x[:1].expand(10**10))
    ),
    "NaN or infinite": lambda d, w: saved(d, changed(w, lambda x: x * math.nan)),
    "infinite": lambda d, w: saved(d, changed(w, lambda x: x / 0)),
    "no CLIP state dict": lambda d, w: RELEASE_STRIPPED,
    "checkpoint of GCL goes to": lambda d, w: saved(d, {"loss": 3.0}),
    "damaged": lambda d, w: written(d, saved(d, w).read_bytes()[:5000]),
}


def safe(folder, weights):
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "clip.safetensors")
    return folder / "clip.safetensors"


@pytest.mark.parametrize("what", NO_WEIGHTS)
def test_a_file_that_is_no_weights_says_what_it_is(tmp_path, weights, what):
    path = NO_WEIGHTS[what](tmp_path, weights)
    with pytest.raises(files.InputError, match=what) as error:
        gcl.load_clip(CLIP_JSON, path)
    assert str(path) in str(error.value) and "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)


def test_quantised_weights_are_refused(tmp_path, weights):
    quantised = changed(weights, lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8))
    with pytest.raises(files.InputError, match="clip.pt"):
        gcl.load_clip(CLIP_JSON, saved(tmp_path, quantised))


def test_a_plain_file_under_a_named_model_has_its_activation_told(tmp_path, monkeypatch, capsys):
    config = {**json.loads(Path(CLIP_JSON).read_text()), "quick_gelu": True}
    monkeypatch.setattr(open_clip, "get_model_config", lambda _: config)
    gcl.load_clip("ViT-B-16-quickgelu", CLIP_WEIGHTS)
    told = capsys.readouterr().err
    assert "does not tell its activation: quick_gelu=True, as ViT-B-16-quickgelu has it" in told


def test_near_names_of_a_model_are_told():
    with pytest.raises(files.InputError, match="ViT-B/16: neither a name.*near: .*ViT-B-16"):
        gcl.load_clip("ViT-B/16", "openai")


ABSURD = {
    "vision_cfg": [
        {"layers": 10**5},
        {"width": 10**6},
        {"image_size": 10**6},
        {"layers": [1, 1, 1, 10**9]},
        {"layers": "3"},
        {"width": -48},
        {"patch_size": 0},
        {"timm_model_name": "hf-hub:someone/something"},
    ],
    "text_cfg": [
        {"context_length": 10**6},
        {"vocab_size": 10**12},
        {"layers": 10**30},
        {"hf_model_name": "someone/something"},
    ],
}


@pytest.mark.parametrize(
    "tower, change", [(tower, change) for tower, changes in ABSURD.items() for change in changes]
)
def test_absurd_configs_and_those_of_other_libraries_are_refused_at_once(
    tmp_path, monkeypatch, tower, change
):
    """In a JSON file, and inside a checkpoint that carries its own CLIP."""
    monkeypatch.setattr("socket.socket", None)  # nothing may ask the network
    config = {**CONFIG, tower: {**CONFIG[tower], **change}}
    net = make_net(tmp_path)
    net.save(tmp_path / "net.pt", clip={"model": None, "pretrained": None, "config": config})
    (tmp_path / "clip.json").write_text(json.dumps(config))
    for load in (
        lambda: gcl.load_clip(tmp_path / "clip.json", None),
        lambda: gcl.load(tmp_path / "net.pt"),
    ):
        with pytest.raises(files.InputError):
            load()


def test_a_config_beyond_any_machine_is_counted_before_it_is_built(tmp_path):
    with pytest.raises(files.InputError, match="thousand million weights"):
        gcl.load_clip(write_config(tmp_path, {"width": 48_000, "layers": 10}), None)
