# SPDX-License-Identifier: MIT
"""The toy world: what it draws is what it labels and says, and it calls the programs that real data uses."""

import argparse
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import backbone
import benchmarks
import data
import evaluate
import gcl
import toy
import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world: one shard of 60 pairs, two held-out sets of 40 pictures."""
    folder = tmp_path_factory.mktemp("toy") / "data"
    patch = pytest.MonkeyPatch()
    patch.setattr(toy, "PER_SHARD", 60)
    patch.setattr(toy, "HELD_OUT", 40)
    images, captions = toy.draw_shard((folder / "train-000.tar", 5, 0))
    held_out = [
        toy.draw_held_out((folder / name, 5, number))
        for number, name in enumerate(("stuff", "background"), 1)
    ]
    patch.undo()
    return folder, images, captions, held_out


def test_the_shards_hold_what_was_drawn(world):
    folder, images, captions, _ = world
    pairs = data.PairDataset([str(folder / "train-000.tar")], None, None, (1, 1))
    assert len(pairs) == 60
    for i in (0, 7, 59):
        image, caption = pairs.read(i)
        assert np.array_equal(np.array(image), images[i]) and caption == captions[i].strip()


def test_a_seed_draws_the_same_bytes_and_another_seed_others(world, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "PER_SHARD", 60)
    toy.draw_shard((tmp_path / "again.tar", 5, 0))
    toy.draw_shard((tmp_path / "other.tar", 6, 0))
    first = (world[0] / "train-000.tar").read_bytes()
    assert (tmp_path / "again.tar").read_bytes() == first != (tmp_path / "other.tar").read_bytes()


def test_captions_name_only_what_is_seen():
    named = dict.fromkeys(toy.CLASSES, 0)
    seen = dict.fromkeys(toy.CLASSES, 0)
    for i in range(600):
        rng = np.random.default_rng(i)
        _, label = toy.scene(rng)
        words = toy.caption(label, rng)
        area = np.bincount(label.ravel(), minlength=len(toy.CLASSES))
        assert any(name in words for name in toy.CLASSES)
        for name, pixels in zip(toy.CLASSES, area, strict=True):
            seen[name] += pixels >= toy.VISIBLE[name in toy.STUFF]
            named[name] += name in words
            assert name not in words or pixels >= toy.VISIBLE[name in toy.STUFF]
    objects = sum(named[n] for n in toy.OBJECTS) / sum(seen[n] for n in toy.OBJECTS)
    stuff = sum(named[n] for n in toy.STUFF) / sum(seen[n] for n in toy.STUFF)
    assert (
        0.70 < objects < 0.80 and 0.42 < stuff < 0.62
    )  # 0.75 and 0.45; a caption that would be empty names one


def test_the_held_out_sets_are_what_evaluate_reads(world):
    folder, _, _, held_out = world
    for name, (images, labels) in zip(("stuff", "background"), held_out, strict=True):
        found = benchmarks.read_spec(str(folder / name / "SPEC.json"))
        benchmarks.check_labels(found)
        assert len(found) == 40 and found.background is (name == "background")
        for k, (_, image, label, lut) in enumerate(found.items):
            stored = benchmarks.read_label(label, lut)
            assert np.array_equal(np.array(Image.open(image)), images[k])
            names = np.array(found.classes)[stored]
            drawn = np.array(toy.CLASSES)[labels[k]]
            expected = (
                np.where(np.isin(drawn, list(toy.OBJECTS)), drawn, "background")
                if found.background
                else drawn
            )
            assert (names == expected).all()


def test_every_object_and_stuff_is_drawn(world):
    labels = np.concatenate([labels for _, labels in world[3]])
    assert len(toy.OBJECTS) == 12 and len(toy.STUFF) == 6 and len(toy.TEMPLATES) == 12
    assert set(np.unique(labels)) == set(range(18))
    assert len({tuple(colour) for colour in toy.PALETTE}) == 18 == len(toy.PALETTE)


def test_the_rows_are_those_of_table_2():
    rows = {name: set(losses) for name, (losses, *_) in toy.ABLATION.items()}
    assert toy.ROWS["GCL"] == (["gcl_v", "gcl_f"], 0.4, 1.0) and toy.ROWS["MaskCLIP"] is None
    assert rows["CL"] == {"cl"} and rows["GCL_v"] == {"gcl_v"} and rows["GCL_f"] == {"gcl_f"}
    assert rows["CL+GCL"] == {"cl", "gcl_v", "gcl_f"}
    priors = {name: weights for name, (_, *weights) in toy.ABLATION.items()}
    assert priors["without area"] == [0.0, 1.0] and priors["without tv"] == [0.4, 0.0]
    assert priors["without both"] == priors["CL"] == [0.0, 0.0]


def test_rows_are_trained_and_evaluated_through_the_command_lines(tmp_path, monkeypatch):
    """The arguments that toy.py builds are ones that train.py and evaluate.py accept, with the losses of the row."""
    calls = []
    monkeypatch.setattr(
        toy, "call", lambda script, *args: calls.append((script, [str(a) for a in args]))
    )
    toy.train_row("without area", tmp_path, 3)
    (tmp_path / "gcl" / "eval").mkdir(parents=True)
    (tmp_path / "maskclip" / "eval").mkdir(parents=True)
    sets = {
        "stuff": {"miou": 3.0},
        "background": {"miou": 1.0, "sweep": {"0.05": 1.5, "0.50": 1.0}},
    }
    for row in ("GCL", "MaskCLIP"):
        (tmp_path / row.lower() / "eval/results.json").write_text(json.dumps({"datasets": sets}))
        assert toy.evaluate_row(row, tmp_path) == {
            "stuff": 3.0,
            "background": 1.0,
            "background_best": 1.5,
        }
    assert [script for script, _ in calls] == ["train.py", "evaluate.py", "evaluate.py"]
    args = train.parse_args(calls[0][1])
    assert (args.lambda_area, args.lambda_tv, args.seed, args.losses) == (
        0.0,
        1.0,
        3,
        ["gcl_v", "gcl_f"],
    )
    assert (args.area_prior, args.lambda_gcl, args.image_size, args.recipe) == (
        0.4,
        0.1,
        48,
        "paper",
    )
    trained, plain = (evaluate.parse_args(arguments) for _, arguments in calls[1:])
    assert (
        trained.method == "gcl"
        and plain.method == "maskclip"
        and plain.pretrained.endswith("toy-clip.pt")
    )
    assert (
        trained.bg_threshold == plain.bg_threshold == 0.5
        and trained.sweep_threshold
        and not trained.pamr
    )


def test_a_failing_program_ends_the_toy_with_its_code(capsys):
    with pytest.raises(SystemExit) as stop:
        toy.call("evaluate.py", "--method", "maskclip")
    assert stop.value.code == 2 and "evaluate.py ended with code 2" in capsys.readouterr().err


def test_the_toy_clip_is_one_that_gcl_loads(tmp_path):
    toy.write_json(tmp_path / "clip.json", toy.CONFIG)
    clip, tokenizer = gcl.load_clip(str(tmp_path / "clip.json"), None)
    assert tokenizer(["a kite"]).shape == (1, 20) and clip.visual.patch_size == (8, 8)
    images = torch.randn(2, 3, 48, 48)
    losses = gcl.GCL(clip)(images, tokenizer(["a kite", "an apple and a bee"]))
    assert all(value.isfinite() for value in losses.values())


# ---- --explain ----


@pytest.fixture(scope="module")
def explained(world):
    """(OUT, net) of a stand-in for the trained toy: the small world, a random CLIP, an adapter with open gates."""
    out = world[0].parent
    toy.write_json(out / "clip/toy-clip.json", toy.CONFIG)
    torch.manual_seed(1)
    clip, _ = gcl.load_clip(str(out / "clip/toy-clip.json"), None)
    torch.save(clip.state_dict(), out / "clip/toy-clip.pt")
    net = gcl.GCL(gcl.load_clip(*map(str, toy.clip_of(out)[1::2]))[0])
    for name, parameter in net.adapter.named_parameters():
        parameter.data += 0.5 * name.endswith("gate")
    (out / "gcl").mkdir()
    net.save(out / "gcl/last.pt")
    return out, net


def test_the_story_tells_the_step_that_training_takes(explained):
    """Its matrices give the losses of the model's own forward pass, its masks are those that the losses see."""
    out, net = explained
    images, texts = toy.story_pairs(out / "data/train-000.tar", 4)
    tokens = backbone.tokenizer_of(net.clip)(texts)
    noise = torch.rand(4, 1, 24, 24)
    step = toy.one_step(net, toy.normalised(np.stack(images)), tokens, noise)
    scale, losses = 1 / 0.07, step["losses"]
    for matrix, name in (("s_m", "gcl_v"), ("s_f", "gcl_f")):
        rows = torch.log_softmax(scale * step[matrix], 1).diagonal().mean()
        columns = torch.log_softmax(scale * step[matrix], 0).diagonal().mean()
        assert losses[name].item() == pytest.approx(-(rows + columns).item() / 2, abs=1e-5)
    areas = step["mask"].mean((2, 3)).diagonal()
    assert losses["area_pos"].item() == pytest.approx(abs(0.4 - areas.mean().item()), abs=1e-6)
    own = step["mask"][
        torch.arange(4), torch.arange(4)
    ]  # a place is in where the noise is below the mask's odds
    assert torch.equal(step["sample"][:, 0] > 0.5, own > 1 - noise[:, 0])
    assert not step["masked"][
        step["sample"].repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1) < 0.5
    ].any()


