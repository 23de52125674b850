# SPDX-License-Identifier: MIT
"""The toy world: what it draws is what it labels and says; it calls the programs of real data."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import benchmarks
import data
import evaluate
import files
import gcl
import toy
import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """OUT of a small world: one shard of 60 pairs, two held-out sets of 40 pictures, seed 5."""
    out = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "PER_SHARD", 60)
        patch.setattr(toy, "HELD_OUT", 40)
        toy.write(toy.draw_shard((out / "data/train-000.tar", 5, 0)))
        for number, name in enumerate(toy.SETS, 1):
            toy.write(toy.draw_set((out / "data" / name, 5, number)))
    return out


def drawn(*seed):
    """What scene and caption make of a seed."""
    rng = np.random.default_rng(seed)
    image, label = toy.scene(rng)
    return image, label, toy.caption(label, rng)


def test_the_shards_hold_what_was_drawn(world):
    pairs = data.PairDataset([str(world / "data/train-000.tar")], None, None, (1, 1))
    assert len(pairs) == 60
    for i in (0, 7, 59):
        (image, caption), (expected, _, words) = pairs.read(i), drawn(5, 0, i)
        assert np.array_equal(np.array(image), expected) and caption == words.strip()


def test_a_seed_draws_the_same_bytes_and_another_seed_others(world, monkeypatch):
    monkeypatch.setattr(toy, "PER_SHARD", 60)
    path = world / "data/train-000.tar"
    again, other = (toy.draw_shard((path, seed, 0)) for seed in (5, 6))
    assert again == {path: path.read_bytes()} != other and other.keys() == {path}


def test_captions_name_only_what_is_seen():
    named = dict.fromkeys(toy.CLASSES, 0)
    seen = dict.fromkeys(toy.CLASSES, 0)
    for i in range(600):
        _, label, words = drawn(i)
        area = np.bincount(label.ravel(), minlength=len(toy.CLASSES))
        assert any(name in words for name in toy.CLASSES)
        for name, pixels in zip(toy.CLASSES, area, strict=True):
            seen[name] += pixels >= toy.VISIBLE[name in toy.STUFF]
            named[name] += name in words
            assert name not in words or pixels >= toy.VISIBLE[name in toy.STUFF]
    objects = sum(named[n] for n in toy.OBJECTS) / sum(seen[n] for n in toy.OBJECTS)
    stuff = sum(named[n] for n in toy.STUFF) / sum(seen[n] for n in toy.STUFF)
    # 0.75 and 0.45; a caption that would be empty names one.
    assert 0.70 < objects < 0.80 and 0.42 < stuff < 0.62


@pytest.mark.parametrize("number, name", [(1, "stuff"), (2, "background")])
def test_the_held_out_sets_are_what_evaluate_reads(world, number, name):
    found = benchmarks.read_spec(str(world / "data" / name / "SPEC.json"))
    benchmarks.check_labels(found)
    assert len(found) == 40 and found.background is (name == "background")
    for k, (_, image, label, lut) in enumerate(found.items):
        expected, classes, _ = drawn(5, number, k)
        assert np.array_equal(np.array(Image.open(image)), expected)
        names = np.array(toy.CLASSES)[classes]
        if found.background:
            names = np.where(np.isin(names, list(toy.OBJECTS)), names, "background")
        assert (np.array(found.classes)[benchmarks.read_label(label, lut)] == names).all()


def test_every_object_and_stuff_is_drawn():
    labels = np.concatenate([drawn(i)[1] for i in range(60)])
    assert len(toy.OBJECTS) == 12 and len(toy.STUFF) == 6 and len(toy.TEMPLATES) == 12
    assert set(np.unique(labels)) == set(range(18))
    assert len(set(toy.PALETTE)) == 19 == len(toy.PALETTE)


def flags_of(row, out, monkeypatch):
    """What a row gives train.py, as that reads it."""
    calls = []
    monkeypatch.setattr(toy, "call", lambda *arguments, ranks: calls.append(arguments))
    toy.train_row(row, out, 3)
    assert calls[0][0] == "train.py"
    return train.parse_args([str(a) for a in calls[0][1:]])


def test_the_rows_are_those_of_table_2(tmp_path, monkeypatch):
    rows = {row: flags_of(row, tmp_path, monkeypatch) for row in [*toy.ABLATION, "GCL"]}
    losses = {row: set(args.losses) for row, args in rows.items()}
    priors = {row: (args.lambda_area, args.lambda_tv) for row, args in rows.items()}
    assert losses["CL"] == losses["CL with priors"] == {"cl"}
    assert losses["GCL_v"] == {"gcl_v"} and losses["GCL_f"] == {"gcl_f"}
    assert losses["CL+GCL"] == {"cl", "gcl_v", "gcl_f"}
    plain = losses["GCL"], losses["without tv"], losses["without area"], losses["without both"]
    assert all(names == {"gcl_v", "gcl_f"} for names in plain)
    assert priors["without area"] == (0.0, 1.0) and priors["without tv"] == (0.4, 0.0)
    assert priors["without both"] == priors["CL"] == (0.0, 0.0)
    assert priors["GCL"] == priors["GCL_v"] == priors["CL with priors"] == (0.4, 1.0)
    args = rows["GCL"]
    assert (args.area_prior, args.lambda_gcl, args.image_size, args.seed) == (0.4, 0.1, 48, 3)
    assert args.recipe == "paper" and args.steps // args.log_every >= 20


def test_rows_are_trained_and_evaluated_through_the_command_lines(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(toy, "call", lambda *arguments: calls.append(arguments))
    background = {"miou": 1.0, "sweep": {"0.05": 1.5, "0.50": 1.0}}
    results = json.dumps({"datasets": {"stuff": {"miou": 3.0}, "background": background}})
    for row in toy.ROWS:
        files.write_text(tmp_path / row.lower() / "eval/results.json", results)
        toy.evaluate_row(row, tmp_path)
        found = toy.miou_of(row, tmp_path)
        assert found == {"stuff": 3.0, "background": 1.0, "background_best": 1.5}
    assert [script for script, *_ in calls] == ["evaluate.py"] * 2
    plain, trained = (evaluate.parse_args([str(a) for a in flags]) for _, *flags in calls)
    assert trained.method == "gcl" and trained.checkpoint == str(tmp_path / "gcl/last.pt")
    assert plain.method == "maskclip" and plain.pretrained.endswith("toy-clip.pt")
    assert trained.bg_threshold == plain.bg_threshold == 0.5
    assert trained.sweep_threshold and not trained.pamr


def test_ablate_takes_all_rows_or_those_named(monkeypatch):
    seen = []
    monkeypatch.setattr(toy, "run", lambda out, seed, rows: seen.append(rows))
    for flags in [], ["--ablate"], ["--ablate", "CL", "GCL_v", "CL"]:
        toy.main(toy.parse_args(flags))
    assert seen == [[*toy.ROWS], [*toy.ROWS, *toy.ABLATION], [*toy.ROWS, "CL", "GCL_v"]]


def test_a_failing_program_ends_the_toy_with_one_line():
    with pytest.raises(files.InputError, match="evaluate.py ended with code 2"):
        toy.call("evaluate.py", "--method", "maskclip")


def test_the_toy_clip_is_one_that_gcl_loads(tmp_path):
    files.write_text(tmp_path / "clip.json", toy.CONFIG)
    clip, tokenizer = gcl.load_clip(str(tmp_path / "clip.json"), None)
    assert tokenizer(["a kite"]).shape == (1, 20) and clip.visual.patch_size == (8, 8)
    images = torch.randn(2, 3, 48, 48)
    losses = gcl.GCL(clip)(images, tokenizer(["a kite", "an apple and a bee"]))
    assert all(value.isfinite() for value in losses.values())


def test_a_stage_is_done_once_for_a_seed_and_goes_on_where_it_was(tmp_path):
    calls, mark = [], tmp_path / "done"

    def stopped(resume):
        calls.append(resume)
        raise SystemExit(143)

    for key in (1, 1):
        with pytest.raises(SystemExit):
            toy.once("x", mark, key, stopped)
    toy.once("x", mark, 1, calls.append)
    toy.once("x", mark, 1, calls.append)  # it is there
    toy.once("x", mark, 2, calls.append)  # another seed, or other code
    assert calls == ["never", "auto", "auto", "never"]


def test_the_sheet_shows_what_there_is(world):
    toy.draw_sheet(world)
    first = np.array(Image.open(world / "toy.png"))
    name = toy.examples(world / "data/stuff/labels", 1)[0]
    prediction = Image.new("RGB", (48, 48), "#0a141e")
    files.save_png(world / "gcl/eval/predictions/stuff" / name, prediction)
    toy.draw_sheet(world)
    changed = (np.array(Image.open(world / "toy.png")) != first).any(-1)
    assert changed.sum() == 144 * 144


def test_a_stop_ends_in_one_line_and_leaves_no_process(tmp_path):
    command = [sys.executable, str(tiny.ROOT / "toy.py"), "--out", str(tmp_path / "toy")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        while not (tmp_path / "toy/data").exists():
            time.sleep(0.1)
        program.send_signal(signal.SIGTERM)
        _, err = program.communicate()
    assert program.returncode == 143
    assert err.splitlines()[-1].endswith("interrupted")
    assert "Traceback" not in err and not list((tmp_path / "toy").rglob("*.tmp"))


def test_the_old_flag_names_explain_py():
    done = tiny.run("toy.py", "--explain")
    tiny.check_refused(done, 2, "--explain is a program of its own now: python explain.py")
