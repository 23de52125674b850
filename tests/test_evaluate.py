# SPDX-License-Identifier: MIT
"""The unified protocol: geometry, windows, metric, and evaluate.py as people call it."""

import argparse
import ast
import dataclasses
import inspect
import json
import math
import os
import re
import signal
import socket
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, RELEASE, golden
from PIL import Image
from tiny import check_refused, make_clip, make_set, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import backbone
import benchmarks
import evaluate
import files
import gcl
import pamr
import report

SMALL = ("--short-side", 32, "--window", 32, "--stride", 16)


def options(**changes):
    defaults = {
        "short_side": 32,
        "window": 32,
        "stride": 16,
        "precision": "fp32",
        "pamr": False,
        "method": "gcl",
    }
    return argparse.Namespace(**defaults | {"kp_weight": 0.3} | changes)


# ---- geometry ----


def test_windows_are_the_golden_ones():
    cases = golden("slide")
    assert len(cases) > 2
    for name, corners in cases.items():
        if name.startswith("windows"):
            height, width = map(int, name.split("_")[1].split("x"))
            assert evaluate.windows(height, width, 448, 224) == [
                tuple(row) for row in corners.tolist()
            ]


def test_windows_cover_every_pixel_and_never_leave_the_image():
    for height, width in ((448, 449), (447, 2048), (100, 30), (1000, 671)):
        seen = np.zeros((height, width), int)
        for y1, y2, x1, x2 in evaluate.windows(height, width, 448, 224):
            assert 0 <= y1 < y2 <= height and 0 <= x1 < x2 <= width and y2 - y1 == min(448, height)
            seen[y1:y2, x1:x2] += 1
        assert seen.min() >= 1


def test_windows_are_those_of_a_walk_from_the_left():
    """One window after the other until the border is reached; the last is pushed back inside."""

    def walk(length, size, stride):
        start, spans = 0, []
        while True:
            end = min(start + size, length)
            spans.append((max(end - size, 0), end))
            if end == length:
                return spans
            start += stride

    rng = np.random.default_rng(0)
    for height, width, size in rng.integers(1, 90, (200, 3)).tolist():
        stride = int(rng.integers(1, size + 1))
        walked = [(*y, *x) for y in walk(height, size, stride) for x in walk(width, size, stride)]
        assert evaluate.windows(height, width, size, stride) == walked


def test_the_shorter_side_is_448_and_the_longer_at_most_2048():
    assert evaluate.resized(5000, 1, 448) == (2048, 1)  # never nothing
    assert evaluate.resized(375, 500, 448) == (448, 597)
    assert evaluate.resized(500, 375, 448) == (597, 448)
    assert evaluate.resized(1024, 2048, 448) == (448, 896)
    assert evaluate.resized(100, 1000, 448) == (205, 2048)  # the longer side decides
    for height, width in ((333, 512), (480, 640), (683, 512)):
        h, w = evaluate.resized(height, width, 448)
        assert min(h, w) == 448 and abs(h / w - height / width) < 0.01


class Brightness:
    """Stands for a model: three masks, functions of the pixels and of the window's own corner."""

    recipe = gcl.RECIPES["paper"]

    def segment(self, images, text, refine, kp_weight):
        ramp = torch.linspace(0, 1, images.shape[-1]).expand(
            images.shape[0], *images.shape[-2:]
        )  # [n, h, w]
        return torch.stack(
            [images.mean(1).sigmoid(), ramp, images[:, 2].sigmoid() * 0.7], dim=1
        )  # [n, 3, h, w]


def test_masks_are_averaged_where_windows_overlap():
    image = np.random.default_rng(0).integers(0, 256, (40, 75, 3), dtype=np.uint8)
    args = options()
    ours = evaluate.segment_image(Brightness(), image, torch.zeros(3, 4), args)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in gcl.CLIP_NORM)
    x = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 - mean) / std
    x = F.interpolate(x, size=(32, 60), mode="bilinear", align_corners=False)
    for row in range(0, 32, 5):
        for column in range(60):
            values = []
            for left in (0, 16, 28):  # windows of 32 every 16, the last flush with the border at 60
                if left <= column < left + 32:
                    window = Brightness().segment(x[..., left : left + 32], None, None, 0)
                    values.append(window[0, :, row, column - left])
            torch.testing.assert_close(ours[:, row, column], torch.stack(values).mean(0))


def test_the_best_class_is_the_argmax_of_all_resized_masks():
    masks = torch.rand(37, 9, 11)
    masks[20] = masks[3]  # a tie: the first class wins
    whole = F.interpolate(masks[None], size=(23, 40), mode="bilinear", align_corners=False)[0]
    value, index = evaluate.best_class(masks, (23, 40))
    torch.testing.assert_close(value, whole.max(0).values)
    assert torch.equal(index, whole.argmax(0)) and not (index == 20).any()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.found = max(
            [self.found, *(x.numel() for x in tree_leaves(result) if torch.is_tensor(x))]
        )
        return result


def test_the_best_class_never_holds_a_map_of_all_classes():
    masks = torch.rand(171, 7, 9)
    with Largest() as largest:
        evaluate.best_class(masks, (60, 80))
    assert largest.found <= 171 * 60 * 80 / 8


def test_the_background_is_a_constant_channel_in_front():
    masks = torch.rand(4, 6, 7)
    masks[:, 0, 0] = 0.4
    value, index = evaluate.best_class(masks, (6, 7))
    front = torch.cat([torch.full((1, 6, 7), 0.4), masks])
    assert torch.equal(evaluate.with_background(value, index, 0.4), front.argmax(0))


# ---- metric ----


def plain_iou(labels, predictions, n):
    """IoU per class as the textbook says it, one class and one pixel at a time."""
    result = []
    for k in range(n):
        hit = miss = false = 0
        for label, prediction in zip(
            labels.ravel().tolist(), predictions.ravel().tolist(), strict=True
        ):
            if label == 255:
                continue
            hit += label == k and prediction == k
            miss += label == k and prediction != k
            false += label != k and prediction == k
        result.append(100 * hit / (hit + miss + false) if hit + miss + false else math.nan)
    return result