def test_the_pairs_of_the_story_name_one_object_each(explained):
    images, texts = toy.story_pairs(explained[0] / "data/train-000.tar")
    named = [[name for name in toy.CLASSES if name in text] for text in texts]
    assert len(images) == len(texts) >= 4 and all(
        len(names) == 1 and names[0] in toy.OBJECTS for names in named
    )
    assert len({names[0] for names in named}) == len(texts)


def test_explain_draws_every_step_with_its_equation(explained, monkeypatch):
    """The page holds the cells that it says it does, and the equations (2) to (12) in its titles."""
    out, _ = explained
    said, drawn = [], []
    text, paste = toy.ImageDraw.ImageDraw.text, toy.draw_cell
    monkeypatch.setattr(toy.ImageDraw.ImageDraw, "text", lambda pen, xy, words, *a, **k: said.append(words) or text(
        pen, xy, words, *a, **k))  # fmt: skip
    monkeypatch.setattr(toy, "draw_cell", lambda page, x, y, cell, side: drawn.append((x, y, cell)) or paste(
        page, x, y, cell, side))  # fmt: skip
    toy.explain(out)
    titles = [
        words for words in said if words[:2] in {f"{k}." for k in range(1, 10)} and "Eq." in words
    ]
    assert sorted({int(n) for title in titles for n in re.findall(r"\((\d+)\)", title)}) == list(
        range(2, 13)
    )
    assert len(drawn) == 9 * 2 - 1
    page = np.array(Image.open(out / "explain.png"))
    for x, y, cell in drawn:
        if isinstance(cell, np.ndarray) and cell.dtype == np.uint8:
            shown = page[y + 125, x : x + 250][[2, 130, 247]]  # the middle row of the cell
            row = cell[len(cell) // 2][[0, int(130.5 * len(cell) / 250), -1]]
            assert np.array_equal(shown, row if cell.ndim == 3 else row[:, None].repeat(3, 1))
    words = " ".join(said)
    assert "before" in words and "sum" in words and "a " in words and len(page) > 1000


def test_explain_runs_the_toy_only_where_it_is_missing(explained, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(toy, "main", lambda args: calls.append("toy"))
    monkeypatch.setattr(toy, "explain", lambda out: calls.append("story"))
    for out in (explained[0], tmp_path):
        toy.run(argparse.Namespace(out=out, explain=True))
    toy.run(argparse.Namespace(out=explained[0], explain=False))
    assert calls == ["story", "toy", "story", "toy"]
