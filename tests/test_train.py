# SPDX-License-Identifier: MIT
"""The training loop: schedule, optimiser, resume to the bit, real ranks, kills and signals, and
train.py as called.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import kill
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import assert_close, run_ranks
from PIL import Image
from tiny import CONFIG, ROOT, check_refused, jpeg, make_clip, make_set, make_shards, run, write_tar
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import backbone
import data
import evaluate
import files
import gcl
import report
import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    model, pretrained = make_clip(folder / "clip")
    shards = make_shards(folder / "data", shards=2, pairs=7)  # 14 pairs: epochs end inside batches
    return folder, ["--data", shards, "--model", model, "--pretrained", pretrained]


@pytest.fixture(autouse=True)
def _signals():
    """The handlers of this process, as they were: training sets its own and leaves them."""
    before = {number: signal.getsignal(number) for number in files.STOP}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


SHORT = "--batch-size 4 --lr 1e-2 --scalar-lr-mult 10 --steps 6 --warmup-steps 2 --save-every 3"
SHORT = [*SHORT.split(), "--log-every", "2"]
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


def wait_for(path, process):
    """Until a file is there or the process has ended."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.001)


# ---- schedule and optimiser ----


def test_the_learning_rate_warms_up_and_decays_as_the_paper_says():
    args = train.parse_args([])
    assert train.learning_rate(0, args) == pytest.approx(7.5e-5 * 1e-4)
    assert train.learning_rate(7500, args) == pytest.approx(7.5e-5 * (0.5 + 0.5e-4))
    assert train.learning_rate(15_000, args) == pytest.approx(7.5e-5)
    assert train.learning_rate(32_500, args) == pytest.approx((7.5e-5 + 1e-5) / 2)
    assert train.learning_rate(50_000, args) == pytest.approx(1e-5)
    # A quarter down a cosine's half wave it has fallen by 15 %, not by 25 %.
    quarter = 1e-5 + (7.5e-5 - 1e-5) * (2 + 2**0.5) / 4
    assert train.learning_rate(23_750, args) == pytest.approx(quarter)
    falling = [train.learning_rate(step, args) for step in range(15_000, 50_001, 500)]
    assert falling == sorted(falling, reverse=True)


def test_the_defaults_are_the_papers_run():
    args = train.parse_args([])
    assert (args.batch_size, args.lr, args.steps, args.warmup_steps) == (
        1024,
        7.5e-5,
        50_000,
        15_000,
    )
    assert (args.weight_decay, args.lambda_gcl, args.lambda_area, args.lambda_tv) == (
        0.05,
        0.1,
        0.4,
        1.0,
    )
    assert (args.area_prior, args.clip_grad, args.min_lr, args.recipe) == (0.4, 5.0, 1e-5, "paper")
    assert (args.model, args.pretrained, args.losses) == (
        "ViT-B-16-quickgelu",
        "openai",
        ["gcl_v", "gcl_f"],
    )
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
    # the order in checkpoints: Adam's moments are taken up by place
    decay = [(g["weight_decay"], g["lr_mult"]) for g in optimizer.param_groups]
    assert decay == [(0.05, 1.0), (0.0, 1.0), (0.0, 3.0)]
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-6


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_training_pictures_are_prepared_as_the_recipe_says(world, recipe):
    run = train.start_run(train.parse_args([*world[1], *CPU, "--recipe", recipe]))
    steps = {type(step).__name__: step for step in run.pairs.transform.transforms}
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    norm = imagenet if recipe == "release" else gcl.CLIP_NORM
    assert (steps["Normalize"].mean, steps["Normalize"].std) == norm
    assert {"RandAugment", "RandomErasing"} & steps.keys() == (
        {"RandAugment", "RandomErasing"} if recipe == "release" else set()
    )
    assert steps["RandomResizedCrop"].size == (32, 32)
    assert run.pairs.noise_size == (16, 16)


def test_the_seed_is_of_the_order_and_of_the_samples(world):
    run = train.start_run(train.parse_args([*world[1], *CPU, *SHORT, "--seed", "3"]))
    run.start = 0
    found = torch.cat([tokens for _, tokens, *_ in train.batches(run)])
    order = [index for batch in data.GlobalOrder(14, 4, 6, seed=3) for _, index in batch]
    assert torch.equal(found, run.tokenizer([run.pairs.read(index)[1] for index in order]))
    assert run.pairs.seed == 3
    torch.manual_seed(99)  # the adapter's start hangs on the flag alone
    again = train.start_run(train.parse_args([*world[1], *CPU, *SHORT, "--seed", "3"]))
    other = train.start_run(train.parse_args([*world[1], *CPU, *SHORT, "--seed", "4"]))
    assert same(run.net.state_dict(), again.net.state_dict())
    assert not same(run.net.state_dict(), other.net.state_dict())


def test_flags_reach_the_model(world):
    flags = ["--area-prior", "0.3", "--losses", "cl", "--micro-batch", "1"]
    run, seen = train.start_run(train.parse_args([*world[1], *CPU, *flags])), []

    def wrapped(*batch, micro_batch):
        seen.append(micro_batch)
        return run.net(*batch, micro_batch=micro_batch)

    run.wrapped = wrapped
    losses, _ = train.gradients(run, make_run(world)[1])
    assert losses.keys() & set(gcl.LOSSES) == {"cl"} and seen == [1]
    area = run.net.mask_areas[0].item()
    assert losses["area_pos"].item() == pytest.approx(abs(0.3 - area), abs=1e-6)


# ---- runs ----