def test_miou_is_the_plain_loops():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (3, 8, 9), generator=generator)
    predictions = torch.randint(0, 6, (3, 8, 9), generator=generator)
    labels[:, 0] = 255  # ignored
    labels[labels == 3] = 2  # class 3: predicted, never labelled
    predictions[predictions == 4] = 0  # class 4: labelled, never predicted; class 6: neither
    matrix = sum(evaluate.confusion(a, b, 7) for a, b in zip(labels, predictions, strict=True))
    expected = plain_iou(labels, predictions, 7)
    assert evaluate.iou_per_class(matrix).tolist() == pytest.approx(expected, nan_ok=True)
    occurring = [v for v in expected if v == v]
    assert len(occurring) == 6 and evaluate.mean_iou(matrix) == pytest.approx(
        sum(occurring) / 6, abs=1e-4
    )
    assert evaluate.mean_iou(matrix, [1, 4]) == pytest.approx(
        (expected[1] + expected[4]) / 2, abs=1e-4
    )


COPIED = ("resized", "windows", "confusion", "iou_per_class", "mean_of", "mean_iou", "accuracies")


def test_geometry_and_metric_can_be_copied_into_any_file():
    """They stand first, and need numpy and torch alone."""
    tree = ast.parse(inspect.getsource(evaluate))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert tuple(node.name for node in functions[: len(COPIED)]) == COPIED
    source = "\n".join(ast.unparse(node) for node in functions[: len(COPIED)])
    copy = {}
    exec(f"import numpy as np\nimport torch\n{source}", copy)
    assert copy["resized"](375, 500, 448) == (448, 597)
    assert copy["windows"](448, 597, 448, 224) == evaluate.windows(448, 597, 448, 224)
    label, prediction = torch.tensor([[0, 1], [2, 255]]), torch.tensor([[0, 2], [2, 1]])
    matrix = copy["confusion"](label, prediction, 3)
    assert copy["iou_per_class"](matrix).tolist() == [100, 0, 50]
    assert copy["mean_iou"](matrix) == 50 and copy["mean_iou"](matrix, [0, 2]) == 75
    assert copy["accuracies"](matrix)["mean_accuracy"] == 66.6667


def test_accuracies_are_those_of_plain_loops():
    """Three counts of pixels; class 3 is never a label, class 4 never predicted."""
    rng = np.random.default_rng(3)
    labels, predictions = rng.integers(0, 5, (2, 400))
    labels[labels == 3], predictions[predictions == 4] = 255, 0
    matrix = evaluate.confusion(torch.tensor(labels), torch.tensor(predictions), 5)
    pairs = [(a, b) for a, b in zip(labels.tolist(), predictions.tolist(), strict=True) if a < 255]
    right, iou = sum(a == b for a, b in pairs), plain_iou(labels, predictions, 5)
    each, weighted = [], 0
    for k in range(5):
        own = [b for a, b in pairs if a == k]
        each += [own.count(k) / len(own)] if own else []
        weighted += len(own) / len(pairs) * iou[k]
    expected = [100 * right / len(pairs), 100 * sum(each) / len(each), weighted]
    found = [*evaluate.accuracies(matrix).values()]
    assert len(each) == 4 and found == pytest.approx(expected, abs=1e-4)
    assert {*evaluate.accuracies(torch.zeros(3, 3)).values()} == {None}


def test_what_is_ignored_has_one_value_whatever_the_labels_type():
    """Arrays as they are stored, of more than 255 classes too, where 255 is one of them. Another
    label past the classes, as of a rule that is off by one, is never scored in silence.
    """
    prediction = torch.tensor([0, 255, 299])
    for label in (np.array([0, 255, 300], np.uint16), torch.tensor([0, 255, 300])):
        matrix = evaluate.confusion(label, prediction, 300)
        assert matrix.nonzero().tolist() == [[0, 0], [255, 255]]
    prediction = torch.tensor([0, 1, 2])
    assert evaluate.confusion(torch.tensor([0, 255, 1]), prediction, 3).sum() == 2
    with pytest.raises(RuntimeError):
        evaluate.confusion(torch.tensor([0, 255, 3]), prediction, 3)


# ---- the command line ----


def evaluated(*args):
    """evaluate.py in this process, which does not have to start; returns its results.json."""
    args = evaluate.parse_args([*map(str, args), "--workers", "0"])
    evaluate.main(args)
    return json.loads(Path(args.out, "results.json").read_text())


def refusal(capsys, *args):
    """The one line with which evaluate.py ends with exit code 1."""
    args = evaluate.parse_args([*map(str, args), "--workers", "0"])
    capsys.readouterr()
    assert files.command(evaluate.main, args) == 1
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    model, pretrained = make_clip(folder / "clip")
    plain, objects = make_set(folder / "plain", n=5), make_set(folder / "objects", 4, True)
    clip = ("--model", model, "--pretrained", pretrained)
    maskclip = ("--method", "maskclip", *clip, *SMALL, "--no-pamr")
    sets = ("--datasets", plain, objects)
    return argparse.Namespace(folder=folder, clip=clip, maskclip=maskclip, sets=sets)


@pytest.fixture(scope="module")
def maskclip(world):
    """The folder of an evaluation of MaskCLIP on both sets, with predictions and a sweep."""
    out = world.folder / "maskclip"
    evaluated(*world.sets, *world.maskclip, "--sweep-threshold", "--save-predictions", "--out", out)
    return out


