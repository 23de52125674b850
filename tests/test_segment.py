# SPDX-License-Identifier: MIT
"""segment.py: the protocol's labels and masks, for any picture, any words, as people call it."""

import ast
import json
import os
import re
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from tiny import check_refused, make_clip, run

import backbone
import evaluate
import files
import gcl
import pamr
import report
import segment

SMALL = {"short_side": 32, "window": 32, "stride": 16}
FLAGS = ("--short-side", 32, "--window", 32, "--stride", 16, "--device", "cpu")
TEXTS = ["a boatman standing on a boat", 'the "moon" {', "sunset"]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny CLIP, and a checkpoint whose adapter does something and masks spread over 0..1."""
    folder = tmp_path_factory.mktemp("world")
    config, weights = make_clip(folder)
    torch.manual_seed(3)
    net = gcl.GCL(gcl.load_clip(config, weights)[0])
    for stage in net.adapter.stages:
        for block in (stage[1], stage[2]):
            block.gate.data.fill_(0.7)
    net.w.data.fill_(8.0)
    net.b.data.fill_(0.3)
    net.save(folder / "net.pt")
    return SimpleNamespace(config=config, weights=weights, checkpoint=str(folder / "net.pt"))


@pytest.fixture(scope="module")
def net(world):
    return gcl.load(world.checkpoint)


def photo(width, height, seed=0):
    """A smooth random picture, uint8 [h, w, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def save_photo(path, *size, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(*size)).save(path, **options)
    return path


# ---- the function ----


@pytest.mark.parametrize("refined", [True, False])
def test_labels_and_masks_are_those_of_the_net_on_one_window(net, refined):
    """A picture of one window, at its own size, needs nothing of the protocol but the threshold."""
    image = photo(32, 32)
    labels, masks = segment.segment_image(net, image, TEXTS, pamr=refined, **SMALL)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in gcl.CLIP_NORM)
    x = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    text = net.encode_classes(TEXTS, backbone.tokenizer_of(net.clip), evaluate.TEMPLATES["release"])
    expected = net.segment(x[None], text, pamr.pamr if refined else None)[0]
    torch.testing.assert_close(masks, expected)
    assert (
        masks.shape == (3, 32, 32) and masks.dtype == torch.float32 and labels.dtype == torch.int64
    )
    threshold = 0.4 if refined else 0.5
    for y in range(32):
        for column in range(32):
            values = expected[:, y, column].tolist()
            best = max(values)
            assert labels[y, column] == (1 + values.index(best) if best > threshold else 0)