def test_a_run_writes_a_checkpoint_a_log_and_its_settings(world, trained):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        terms = {
            k: line[k] for k in ("gcl_v", "gcl_f", "area_pos", "area_neg", "tv_mask", "tv_dense")
        }
        assert line["loss"] == pytest.approx(gcl.total_loss(terms), rel=1e-5)
        assert {
            "w",
            "b",
            "tau_gcl_v",
            "tau_gcl_f",
            "lr",
            "grad_norm",
            "images_per_second",
            "skipped",
        } <= line.keys()
        bad = line.pop("bad")
        assert all(math.isfinite(value) for value in line.values()) and not any(bad.values())
        assert line["area_pos"] == pytest.approx(abs(0.4 - line["mean_area_pos"]), rel=1e-4)
        assert line["area_neg"] == pytest.approx(line["mean_area_neg"], rel=1e-4)
        assert 0 < line["data_wait"] < 1 and line["memory_gb"] == 0  # of a GPU
    assert lines[-1]["eta_seconds"] == 0 and lines[0]["tau_gcl_v"] == pytest.approx(0.07, abs=0.01)
    config = json.loads((trained / "config.json").read_text())
    assert (
        config["batch_size"] == 4
        and config["torch"] == torch.__version__.split("+")[0]
        and config["pairs"] == 14
    )
    assert {
        "python",
        "torchvision",
        "open_clip_torch",
        "numpy",
        "pillow",
        "micro_batch",
    } <= config.keys()
    assert len(list(trained.glob("index-*"))) == 1
    files = ["config.json", "last.pt", "log.jsonl", "loss.png", "previous.pt", "samples.png"]
    assert (
        sorted(p.name for p in trained.iterdir() if p.name[:6] not in ("index-", ".lock")) == files
    )
    checkpoint, before = read(trained / "last.pt"), read(trained / "previous.pt")
    assert before["step"] == 3 and before["model"].keys() == checkpoint["model"].keys()
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
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(out / "last.pt", process)
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
    result = run(
        "train.py", *pairs, *SHORT, "--workers", 2, "--device", "cpu", "--out", folder / "workers"
    )
    assert result.returncode == 0, result.stderr
    assert same(read(folder / "workers" / "last.pt")["model"], read(trained / "last.pt")["model"])


OPEN = """
build = gcl.GCL.__init__
def opened(self, *rest, **named):
    build(self, *rest, **named)
    for name, p in self.adapter.named_parameters():
        if name.endswith("gate"):
            p.data.fill_(0.5)
gcl.GCL.__init__ = opened
"""


