# SPDX-License-Identifier: MIT
"""The unified protocol: geometry, windows, background, metric, and evaluate.py as people call it."""

import argparse
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden, run_ranks
from PIL import Image
from tiny import check_refused, make_clip, make_set, make_shards, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import backbone
import benchmarks
import evaluate
import files
import gcl
import pamr
import report

SMALL = ("--short-side", 32, "--window", 32, "--stride", 16, "--workers", 0)


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
    """Stands for a model: three masks that are simple functions of the pixels and of the window's own corner."""

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
    for chunk in (1, 5, 16, 64):
        value, index = evaluate.best_class(masks, (23, 40), chunk)
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


# ---- the command line ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    model, pretrained = make_clip(folder / "clip")
    return {
        "folder": folder,
        "clip": ("--model", model, "--pretrained", pretrained),
        "plain": make_set(folder / "plain", n=5),
        "objects": make_set(folder / "objects", n=4, background=True),
    }


@pytest.fixture(scope="module")
def maskclip(world):
    """results.json of an evaluation of MaskCLIP on both sets, with predictions and a sweep."""
    out = world["folder"] / "maskclip"
    result = run(
        *(
            "evaluate.py",
            "--datasets",
            world["plain"],
            world["objects"],
            "--method",
            "maskclip",
            *world["clip"],
            *SMALL,
        ),
        *("--no-pamr", "--sweep-threshold", "--save-predictions", "--out", out),
    )
    assert result.returncode == 0, result.stderr
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
    assert results["settings"]["clip"]["model"] == world["clip"][1]
    text = (maskclip / "results.md").read_text()
    assert "Outside the unified protocol" in text and f"{plain['miou']:.1f}" in text
    for name, n in (("plain", 5), ("objects", 4)):
        with Image.open(maskclip / f"{name}.png") as sheet:
            assert sheet.height > n * report.CELL * 0.6 and len(sheet.getcolors(1 << 24)) > 20
        assert len(list((maskclip / "predictions" / name).glob("*.png"))) == n


def test_the_result_is_that_of_the_saved_predictions(world, maskclip):
    """An independent score: the plain loop over the PNGs that were written."""
    for name in ("plain", "objects"):
        found = benchmarks.read_spec(world[name])
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


def test_predictions_can_be_scored_again_without_a_model(world, maskclip, tmp_path):
    again = run(
        *(
            "evaluate.py",
            "--datasets",
            world["plain"],
            world["objects"],
            "--out",
            tmp_path,
            "--workers",
            0,
        ),
        *("--predictions", maskclip / "predictions"),
    )
    assert again.returncode == 0, again.stderr
    first, second = (
        json.loads((d / "results.json").read_text())["datasets"] for d in (maskclip, tmp_path)
    )
    for name in first:
        assert (
            first[name]["iou"] == second[name]["iou"]
            and first[name]["miou"] == second[name]["miou"]
        )