def test_a_large_picture_is_segmented_in_the_protocols_windows_and_comes_back_at_its_own_size(net):
    image = photo(201, 60)
    labels, masks = segment.segment_image(net, image, TEXTS, background=0.3, pamr=False, **SMALL)
    args = evaluate.parse_args(
        ["--datasets", "x", "--no-pamr", "--short-side=32", "--window=32", "--stride=16"]
    )
    text = net.encode_classes(TEXTS, backbone.tokenizer_of(net.clip), evaluate.TEMPLATES["release"])
    small = evaluate.segment_image(net, image, text, args)
    assert small.shape == (3, 32, 107)
    full = F.interpolate(small[None], size=(60, 201), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(masks, full)
    values, indices = full.max(0)
    assert torch.equal(labels, torch.where(values > 0.3, indices + 1, 0)) and masks.shape == (
        3,
        60,
        201,
    )


def test_without_background_every_pixel_has_a_text(net):
    image = photo(40, 30)
    one = segment.segment_image(net, image, TEXTS, background=1.0, pamr=False, **SMALL)[0]
    labels, masks = segment.segment_image(net, image, TEXTS, background=False, pamr=False, **SMALL)
    assert (one == 0).all() and torch.equal(labels, masks.argmax(0) + 1)


def test_settings_are_evaluates_and_wrong_ones_are_said_in_its_words(net):
    image = photo(32, 32)
    plain = segment.segment_image(net, image, TEXTS, method="maskclip", pamr=False, **SMALL)[1]
    other = segment.segment_image(
        net, image, TEXTS, pamr=False, templates="simple", kp_weight=0.0, **SMALL
    )[1]
    assert not torch.allclose(plain, other)
    with pytest.raises(ValueError, match="invalid choice: 'sam'.*gcl.*maskclip"):
        segment.protocol(TEXTS, method="sam")
    with pytest.raises(ValueError, match="unrecognized arguments: --colour=3"):
        segment.protocol(TEXTS, colour=3)
    assert segment.protocol(TEXTS, pamr=False).bg_threshold == 0.5
    assert segment.protocol(TEXTS, pamr=None).bg_threshold == 0.4


def test_a_result_unpacks_and_shows_itself(net):
    image = Image.fromarray(photo(40, 30))
    result = segment.segment_image(net, image, TEXTS, background=0.2, pamr=False, **SMALL)
    labels, masks = result
    assert labels is result.labels is result[0] and masks is result.masks and len(result) == 2
    expected = segment.draw_overlay(np.asarray(image), labels, drawn_with(TEXTS))
    assert np.array_equal(np.asarray(result.overlay), np.asarray(expected))
    assert result._repr_png_().startswith(b"\x89PNG")


def test_masks_that_are_not_finite_are_an_error(net, monkeypatch):
    masks = torch.full((3, 8, 8), float("nan"))
    monkeypatch.setattr(evaluate, "segment_image", lambda *args: masks)
    with pytest.raises(ValueError, match="not finite.*--precision fp32"):
        segment.segment_image(net, photo(40, 30), TEXTS, **SMALL)


@pytest.mark.parametrize(
    "texts, words",
    [([], "0 texts"), (["a", " "], "empty"), (["the Moon", "the  moon"], "'the moon' is .* twice")],
)
def test_texts_that_cannot_be_are_named(net, texts, words):
    with pytest.raises(ValueError, match=words):
        segment.segment_image(net, photo(28, 28), texts)


def test_arrays_and_pictures_of_any_mode_are_read_alike(net):
    image = photo(40, 30)
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(image)))
    turned.getexif()[0x0112] = 6  # turn by 90 degrees to the right
    assert np.array_equal(segment.pixels(turned), image)
    assert np.array_equal(segment.pixels(Image.fromarray(image).convert("RGBA")), image)
    assert np.array_equal(segment.pixels(image[..., 0]), image[..., :1].repeat(3, 2))
    with pytest.raises(files.InputError, match="32-bit pixels; convert"):
        segment.pixels(np.full((5, 5), 0.5, np.float32))


def test_a_narrow_picture_has_masks_too(net):
    labels, masks = segment.segment_image(net, photo(1, 300), TEXTS, pamr=False, **SMALL)
    assert labels.shape == (300, 1) and masks.shape == (3, 300, 1)


# ---- the command line ----


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_photo(tmp_path / "photo.jpg", 40, 30)
    save_photo(tmp_path / "boats/a.png", 30, 30)
    save_photo(tmp_path / "boats/B.JPG", 30, 30)
    (tmp_path / "boats/notes.txt").write_text("no picture")
    (tmp_path / "moon").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "line, images, texts",
    [
        (["photo.jpg", "moon is up", "sunset"], ["photo.jpg"], ["moon is up", "sunset"]),
        (["--no-pamr", "photo.jpg", "--out", "o", "sea"], ["photo.jpg"], ["sea"]),
        (
            ["boats", "photo.jpg", "./boats", "sea"],
            ["boats/B.JPG", "boats/a.png", "photo.jpg"],
            ["sea"],
        ),
        (
            ["photo.jpg", "and/or not", "boats"],
            ["photo.jpg"],
            ["and/or not", "boats"],
        ),  # after a text all are texts
        (["boats/a.png", "--texts", "moon", "photo.jpg"], ["boats/a.png"], ["moon", "photo.jpg"]),
        (["photo.jpg", "--", "-5 degrees"], ["photo.jpg"], ["-5 degrees"]),
    ],
)
def test_pictures_and_texts_are_told_apart(here, line, images, texts):
    args = segment.parse_args(line)
    assert [str(path) for path in args.images] == images and args.texts == texts


