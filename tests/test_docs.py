# SPDX-License-Identifier: MIT
"""What docs/ prints is run: the script of other-methods.md, the lines that plot a log, and the
tests that robustness.md names.
"""

import importlib
import json
import math
import re
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch
from conftest import ROOT
from PIL import Image
from tiny import make_set

import evaluate
import files


def block(page, needle):
    """The Python block of a page of docs/ that holds these words."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return next(code for code in blocks if needle in code)


# ---- other methods ----


class Patches:
    """Stands for the part of GroupViT that knows at which size it was trained."""

    def forward(self, images, interpolate_pos_encoding=False):
        assert interpolate_pos_encoding or images.shape[2:] == (224, 224)


class GroupViTModel:
    """As that of transformers, as far as the page uses it; scores from the pictures' colours."""

    logit_scale = torch.zeros(())

    def __init__(self, config):
        self.vision_model = SimpleNamespace(embeddings=Patches())

    from_pretrained = classmethod(lambda cls, name: cls(name))

    def eval(self):
        return self

    def __call__(self, input_ids, pixel_values, output_segmentation):
        assert input_ids.shape[1] == 77 and output_segmentation
        assert pixel_values.shape[2:] == (448, 448) and not torch.is_grad_enabled()
        self.vision_model.embeddings.forward(pixel_values)
        colours = pixel_values.repeat(1, len(input_ids), 1, 1)[:, : len(input_ids)]
        return SimpleNamespace(segmentation_logits=9 * colours)  # [B, K, 448, 448]


def test_the_script_for_other_methods_writes_what_evaluate_scores(tmp_path, monkeypatch):
    code = block("other-methods.md", "GroupViT")
    lines = [line for line in code.splitlines() if line.strip() and line.strip()[0] != "#"]
    assert len(lines) <= 25
    module = ModuleType("transformers")
    module.GroupViTModel, module.GroupViTConfig = GroupViTModel, dict
    monkeypatch.setitem(sys.modules, "transformers", module)
    sets = [
        make_set(tmp_path / "plain", n=2),
        make_set(tmp_path / "wide", n=1, background=True, sizes=((900, 60),)),  # narrow windows
    ]
    monkeypatch.setattr(sys, "argv", ["groupvit.py", "--datasets", *sets, "--out", str(tmp_path)])
    exec(compile(code, "other-methods.md", "exec"), {})

    stored = np.asarray(Image.open(tmp_path / "predictions/plain/0.png"))
    image = np.asarray(Image.open(tmp_path / "plain/images/0.png"))
    norm = np.array(((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    brightest = ((image / 255 - norm[0]) / norm[1]).argmax(2)  # the three classes are the colours
    assert stored.shape == brightest.shape and (stored == brightest).mean() > 0.8
    wide = np.asarray(Image.open(tmp_path / "predictions/wide/0.png"))
    assert wide.shape == (60, 900) and set(wide.ravel()) == {0, 1, 2, 3}

    options = ["--predictions", str(tmp_path / "predictions"), "--workers", "0"]
    command = ["--datasets", *sets, *options, "--out", str(tmp_path / "scored")]
    assert not files.command(evaluate.main, evaluate.parse_args(command))
    results = json.loads((tmp_path / "scored/results.json").read_text())
    assert [entry["images"] for entry in results["datasets"].values()] == [2, 1]
    assert results["average"] > 0


# ---- plots of a log ----


def test_every_way_to_plot_a_log_reads_its_numbers(tmp_path, monkeypatch):
    lines = [{"step": 2, "gcl_v": 1.5, "bad": {"image": 0}}, {"step": 4, "miou": 30.0}]
    (tmp_path / "runs/gcl").mkdir(parents=True)
    (tmp_path / "runs/gcl/log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stubs = {name: MagicMock() for name in ("pandas", "wandb", "torch.utils.tensorboard")}
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.chdir(tmp_path)
    exec(block("training.md", "pandas"), {})
    stubs["pandas"].read_json.assert_called_once_with("runs/gcl/log.jsonl", lines=True)
    scalars = stubs["torch.utils.tensorboard"].SummaryWriter.return_value.add_scalar
    assert [call.args for call in scalars.call_args_list] == [("gcl_v", 1.5, 2), ("miou", 30.0, 4)]
    logged = stubs["wandb"].init.return_value.log.call_args_list
    assert [(call.args[0], call.kwargs) for call in logged] == [
        (line, {"step": line["step"]}) for line in lines
    ]


# ---- the table of attacks ----

ROW = re.compile(r"\| `tests/(test_\w+)\.py::(test_\w+)` \| (\d+) \|")


def cases(function):
    """How often pytest runs a test: the product of its parameters."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    return math.prod(len(mark.args[1]) for mark in marks)


def test_every_attack_of_the_table_is_a_test_with_as_many_cases():
    rows = ROW.findall((ROOT / "docs/robustness.md").read_text())
    named = {(file, name): int(number) for file, name, number in rows}
    tests = {key: getattr(importlib.import_module(key[0]), key[1], None) for key in named}
    assert len(rows) == len(named) > 25
    assert [key for key, test in tests.items() if test is None] == []
    assert named == {key: cases(test) for key, test in tests.items()}