def matrices_of(rank, spec, predictions, clip, ranks):
    """The confusion matrices that a rank holds before and after the ranks meet."""
    found, evaluate_summary, seen = benchmarks.read_spec(spec), evaluate.summary, []
    found.full = len(found)
    arguments = ["--datasets", spec, "--workers", "0", "--no-pamr", *map(str, SMALL)]
    arguments += (
        ["--predictions", predictions]
        if predictions
        else ["--method", "sclip", "--sweep-threshold"]
    )
    args = evaluate.parse_args(arguments)
    net = None if predictions else gcl.GCL(gcl.load_clip(*clip)[0]).eval()
    tokenizer = net and backbone.tokenizer_of(net.clip)
    evaluate.summary = lambda dataset, matrices, *rest: (
        seen.append(matrices) or evaluate_summary(dataset, matrices, *rest)
    )
    try:
        evaluate.evaluate_set(found, net, tokenizer, args, torch.device("cpu"), rank, ranks)
    finally:
        evaluate.summary = evaluate_summary
    return seen[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_confusion_matrix_is_the_same_to_the_bit(world, tmp_path, ranks):
    """Two images: on three processes one has none. With the masks of a model, and all thresholds."""
    spec = make_set(tmp_path / "two", n=2, background=True)
    clip = world["clip"][1::2]
    one = matrices_of(0, spec, None, clip, 1)
    assert one.dtype == torch.int64 and one.shape == (20, 4, 4)
    assert (
        one.sum((1, 2)).tolist() == [40 * 30 + 32 * 46] * 20
    )  # every pixel that is not ignored, once
    assert len({tuple(m.flatten().tolist()) for m in one}) > 3  # the sweep changes something
    for many in run_ranks(matrices_of, spec, None, clip, ranks, ranks=ranks):
        assert many.dtype == torch.int64 and torch.equal(many, one)


def test_the_failure_of_one_rank_is_said_once_and_ends_all(world, tmp_path):
    """Image 3 is cut off behind its header, so that rank 1 alone finds it; the run stops long before any timeout."""
    spec = make_set(tmp_path / "cut", n=4)
    image = tmp_path / "cut/images/3.png"
    image.write_bytes(image.read_bytes()[:200])
    options = (
        "--method",
        "maskclip",
        *world["clip"],
        *SMALL,
        "--no-pamr",
        "--out",
        tmp_path / "out",
    )
    result = run("evaluate.py", "--datasets", spec, *options, "--device", "cpu", ranks=2)
    assert result.returncode == 1
    named = [
        line
        for line in result.stderr.splitlines()
        if "images/3.png: not an image that can be read" in line
    ]
    assert len(named) == 1 and "error: /" in named[0] and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("broken", ["images/1.png", "labels/1.png"])
def test_what_cannot_be_read_is_named_and_stops_the_run(world, tmp_path, broken):
    spec = make_set(tmp_path / "cut", n=2)
    file = tmp_path / "cut" / broken
    file.write_bytes(file.read_bytes()[:80])
    arguments = [
        "--datasets",
        spec,
        "--method",
        "maskclip",
        *world["clip"],
        *map(str, SMALL),
        "--no-pamr",
    ]
    with pytest.raises(files.InputError, match=f"{broken}: not a.* that can be read"):
        evaluate.main(evaluate.parse_args([*arguments, "--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize(
    ("prediction", "words"),
    [
        (
            np.zeros((32, 41), np.uint8),
            r"0.png: the prediction is \(32, 41\), the label \(32, 40\)",
        ),
        (np.full((32, 40), 3, np.uint8), "0.png: label value 3 is outside the class list"),
        (np.full((32, 40), 255, np.uint8), "0.png: label value 255 is outside the class list"),
        (np.zeros((32, 40, 3), np.uint8), "0.png: stored as RGB"),
        (None, r"0.png: this prediction is missing \(1 of 1 are\)"),
    ],
)
def test_a_prediction_that_does_not_fit_is_named(tmp_path, prediction, words):
    spec = make_set(tmp_path / "plain", n=1)
    (tmp_path / "plain/predictions/plain").mkdir(parents=True)
    if prediction is not None:
        Image.fromarray(prediction).save(tmp_path / "plain/predictions/plain/0.png")
    arguments = [
        "--datasets",
        spec,
        "--predictions",
        str(tmp_path / "plain/predictions"),
        "--workers",
        "0",
    ]
    with pytest.raises(files.InputError, match=words):
        evaluate.main(evaluate.parse_args([*arguments, "--out", str(tmp_path / "out")]))


def make_cityscapes(root, n=3):
    """A few images in the layout of the download, whose ids are city/name."""
    rng = np.random.default_rng(5)
    for k in range(n):
        image = root / f"cityscapes/leftImg8bit/val/ulm/ulm_{k}.v1_leftImg8bit.png"
        label = root / f"cityscapes/gtFine/val/ulm/ulm_{k}.v1_gtFine_labelIds.png"
        for path, shape, high in ((image, (32, 64, 3), 256), (label, (32, 64), 34)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, high, shape, dtype=np.uint8)).save(path)


def test_a_partial_benchmark_is_marked_everywhere_and_scored_again_the_same(
    world, tmp_path, capsys, monkeypatch
):
    """Three images of Cityscapes alone under --all --available; saved and scored with every way to a model shut."""
    make_cityscapes(tmp_path / "data")
    common = ["--all", "--available", "--data-root", str(tmp_path / "data"), "--workers", "0"]
    first = [
        "--method",
        "clearclip",
        *world["clip"],
        *map(str, SMALL),
        "--no-pamr",
        "--save-predictions",
    ]
    evaluate.main(evaluate.parse_args([*common, *first, "--out", str(tmp_path / "first")]))
    said = capsys.readouterr()
    assert "(partial: 3 of 500 images)" in said.out and said.out.strip().endswith("(partial)")
    assert said.err.count("left out: ") == 7
    for name in ("load_clip", "load", "GCL"):
        monkeypatch.setattr(gcl, name, None)
    again = ["--predictions", str(tmp_path / "first/predictions"), "--out", str(tmp_path / "again")]
    evaluate.main(evaluate.parse_args(common + again))
    one, two = (json.loads((tmp_path / d / "results.json").read_text()) for d in ("first", "again"))
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


def test_templates_may_come_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a {} at sea.\n\n  one {}.  \n")
    assert evaluate.read_templates(str(file)) == ["a {} at sea.", "one {}."]
    for wrong in ("no name here\n", "", "{} and {}\n"):
        file.write_text(wrong)
        with pytest.raises(files.InputError, match="needs one prompt per line"):
            evaluate.read_templates(str(file))


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_processes_gives_the_same_result(world, maskclip, tmp_path, ranks):
    """Five and four images on two and three processes: none is counted twice."""
    result = run(
        *(
            "evaluate.py",
            "--datasets",
            world["plain"],
            world["objects"],
            "--method",
            "maskclip",
            *world["clip"],
            *SMALL,
        ),
        *("--no-pamr", "--sweep-threshold", "--out", tmp_path, "--device", "cpu"),
        ranks=ranks,
    )
    assert result.returncode == 0, result.stderr
    one, many = (
        json.loads((d / "results.json").read_text())["datasets"] for d in (maskclip, tmp_path)
    )
    for name in one:
        assert one[name] | {"seconds": 0} == many[name] | {"seconds": 0}


def test_a_checkpoint_is_evaluated_and_a_limit_marked_partial(world, tmp_path):
    clip, _ = gcl.load_clip(*world["clip"][1::2])
    net = gcl.GCL(clip)
    with torch.no_grad():
        net.b += 1.0
    net.save(tmp_path / "net.pt")
    result = run(
        *(
            "evaluate.py",
            "--datasets",
            world["objects"],
            "--checkpoint",
            tmp_path / "net.pt",
            *SMALL,
        ),
        *("--limit", 2, "--out", tmp_path / "out"),
    )
    assert result.returncode == 0, result.stderr
    assert (
        json.loads((tmp_path / "out/results.json").read_text())["datasets"]["objects"]["images"]
        == 2
    )
    entry = json.loads((tmp_path / "out/results.json").read_text())
    assert entry["partial"] is entry["datasets"]["objects"]["partial"] is True
    assert "(partial: 2 of 4 images)" in result.stdout and "(partial)" in result.stdout
    assert (
        "**Partial**: only some of the images of objects"
        in (tmp_path / "out/results.md").read_text()
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--datasets", "voc", "--predictions", "x", "--sweep-threshold"], "need a model's masks"),
        (["--datasets", "voc", "--predictions", "x", "--save-predictions"], "need a model's masks"),
        (["--datasets", "voc", "--method", "maskclip", "--stride", "0"], "must be positive"),
        (["--datasets", "voc", "--limit", "0"], "must be positive"),
        (["--datasets", "voc", "--kp-weight", "2"], "--kp-weight between 0 and 1"),
        (["--datasets", "voc", "--out", __file__], "is a file, not a folder"),
        (
            ["--datasets", "voc", "--method", "maskclip", "--stride", "500"],
            "--stride must be at most --window",
        ),
        (["--all", "--method", "maskclipp"], "invalid choice"),
        (["--all", "--method", "maskclip", "--checkpoint", "x.pt"], "--checkpoint goes with"),
        (
            ["--datasets", "voc", "--method", "maskclip", "--available"],
            "--available goes with --all",
        ),
        (["--method", "maskclip"], "one of the arguments --all --datasets is required"),
    ],
)
def test_wrong_calls_are_explained(capsys, args, words):
    with pytest.raises(SystemExit) as stop:
        evaluate.parse_args(args)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_wrong_data_is_explained(world, tmp_path, monkeypatch):
    plain, clip = world["plain"], world["clip"]
    refuse = [
        (("--datasets", "ade20", "--method", "maskclip"), "did you mean ade20k"),
        (("--datasets", plain), "runs/gcl/last.pt: no such file; train first"),
        (
            ("--datasets", plain, "--method", "maskclip", *clip, "--device", "gpu"),
            "--device gpu: no such device",
        ),
        (
            ("--datasets", plain, "--method", "maskclip", *clip, "--device", "cuda"),
            "--device cuda: GPU 0 is asked for",
        ),
        (("--datasets", plain, plain, "--method", "maskclip", *clip), "the same name"),
        (
            ("--datasets", plain, "--method", "maskclip", *clip, "--templates", "shout"),
            "no such file",
        ),
        (
            ("--datasets", plain, "--predictions", tmp_path),
            "0.png: this prediction is missing (5 of 5 are)",
        ),
    ]
    monkeypatch.chdir(tmp_path)
    for args, words in refuse:
        command = [str(a) for a in (*args, "--workers", 0, "--out", tmp_path / "out")]
        with pytest.raises(files.InputError, match=re.escape(words)) as refusal:
            evaluate.main(evaluate.parse_args(command))
        assert "\n" not in str(refusal.value)
    check_refused(
        run("evaluate.py", *refuse[0][0], "--out", tmp_path / "out"), 1, refuse[0][1]
    )  # as people see it
    assert not (tmp_path / "out").exists()


def test_all_lists_every_missing_benchmark_at_once(tmp_path):
    result = run("evaluate.py", "--all", "--method", "maskclip", "--data-root", tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    for needle in ("VOC2012", "VOC2010", "coco_stuff164k", "cityscapes", "ADEChallengeData2016"):
        assert needle in result.stderr
    lines = result.stderr.strip().splitlines()[
        -9:
    ]  # one message: a head, then a line for each benchmark
    assert lines[0] == "error: 8 of 8 sets cannot be read:" and all(
        line.startswith("       ") for line in lines[1:]
    )


def test_a_checkpoint_of_another_clip_is_named(world, tmp_path):
    clip, _ = gcl.load_clip(*world["clip"][1::2])
    gcl.GCL(clip).save(tmp_path / "net.pt")
    other = make_clip(tmp_path / "other", width=48)
    result = run(
        *(
            "evaluate.py",
            "--datasets",
            world["plain"],
            "--checkpoint",
            tmp_path / "net.pt",
            "--workers",
            0,
        ),
        *("--model", other[0], "--pretrained", other[1], "--out", tmp_path / "out"),
    )
    check_refused(result, 1, "adapter.stages.0.1", "(32,)", "(48,)")


def test_one_image_of_another_size_than_its_label_stops_before_any_work(world, tmp_path):
    spec = make_set(tmp_path / "odd")
    Image.new("L", (7, 9)).save(tmp_path / "odd/labels/3.png")
    result = run(
        "evaluate.py",
        "--datasets",
        spec,
        "--method",
        "maskclip",
        *world["clip"],
        "--out",
        tmp_path / "out",
    )
    check_refused(result, 1, "images/3.png", "7x9")


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
    assert "**Partial**" in part and "51.2 (partial)" in part


def test_shards_are_not_a_labelled_set(tmp_path):
    make_shards(tmp_path, shards=1, pairs=1)
    (tmp_path / "SPEC.json").write_text('["not", "a", "spec"]')
    with pytest.raises(files.InputError, match="needs the fields"):
        benchmarks.read_spec(str(tmp_path / "SPEC.json"))


def test_masks_stay_in_float32_under_autocast(world, monkeypatch):
    """Only the features may be in half precision: with features fixed, autocast changes no bit of the masks."""
    net = gcl.GCL(gcl.load_clip(*world["clip"][1::2])[0])
    v_s, v_d = torch.randn(1, 24, 16, 16), torch.randn(1, 32, 4, 4)
    monkeypatch.setattr(net, "dense_embedding", lambda _: v_s)
    monkeypatch.setattr(net, "dense_features", lambda *_: v_d)
    images, text = torch.randn(1, 3, 32, 32), F.normalize(torch.randn(3, 24), dim=-1)
    full = net.segment(images, text, pamr.pamr)
    with torch.autocast("cpu", torch.bfloat16):
        half = net.segment(images, text, pamr.pamr)
    assert half.dtype == torch.float32 and torch.equal(full, half)