def test_two_ranks_train_as_one(world, tmp_path):
    """From open gates: behind closed ones upsampled neighbours differ by rounding alone, and the
    smooth prior's gradient is the sign of that.
    """
    script, out = driver(tmp_path, "opened", OPEN), {}
    for ranks in (1, 2):
        out[ranks] = tmp_path / str(ranks)
        result = run(script, *world[1], *SHORT, *CPU, "--out", out[ranks], ranks=ranks)
        assert result.returncode == 0, result.stderr
    one, two = (
        [json.loads(x) for x in (out[ranks] / "log.jsonl").read_text().splitlines()]
        for ranks in (1, 2)
    )
    keys = ("loss", "gcl_v", "gcl_f", "area_pos", "area_neg", "tv_mask", "tv_dense", "w", "b")
    for a, b in zip(one, two, strict=True):
        for key in (*keys, "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-5), key


# ---- kills, signals, ranks that fail ----


def driver(folder, name, code):
    """A script that is train.py but for the code run before."""
    head = f"import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
    head += "import torch, gcl, train\n"
    tail = "if __name__ == '__main__':\n    sys.exit(train.command())\n"
    (folder / f"{name}.py").write_text(head + code + tail)
    return folder / f"{name}.py"


SLOW = """
step = train.train_step
def slow(*rest):
    time.sleep(0.3)
    return step(*rest)
train.train_step = slow
"""


def start(script, *args, ranks=1):
    """A script as a process group of its own, under torchrun for several ranks."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        if ranks > 1
        else []
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(script), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, start_new_session=True, **pipes)


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_writes_a_checkpoint_first(world, trained, tmp_path, number, ranks):
    """To the whole group, loader processes included, or to torchrun, which hands it on."""
    out = tmp_path / "out"
    args = [
        *world[1],
        *SHORT,
        "--save-every",
        100,
        "--log-every",
        1,
        "--workers",
        1,
        "--device",
        "cpu",
        "--out",
        out,
    ]
    process = start(driver(tmp_path, "slow", SLOW), *args, ranks=ranks)
    wait_for(out / "log.jsonl", process)
    while process.poll() is None and not (out / "log.jsonl").read_text():
        time.sleep(0.01)
    (os.killpg if ranks == 1 else os.kill)(process.pid, number)
    stdout, stderr = process.communicate()
    step = read(out / "last.pt")["step"]
    assert 1 <= step < 6, stderr
    assert f"last.pt: stopped by {number.name}, the same command goes on to step 6" in stdout, (
        stderr
    )
    assert len((out / "log.jsonl").read_text().splitlines()) == step
    if ranks == 1:
        assert process.returncode == 128 + number and "Traceback" not in stderr
    again = train.parse_args([*world[1], *SHORT, *CPU, "--out", str(out)])
    assert train.main(again) == 0
    whole, resumed = read(trained / "last.pt"), read(out / "last.pt")
    if ranks == 1:
        assert same(whole["model"], resumed["model"]) and same(
            whole["optimizer"], resumed["optimizer"]
        )
    assert float(whole["model"]["w"]) == pytest.approx(float(resumed["model"]["w"]), rel=2e-2)


def test_a_checkpoint_comes_before_evaluation_and_pictures(monkeypatch):
    """A launcher that has sent a signal does not wait: the checkpoint alone is written then."""
    calls = []
    for owner, name in (
        (train, "save"),
        (train, "evaluate_now"),
        (train, "draw_samples"),
        (report, "write_curves"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, name=name: calls.append(name))
    flags = {"steps": 6, "log_every": 100, "save_every": 2, "eval_every": 2, "out": Path("out")}
    progress = {"in_a_row": 0, "evaluated": 0}
    run = SimpleNamespace(rank=0, sets=["a set"], progress=progress, **flags)
    for done, stop, expected in (
        (2, 0, ["save", "evaluate_now", "save", "draw_samples", "write_curves"]),
        (3, 0, []),
        (3, signal.SIGTERM, ["save"]),
        (4, signal.SIGTERM, ["save"]),
    ):
        calls.clear()
        run.stop = stop
        train.after_step(run, done, {})
        assert calls == expected
    calls.clear()
    run.stop, run.eval_every = 0, 5
    train.after_step(run, 5, {})  # no other checkpoint is due
    assert calls == ["save", "evaluate_now", "save"]
    calls.clear()
    run.eval_every, progress["evaluated"] = 2, 2
    train.follow_up(run, 2)  # the evaluation is there already
    assert calls == ["draw_samples", "write_curves"]


def test_what_a_kill_has_cut_off_after_the_last_step_is_made_again(monkeypatch):
    calls = []
    monkeypatch.setattr(train, "batches", lambda _: iter(()))
    monkeypatch.setattr(train, "follow_up", lambda _, done: calls.append(done))
    train.train(SimpleNamespace(rank=1, start=6, steps=6))
    assert calls == [6]


def test_a_save_that_fails_at_any_point_leaves_what_was_there(tmp_path, monkeypatch):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    state = SimpleNamespace(state_dict=dict, fingerprint=str)
    run = SimpleNamespace(out=tmp_path, optimizer=state, scaler=state, pairs=state)
    run.flags, run.progress, run.net = {}, {}, SimpleNamespace()

    def fails(*_, **__):
        raise InterruptedError

    def half(_, path):
        Path(path).write_text("half")
        raise InterruptedError

    run.net.save = fails
    last.write_text("2")
    previous.write_text("1")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", half)
        with pytest.raises(OSError):
            train.save(run, 3)
    assert (last.read_text(), previous.read_text()) == ("2", "1")
    with pytest.raises(OSError):
        train.save(run, 3)
    assert (last.read_text(), previous.read_text()) == ("2", "2")


def logs(out, **fields):
    """What begin_logs needs of a run from step 4 on, whose second evaluation was cut off."""
    flags = {"out": out, "resume": "auto", "start": 4, "steps": 6, "path": out / "previous.pt"}
    flags |= {"progress": {"evaluated": 2}, "flags": {}, "pairs": range(4), "ranks": 1}
    flags["path"].write_text("whole")
    lines = [{"step": 2, "miou": 1}, {"step": 4}, {"step": 4, "miou": 2}, {"step": 5}]
    (out / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return SimpleNamespace(**flags | fields, device="cpu", precision="fp32")


def test_a_log_keeps_what_the_checkpoint_knows(tmp_path):
    run = logs(tmp_path)
    train.begin_logs(run)
    run.lock.close()
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kept == [{"step": 2, "miou": 1}, {"step": 4}]
    assert (tmp_path / "last.pt").read_text() == "whole"


def test_a_log_is_whole_at_any_moment_and_a_file_to_resume_from_stays(tmp_path, monkeypatch):
    def fails(*_):
        raise InterruptedError

    monkeypatch.setattr(files, "write_text", fails)
    run = logs(tmp_path, resume=str(tmp_path / "previous.pt"))
    with pytest.raises(InterruptedError):
        train.begin_logs(run)
    run.lock.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    assert run.path.exists() and not (tmp_path / "last.pt").exists()


def test_resume_never_leaves_no_checkpoint_of_the_old_run(world, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    (tmp_path / "out" / "best.pt").touch()
    args = train.parse_args(
        [*world[1], *SHORT, *CPU, "--resume", "never", "--out", str(tmp_path / "out")]
    )
    fresh = train.start_run(args)
    train.restore(fresh)
    train.begin_logs(fresh)
    assert not list((tmp_path / "out").glob("*.pt"))


DIES = """
save, count = torch.save, []
def half(fields, path):
    count.append(path)
    save(fields, path)
    if len(count) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
"""


def test_a_kill_during_the_write_leaves_the_checkpoint_before_whole(world, trained, tmp_path):
    out = tmp_path / "out"
    result = run(driver(tmp_path, "dies", DIES), *world[1], *SHORT, *CPU, "--out", out)
    assert result.returncode == -signal.SIGKILL
    assert read(out / "last.pt")["step"] == 3 and len(list(out.glob("*.tmp"))) == 1
    assert train.main(train.parse_args([*world[1], *SHORT, *CPU, "--out", str(out)])) == 0
    assert same(read(out / "last.pt")["model"], read(trained / "last.pt")["model"]) and not list(
        out.glob("*.tmp")
    )


def test_resume_takes_the_newest_whole_checkpoint(world, trained, tmp_path, capsys):
    args = train.parse_args([*world[1], *SHORT, *CPU, "--out", str(tmp_path)])
    assert train.newest_checkpoint(args) == (None, None)
    whole, before = (trained / "last.pt").read_bytes(), (trained / "previous.pt").read_bytes()
    (tmp_path / "previous.pt").write_bytes(before)
    assert train.newest_checkpoint(args)[1]["step"] == 3
    (tmp_path / "last.pt").write_bytes(whole)
    assert train.newest_checkpoint(args)[1]["step"] == 6
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    assert train.newest_checkpoint(args)[1]["step"] == 3
    assert "last.pt: not a checkpoint that can be read" in capsys.readouterr().err
    (tmp_path / "previous.pt").write_bytes(before[:-100])
    never = r"previous.pt: .*no checkpoint here can be read; --resume never starts over"
    with pytest.raises(files.InputError, match=never):
        train.newest_checkpoint(args)


def test_a_broken_checkpoint_never_takes_the_place_of_a_whole_one(world, trained, tmp_path):
    """A kill in the first save after previous.pt was taken up: both would be broken."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    (out / "last.pt").write_bytes((trained / "last.pt").read_bytes()[:-100])
    run = train.start_run(train.parse_args([*world[1], *SHORT, *CPU, "--out", str(out)]))
    train.restore(run)
    train.begin_logs(run)
    run.lock.close()
    assert read(out / "last.pt")["step"] == run.start == 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_resumes_to_the_same_bits(world, tmp_path, precision, monkeypatch):
    def args(out):
        return train.parse_args(
            [*world[1], *SHORT, *CPU, "--precision", precision, "--out", str(tmp_path / out)]
        )

    train.main(args("whole"))
    step, calls = train.train_step, []

    def fifth(*rest):
        calls.append(len(calls))
        if len(calls) == 5:
            raise InterruptedError
        return step(*rest)

    monkeypatch.setattr(train, "train_step", fifth)
    with pytest.raises(InterruptedError):
        train.main(args("cut"))
    monkeypatch.setattr(train, "train_step", step)
    train.main(args("cut"))
    whole, resumed = read(tmp_path / "whole" / "last.pt"), read(tmp_path / "cut" / "last.pt")
    for part in ("model", "optimizer", "scaler", "progress"):
        assert same(whole[part], resumed[part]), part
    assert (precision == "fp16") == bool(resumed["scaler"])


def test_a_late_block_trains_alike_on_two_ranks_that_take_over_from_one(
    world, tmp_path, monkeypatch
):
    """Two ranks go on at step 3 from the checkpoint of one, and unfreeze the block at step 4."""
    late = "import dataclasses\nr = gcl.RECIPES\n"
    late += "r['release'] = dataclasses.replace(r['release'], unfreeze_block_at=4)\n"
    recipe = dataclasses.replace(gcl.RECIPES["release"], unfreeze_block_at=4)
    monkeypatch.setitem(gcl.RECIPES, "release", recipe)
    args = [*world[1], *SHORT, *CPU, "--recipe", "release", "--lr", "1e-3"]
    train.main(train.parse_args([*args, "--out", str(tmp_path / "one")]))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "last.pt").write_bytes((tmp_path / "one" / "previous.pt").read_bytes())
    result = run(
        driver(tmp_path, "late", late),
        *args,
        "--micro-batch",
        1,
        "--out",
        tmp_path / "two",
        ranks=2,
    )
    assert result.returncode == 0 and "2 rank(s) on cpu, fp32, steps 3 to 6" in result.stdout, (
        result.stderr
    )
    one, two, early = (
        read(tmp_path / p)["model"] for p in ("one/last.pt", "two/last.pt", "one/previous.pt")
    )
    moved = 0
    for name in (n for n in one if n.startswith("block.") and one[n].ndim == 2):
        moved += not torch.equal(one[name], early[name])
        assert (one[name] - two[name]).norm() < 0.05 * (one[name] - early[name]).norm(), name
    assert moved