def test_an_evaluation_writes_results_pictures_and_predictions(world, maskclip):
    results = json.loads((maskclip / "results.json").read_text())
    assert (
        list(results["datasets"]) == ["plain", "objects"]
        and results["settings"]["method"] == "maskclip"
    )
    plain, objects = results["datasets"].values()
    assert results["average"] == pytest.approx((plain["miou"] + objects["miou"]) / 2, abs=1e-3)
    assert (
        plain["images"] == 5
        and list(plain["iou"]) == ["cat", "dog", "tree"]
        and plain["partial_miou"] is None
    )
    assert (
        "sweep" not in plain
        and len(objects["sweep"]) == 19
        and objects["sweep"]["0.50"] == objects["miou"]
    )
    assert results["settings"]["unified_protocol"] is False
    assert results["partial"] is plain["partial"] is objects["partial"] is False
    assert results["settings"]["clip"]["model"] == world.clip[1]
    text = (maskclip / "results.md").read_text()
    assert "Outside the unified protocol" in text and f"{plain['miou']:.1f}" in text
    for name, n in (("plain", 5), ("objects", 4)):
        with Image.open(maskclip / f"{name}.png") as sheet:
            assert sheet.height > n * report.CELL * 0.6 and len(sheet.getcolors(1 << 24)) > 20
        assert len(list((maskclip / "predictions" / name).glob("*.png"))) == n


def test_the_result_is_that_of_the_saved_predictions(world, maskclip):
    """An independent score: the plain loop over the PNGs that were written."""
    for name in ("plain", "objects"):
        found = benchmarks.read_spec(str(world.folder / name / "SPEC.json"))
        labels, predictions = [], []
        for image_id, _, label, lut in found.items:
            labels.append(benchmarks.read_label(label, lut).ravel())
            predictions.append(
                np.array(Image.open(maskclip / "predictions" / name / f"{image_id}.png")).ravel()
            )
        expected = plain_iou(
            np.concatenate(labels), np.concatenate(predictions), len(found.classes)
        )
        iou = json.loads((maskclip / "results.json").read_text())["datasets"][name]["iou"]
        assert list(iou.values()) == pytest.approx(expected, abs=1e-3)


def test_accuracies_and_the_confusion_matrix_are_those_of_the_saved_predictions(world, maskclip):
    results = json.loads((maskclip / "results.json").read_text())["datasets"]
    for name, result in results.items():
        matrix = np.load(maskclip / f"{name}.confusion.npy")
        expected = np.zeros_like(matrix)
        for image_id, _, label, lut in benchmarks.read_spec(
            str(world.folder / name / "SPEC.json")
        ).items:
            found = np.array(Image.open(maskclip / "predictions" / name / f"{image_id}.png"))
            stored = benchmarks.read_label(label, lut)
            np.add.at(expected, (stored[stored != 255], found[stored != 255]), 1)
        assert np.array_equal(matrix, expected)
        hit, label = matrix.diagonal(), matrix.sum(1)
        assert result["pixel_accuracy"] == pytest.approx(100 * hit.sum() / label.sum(), abs=1e-4)
        assert result["mean_accuracy"] == pytest.approx(100 * (hit / label).mean(), abs=1e-4)
        assert result["fw_iou"] == pytest.approx(
            label @ [*result["iou"].values()] / label.sum(), abs=1e-3
        )
        rows = (maskclip / f"{name}.csv").read_text().splitlines()
        assert rows[1].startswith(f"{next(iter(result['iou']))},") and len(rows) == len(label) + 1
        assert (maskclip / f"{name}.confusion.png").is_file()


def test_every_image_has_its_own_iou_and_the_worst_are_shown(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "WORST", 3)
    sheets = {}
    write = report.write_sheet
    monkeypatch.setattr(
        report,
        "write_sheet",
        lambda path, dataset, rows: (
            sheets.update({Path(path).name: rows}) or write(path, dataset, rows)
        ),
    )
    plain = world.sets[1]
    evaluated("--datasets", plain, *world.maskclip, "--per-image", "--out", tmp_path)
    rows = (tmp_path / "plain.images.csv").read_text().splitlines()
    own = []
    for image_id, _, label, lut in benchmarks.read_spec(plain).items:
        found = np.array(Image.open(tmp_path / f"predictions/plain/{image_id}.png"))
        iou = [v for v in plain_iou(benchmarks.read_label(label, lut), found, 3) if v == v]
        own.append((round(sum(iou) / len(iou), 4), image_id, found))
    assert rows[0] == "image,miou" and rows[1:] == [f'"{name}",{iou}' for iou, name, _ in own]
    own.sort(key=lambda entry: entry[0])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said[:3]] == [name for _, name, _ in own[:3]]
    for (_, _, prediction), (_, _, expected) in zip(
        sheets["plain.worst.png"], own[:3], strict=True
    ):
        assert np.array_equal(prediction, expected)


