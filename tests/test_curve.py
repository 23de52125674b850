# SPDX-License-Identifier: MIT
"""The loss curve of 100 steps of train.py's own loop on random numbers, against the stored one.

    python tests/test_curve.py    # writes tests/golden/loss_curve.json again

Do that only where a change is meant to change training, and say so. Nothing hangs on the CPU: all
is float64; weights, pictures and noise are products of uniform numbers, which torch.Generator gives
alike everywhere (normal ones it does not); the gates are open. What is left is the rounding of sums
in another order, 1e-16 each, and that train.py adds its figures up over ranks in float32: 6e-8.
"""

import json
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import GOLDEN
from tiny import make_clip

import data
import train

STORED = GOLDEN / "loss_curve.json"
FLAGS = """--losses gcl_v gcl_f cl --batch-size 4 --steps 100 --warmup-steps 20 --lr 2e-3
--scalar-lr-mult 10 --clip-grad 0.3 --resume never --device cpu""".split()
CAPTIONS = ["a cat", "two dogs", "trees", "a red kite", "the sea", "a box", "no one", "four of us"]


def numbers(generator, *shape):
    """Uniform in (-1, 1), float64."""
    return 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1


@torch.no_grad()
def fill(net, generator):
    """Open gates, and every weight anew that starts at a random number."""
    for name, p in net.double().named_parameters():
        if name.endswith("gate"):
            p.fill_(0.5)
        elif p.ndim and not any(word in name for word in ("norm", "ln_")):
            spread = 3 / p[0].numel() if p.ndim > 1 else 0.01
            p.copy_(numbers(generator, *p.shape) * spread**0.5)


def batches(run, generator):
    """Two batches in turn, their noise always new."""
    images, tokens = 2 * numbers(generator, 8, 3, 24, 24), run.tokenizer(CAPTIONS)
    none_bad = torch.zeros(4, len(data.REASONS), dtype=torch.int32)
    for step in range(run.steps):
        half = slice(step % 2 * 4, step % 2 * 4 + 4)
        yield images[half], tokens[half], numbers(generator, 4, 1, 12, 12) / 2 + 0.5, none_bad


def curve(folder):
    """What train.py logs of steps 10, 20, ..., 100, and w and b after them: a list of dicts."""
    model, pretrained = make_clip(folder)
    generator, logged = torch.Generator().manual_seed(0), []

    def after_step(run, done, facts):
        if done % 10 == 0:
            logged.append({"step": done, **facts, "w": run.net.w.item(), "b": run.net.b.item()})

    with (
        mock.patch.object(data, "expand_shards"),
        mock.patch.object(train, "build_pairs"),
        mock.patch.object(train, "batches", lambda run: batches(run, generator)),
        mock.patch.object(train, "after_step", after_step),
    ):
        args = train.parse_args([*FLAGS, "--model", model, "--pretrained", pretrained])
        run = train.start_run(args)
        fill(run.net, generator)
        train.restore(run)  # a fresh start
        train.train(run)
    return logged


def test_a_hundred_steps_have_the_stored_losses(tmp_path):
    stored, found = json.loads(STORED.read_text()), curve(tmp_path)
    for step, expected in zip(found, stored, strict=True):
        assert step == pytest.approx(expected, rel=1e-6, abs=1e-9)
    # It is a training that is compared: the loss falls, some gradients are clipped, some are not.
    norms = [step["grad_norm"] for step in stored]
    assert stored[-1]["loss"] < stored[0]["loss"] and min(norms) < 0.3 < max(norms)


if __name__ == "__main__":
    STORED.write_text(json.dumps(curve(Path(tempfile.mkdtemp())), indent=1) + "\n")