FAILS = """
step = train.train_step
def patched(*rest):
    if os.environ["RANK"] == "1":
        WHAT
    return step(*rest)
train.train_step = patched
"""
STALLS = "signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(600)"
OTHER = """
build = train.build_pairs
def patched(*rest):
    pairs = build(*rest)
    length = {"__len__": lambda self: 14 - int(os.environ["RANK"])}
    pairs.__class__ = type("Other", (type(pairs),), length)
    return pairs
train.build_pairs = patched
"""


def test_one_rank_that_fails_ends_the_other(world, tmp_path):
    code = FAILS.replace("WHAT", "raise ValueError('as a test')")
    script = driver(tmp_path, "raises", code)
    result = run(script, *world[1], *SHORT, *CPU, "--out", tmp_path / "out", ranks=2)
    assert result.returncode == 1 and "ValueError: as a test" in result.stderr
    assert "error: rank 0: a collective broke off: another rank has failed" in result.stderr


def test_one_rank_that_hangs_ends_all(world, tmp_path):
    script = driver(tmp_path, "stalls", FAILS.replace("WHAT", STALLS))
    args = [*world[1], *SHORT, *CPU, "--timeout", 3, "--out", tmp_path / "out"]
    process = start(script, *args, ranks=2)
    error = process.communicate()[1]
    lost = "error: rank 0: a collective was not completed within --timeout 3 s: another rank hangs"
    assert process.returncode == 1 and lost in error and "3000ms" in error


def test_a_rank_that_is_gone_while_the_group_forms_is_one_line(monkeypatch):
    """As when it is killed just after all have met at the store: seldom, but kill.py met it."""

    def gone(*_):
        raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(dist, "rendezvous", lambda *_: iter([(dist.HashStore(), 0, 1)]))
    monkeypatch.setattr(dist, "init_process_group", gone)
    pairs = type("Pairs", (), {"__len__": lambda _: 3, "fingerprint": lambda _: "0" * 64})()
    run = SimpleNamespace(rank=0, ranks=1, start=0, pairs=pairs, timeout=9)
    run.device = torch.device("cpu")
    with pytest.raises(files.InputError, match=r"have started \(Connection reset by peer\)"):
        train.join(run)


def test_ranks_that_see_other_pairs_do_not_start(world, tmp_path):
    out = tmp_path / "out"
    result = run(driver(tmp_path, "other", OTHER), *world[1], *SHORT, *CPU, "--out", out, ranks=2)
    assert result.returncode == 1 and "would start at step 0 of 14 pairs (" in result.stderr
    assert "the same --data" in result.stderr and "Traceback" not in result.stderr


# ---- seeing it run ----


def test_evaluation_as_it_goes_keeps_the_best(world, tmp_path, monkeypatch):
    spec = make_set(tmp_path / "set", n=1)
    scores, seen, modes = [10.0, 30.0, 30.0], [], []  # the first of equal ones is the best
    step = train.train_step

    def scored(dataset, net, tokenizer, args, device, rank, ranks):
        seen.append((dataset.name, net.training, args.pamr, args.precision, args.bg_threshold))
        return {"miou": scores[len(seen) - 1], "partial": False}, []

    def stepped(run, *rest):
        modes.append(run.net.training)
        return step(run, *rest)

    monkeypatch.setattr(evaluate, "evaluate_set", scored)
    monkeypatch.setattr(train, "train_step", stepped)
    args = [
        *world[1],
        *SHORT,
        *CPU,
        "--eval",
        spec,
        "--eval-every",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    train.main(train.parse_args(args))
    assert seen == [("set", False, False, "fp32", 0.5)] * 3
    assert modes == [True] * 6  # by which a signal knows that it interrupts no evaluation
    best, last = read(tmp_path / "out" / "best.pt"), read(tmp_path / "out" / "last.pt")
    assert (best["step"], best["miou"]) == (4, 30.0) and gcl.load(tmp_path / "out" / "best.pt")
    assert last["progress"]["best"] == {"step": 4, "miou": 30.0}
    assert last["progress"]["evaluated"] == 6
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [x for x in lines if "miou" in x][2] == {
        **{"step": 6, "miou": 30.0, "partial": False, "miou_set": 30.0, "best_step": 4}
    }


def test_a_signal_during_an_evaluation_ends_it_and_the_same_command_makes_it_again(
    world, tmp_path, monkeypatch, capsys
):
    out, seen = tmp_path / "out", []

    def interrupted(*_):
        seen.append(len(seen))
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"miou": 10.0, "partial": False}, []

    monkeypatch.setattr(evaluate, "evaluate_set", interrupted)
    spec = make_set(tmp_path / "set", n=1)
    command = [*world[1], *SHORT, *CPU, "--eval", spec, "--eval-every", "2", "--out", str(out)]
    assert train.command(command) == 143
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert read(out / "last.pt")["step"] == 2 and not (out / "best.pt").exists()
    assert train.command(command) == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "miou" in line] == [2, 4, 6] and len(seen) == 4
    assert read(out / "best.pt")["step"] == 2


HOLDS = "import pathlib, sys, time; sys.path.insert(0, sys.argv[1]); import train\n"
HOLDS += "held = train.lock(pathlib.Path(sys.argv[2])); print('held', flush=True); time.sleep(600)"


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    (tmp_path / "last.pt.tmp").touch()  # the first one's
    with pytest.raises(files.InputError, match=f"in use by process {first.pid} on "):
        train.begin_logs(logs(tmp_path))
    assert (tmp_path / "last.pt.tmp").exists()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    first.kill()
    first.wait()
    train.lock(tmp_path).close()