def test_the_templates_of_imagenet_are_clips_eighty():
    templates = evaluate.read_templates("imagenet")
    assert len(templates) == 80 and templates[0] == "a bad photo of a {}."
    wanted = [template("moon") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert [template.replace("{}", "moon") for template in templates] == wanted


def test_partial_classes_alone_are_the_other_reading_of_table_3(tmp_path, monkeypatch):
    """Only they are prompts, and only their pixels are scored."""
    classes = ["a", "b", "c", "d"]
    lut = benchmarks.lookup_table(range(4))
    label = np.array([[0, 1, 2, 3, 255, 1]], np.uint8)
    Image.fromarray(label).save(tmp_path / "0.png")
    items = [("0", str(tmp_path / "0.png"), str(tmp_path / "0.png"), lut)]
    palette = [[k, k, k] for k in range(4)]
    found = benchmarks.SegmentationSet("s", classes, False, items, palette, 1, ["d", "b"])
    monkeypatch.setattr(benchmarks, "read_set", lambda *_: found)
    args = evaluate.parse_args(["--datasets", "s", "--method", "clip", "--partial-only"])
    (only,) = evaluate.read_sets(args)
    assert only.prompts() == ["d", "b"] and only.palette == [[3, 3, 3], [1, 1, 1]]
    stored = benchmarks.read_label(only.items[0][2], only.items[0][3])
    assert stored.tolist() == [[255, 1, 255, 0, 255, 1]]
    assert (only.items[0][3] == benchmarks.INVALID).tolist() == (lut == benchmarks.INVALID).tolist()
    found.partial = []
    with pytest.raises(files.InputError, match="Table 3 has no classes of s"):
        evaluate.read_sets(args)


def test_masks_that_are_not_finite_end_the_run_in_one_line(world, tmp_path, monkeypatch, capsys):
    masks = torch.rand(3, 8, 8)
    masks[1, 2, 3] = math.nan
    monkeypatch.setattr(evaluate, "segment_image", lambda *_: masks)
    line = refusal(capsys, "--datasets", world.sets[1], *world.maskclip, "--out", tmp_path)
    assert "0: masks are not finite; try --precision fp32" in line


@pytest.mark.parametrize("flag", ["--pamr", "--no-pamr"])
def test_the_papers_row_that_fits_the_runs_pamr_is_printed(tmp_path, capsys, monkeypatch, flag):
    """With PAMR Table 1's; without it the row that later papers print."""
    monkeypatch.setattr(evaluate, "read_sets", lambda _: [])
    monkeypatch.setattr(evaluate, "load_model", lambda *_: (None, None))
    monkeypatch.setattr(evaluate, "settings_of", lambda *_: {})
    evaluate.main(evaluate.parse_args(["--all", flag, "--out", str(tmp_path)]))
    line = capsys.readouterr().out.splitlines()[-1]
    row = re.findall(r"\d+\.\d", line)
    without = "51.2 24.3 30.4 77.5 30.3 19.6 23.1 14.9 33.9".split()
    paper = [str(v) for v in report.TABLE_1["GCL"]]
    assert row == (paper if flag == "--pamr" else without) and "average" in line
    assert sum(map(float, without[:8])) / 8 == pytest.approx(33.9, abs=0.05)


def test_predictions_can_be_scored_again_without_a_model(world, maskclip, tmp_path):
    first = json.loads((maskclip / "results.json").read_text())["datasets"]
    given = ("--predictions", maskclip / "predictions")
    second = evaluated(*world.sets, "--out", tmp_path, *given)["datasets"]
    for name in first:
        assert first[name]["iou"] == second[name]["iou"]
        assert first[name]["miou"] == second[name]["miou"]


def test_three_processes_give_the_same_results(world, maskclip, tmp_path):
    """Five, four and two images: none is counted twice, and one process has none of the two."""
    spec = make_set(tmp_path / "two", n=2, background=True)
    options = (*world.maskclip, "--sweep-threshold", "--device", "cpu")
    sets, out = (*world.sets, spec), tmp_path / "out"
    result = run("evaluate.py", *sets, *options, "--workers", 0, "--out", out, ranks=3)
    assert result.returncode == 0, result.stderr
    one = json.loads((maskclip / "results.json").read_text())["datasets"]
    one |= evaluated("--datasets", spec, *options, "--out", tmp_path / "one")["datasets"]
    many = json.loads((out / "results.json").read_text())["datasets"]
    assert len(many) == 3 and len(set(many["two"]["sweep"].values())) > 3
    for name in many:
        assert one[name] | {"seconds": 0} == many[name] | {"seconds": 0}


def test_a_rank_that_is_gone_is_said(monkeypatch):
    def gone(matrices):
        raise RuntimeError("Connection closed by peer\nand more")

    monkeypatch.setattr(evaluate.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(evaluate.dist, "all_reduce", gone)
    found = benchmarks.SegmentationSet("none", ["a"], False, [], [], 0)
    args = argparse.Namespace(predictions="x", sweep_threshold=False, workers=0)
    with pytest.raises(files.InputError, match="another rank is gone.*Connection closed by peer"):
        evaluate.evaluate_set(found, None, None, args, torch.device("cpu"), 0, 2)


def test_a_loader_process_that_is_killed_is_one_line(world, tmp_path, monkeypatch, capsys):
    """As by a full /dev/shm: SIGBUS."""
    monkeypatch.setattr(evaluate, "read_item", lambda _: os.kill(os.getpid(), signal.SIGBUS))
    options = [str(x) for x in (*world.maskclip, "--out", tmp_path, "--workers", 1)]
    args = evaluate.parse_args(["--datasets", world.sets[1], *options])
    assert files.command(evaluate.main, args) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "--workers" in line and "--shm-size" in line


def test_what_loaders_send_is_small_and_no_tensor(world):
    """Bytes for labels of less than 256 classes, through a pipe: nothing lies in /dev/shm."""
    item = benchmarks.read_spec(world.sets[1]).items[0]
    image_id, image, label = evaluate.read_item(item)
    assert type(image) is type(label) is np.ndarray
    assert image.dtype == label.dtype == np.uint8 and image.shape == (32, 40, 3)
    assert np.array_equal(label, benchmarks.read_label(*item[2:])) and image_id == "0"


def test_float32_is_not_rounded_to_tf32(world):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    args = evaluate.parse_args(["--datasets", "voc", "--method", "clip", *world.clip])
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        evaluate.load_model(args, torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("broken", ["images/1.png", "labels/1.png"])
def test_what_cannot_be_read_is_named_and_stops_the_run(world, tmp_path, capsys, broken):
    spec = make_set(tmp_path / "cut", n=2)
    file = tmp_path / "cut" / broken
    file.write_bytes(file.read_bytes()[:80])
    line = refusal(capsys, "--datasets", spec, *world.maskclip, "--out", tmp_path / "out")
    assert f"{broken}: not a " in line and "that can be read" in line
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize(
    ("prediction", "words"),
    [
        (np.zeros((32, 41), np.uint8), "0.png: the prediction is (32, 41), the label (32, 40)"),
        (np.full((32, 40), 3, np.uint8), "0.png: label value 3 is outside the class list"),
        (np.full((32, 40), 255, np.uint8), "0.png: label value 255 is outside the class list"),
        (np.zeros((32, 40, 3), np.uint8), "0.png: stored as RGB"),
        (None, "0.png: not a label that can be read"),
    ],
)
def test_a_prediction_that_does_not_fit_is_named(tmp_path, capsys, prediction, words):
    spec = make_set(tmp_path / "plain", n=1)
    (tmp_path / "predictions/plain").mkdir(parents=True)
    if prediction is not None:
        Image.fromarray(prediction).save(tmp_path / "predictions/plain/0.png")
    given = ("--predictions", tmp_path / "predictions", "--out", tmp_path / "out")
    assert words in refusal(capsys, "--datasets", spec, *given)


def make_cityscapes(root, n=3):
    """A few images in the layout of the download, whose ids are city/name."""
    rng = np.random.default_rng(5)
    for k in range(n):
        image = root / f"cityscapes/leftImg8bit/val/ulm/ulm_{k}.v1_leftImg8bit.png"
        label = root / f"cityscapes/gtFine/val/ulm/ulm_{k}.v1_gtFine_labelIds.png"
        for path, shape, high in ((image, (32, 64, 3), 256), (label, (32, 64), 34)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, high, shape, dtype=np.uint8)).save(path)


def test_more_classes_than_255_are_scored_saved_and_scored_again(world, tmp_path, capsys):
    """Class 255 counts, what is not scored does not, and a label is its own best prediction."""
    classes = [f"class {k}" for k in range(300)]
    spec = make_set(tmp_path / "many", n=1, classes=classes)
    stored = np.arange(300).reshape(10, 30).repeat(4, axis=1)
    stored[0, :4] = 65_535
    Image.fromarray(stored.astype(np.uint16)).save(tmp_path / "many/labels/0.png")
    Image.new("RGB", (120, 10)).save(tmp_path / "many/images/0.png")
    (tmp_path / "predictions/many").mkdir(parents=True)
    best = np.where(stored == 65_535, 0, stored)
    best[stored == 255] = 254
    Image.fromarray(best.astype(np.uint16)).save(tmp_path / "predictions/many/0.png")
    given = ("--datasets", spec, "--predictions", tmp_path / "predictions")
    iou = evaluated(*given, "--out", tmp_path / "out")["datasets"]["many"]["iou"]
    assert iou.pop("class 255") == 0 and iou.pop("class 254") == 50 and iou.pop("class 0") is None
    assert set(iou.values()) == {100}
    capsys.readouterr()
    saved = evaluated("--datasets", spec, *world.maskclip, "--save-predictions", "--out", tmp_path)
    assert "stored 65535 is not scored, no label holds 1 of 300 classes" in capsys.readouterr().err
    assert Image.open(tmp_path / "predictions/many/0.png").mode in ("I;16", "I")  # an older Pillow
    again = evaluated(*given, "--out", tmp_path / "again")
    assert saved["datasets"]["many"]["iou"] == again["datasets"]["many"]["iou"]


def test_a_partial_benchmark_is_marked_everywhere_and_scored_again_the_same(
    world, tmp_path, capsys, monkeypatch
):
    """Three images of Cityscapes alone; saved, and scored with every way to a model shut."""
    make_cityscapes(tmp_path / "data")
    common = ("--all", "--available", "--data-root", tmp_path / "data")
    first = ("--method", "clearclip", *world.clip, *SMALL, "--no-pamr", "--save-predictions")
    one = evaluated(*common, *first, "--out", tmp_path / "first")
    said = capsys.readouterr()
    assert "(partial: 3 of 500 images)" in said.out and "(partial)\n" in said.out
    assert said.err.count("left out: ") == 7
    for name in ("load_clip", "load", "GCL"):
        monkeypatch.setattr(gcl, name, None)
    again = ("--predictions", tmp_path / "first/predictions", "--out", tmp_path / "again")
    two = evaluated(*common, *again)
    assert one["partial"] is two["partial"] is one["datasets"]["cityscapes"]["partial"] is True
    assert one["average"] == two["average"] and one["average"] > 0
    a, b = (r["datasets"]["cityscapes"] | {"seconds": 0} for r in (one, two))
    assert a == b and a["images"] == 3 and a["full"] == 500
    assert (tmp_path / "first/predictions/cityscapes/ulm/ulm_1.v1.png").is_file()


def test_the_average_is_whole_only_when_every_set_is():
    whole, part = {"miou": 50.0, "partial": False}, {"miou": 20.0, "partial": True}
    for found, asked, average, partial in (
        ([whole, whole], 2, 50.0, False),
        ([whole, part], 2, 35.0, True),
        ([whole], 8, 50.0, True),
        ([whole, whole | {"miou": None}], 2, None, False),
    ):
        results = {"datasets": dict(enumerate(found))}
        evaluate.totals(results, asked)
        assert (results["average"], results["partial"]) == (average, partial)


def test_the_nine_prompts_are_the_releases():
    """All but the last are also among CLIP's 80."""
    assert [template.format("X") for template in evaluate.read_templates("release")] == [
        "itap of a X.",
        "a bad photo of a X.",
        "a origami X.",
        "a photo of the large X.",
        "a X in a video game.",
        "art of the X.",
        "a photo of the small X.",
        "a photo of many X.",
        "a photo of Xs.",
    ]
    only = set(evaluate.read_templates("release")) - set(evaluate.read_templates("imagenet"))
    assert only == {"a photo of {}s."}


def test_templates_may_come_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\na {} at sea.\none {}.\n\n")
    assert evaluate.read_templates(str(file)) == ["a {} at sea.", "one {}."]
    for wrong in ("no name here\n", "", "{} and {}\n"):
        file.write_text(wrong)
        with pytest.raises(files.InputError, match="needs one prompt per line"):
            evaluate.read_templates(str(file))


def test_a_checkpoint_is_evaluated_and_a_limit_marked_partial(world, tmp_path, capsys):
    clip, _ = gcl.load_clip(*world.clip[1::2])
    net = gcl.GCL(clip)
    with torch.no_grad():
        net.b += 1.0
    net.save(tmp_path / "net.pt")
    options = ("--checkpoint", tmp_path / "net.pt", *SMALL, "--limit", 2, "--out", tmp_path)
    entry = evaluated("--datasets", world.sets[2], *options)
    assert entry["datasets"]["objects"]["images"] == 2
    assert entry["partial"] is entry["datasets"]["objects"]["partial"] is True
    said = capsys.readouterr().out
    assert "(partial: 2 of 4 images)" in said and said.strip().endswith("(partial)")
    text = (tmp_path / "results.md").read_text()
    assert "**Partial**: only some of the images of objects" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--datasets", "voc", "--predictions", "x", "--sweep-threshold"], "need a model's masks"),
        (["--datasets", "voc", "--predictions", "x", "--save-predictions"], "need a model's masks"),
        (["--datasets", "voc", "--stride", "0"], "--stride: must be a whole number, at least 1"),
        (["--datasets", "voc", "--limit", "0"], "--limit: must be a whole number, at least 1"),
        (["--datasets", "voc", "--kp-weight", "2"], "--kp-weight: must lie between 0 and 1"),
        (["--datasets", "voc", "--bg-threshold", "nan"], "--bg-threshold: must lie between 0"),
        (["--datasets", "voc", "--stride", "500"], "--stride must be at most --window"),
        (["--all", "--method", "maskclipp"], "invalid choice"),
        (["--all", "--method", "maskclip", "--checkpoint", "x.pt"], "--checkpoint goes with"),
        (["--method", "maskclip"], "one of the arguments --all --datasets is required"),
    ],
)
def test_wrong_calls_are_explained(capsys, args, words):
    with pytest.raises(SystemExit) as stop:
        evaluate.parse_args(args)
    assert stop.value.code == 2 and words in capsys.readouterr().err


