# SPDX-License-Identifier: MIT
"""The training loop: schedule, optimiser, resume to the bit, two real ranks, and train.py as people call it."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import run_ranks
from tiny import ROOT, check_refused, make_clip, make_shards, run, write_tar
from torch.nn.parallel import DistributedDataParallel

import data
import gcl
import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    model, pretrained = make_clip(folder / "clip")
    shards = make_shards(folder / "data", shards=2, pairs=7)  # 14 pairs: epochs end inside batches
    return folder, ["--data", shards, "--model", model, "--pretrained", pretrained]


SHORT = "--batch-size 4 --lr 1e-2 --scalar-lr-mult 10 --steps 6 --warmup-steps 2 --save-every 3 --log-every 2".split()
CPU = ["--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(world):
    """OUT of one whole run of six steps."""
    folder, pairs = world
    result = run("train.py", *pairs, *SHORT, *CPU, "--out", folder / "whole")
    assert result.returncode == 0, result.stderr
    return folder / "whole"


def read(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Bitwise equality of nested states."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


# ---- schedule and optimiser ----


def test_the_learning_rate_warms_up_and_decays_as_the_paper_says():
    args = train.parse_args([])
    assert train.learning_rate(0, args) == pytest.approx(7.5e-5 * 1e-4)
    assert train.learning_rate(7500, args) == pytest.approx(7.5e-5 * (0.5 + 0.5e-4))
    assert train.learning_rate(15_000, args) == pytest.approx(7.5e-5)
    assert train.learning_rate(32_500, args) == pytest.approx((7.5e-5 + 1e-5) / 2)
    assert train.learning_rate(50_000, args) == pytest.approx(1e-5)
    falling = [train.learning_rate(step, args) for step in range(15_000, 50_001, 500)]
    assert falling == sorted(falling, reverse=True)


def test_the_defaults_are_the_papers_run():
    args = train.parse_args([])
    assert (args.batch_size, args.lr, args.steps, args.warmup_steps) == (1024, 7.5e-5, 50_000, 15_000)
    assert (args.weight_decay, args.lambda_gcl, args.lambda_area, args.lambda_tv) == (0.05, 0.1, 0.4, 1.0)
    assert (args.area_prior, args.clip_grad, args.min_lr, args.recipe) == (0.4, 5.0, 1e-5, "paper")
    assert (args.model, args.pretrained, args.losses) == ("ViT-B-16-quickgelu", "openai", ["gcl_v", "gcl_f"])
    assert args.data == ["data/gcc3m/*.tar", "data/gcc12m/*.tar"] and args.image_size is None


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_only_matrices_decay_and_every_parameter_is_optimised_once(world, recipe):
    clip, _ = gcl.load_clip(world[1][3], world[1][5])
    net = gcl.GCL(clip, recipe)
    optimizer = train.build_optimizer(net, train.parse_args(["--scalar-lr-mult", "3"]))
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    own = {name: p for name, p in net.named_parameters() if not name.startswith("clip.")}
    assert len(found) == len(own) == sum(len(group["params"]) for group in optimizer.param_groups)
    for p in own.values():
        group = found[id(p)]
        assert group["weight_decay"] == (0.05 if p.ndim >= 2 else 0.0)
        assert group["lr_mult"] == (3.0 if p.ndim == 0 else 1.0)
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-6


# ---- runs ----


def test_a_run_writes_a_checkpoint_a_log_and_its_settings(world, trained):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        terms = {k: line[k] for k in ("gcl_v", "gcl_f", "area_pos", "area_neg", "tv_mask", "tv_dense")}
        assert line["loss"] == pytest.approx(gcl.total_loss(terms), rel=1e-5)
        assert {"w", "b", "tau_gcl_v", "tau_gcl_f", "lr", "grad_norm", "images_per_second", "replaced"} <= line.keys()
        assert all(math.isfinite(value) for value in line.values())
    assert json.loads((trained / "config.json").read_text())["batch_size"] == 4
    assert [p.name for p in sorted(trained.iterdir()) if p.suffix != ".npy"] == ["config.json", "last.pt", "log.jsonl"]
    assert len(list(trained.glob("index-*.npy"))) == 1
    checkpoint = read(trained / "last.pt")
    assert checkpoint["step"] == 6 and not any(k.startswith("clip.") for k in checkpoint["model"])


def test_training_changes_what_is_trained_and_nothing_else(world, trained):
    net = gcl.load(trained / "last.pt")
    fresh = gcl.GCL(gcl.load_clip(world[1][3], world[1][5])[0])
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, fresh.state_dict()[k])}
    gates = {f"adapter.stages.{s}.{b}.gate" for s in (0, 1) for b in (1, 2)}
    assert gates | {"w", "b", "log_scale.gcl_v", "log_scale.gcl_f"} <= moved
    assert not any(k.startswith("clip.") for k in moved) and "log_scale.cl" not in moved


def test_a_killed_run_goes_on_to_the_same_bits(world, trained):
    folder, pairs = world
    out = folder / "killed"
    command = [sys.executable, str(ROOT / "train.py"), *pairs, *SHORT, *CPU, "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "last.pt").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = read(out / "last.pt")["step"]
    assert step in (3, 6)  # 6 on a machine so loaded that the run ended before the signal
    again = run("train.py", *pairs, *SHORT, *CPU, "--out", out)
    assert again.returncode == 0 and f"steps {step} to 6" in again.stdout
    whole, resumed = read(trained / "last.pt"), read(out / "last.pt")
    assert same(whole["model"], resumed["model"]) and same(whole["optimizer"], resumed["optimizer"])
    log = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert log == [2, 4, 6]
    done = run("train.py", *pairs, *SHORT, *CPU, "--out", out)
    assert done.returncode == 0 and same(read(out / "last.pt")["model"], whole["model"])


def test_workers_do_not_change_the_run(world, trained):
    folder, pairs = world
    result = run("train.py", *pairs, *SHORT, "--workers", 2, "--device", "cpu", "--out", folder / "workers")
    assert result.returncode == 0, result.stderr
    assert same(read(folder / "workers" / "last.pt")["model"], read(trained / "last.pt")["model"])


def test_two_ranks_train_as_one(world, trained):
    folder, pairs = world
    result = run("train.py", *pairs, *SHORT, *CPU, "--out", folder / "ranks", ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = (
        [json.loads(x) for x in (p / "log.jsonl").read_text().splitlines()] for p in (trained, folder / "ranks")
    )
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "gcl_v", "gcl_f", "area_pos", "area_neg", "tv_mask", "tv_dense", "grad_norm", "w", "b"):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-5), key
    a, b = read(trained / "last.pt")["model"], read(folder / "ranks" / "last.pt")["model"]
    for key in ("w", "b", "log_scale.gcl_v", "adapter.stages.0.1.gate", "adapter.stages.1.2.gate"):
        assert float(a[key]) == pytest.approx(float(b[key]), rel=2e-3)


def step_gradients(rank, config, weights, ranks, late):
    """Gradients of one step on a global batch of 4 in float64, by name; the release's late block as well when late."""
    clip, tokenizer = gcl.load_clip(config, weights)
    recipe = dataclasses.replace(gcl.RECIPES["release"], unfreeze_block_at=1)
    torch.manual_seed(0)
    net = gcl.GCL(clip, recipe, gcl.LOSSES).double().train()
    with torch.no_grad():
        for p in net.adapter.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype) * 0.1)  # open gates: nothing hides behind an identity
    model = DistributedDataParallel(net) if ranks > 1 else net
    if late and net.set_trainable(1):
        model = DistributedDataParallel(net) if ranks > 1 else net
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    noise = torch.rand(4, 1, 16, 16, generator=generator, dtype=torch.float64)
    tokens = tokenizer(["a cat", "two dogs", "trees", "a red kite"])
    mine = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    gcl.total_loss(model(images[mine], tokens[mine], noise[mine])).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("ranks", "late"), [(2, False), (4, True)])