def test_evaluation_is_that_of_evaluate_py(world, tmp_path):
    spec, out = make_set(tmp_path / "set", n=1, background=True), tmp_path / "out"
    train.main(train.parse_args([*world[1], *SHORT, *CPU, "--eval", spec, "--out", str(out)]))
    line = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    args = [
        "--datasets",
        spec,
        "--no-pamr",
        "--checkpoint",
        str(out / "last.pt"),
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    evaluate.main(evaluate.parse_args([*args, "--out", str(tmp_path / "results")]))
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert line["step"] == 6 and line["miou"] == results["average"]


def test_pictures_show_images_masks_and_curves(trained):
    with Image.open(trained / "samples.png") as sheet:
        pixels = torch.from_numpy(np.array(sheet.convert("L"))) / 255
    columns = [pixels[26:250, 8 + 232 * k : 232 + 232 * k] for k in range(3)]
    assert pixels.shape == (4 * 250 + 8, 3 * 232 + 8)
    assert columns[0].mean() > 2 * columns[1].mean() > 0.02  # masks leave the rest dark
    assert (columns[1] - columns[2]).abs().max() > 0.02
    with Image.open(trained / "loss.png") as curves:
        assert curves.height > 4 * 200  # losses, areas, total variation, gradient norm
        assert len(curves.convert("RGB").getcolors(10**6)) > 10


def test_the_area_prior_is_the_mean_area_of_maskclip(world, capsys, tmp_path):
    out = tmp_path / "out"
    train.main(
        train.parse_args(
            [*world[1], *CPU, "--measure-area-prior", "--batch-size", "7", "--out", str(out)]
        )
    )
    said = re.search(
        r"masks: (\S+) \(14 pairs\); train with --area-prior",
        capsys.readouterr().out,
    )
    run = train.start_run(train.parse_args([*world[1], *CPU]))
    net, areas = run.net, []
    for k in range(14):
        image, tokens, *_ = run.pairs[k, k]
        padded, grid = image[None], backbone.patch_grid(image[None], net.patch)
        x = backbone.trunk(net.clip.visual, padded)
        v_d = backbone.dense_features(net.last_block, x, grid)
        cosine = backbone.cosines(net.clip.visual, v_d, net.encode_text(tokens[None]))
        areas.append(torch.sigmoid(10 * cosine - 2.5).mean())
    assert float(said[1]) == pytest.approx(float(torch.stack(areas).mean()), abs=1e-4)


def test_too_many_bad_samples_stop_the_run(world, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ENOUGH", 8)
    members = [
        (f"{k}.{kind}", jpeg(k) if kind == "jpg" else b"a cat")
        for k in range(6)
        for kind in ("jpg", "txt")
    ]
    broken = [
        (f"{k}.{kind}", b"broken" if kind == "jpg" else b"a cat")
        for k in (6, 7)
        for kind in ("jpg", "txt")
    ]
    shard = write_tar(tmp_path / "mixed.tar", members + broken)
    args = [*world[1], "--data", shard, *SHORT, *CPU, "--out", str(tmp_path / "out")]
    train.main(train.parse_args([*args, "--max-bad", "0.9"]))
    line = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])
    assert sum(line["bad"].values()) >= 6  # 24 samples of three epochs, two of eight are bad
    with pytest.raises(
        files.InputError, match=r"samples are bad \(shard 0, image \d, size 0, caption 0\)"
    ):
        train.main(train.parse_args([*args, "--max-bad", "0.01", "--resume", "never"]))


# ---- any number of ranks, any slices ----

SMALL = {
    **CONFIG,
    "embed_dim": 3,
}  # three texts at a time: a batch of eight has three slices of masks
CASES = [("paper", False), ("release", True)]