TOGETHER, STARTED = "RANK and WORLD_SIZE do not go together", "not all 2 ranks have started ("


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "0"}, TOGETHER),
        ({"WORLD_SIZE": "x"}, TOGETHER),
        ({"RANK": "2"}, TOGETHER),
        ({"WORLD_SIZE": "2", "RANK": "0"}, STARTED),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, STARTED),
    ],
)
def test_ranks_that_cannot_be_are_one_line(monkeypatch, capsys, variables, words):
    """As without torchrun, and where the port is in use."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("localhost", 0)) as used:
        if "MASTER_ADDR" in variables:
            monkeypatch.setenv("MASTER_PORT", str(used.getsockname()[1]))
        args = evaluate.parse_args(["--datasets", "nowhere.json", "--method", "maskclip"])
        assert files.command(evaluate.main, args) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_file_in_place_of_out_is_refused_before_the_long_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--all", "--out", str(tmp_path / "file")])
    assert "file: is a file, not a folder" in capsys.readouterr().err


def test_wrong_data_is_explained(world, tmp_path, monkeypatch, capsys):
    plain, *maskclip = world.sets[1], *world.maskclip
    odd = make_set(tmp_path / "odd")
    Image.new("L", (7, 9)).save(tmp_path / "odd/labels/3.png")
    monkeypatch.chdir(tmp_path)
    for args, words in (
        ((plain,), "runs/gcl/last.pt: no such file"),
        ((plain, *maskclip, "--device", "gpu"), "--device gpu: no such device"),
        ((plain, *maskclip, "--device", "cuda"), "--device cuda: no such device"),
        ((plain, plain, *maskclip), "the same name"),
        ((plain, *maskclip, "--templates", "shout"), "No such file"),
        ((odd, *maskclip), "labels/3.png (7, 9)"),
    ):
        assert words in refusal(capsys, "--datasets", *args, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mistake_is_one_line(tmp_path):
    """As people see it, in a process of its own."""
    result = run("evaluate.py", "--datasets", "ade20", "--method", "maskclip")
    check_refused(result, 1, "did you mean ade20k")
    result = run("evaluate.py", "--all", "--method", "maskclip", "--data-root", tmp_path)
    check_refused(result, 1, "error: voc: ", "VOC2012")


def test_nothing_available_is_an_error(tmp_path, capsys):
    given = ("--all", "--available", "--data-root", tmp_path, "--predictions", tmp_path)
    assert "none of the sets is there" in refusal(capsys, *given, "--out", tmp_path / "out")


def test_a_checkpoint_of_another_clip_is_named(world, tmp_path, capsys):
    clip, _ = gcl.load_clip(*world.clip[1::2])
    gcl.GCL(clip).save(tmp_path / "net.pt")
    other = make_clip(tmp_path / "other", width=48)
    given = ("--checkpoint", tmp_path / "net.pt", "--model", other[0], "--pretrained", other[1])
    line = refusal(capsys, "--datasets", world.sets[1], *given, "--out", tmp_path / "out")
    for word in ("adapter.stages.0.1", "[32]", "[48]"):
        assert word in line


# ---- the authors' checkpoint, from files to mIoU ----

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def release(tmp_path, monkeypatch):
    """Flags of the golden checkpoint, whose tokenizer knows the golden prompts alone."""
    tokens = golden("segment_A")["cls_tokens"]  # [5 classes, 3 templates, 16]

    def tokenizer(prompts):
        places = [tuple(map(int, prompt.split())) for prompt in prompts]
        return torch.stack([tokens[k, j] for j, k in places])

    monkeypatch.setattr(backbone, "tokenizer_of", lambda clip: tokenizer)
    templates = tmp_path / "templates.txt"
    templates.write_text("".join(f"{j} {{}}\n" for j in range(3)))
    return ("--checkpoint", RELEASE, "--templates", templates, "--save-predictions")


def write_set(folder, pictures, labels, background):
    """SPEC.json of pictures uint8 [h, w, 3] and labels; the golden classes are called 0 to 4."""
    classes = ["background"] * background + [str(k) for k in range(5)]
    sizes = [picture.shape[1::-1] for picture in pictures]
    spec = make_set(folder, len(pictures), background, sizes, classes=classes)
    for k, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        Image.fromarray(picture).save(folder / f"images/{k}.png")
        Image.fromarray(label.astype(np.uint8)).save(folder / f"labels/{k}.png")
    return spec


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("refined", [0, 1])
def test_pictures_of_the_golden_sizes_have_the_golden_labels(
    release, tmp_path, monkeypatch, refined, background
):
    """The golden pictures are no bytes, so they are put in where files are read, unrounded.

    One window, no resizing: what is left are normalisation, PAMR, knowledge preservation,
    background, argmax and mIoU, the labels being the golden masks' own.
    """
    z, (mean, std) = golden("segment_A"), (np.array(v) for v in IMAGENET)
    pixels = [(x.permute(1, 2, 0).numpy() * std + mean) * 255 for x in z["image"]]
    masks = z[f"mask_pamr{refined}_kp0.3"]  # [2, 5, 61, 83]
    front = torch.full_like(masks[:, :1], 0.4 if refined else 0.5)
    channels = torch.cat([front, masks], 1) if background else masks
    labels = channels.argmax(1).numpy()
    if background:
        assert np.array_equal(labels, z[f"labels_bg_pamr{refined}_kp0.3"])
    spec = write_set(tmp_path / "golden", [np.zeros((61, 83, 3), np.uint8)] * 2, labels, background)
    monkeypatch.setattr(evaluate, "read_item", lambda item: unrounded(item, pixels))
    monkeypatch.setattr(report, "write_sheet", lambda *_: None)  # of bytes alone
    recipe = dataclasses.replace(gcl.RECIPES["release"], resize_bytes=False)
    monkeypatch.setitem(gcl.RECIPES, "release", recipe)
    geometry = ("--short-side", 61, "--window", 90, "--stride", 90)
    pamr_flag = "--pamr" if refined else "--no-pamr"
    options = (*release, *geometry, pamr_flag, "--out", tmp_path / "out")
    result = evaluated("--datasets", spec, *options)["datasets"]["golden"]
    for k, label in enumerate(labels):
        found = np.array(Image.open(tmp_path / f"out/predictions/golden/{k}.png"))
        sure = (
            channels[k].topk(2, 0).values
        )  # a tie within the golden tolerance may fall either way
        assert (found == label)[(sure[0] - sure[1] > 2e-4).numpy()].all()
    assert result["miou"] > 99.5


def unrounded(item, pixels):
    image_id, _, label, lut = item
    return image_id, pixels[int(image_id)].astype(np.float32), benchmarks.read_label(label, lut)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("refined", [False, True])
def test_the_release_is_evaluated_as_a_few_plain_lines_do(release, tmp_path, refined, background):
    """Two pictures whose sizes need resizing and windows; ImageNet's constants, bytes rounded."""
    rng = np.random.default_rng(6)
    pictures = [
        np.array(Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize(size, 3))
        for size in ((90, 50), (64, 96))
    ]
    net, z = gcl.load(RELEASE), golden("segment_A")
    text = F.normalize(z["text_embedding"], dim=-1)
    threshold = 0.4 if refined else 0.5
    # (h, w) for a shorter side of 64, and the windows of 64 every 32 along the longer one
    geometry = [((64, 115), (0, 32, 51)), ((96, 64), (0, 32))]

    def plain(norm):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in norm)
        for picture, (size, starts) in zip(pictures, geometry, strict=True):
            x = torch.tensor(picture).permute(2, 0, 1)[None].float()
            x = F.interpolate(x, size, mode="bilinear", align_corners=False).round()
            x, total, count = (x / 255 - mean) / std, torch.zeros(5, *size), torch.zeros(size)
            for start in starts:
                place = slice(start, start + 64)
                part = (..., place, slice(None)) if size[0] > 64 else (..., place)
                total[part] += net.segment(x[part], text, pamr.pamr if refined else None, 0.3)[0]
                count[part] += 1
            masks = F.interpolate((total / count)[None], picture.shape[:2], mode="bilinear")[0]
            front = torch.full_like(masks[:1], threshold)
            yield torch.cat([front, masks]) if background else masks

    expected, other = (list(plain(norm)) for norm in (IMAGENET, gcl.CLIP_NORM))
    labels = [rng.integers(0, 5 + background, picture.shape[:2]) for picture in pictures]
    spec = write_set(tmp_path / "set", pictures, labels, background)
    sizes = ("--short-side", 64, "--window", 64, "--stride", 32)
    options = (*sizes, "--pamr" if refined else "--no-pamr", "--out", tmp_path / "out")
    result = evaluated("--datasets", spec, *release, *options)["datasets"]["set"]
    found = [np.array(Image.open(tmp_path / f"out/predictions/set/{k}.png")) for k in range(2)]
    for one, channels, wrong in zip(found, expected, other, strict=True):
        high = channels.topk(2, 0).values
        assert (one == channels.argmax(0).numpy())[(high[0] - high[1] > 1e-5).numpy()].all()
        assert (one != wrong.argmax(0).numpy()).mean() > 0.01  # CLIP's constants would be seen
    together = [np.concatenate([x.ravel() for x in maps]) for maps in (labels, found)]
    iou = [v for v in plain_iou(*together, 5 + background) if v == v]
    assert result["miou"] == pytest.approx(sum(iou) / len(iou), abs=1e-4)