def test_gradients_are_the_same_on_any_number_of_ranks(world, ranks, late):
    config, weights = world[1][3], world[1][5]
    whole = step_gradients(0, config, weights, 1, late)
    assert any(name.startswith("block.") for name in whole) is late
    for found in run_ranks(step_gradients, config, weights, ranks, late, ranks=ranks):
        assert found.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_a_non_finite_gradient_leaves_the_weights_alone(world):
    clip, tokenizer = gcl.load_clip(world[1][3], world[1][5])
    net, args = gcl.GCL(clip).train(), train.parse_args([])
    optimizer = train.build_optimizer(net, args)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    tokens, noise = tokenizer(["a cat", "two dogs"]), torch.full((2, 1, 16, 16), 0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = [torch.full((2, 3, 32, 32), math.nan), tokens, noise]
    _, norm = train.train_step(net, batch, optimizer, scaler, None, args)
    assert not norm.isfinite() and same(dict(net.state_dict()), before)
    batch[0] = torch.randn(2, 3, 32, 32)
    _, norm = train.train_step(net, batch, optimizer, scaler, None, args)
    assert norm.isfinite() and not torch.equal(net.w, before["w"])


def test_twenty_non_finite_gradients_in_a_row_stop_the_run(world, tmp_path, monkeypatch):
    norms = [math.nan] * 19 + [1.0] + [math.nan] * 30  # a finite one in between starts the count again
    monkeypatch.setattr(train, "train_step", lambda *_: ({}, torch.tensor(norms.pop(0))))
    command = "--batch-size 2 --steps 60 --warmup-steps 0 --log-every 100".split()
    with pytest.raises(data.DataError, match="step 39: 20 non-finite gradients in a row"):
        train.main(train.parse_args([*world[1], *CPU, *command, "--out", str(tmp_path)]))


def test_bf16_autocast_stays_close_to_float32(world):
    clip, tokenizer = gcl.load_clip(world[1][3], world[1][5])
    net = gcl.GCL(clip, losses=gcl.LOSSES).train()
    images, tokens = torch.randn(4, 3, 32, 32), tokenizer(["a cat", "two dogs", "trees", "a red kite"])
    noise = torch.full((4, 1, 16, 16), 0.5)
    full = net(images, tokens, noise)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(images, tokens, noise)
    for name, value in full.items():
        assert half[name].dtype == torch.float32
        assert half[name].item() == pytest.approx(value.item(), rel=0.05, abs=0.02), name


@pytest.mark.parametrize(
    "extra", [["--losses", "cl", "--lambda-area", "0", "--lambda-tv", "0"], ["--recipe", "release"]]
)
def test_other_rows_and_recipes_run(world, tmp_path, extra):
    result = run("train.py", *world[1], *SHORT, *CPU, "--precision", "bf16", "--out", tmp_path, *extra)
    assert result.returncode == 0, result.stderr
    net = gcl.load(tmp_path / "last.pt")
    assert net.recipe.name == ("release" if "--recipe" in extra else "paper")
    if "cl" in extra:
        assert net.losses == ("cl",) and net.w.item() == 10.0  # without priors nothing pulls on w


# ---- mistakes ----


@pytest.mark.parametrize(
    ("args", "ranks", "words"),
    [
        (["--batch-size", "10"], "4", "--batch-size 10 is not divisible by the 4 ranks"),
        (["--steps", "5"], "1", "--warmup-steps 15000 must lie between 0 and --steps 5"),
        (["--lr", "1e-6"], "1", "--min-lr 1e-05 must lie between 0 and --lr 1e-06"),
        (["--losses", "gcl"], "1", "invalid choice: 'gcl'"),
        (["--seed", "-1"], "1", "cannot be negative"),
        (["--image-size", "0"], "1", "--image-size must be at least 1"),
        (["--out", __file__], "1", "is a file, not a folder"),
        (["--batch", "4", "--bogus"], "1", "unrecognized arguments: --bogus"),
    ],
)
def test_wrong_calls_are_explained(monkeypatch, capsys, args, ranks, words):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(SystemExit) as stop:
        train.parse_args(args)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_wrong_data_is_explained_before_anything_is_written(world, trained, tmp_path):
    pairs = world[1]
    empty = write_tar(tmp_path / "empty.tar", [("readme.md", b"hello")])
    other = make_clip(tmp_path / "other", width=48)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    refuse = [
        (["--data", tmp_path / "*.tgz"], "no such shard"),
        ([*pairs, "--data", empty], "empty.tar: no image-text pairs"),
        ([*pairs, "--model", "ViT-B-17"], "--model ViT-B-17: neither"),
        ([*pairs, "--pretrained", "nowhere.pt"], "--pretrained nowhere.pt: no such file"),
        ([*pairs, "--image-size", 33], "--image-size 33 is not a multiple"),
        ([*pairs, "--resume", tmp_path / "no.pt"], "no.pt: no such file"),
        ([*pairs, "--model", other[0], "--pretrained", other[1], "--resume", trained / "last.pt"], "(32,)"),
        ([*pairs, "--seed", 1, "--resume", trained / "last.pt"], "was trained with --seed 0"),
        ([*pairs, "--lambda-tv", 0, "--resume", trained / "last.pt"], "was trained with --lambda-tv 1.0"),
        ([*pairs, "--pretrained", trained / "last.pt"], "no CLIP state dict"),
    ]
    for args, words in refuse:
        command = [str(a) for a in (*args, *SHORT, *CPU, "--out", tmp_path / "out")]
        with pytest.raises((data.DataError, gcl.CheckpointError), match=re.escape(words)) as refusal:
            train.main(train.parse_args(command))
        assert "\n" not in str(refusal.value)
    for args, words in (
        refuse[0],
        (["--data", pairs[1]], "--pretrained FILE"),
    ):  # as people see it, with no hub in reach
        check_refused(run("train.py", *args, *SHORT, *CPU, "--out", tmp_path / "out", **offline), 1, words)
    assert not (tmp_path / "out").exists()


def test_a_shard_of_broken_images_stops_with_its_name(world, tmp_path):
    broken = write_tar(tmp_path / "broken.tar", [("0.jpg", b"broken"), ("0.txt", b"a cat")])
    for workers in (0, 1):
        args = [*world[1], "--data", broken, *SHORT, "--workers", workers, "--device", "cpu", "--out", tmp_path / "out"]
        check_refused(run("train.py", *args), 1, "broken.tar", "unreadable")


def test_a_checkpoint_without_optimiser_state_cannot_be_resumed(world, tmp_path):
    gcl.GCL(gcl.load_clip(world[1][3], world[1][5])[0]).save(tmp_path / "net.pt")
    command = [*world[1], *SHORT, *CPU, "--resume", str(tmp_path / "net.pt"), "--out", str(tmp_path / "out")]
    with pytest.raises(gcl.CheckpointError, match="no optimiser state"):
        train.main(train.parse_args(command))