def step_gradients(rank, ranks, recipe, late, micro_batch):
    """Loss terms and gradients of one step on a global batch of 8 in float64, by name; of a late
    block when late.
    """
    torch.manual_seed(0)
    clip, tokenizer = gcl.load_clip(SMALL, None)
    net = gcl.GCL(
        clip,
        dataclasses.replace(
            gcl.RECIPES[recipe], unfreeze_block_at=1 if late else None, area_per_rank=False
        ),  # per rank, the release differs from one process
        gcl.LOSSES,
    )
    net = net.double().train()
    with torch.no_grad():
        for p in (*net.adapter.parameters(), *net.clip.parameters()):
            p.add_(
                torch.randn(p.shape, dtype=p.dtype) * 0.1
            )  # open gates: nothing hides behind an identity
    model = train.wrap(net, ranks)
    if late and net.set_trainable(1):
        model = train.wrap(net, ranks)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
    noise = torch.rand(8, 1, 16, 16, generator=generator, dtype=torch.float64)
    tokens = tokenizer(
        ["a cat", "two dogs", "trees", "a red kite", "the sea", "a box", "no one", "four of us"]
    )
    mine = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    terms = model(images[mine], tokens[mine], noise[mine], micro_batch=micro_batch)
    gcl.total_loss(terms).backward()
    terms = {f"loss {name}": value.detach() for name, value in terms.items()}
    return terms | {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def steps_on_rank(rank, ranks):
    return [
        [step_gradients(rank, ranks, *case, m) for m in (None, 3 if ranks == 2 else 1)]
        for case in CASES
    ]


def check_same(found, whole):
    """found: the results of every rank. Gradients are the same on each, the losses' mean is the
    whole batch's.
    """
    for result in found:
        assert result.keys() == whole.keys()
    for name, value in whole.items():
        means = (
            torch.stack([result[name] for result in found]).mean(0)
            if name.startswith("loss")
            else found[-1][name]
        )
        torch.testing.assert_close(means, value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.fixture(scope="module")
def whole_steps():
    return [step_gradients(0, 1, *case, None) for case in CASES]


def test_a_step_in_slices_is_the_whole_step(whole_steps):
    for case, whole in zip(CASES, whole_steps, strict=True):
        assert any(name.startswith("block.") for name in whole) is case[1]
        assert len([name for name in whole if name.startswith("loss")]) == 7
        for micro_batch in (1, 3):
            check_same([step_gradients(0, 1, *case, micro_batch)], whole)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_is_the_same_on_any_number_of_ranks(whole_steps, ranks):
    found = run_ranks(steps_on_rank, ranks, ranks=ranks)
    for k, whole in enumerate(whole_steps):
        for sliced in (0, 1):
            check_same([result[k][sliced] for result in found], whole)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that tensor operations make, and keeps the shapes; peak is
    the most at once.
    """

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak, self.shapes = {}, 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            self.shapes.add(tuple(x.shape) if torch.is_tensor(x) else ())
            if torch.is_tensor(x) and x.untyped_storage()._cdata not in self.live:
                storage = x.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.end, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def end(self, key):
        self.now -= self.live.pop(key, 0)


def bytes_of_step(batch_size, micro_batch):
    torch.manual_seed(0)
    clip, tokenizer = gcl.load_clip(
        {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "width": 128}}, None
    )
    net = gcl.GCL(clip).train()
    batch = (
        torch.randn(batch_size, 3, 64, 64),
        tokenizer(["a cat"] * batch_size),
        torch.rand(batch_size, 1, 32, 32),
    )
    with LiveBytes() as count:
        gcl.total_loss(net(*batch, micro_batch=micro_batch)).backward()
    return count


def test_the_memory_of_a_step_is_that_of_its_slice():
    small, sliced, whole = bytes_of_step(4, None), bytes_of_step(32, 4), bytes_of_step(32, None)
    assert small.peak < sliced.peak < 1.6 * small.peak < whole.peak / 2


def test_in_slices_masks_are_never_held_for_all_texts_at_once():
    """24 channels: masks of 24 texts at a time, in the backward pass too."""
    shapes = [s for s in bytes_of_step(30, 4).shapes if s[:1] == (4,)]
    masks = {
        n: [s for s in shapes if n in s[1:] and math.prod(s[s.index(n, 1) + 1 :]) == 32 * 32]
        for n in (24, 6, 30)
    }
    assert masks[24] and masks[6] and not masks[30]


class Keys(torch.utils.data.Dataset):
    """Samples that say which they are: position, index, and nothing else."""

    def __len__(self):
        return 14

    def __getitem__(self, key):
        return key


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_samples_come_in_one_order_from_any_start_on_any_number_of_ranks(ranks):
    flags = {"workers": 0, "seed": 0, "batch_size": 4, "steps": 6, "device": torch.device("cpu")}

    def drawn(ranks, start):
        where = {"pairs": Keys(), "ranks": ranks, "start": start}
        runs = [SimpleNamespace(rank=r, **where, **flags) for r in range(ranks)]
        parts = [list(train.batches(run)) for run in runs]
        return [
            [sum((x[k].tolist() for x in step), []) for k in (0, 1)]
            for step in zip(*parts, strict=True)
        ]

    whole = drawn(1, 0)
    assert sorted(sum((step[1] for step in whole), [])[:14]) == list(range(14))
    for start in (0, 3, 5):
        assert drawn(ranks, start) == whole[start:]


# ---- what is not finite ----


def make_run(world, **changes):
    """What train_step needs of a run on one rank, and a batch of two."""
    clip, tokenizer = gcl.load_clip(world[1][3], world[1][5])
    args = train.parse_args([])
    net, dtype = gcl.GCL(clip).train(), changes.pop("dtype", None)
    progress = {
        "skipped": 0,
        "in_a_row": 0,
        "bad": [0] * len(data.REASONS),
        "best": None,
        "evaluated": 0,
    }
    parts = vars(args) | {
        "net": net,
        "optimizer": train.build_optimizer(net, args),
        "progress": progress,
        "signals": [],
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "autocast": torch.autocast("cpu", dtype, enabled=bool(dtype)),
    }
    parts |= changes
    parts["wrapped"] = train.wrap(net, parts["ranks"])
    batch = [
        torch.randn(2, 3, 32, 32),
        tokenizer(["a cat", "two dogs"]),
        torch.full((2, 1, 16, 16), 0.5),
    ]
    return SimpleNamespace(**parts), batch


NONE_BAD = torch.zeros(2, len(data.REASONS), dtype=torch.int64)


def test_a_non_finite_gradient_leaves_the_weights_alone(world):
    run, batch = make_run(world)
    before = {k: v.clone() for k, v in run.net.state_dict().items()}
    train.train_step(run, [torch.full((2, 3, 32, 32), math.nan), *batch[1:]], NONE_BAD)
    assert same(dict(run.net.state_dict()), before)
    assert (run.progress["skipped"], run.progress["in_a_row"]) == (1, 1)
    train.train_step(run, batch, NONE_BAD + 3)
    assert not torch.equal(run.net.w, before["w"])
    assert (run.progress["skipped"], run.progress["in_a_row"]) == (1, 0)
    assert run.progress["bad"] == [6] * len(data.REASONS)


def test_gradients_are_clipped_as_they_are_without_float16s_scale(world):
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        run, batch = make_run(world, scaler=scaler, clip_grad=1e-3)
        _, norm = train.gradients(run, batch)
        found.append([norm, *(p.grad for p in run.net.parameters() if p.grad is not None)])
    for plain, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-9)
    assert found[0][0] > 1e-3  # so they were clipped
    whole = torch.cat([gradient.flatten() for gradient in found[0][1:]])
    assert whole.norm().item() == pytest.approx(1e-3, rel=1e-2)


def skip_on_rank(rank, pairs):
    """A step in which the loss of rank 1 alone is infinite, then a plain one: what moved, and
    float16's scale.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run, batch = make_run((None, pairs), scaler=scaler, dtype=torch.float16, ranks=2)
    gradients = train.gradients
    results = []
    for broken in (True, False):
        before = run.net.w.clone()

        def patched(*rest, broken=broken):
            losses, norm = gradients(*rest)
            return (
                losses | {"gcl_v": losses["gcl_v"] / 0} if broken and rank == 1 else losses
            ), norm

        train.gradients = patched
        train.train_step(run, batch, NONE_BAD)
        results.append(
            [
                run.progress["in_a_row"] == 0,
                not torch.equal(before, run.net.w),
                scaler.get_scale(),
                run.progress["skipped"],
            ]
        )
    return torch.tensor(results)


def test_all_ranks_skip_the_same_steps_and_scale_alike(world):
    for result in run_ranks(skip_on_rank, world[1]):
        assert result.tolist() == [[0, 0, 512, 1], [1, 1, 512, 1]]


def test_twenty_non_finite_gradients_in_a_row_stop_the_run(world, tmp_path, monkeypatch):
    norms = (
        [math.nan] * 19 + [1.0] + [math.nan] * 30
    )  # a finite one in between starts the count again
    plain = train.gradients
    monkeypatch.setattr(
        train, "gradients", lambda *rest: (plain(*rest)[0], torch.tensor(norms.pop(0)))
    )
    command = "--batch-size 2 --steps 60 --warmup-steps 0 --log-every 100 --save-every 15".split()
    with pytest.raises(files.InputError, match="step 39: 20 non-finite gradients in a row"):
        train.main(train.parse_args([*world[1], *CPU, *command, "--out", str(tmp_path)]))
    assert read(tmp_path / "previous.pt")["progress"] | {"bad": 0} == {
        "skipped": 15,
        "in_a_row": 15,
        "bad": 0,
        "best": None,
        "evaluated": 0,
    }
    assert read(tmp_path / "last.pt")["progress"]["in_a_row"] == 10
    monkeypatch.setattr(train, "gradients", plain)
    train.main(train.parse_args([*world[1], *CPU, *command, "--out", str(tmp_path)]))
    assert (
        read(tmp_path / "last.pt")["progress"]["skipped"] == 29
    )  # of the first 30 steps; counts go on


def test_bf16_autocast_stays_close_to_float32(world):
    clip, tokenizer = gcl.load_clip(world[1][3], world[1][5])
    net = gcl.GCL(clip, losses=gcl.LOSSES).train()
    images, tokens = (
        torch.randn(4, 3, 32, 32),
        tokenizer(["a cat", "two dogs", "trees", "a red kite"]),
    )
    noise = torch.full((4, 1, 16, 16), 0.5)
    full = net(images, tokens, noise)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(images, tokens, noise)
    for name, value in full.items():
        assert half[name].dtype == torch.float32
        assert half[name].item() == pytest.approx(value.item(), rel=0.05, abs=0.02), name


def test_compiled_masks_are_the_plain_ones(world, tmp_path, monkeypatch):
    """torch.compile's capture of the whole function, forward and backward; what a backend makes of
    it is that backend's. Of each size of a slice on its own: a graph for any size keeps other
    tensors, and a checkpointed part would not be computed again by the graph of its forward pass.
    """
    compile, dynamic = torch.compile, []

    def whole(function, **how):
        dynamic.append(how.get("dynamic"))
        return compile(function, backend="aot_eager", fullgraph=True, **how)

    monkeypatch.setattr(torch, "compile", whole)
    args = [*world[1], *CPU, "--batch-size", "6", "--out", str(tmp_path)]
    found = {}
    for flags in [], ["--compile"], ["--compile", "--micro-batch", "4"]:
        run = train.start_run(train.parse_args([*args, *flags]))
        assert bool(flags) == hasattr(run.net.mask_rows, "_torchdynamo_orig_callable")
        for name, p in run.net.adapter.named_parameters():
            if name.endswith("gate"):
                p.data.fill_(0.5)
        run.wrapped, run.start = run.net.double(), 0
        *batch, _ = next(train.batches(run))
        batch = [x.double() if x.is_floating_point() else x for x in batch]
        losses, norm = train.gradients(run, batch)
        found[len(flags)] = torch.stack([*losses.values(), norm]).detach()
    for count in 1, 3:
        assert_close(found[count], found[0], rtol=1e-10, atol=1e-12)
    assert dynamic == [None, False] * 2  # of the trial, of the masks


def test_without_a_compiler_training_goes_on_and_says_so(world, tmp_path, monkeypatch, capsys):
    def first_call(x):
        assert x.device == torch.device("cpu")
        error = RuntimeError("backend='inductor' raised:\nNo working C++ compiler")
        error.inner_exception = RuntimeError("No working C++ compiler found.\nSee CXX.")
        raise error

    monkeypatch.setattr(torch, "compile", lambda _: first_call)
    args = [*world[1], *SHORT, *CPU, "--compile", "--out", str(tmp_path)]
    run = train.start_run(train.parse_args(args))
    assert "note: --compile is off: No working C++ compiler found.\n" in capsys.readouterr().err
    assert run.net.mask_rows.__func__ is gcl.GCL.mask_rows
    train.restore(run)
    train.save(run, 3)
    assert read(tmp_path / "last.pt")["args"]["compile"] is False
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    train.restore(train.start_run(train.parse_args(args)))
    assert "note: --compile False is True now" in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra", [["--losses", "cl", "--lambda-area", "0", "--lambda-tv", "0"], ["--recipe", "release"]]
)
def test_other_rows_and_recipes_run(world, tmp_path, extra):
    result = run(
        "train.py", *world[1], *SHORT, *CPU, "--precision", "bf16", "--out", tmp_path, *extra
    )
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
        (["--seed", "-1"], "1", "--seed: must be a whole number, at least 0"),
        (["--lambda-area", "nan"], "1", "--lambda-area: must lie between 0 and 1e12, not 'nan'"),
        (["--lambda-tv", "-1"], "1", "--lambda-tv: must lie between 0 and 1e12"),
        (["--lr", "1.1e12"], "1", "--lr: must lie between 0 and 1e12, not '1.1e12'"),
        (["--lr", "inf"], "1", "--lr: must lie between 0 and 1e12, not 'inf'"),
        (["--steps", "1" + "0" * 20], "1", "--steps: must be a whole number"),
        ([], "0", "start several ranks by torchrun"),
        ([], "x", "start several ranks by torchrun"),
        (["--clip-grad", "0"], "1", "--clip-grad: must lie between 0 and 1e12"),
        (["--scalar-lr-mult", "1e308"], "1", "--scalar-lr-mult: must lie between 0 and 1e12"),
        (["--area-prior", "7"], "1", "--area-prior: must lie between 0 and 1"),
        (["--seed", "4294967296"], "1", "--seed: must be a whole number"),
        (["--image-size", "0"], "1", "--image-size: must be a whole number, at least 1"),
        (["--micro-batch", "0"], "1", "--micro-batch: must be a whole number, at least 1"),
        (
            ["--measure-area-prior", "0"],
            "1",
            "--measure-area-prior: must be a whole number, at least 1",
        ),
        (["--max-bad", "2"], "1", "--max-bad: must lie between 0 and 1"),
        (["--batch", "4", "--bogus"], "1", "unrecognized arguments: --bogus"),
    ],
)
def test_wrong_calls_are_explained(monkeypatch, capsys, args, ranks, words):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(SystemExit) as stop:
        train.parse_args(args)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_ranks_that_cannot_meet_say_so_in_one_line(monkeypatch):
    """As of WORLD_SIZE=2 without torchrun, or a port that is in use."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    pairs = type("Pairs", (), {"__len__": lambda _: 14, "fingerprint": lambda _: "0" * 64})()
    with pytest.raises(files.InputError, match="not all 2 ranks have started .*MASTER_ADDR"):
        device = torch.device("cpu")
        train.join(SimpleNamespace(rank=0, ranks=2, start=0, pairs=pairs, device=device, timeout=9))


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
        (
            [
                *pairs,
                "--model",
                other[0],
                "--pretrained",
                other[1],
                "--resume",
                trained / "last.pt",
            ],
            "torch.Size([32])",
        ),
        ([*pairs, "--seed", 1, "--resume", trained / "last.pt"], "was trained with --seed 0"),
        (
            [*pairs, "--lambda-tv", 0, "--resume", trained / "last.pt"],
            "was trained with --lambda-tv 1.0",
        ),
        ([*pairs, "--pretrained", trained / "last.pt"], "no CLIP state dict"),
    ]
    for args, words in refuse:
        command = [str(a) for a in (*args, *SHORT, *CPU, "--out", tmp_path / "out")]
        with pytest.raises(files.InputError, match=re.escape(words)) as refusal:
            train.main(train.parse_args(command))
        assert "\n" not in str(refusal.value)
    for args, words in (
        refuse[0],
        (["--data", pairs[1]], "--pretrained FILE"),
    ):  # as people see it, with no hub in reach
        check_refused(
            run("train.py", *args, *SHORT, *CPU, "--out", tmp_path / "out", **offline), 1, words
        )
    assert all(path.name.startswith("index-") for path in (tmp_path / "out").glob("*"))


def test_a_shard_of_broken_images_stops_with_its_name(world, tmp_path):
    broken = write_tar(tmp_path / "broken.tar", [("0.jpg", b"broken"), ("0.txt", b"a cat")])
    for workers in (0, 1):
        args = [
            *world[1],
            "--data",
            broken,
            *SHORT,
            "--workers",
            workers,
            "--device",
            "cpu",
            "--out",
            tmp_path / "out",
        ]
        check_refused(run("train.py", *args), 1, "broken.tar", "unreadable")


CHANGES = {
    "recipe": "release",
    "losses": ["cl"],
    "lambda_gcl": 1,
    "lambda_area": 1,
    "area_prior": 0.3,
    "batch_size": 2,
}
CHANGES |= {
    "lr": 0.1,
    "min_lr": 1e-4,
    "scalar_lr_mult": 2,
    "weight_decay": 0,
    "steps": 7,
    "warmup_steps": 1,
}
CHANGES |= {"clip_grad": 1, "image_size": 16, "seed": 3, "lambda_tv": 2}


def kill_command(folder):
    """A run of four steps with two evaluations, the second of them the better one or not."""
    model, pretrained = make_clip(folder / "kill-clip")
    shards, spec = (
        make_shards(folder / "kill-data", shards=1, pairs=4),
        make_set(folder / "set", n=1),
    )
    command = "--batch-size 2 --lr 1e-2 --steps 4 --warmup-steps 1 --save-every 3 --log-every 1"
    command += " --eval-every 2 --device cpu --workers 0"
    names = ["--data", shards, "--model", model, "--pretrained", pretrained, "--eval", spec]
    return [*command.split(), *names]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a run is forked")
@pytest.mark.parametrize(("ranks", "stride", "least"), [(1, 11, 6), (2, 24, 3)])
def test_a_run_that_was_killed_at_any_file_operation_ends_as_the_unbroken_one(
    tmp_path, ranks, stride, least
):
    """Some of them here; python tests/kill.py tries all, and with 2 behind it on two ranks."""
    points, differs, _ = kill.survive(kill_command(tmp_path), tmp_path, stride, 5, ranks)
    assert points >= least and not differs


@pytest.mark.parametrize("name", train.SAME_RUN)
def test_a_run_goes_on_with_its_own_settings_alone(world, trained, name):
    args = train.parse_args([*world[1], *SHORT, *CPU, "--resume", str(trained / "last.pt")])
    setattr(args, name, CHANGES[name])
    with pytest.raises(files.InputError, match=f"was trained with --{name.replace('_', '-')} "):
        train.restore(SimpleNamespace(**vars(args), flags=vars(args)))


def test_other_pairs_of_the_same_number_are_refused(world, tmp_path):
    shard = make_shards(tmp_path / "data", shards=1, pairs=6)
    args = [*world[1], "--data", shard, *SHORT, *CPU, "--out", str(tmp_path / "out")]
    train.main(train.parse_args(args))
    members = [
        (f"{k}.{kind}", jpeg(k) if kind == "jpg" else b"a cat")
        for k in range(6)
        for kind in ("jpg", "txt")
    ]
    write_tar(tmp_path / "data" / "000.tar", members)
    with pytest.raises(files.InputError, match="trained on other pairs"):
        train.main(train.parse_args(args))


def test_the_same_shards_under_another_path_go_on(world, trained, tmp_path):
    shutil.copytree(world[0] / "data", tmp_path / "moved [1]")
    shutil.copytree(trained, tmp_path / "out")
    moved = [str(path) for path in sorted((tmp_path / "moved [1]").glob("*.tar"))]
    command = [*world[1], *SHORT, *CPU, "--out", str(tmp_path / "out"), "--data", *moved]
    assert train.main(train.parse_args(command)) == 0


def test_a_log_line_that_a_kill_has_cut_is_dropped(world, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    log = tmp_path / "out" / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 6, "bad": {"image": 0}')
    train.main(train.parse_args([*world[1], *SHORT, *CPU, "--out", str(tmp_path / "out")]))
    assert log.read_text() == whole


def test_a_checkpoint_without_optimiser_state_cannot_be_resumed(world, tmp_path):
    gcl.GCL(gcl.load_clip(world[1][3], world[1][5])[0]).save(tmp_path / "net.pt")
    command = [
        *world[1],
        *SHORT,
        *CPU,
        "--resume",
        str(tmp_path / "net.pt"),
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(files.InputError, match="no optimiser state"):
        train.main(train.parse_args(command))


@pytest.mark.parametrize(
    "field", [{"args": 3}, {"progress": None}, {"optimizer": {"state": {}, "param_groups": []}}]
)
def test_a_checkpoint_whose_state_is_of_another_kind_is_named(world, trained, tmp_path, field):
    path = tmp_path / "out" / "last.pt"
    path.parent.mkdir()
    torch.save(read(trained / "last.pt") | field, path)
    with pytest.raises(files.InputError, match="last.pt: fields are not as train.py writes them"):
        train.main(train.parse_args([*world[1], *SHORT, *CPU, "--out", str(path.parent)]))