@pytest.mark.parametrize("name", ["paper", "release"])
def test_resized_pictures_are_rounded_to_bytes_by_the_release_alone(name):
    seen, (mean, std) = [], (torch.tensor(v).view(3, 1, 1) for v in gcl.RECIPES[name].norm)

    class Recorder(Brightness):
        recipe = gcl.RECIPES[name]

        def segment(self, images, *rest):
            seen.append((images * std + mean) * 255)
            return super().segment(images, *rest)

    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    evaluate.segment_image(Recorder(), image, torch.zeros(3, 4), options())
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen[0], x.round() if name == "release" else x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", ["gcl", "maskclip"])
def test_a_model_gets_the_runs_settings_and_pictures_in_its_own_normalisation(method):
    """The release's net has ImageNet's; its frozen CLIP alone has CLIP's."""
    seen = []

    class Recorder(Brightness):
        recipe = gcl.RECIPES["release"]

        def segment(self, images, text, refine, kp_weight):
            seen.append((images, kp_weight))
            return super().segment(images, text, refine, kp_weight)

        def segment_clip(self, images, text, method, refine):
            return self.segment(images, text, refine, method)

    image = np.full((20, 20, 3), 51, np.uint8)  # a fifth
    args = options(method=method, kp_weight=0.15)
    evaluate.segment_image(Recorder(), image, torch.zeros(3, 4), args)
    (images, given), (mean, std) = seen[0], gcl.CLIP_NORM
    if method == "gcl":
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = [(0.2 - m) / s for m, s in zip(mean, std, strict=True)]
    assert images[0, :, 5, 5].tolist() == pytest.approx(expected, abs=1e-5)
    assert given == (0.15 if method == "gcl" else method)