@pytest.mark.parametrize(
    "line, words",
    [
        ("phot.jpg moon", "phot.jpg: no such picture or folder"),
        (
            "sunset moon",
            "sunset: no such picture or folder, or one after a text (pictures come first",
        ),
        ("photo.jpg gone.png sea", "gone.png: no such picture or folder"),
        ("photo.jpg moon sea", "for a text that is also a folder there is --texts"),
        (
            "photo.jpg sea boats/a.png",
            "boats/a.png: no such picture or folder, or one after a text",
        ),
        ("gone.png --texts sea", "gone.png: no such picture or folder"),
        ("moon sea", "moon: no such picture or folder, or none in it (.a"),
        ("photo.jpg", "0 texts; give 1 to 254"),
        ("photo.jpg sea Sea", "the text 'sea' is empty, or given twice"),
        ("photo.jpg sea --method sam", "invalid choice: 'sam'"),
        (
            "photo.jpg sea --method maskclip --checkpoint x",
            "--checkpoint goes with --method gcl alone",
        ),
        ("photo.jpg sea --background 1.5", "--background: must lie between 0 and 1, not '1.5'"),
        ("photo.jpg sea --background 0.3 --no-background", "not allowed with"),
        ("photo.jpg sea --stride 500", "--stride must be at most --window"),
        ("photo.jpg sea --out photo.jpg", "is a file, not a folder"),
        ("photo.jpg " + " ".join(f"t{k}" for k in range(255)), "255 texts; give 1 to 254"),
    ],
)
def test_wrong_calls_end_with_code_2_and_say_why(here, capsys, line, words):
    with pytest.raises(SystemExit) as stop:
        segment.parse_args(line.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said.splitlines()[-1], said


def test_the_background_is_the_protocols_unless_it_is_said(here):
    for extra, threshold in (
        ("", 0.4),
        ("--no-pamr", 0.5),
        ("--background 0.2", 0.2),
        ("--no-background", -1),
    ):
        assert segment.parse_args(f"photo.jpg sea {extra}".split()).bg_threshold == threshold


def test_a_folder_is_segmented_a_broken_picture_named_and_nothing_overwritten(here, world, net):
    """One call of the program: everything that it writes is looked at.

    One more `a.png`, and one whose name is what a second one would get.
    """
    save_photo(here / "boats/a-2.png", 33, 30)
    (here / "boats/broken.png").write_bytes((here / "boats/a.png").read_bytes()[:60])
    save_photo(here / "more/a.png", 60, 35)
    save_photo(here / ("é" * 110 + ".png"), 30, 30)
    long = "a very long text, longer than any file name may be: " * 9 + "月"
    paths = (here / "boats", here / "more", here / ("é" * 110 + ".png"))
    options = ("--checkpoint", world.checkpoint, *FLAGS, "--no-pamr", "--background", 0.2, "--json")
    result = run("segment.py", *paths, *TEXTS, long, "月", *options, "--out", here / "o")
    check_refused(result, 1, "broken.png", "not a picture")
    assert "warning: CLIP reads" in result.stderr and "segmenting" in result.stderr
    document = json.loads(result.stdout)
    assert [entry["image"] for entry in document["failed"]] == [str(here / "boats/broken.png")]
    assert document["settings"]["background"] == 0.2 and len(document["images"]) == 5
    written = [e[k] for e in document["images"] for k in ("overlay", "labels")]
    written += [t["heat_map"] for e in document["images"] for t in e["texts"]]
    assert len(set(written)) == 5 * (2 + 5) and sorted(written) == sorted(
        map(str, (here / "o").iterdir())
    )
    names = {path.rsplit("/", 1)[1] for path in written}
    assert {
        "a.overlay.png",
        "a-2.overlay.png",
        "a-3.overlay.png",
        "B.labels.png",
        "a.1-a-boatman-standing-on-a-boat.png",
    } <= names
    assert {"a.2-the-moon.png", "a.5.png"} <= names  # no letters of 月 in plain ASCII
    for entry in document["images"]:
        labels, masks = segment.segment_image(
            net,
            files.read_picture(entry["image"]),
            [t["text"] for t in entry["texts"]],
            0.2,
            pamr=False,
            **SMALL,
        )
        with Image.open(entry["labels"]) as stored:
            assert stored.mode == "P" and np.array_equal(np.asarray(stored), labels.numpy())
            assert stored.getpalette()[:9] == [0, 0, 0, 230, 159, 0, 86, 180, 233]
        assert (entry["height"], entry["width"]) == labels.shape
        for k, text in enumerate(entry["texts"], start=1):
            assert text["label"] == k and text["share"] == pytest.approx(
                (labels == k).float().mean().item()
            )
            assert text["mean"] == pytest.approx(masks[k - 1].mean().item(), abs=1e-5)
        assert entry["background"] == pytest.approx((labels == 0).float().mean().item())


def test_a_run_says_one_line_a_picture_and_a_wrong_checkpoint_is_named(here, world, capsys):
    args = segment.parse_args(
        ["photo.jpg", "sea", "--checkpoint", world.checkpoint, *map(str, FLAGS)]
    )
    assert segment.main(args) == 0
    said = capsys.readouterr()
    assert "segmenting" not in said.err  # no bar for one picture
    assert re.fullmatch(
        r"photo.jpg: sea [\d.]+ %, background [\d.]+ % -> out/photo.overlay.png\n", said.out
    )
    check_refused(
        run("segment.py", here / "photo.jpg", "sea", "--checkpoint", here / "x.pt"),
        1,
        "x.pt",
        "no such file",
    )


def test_without_a_background_none_is_counted_and_masks_of_nan_are_a_failure(
    here, world, capsys, monkeypatch
):
    line = ["photo.jpg", "sea", "moon", "--no-background", "--checkpoint", world.checkpoint]
    args = segment.parse_args([*line, *map(str, FLAGS)])
    assert segment.main(args) == 0 and "background" not in capsys.readouterr().out
    args.json = True
    assert segment.main(args) == 0
    entry = json.loads(capsys.readouterr().out)["images"][0]
    assert entry["background"] is None
    assert sum(text["share"] for text in entry["texts"]) == pytest.approx(1)
    monkeypatch.setattr(evaluate, "segment_image", lambda *args: torch.full((2, 8, 8), torch.nan))
    assert segment.main(args) == 1
    said = capsys.readouterr()
    failed = json.loads(said.out, parse_constant=pytest.fail)
    assert not failed["images"] and "photo.jpg: masks are not finite" in said.err


def test_names_and_texts_of_any_bytes_reach_an_ascii_terminal_escaped(here, world, capsys):
    """Not UTF-8, control characters, other scripts: one line, and JSON in ASCII."""
    name = os.fsdecode(b"ph\xf6to \x1b[31m[1]\n.png")
    save_photo(here / "odd" / name, 30, 30)
    (here / "odd/broken.png").write_bytes(b"\x00\x00\x00\x1cftypavif")
    texts = ["m\x1b[2Joon", "月 \u202e", os.fsdecode(b"caf\xe9")]
    line = [str(here / "odd"), "--texts", *texts, "--checkpoint", world.checkpoint]
    line += [*map(str, FLAGS), "--out", str(here / "o")]
    result = run("segment.py", *line, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    check_refused(result, 1, "broken.png", "not a picture that can be read")
    assert result.stdout.isascii() and "\x1b" not in result.stdout + result.stderr
    assert "ph\\udcf6to \\x1b[31m[1]\\n.png: m\\x1b[2Joon" in result.stdout
    assert segment.main(segment.parse_args([*line, "--json"])) == 1
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert said.out.isascii() and document["images"][0]["image"].endswith(name)
    assert [text["text"] for text in document["images"][0]["texts"]] == texts
    with pytest.raises(SystemExit):
        segment.parse_args(["gone\x1b.png", "sea"])
    assert "gone\\x1b.png" in capsys.readouterr().err


def test_random_weights_are_said_on_every_picture(world, net, monkeypatch):
    seen = []
    draw = report.put_text
    monkeypatch.setattr(report, "put_text", lambda *a, **k: (seen.append(a[2]), draw(*a, **k)))
    for source, words in (("random", 1), ("openai", 0)):
        monkeypatch.setitem(net.clip.source, "pretrained", source)
        _ = segment.segment_image(net, photo(40, 30), TEXTS, pamr=False, **SMALL).overlay
        assert sum("random weights" in text for text in seen) == words
        seen.clear()


def test_another_method_needs_no_checkpoint(here, world):
    args = [
        "photo.jpg",
        "sea",
        "--method",
        "maskclip",
        "--model",
        world.config,
        "--pretrained",
        world.weights,
    ]
    args = segment.parse_args([*args, *map(str, FLAGS), "--out", "o"])
    assert segment.main(args) == 0 and (here / "o/photo.1-sea.png").is_file()


# ---- the pictures ----


def drawn_with(texts, bg_threshold=0.4, note=""):
    return SimpleNamespace(texts=texts, bg_threshold=bg_threshold, note=note)


def cell_of(picture, top, height, width):
    """A cell of a sheet, uint8 [height, width, 3]."""
    return np.asarray(picture)[top : top + height, report.GAP : report.GAP + width]


def test_the_overlay_is_coloured_where_the_text_is_and_grey_elsewhere():
    image, labels = photo(1024, 640), torch.zeros(640, 1024, dtype=torch.int64)
    labels[:, 200:400] = 2
    picture = segment.draw_overlay(image, labels, drawn_with(["a", "b", "c"]))
    picture = cell_of(picture, report.GAP + 18, 640, 1024)
    hue = picture.max(-1).astype(int) - picture.min(-1)
    assert (hue[:, :200] == 0).all() and (hue[:, 405:] == 0).all()
    assert np.median(hue[:, 201:399]) > 80
    grey = np.asarray(Image.fromarray(image).convert("L"), float)
    y, x = 600, 210  # away from the number in the middle
    expected = 0.4 * grey[y, x] + 0.6 * np.array([86, 180, 233])
    assert np.abs(picture[y, x] - expected).max() <= 1


def test_the_heat_map_has_the_colours_of_its_mask():
    mask = torch.zeros(640, 1024)
    mask[:, 350:] = 1
    picture = segment.draw_heat(photo(1024, 640), mask, "a text", drawn_with(["a text"]))
    picture = cell_of(picture, report.GAP + 18, 640, 1024)
    assert picture[:, 360:, 0].min() >= 0.75 * 253 - 1 > picture[:, :340, 0].max()


@pytest.mark.parametrize("size, view", [((48, 48), (1024, 1024)), ((1, 100), (10, 1024))])
def test_views_are_neither_tiny_nor_giant(size, view):
    assert segment.grey_view(np.zeros((*size, 3), np.uint8)).size == view[::-1]


# ---- the README ----


def test_the_five_lines_of_the_readme_work_as_printed(world, tmp_path, monkeypatch):
    block = next(
        b
        for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        if "segment.segment_image" in b
    )
    assert len(ast.parse(block).body) == 5
    shutil.copy(world.checkpoint, tmp_path / "tcl.pth")
    save_photo(tmp_path / "photo.jpg", 40, 30)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["labels"].shape == (30, 40) and names["masks"].shape == (2, 30, 40)


def test_the_commands_of_the_readme_are_accepted(here):
    (here / "moon").rmdir()
    for name in ("beach.png", "holiday/a.jpg"):
        save_photo(here / name, 30, 30)
    text = README + ast.get_docstring(ast.parse((ROOT / "segment.py").read_text()))
    lines = re.findall(r"python segment\.py (.*)", text.replace("\\\n", " "))
    assert len(lines) >= 5
    for line in lines:
        assert segment.parse_args(shlex.split(line.split("  #")[0].split(">")[0])).texts