# ---- report ----


def test_the_paper_rows_are_the_papers():
    tables = json.loads((GOLDEN / "paper_tables.json").read_text())
    rows = {name.replace("†", "-dagger"): list(row) for name, row in report.TABLE_1.items()}
    assert rows == tables["table1"]
    assert list(report.COLUMNS) == tables["datasets"] == list(benchmarks.BENCHMARKS)


def test_classes_that_do_not_occur_give_no_number():
    assert evaluate.mean_iou(torch.zeros(3, 3, dtype=torch.int64)) is None
    matrix = torch.diag(torch.tensor([5, 0, 0]))
    assert evaluate.mean_iou(matrix) == 100 and evaluate.mean_iou(matrix, [1, 2]) is None
    found = benchmarks.SegmentationSet("voc20", ["a", "b", "c"], False, [None] * 4, [], 9, ("b",))
    result = evaluate.summary(found, matrix[None], False, 1.0)
    assert result["partial_miou"] is None and result["iou"] == {"a": 100.0, "b": None, "c": None}
    json.loads(json.dumps(result, allow_nan=False))


def test_only_the_protocols_own_settings_are_the_protocol():
    clip = argparse.Namespace(clip=argparse.Namespace(source={}))
    whole = ["--datasets", "voc"]
    for extra in ([], ["--no-pamr"], ["--pamr"]):
        assert (
            evaluate.settings_of(evaluate.parse_args(whole + extra), clip)["unified_protocol"]
            is True
        )
    for extra in (
        "--stride 112",
        "--window 336 --stride 168",
        "--bg-threshold 0.45",
        "--kp-weight 0",
        "--templates simple",
    ):
        args = evaluate.parse_args(whole + extra.split())
        assert evaluate.settings_of(args, clip)["unified_protocol"] is False


def test_the_protocol_is_the_default_and_any_other_setting_is_said():
    """Every flag that the protocol fixes has its value, and one other value leaves the protocol."""
    net = argparse.Namespace(clip=argparse.Namespace(source={}))
    args = evaluate.parse_args(["--all"])
    fixed = {"short_side": 448, "window": 448, "stride": 224, "templates": "release"}
    fixed |= {"kp_weight": 0.3, "bg_threshold": 0.4, "partial_only": False}
    assert fixed | vars(args) == vars(args) and args.pamr and args.method == "gcl"
    for name, value in fixed.items():
        other = argparse.Namespace(**vars(args) | {name: not value})
        assert evaluate.settings_of(other, net)["unified_protocol"] is False, name
    settings = evaluate.settings_of(args, net)
    assert settings["unified_protocol"] is True and fixed | settings == settings
    results = {"settings": settings | {"unified_protocol": False}, "datasets": {}}
    assert next(report.notes(results)).startswith("Outside the unified protocol")


def test_a_run_on_a_benchmark_stands_beside_the_paper():
    one = {"miou": 51.2, "images": 1449, "full": 1449, "iou": {"cat": 3.0}, "partial_miou": None}
    settings = {"method": "gcl", "predictions": None, "unified_protocol": True}
    text = report.markdown({"average": 51.2, "settings": settings, "datasets": {"voc": one}})
    assert (
        "| GCL | 55.0 | 30.4 |" in text
        and "| **this run** | 51.2 |  |" in text
        and "Partial" not in text
    )
    part = report.markdown(
        {"average": 51.2, "settings": settings, "datasets": {"voc": one | {"images": 7}}}
    )
    assert "**Partial**: " in part and "51.2 (partial)" in part


def test_masks_stay_in_float32_under_autocast(world, monkeypatch):
    """Only features may be in half precision: where they are fixed, autocast changes nothing."""
    net = gcl.GCL(gcl.load_clip(*world.clip[1::2])[0])
    v_s, v_d = torch.randn(1, 24, 16, 16), torch.randn(1, 32, 4, 4)
    monkeypatch.setattr(net, "dense_embedding", lambda _: v_s)
    monkeypatch.setattr(backbone, "dense_features", lambda *_: v_d)
    images, text = torch.randn(1, 3, 32, 32), F.normalize(torch.randn(3, 24), dim=-1)
    full = net.segment(images, text, pamr.pamr)
    with torch.autocast("cpu", torch.bfloat16):
        half = net.segment(images, text, pamr.pamr)
    assert half.dtype == torch.float32 and torch.equal(full, half)
