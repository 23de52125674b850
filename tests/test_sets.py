# SPDX-License-Identifier: MIT
"""Labelled sets: SPEC.json, label files, the eight benchmarks, the commands of benchmarks.py."""

import base64
import dataclasses
import json
import re
import struct
import tracemalloc
import zlib

import conftest
import numpy as np
import pytest
from PIL import Image
from tiny import check_refused, make_set, run

import benchmarks
import files

RULES = json.loads((conftest.GOLDEN / "datasets.json").read_text())
NAMES = list(RULES)[1:9]  # the eight benchmarks


# ---- labelled sets ----


def test_a_spec_lists_its_images_and_maps_its_labels(tmp_path):
    found = benchmarks.read_spec(make_set(tmp_path / "mine", n=3, background=True))
    assert found.name == "mine" and len(found) == 3 and found.prompts() == ["cat", "dog", "tree"]
    _, image, label, lut = found.items[1]
    assert np.array(files.read_picture(image)).shape == (48, 32, 3)
    assert benchmarks.read_label(label, lut).shape == (48, 32)
    assert (
        lut[[0, 1, 2, 3, 255]].tolist() == [0, 1, 2, 3, 255]
        and (lut[4:255] == benchmarks.INVALID).all()
    )
    assert len(found.palette) == 4 and found.palette[0] == [0, 0, 0]


def test_zero_can_be_ignored_and_a_list_can_choose(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "val.txt").write_text("2\n0\n")
    path = make_set(tmp_path / "mine", n=3, zero_is_ignored=True, ignore=[9, 255], list="val.txt")
    found = benchmarks.read_spec(path)
    lut = found.items[0][3]
    assert [i for i, *_ in found.items] == ["2", "0"]
    assert lut[[0, 1, 2, 3, 4, 9, 255]].tolist() == [255, 0, 1, 2, -1, 255, 255]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clases": []}, "must be a JSON object of name, images, .*'clases'"),
        ({"classes": []}, "classes must be"),
        ({"background": True, "classes": ["cat", "dog"]}, '"background" is the first class'),
        ({"background": True, "classes": ["background"]}, "classes must be"),
        ({"background": True, "classes": ["cat", "background"]}, '"background" is the first class'),
        ({"name": "a/b"}, "becomes a file name"),
        ({"name": "voc"}, "'voc' becomes .* not the name of a benchmark"),
        ({"images": "nowhere"}, "nowhere/{id}.png missing"),
        ({"labels": "nowhere"}, "nowhere/0.png, .* missing"),
        ({"label_suffix": ".tif"}, "0.tif, .* missing"),
        ({"image_suffix": "**/"}, "{id}[*][*] missing"),
        ({"image_suffix": ".tif"}, "{id}.tif missing"),
        ({"list": "nowhere.txt"}, "nowhere.txt missing"),
        ({"palette": [[0, 0, 0]]}, "palette needs"),
        ({"palette": [[0, 0, 300]] * 3}, "palette needs"),
        ({"palette": [[0, 0, [0]]] * 3}, "palette cannot be"),
        ({"palette": [[0, 0]] * 3}, "palette needs"),
        ({"palette": [[0, 0, 0]] * 4}, "palette needs"),
        ({"image_suffix": None}, "image_suffix cannot be None"),
        ({"zero_is_ignored": "no"}, "zero_is_ignored cannot be 'no'"),
        ({"background": 0.0}, "background cannot be 0.0"),
        ({"ignore": 255}, "ignore cannot be 255"),
        ({"ignore": [-1]}, "ignore cannot be .-1."),
        ({"ignore": [[1]]}, "ignore cannot be"),
        ({"ignore": [True]}, "ignore cannot be .True."),
        ({"ignore": [1, 255]}, "each class needs one stored value that is not ignored"),
        ({"values": [1, 2, 3, 4]}, "each class needs one stored value"),
        ({"values": [*range(300)]}, "each class needs one stored value"),
        ({"values": [1, 2]}, "each class needs one stored value"),
        ({"values": [1, 2, 2]}, "each class needs one stored value"),
        ({"values": [0, 1, 2], "zero_is_ignored": True}, "each class needs one stored value"),
        ({"values": [0, 1, 255], "ignore": [255]}, "each class needs one stored value"),
        ({"values": [0, 1, "2"]}, "values cannot be"),
        ({"classes": ["cat", "cat"]}, "class names must differ"),
        ({"classes": ["cat", "Cat", "dog"]}, "class names must differ"),
        ({"classes": ["traffic light", " traffic  light "]}, "class names must differ"),
        ({"classes": ["cat", " "]}, "none is empty"),
        ({"classes": ["cat", "Background"]}, '"background" is the first class'),
        ({"name": ".."}, "becomes a file name"),
        ({"classes": ["cat", "background"]}, '"background" is the first class'),
    ],
)
def test_a_wrong_spec_is_explained(tmp_path, change, message):
    path = make_set(tmp_path / "mine", **change)
    with pytest.raises(files.InputError, match=message):
        benchmarks.read_spec(path)
    for text in ("[]", "{}", "[", '{"name": "mine"}'):
        (tmp_path / "mine/SPEC.json").write_text(text)
        with pytest.raises(files.InputError, match="SPEC.json: must be a JSON object of name, "):
            benchmarks.read_spec(path)


def masks_of_0_and_255(folder, **spec):
    spec = make_set(folder, n=2, background=True, **{"classes": ["background", "cat"]} | spec)
    for path in (folder / "labels").iterdir():
        Image.fromarray((np.array(Image.open(path)) % 2) * np.uint8(255)).save(path)
    return spec


def test_masks_of_0_and_255_are_not_silently_half_ignored(tmp_path, capsys):
    spec = masks_of_0_and_255(tmp_path / "mine")
    line = "mine: stored 255 is not scored, no label holds 1 of 2 classes: cat\n"
    benchmarks.check_labels(benchmarks.read_spec(spec))
    assert capsys.readouterr().err == line
    assert benchmarks.check_sets([spec], tmp_path) == 0 and capsys.readouterr().err == line


def test_a_stored_value_of_255_can_be_a_class(tmp_path, capsys):
    found = benchmarks.read_spec(masks_of_0_and_255(tmp_path / "mine", values=[0, 255]))
    benchmarks.check_labels(found)
    assert capsys.readouterr().err == ""
    for _, _, label, lut in found.items:
        stored = np.array(Image.open(label))
        assert (benchmarks.read_label(label, lut) == stored // 255).all() and stored.max() == 255
    assert np.flatnonzero(found.items[0][3] != benchmarks.INVALID).tolist() == [0, 255]


@pytest.mark.parametrize("values", [[7, 3, 200], [3, 255, 0]])
def test_values_are_the_stored_values_of_the_classes_in_order(tmp_path, values):
    spec = make_set(tmp_path / "mine", n=1, values=values, ignore=[9])
    lut = benchmarks.read_spec(spec).items[0][3]
    assert lut[[*values, 9, 1]].tolist() == [0, 1, 2, benchmarks.IGNORE, benchmarks.INVALID]


def test_a_set_without_a_pixel_to_score_is_refused(tmp_path, capsys):
    spec = make_set(tmp_path / "mine", n=2)
    for path in (tmp_path / "mine/labels").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)
    message = "no pixel of mine is scored: its labels hold 255 alone, ignored"
    with pytest.raises(files.InputError, match=message):
        benchmarks.check_labels(benchmarks.read_spec(spec))
    code, rows, below = checked(capsys, [spec], tmp_path)
    assert code == 1 and rows["mine"][0] == "wrong" and below == [message]


def test_classes_without_a_label_are_said_once_for_all_ranks(tmp_path, capsys, monkeypatch):
    classes = ["cat", "dog", "tree", *"abcdefgh"]
    found = benchmarks.read_spec(make_set(tmp_path / "mine", n=2, classes=classes, ignore=[]))
    for _, _, label, _ in found.items:
        Image.fromarray(np.array(Image.open(label)) % 3).save(label)
    benchmarks.check_labels(found)
    line = (
        "mine: stored none is not scored, no label holds 8 of 11 classes: a, b, c, d, e, f, g, h\n"
    )
    assert capsys.readouterr().err == line
    monkeypatch.setenv("RANK", "1")
    benchmarks.check_labels(found)
    assert capsys.readouterr().err == ""


def test_pictures_of_another_suffix_and_labels_without_one_are_named(tmp_path, capsys):
    spec = make_set(tmp_path / "mine", n=5, image_suffix=".jpg")
    images, labels = tmp_path / "mine/images", tmp_path / "mine/labels"
    for k, suffix in enumerate((".jpg", ".JPG", ".jpeg", ".png", ".Jpg")):
        Image.open(images / f"{k}.png").save(tmp_path / "x.jpg")
        (images / f"{k}.png").unlink()
        (tmp_path / "x.jpg").rename(images / f"{k}{suffix}")
    for hidden in ("images/._0.jpg", "images/.png", "labels/._0.png", "images/notes.txt"):
        (tmp_path / "mine" / hidden).write_bytes(b"of another system")
    found = benchmarks.read_spec(spec)
    assert [item[:3] for item in found.items] == [
        ("0", str(images / "0.jpg"), str(labels / "0.png"))
    ]
    benchmarks.check_labels(found)
    assert sorted(capsys.readouterr().err.splitlines()) == [
        f"mine: 4 files of {images} are left out, no pair of *.jpg and *.png: "
        "1.JPG, 2.jpeg, 3.png, 4.Jpg",
        f"mine: 4 files of {labels} are left out, no pair of *.jpg and *.png: "
        "1.png, 2.png, 3.png, 4.png",
    ]


def test_a_list_chooses_in_silence(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/val.txt").write_text("1\n")
    assert len(benchmarks.read_spec(make_set(tmp_path / "mine", n=3, list="val.txt"))) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["SPEC.json", "voc", "context"])
@pytest.mark.parametrize(
    "image_id",
    ["../labels/0", "a/../../0", "/etc/0", "..", "./0", "a//0", "C:0", "C:/0", "a\\..\\0", "\\0"],
)
def test_ids_that_leave_their_folder_are_refused(tmp_path, name, image_id):
    """--save-predictions once wrote where they point."""
    if name == "SPEC.json":
        name = make_set(tmp_path / "mine", n=1, list="ids.txt")
        listed = tmp_path / "mine/ids.txt"
    else:
        make_benchmark(tmp_path, name)
        listed = tmp_path / RULES[name]["root"] / RULES[name]["list"]
    listed.write_text(f"0\n{image_id}\n")
    with pytest.raises(files.InputError, match=f"{listed.name}: .* is no image id"):
        benchmarks.read_set(name, str(tmp_path))


def test_an_id_may_hold_a_folder(tmp_path):
    spec = make_set(tmp_path / "mine", n=1, list="ids.txt")
    for kind in ("images", "labels"):
        (tmp_path / "mine" / kind / "a..b").mkdir()
        (tmp_path / "mine" / kind / "0.png").rename(tmp_path / "mine" / kind / "a..b/..0.png")
    (tmp_path / "mine/ids.txt").write_text("a..b/..0\n")
    dataset = benchmarks.read_spec(spec)
    assert [item[0] for item in dataset.items] == ["a..b/..0"]
    assert benchmarks.survey(dataset, 1) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "must be a JSON object"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "must be a JSON object"),
        ('{"name": ' + "1" * 1_000_000 + "}", "must be a JSON object"),
        ('{"name": "x", "' + "y" * 100_000 + '": 1}', "must be a JSON object"),
        ({"ignore": [int("9" * 4000)]}, "ignore cannot be"),
        ({"palette": [[0] * 9999] * 99}, "palette needs"),
        ({"palette": {"k": [0] * 9999}}, "palette cannot be"),
        ({"classes": ["x" * 100_000, "y"]}, "classes cannot be"),
        ({"classes": [f"c{k}" for k in range(10_001)]}, "classes must be 1 to 10000 names"),
        ({"name": "x" * 100_000}, "name cannot be"),
        ({"name": "x" * 101}, "becomes a file name"),
        ({"images": 10**4000}, "images cannot be"),
        ({"images": "x" * 100_000}, "images cannot be"),
        ({"label_suffix": "a\nb"}, "label_suffix cannot be"),
        ({"images": "\ud800"}, "images cannot be"),
        ({"images": "\udce9"}, "{id}.png missing"),
        ({"classes": ["cat\ndog"]}, "classes cannot be"),
    ],
)
def test_an_absurd_spec_is_one_short_line(tmp_path, text, message):
    spec = make_set(tmp_path / "mine", n=1, **({} if isinstance(text, str) else text))
    if isinstance(text, str):
        (tmp_path / "mine/SPEC.json").write_text(text)
    with pytest.raises(files.InputError, match=message) as error:
        benchmarks.read_spec(spec)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("n", "ignore", "unscored"),
    [(254, None, 255), (255, None, 255), (257, None, 65_535), (847, [60_000], 60_000)],
)
def test_sets_of_many_classes_have_labels_of_16_bits(tmp_path, capsys, n, ignore, unscored):
    """ADE-847, PC-459: class 255 is a class there, and what is not scored is none."""
    spec = {} if ignore is None else {"ignore": ignore}
    spec = make_set(tmp_path / "mine", n=1, classes=[f"class {k}" for k in range(n)], **spec)
    stored = np.arange(n + 1).reshape(1, -1)
    stored[0, n] = unscored
    path = tmp_path / "mine/labels/0.png"
    Image.fromarray(stored.astype(np.uint16)).save(path)
    Image.new("RGB", (n + 1, 1)).save(tmp_path / "mine/images/0.png")
    found = benchmarks.read_spec(spec)
    label = benchmarks.read_label(path, found.items[0][3])
    assert label[0, :n].tolist() == list(range(n)) and label[0, n] == max(benchmarks.IGNORE, n)
    benchmarks.check_labels(found)
    assert capsys.readouterr().err == "" and len({*map(tuple, found.palette)}) == n
    Image.fromarray(np.full((1, n + 1), n + 2, dtype=np.uint16)).save(path)
    with pytest.raises(files.InputError, match=f"label value {n + 2} is outside"):
        benchmarks.check_labels(found)


def test_ten_thousand_classes_are_few_bytes(tmp_path):
    spec = make_set(tmp_path / "mine", n=1, classes=[f"class {k}" for k in range(10_000)])
    lut = benchmarks.read_spec(spec).items[0][3]
    assert lut.nbytes == 2 * 65_536 and lut[9_999] == 9_999 and lut[65_535] == 10_000
    assert benchmarks.spans(np.flatnonzero(lut >= 0)) == "0-9999, 65535"


def test_labels_that_do_not_fit_are_named(tmp_path):
    found = benchmarks.read_spec(make_set(tmp_path / "mine", n=2))
    benchmarks.check_labels(found)
    label = tmp_path / "mine/labels/1.png"
    stored = np.array(Image.open(label))
    stored[5, 5] = 7
    Image.fromarray(stored).save(label)
    with pytest.raises(files.InputError, match="labels/1.png: label value 7"):
        benchmarks.check_labels(found)
    Image.fromarray(stored).convert("RGB").save(label)
    with pytest.raises(files.InputError, match="labels/1.png: stored as RGB"):
        benchmarks.check_labels(found)
    Image.fromarray(stored[:-1] % 3).save(label)
    with pytest.raises(files.InputError, match=r"images/1.png: .* \(32, 48\).*\(32, 47\)"):
        benchmarks.check_labels(found)
    label.write_bytes(b"nothing")
    with pytest.raises(files.InputError, match="labels/1.png: not a label"):
        benchmarks.check_labels(found)


def test_a_picture_that_is_cut_off_is_found_before_any_work(tmp_path, capsys):
    """Behind its header, which agrees with the label."""
    spec = make_set(tmp_path / "mine", n=3, image_suffix=".jpg")
    for path in (tmp_path / "mine/images").iterdir():
        Image.open(path).save(path.with_suffix(".jpg"))
    whole = (tmp_path / "mine/images/1.jpg").read_bytes()
    (tmp_path / "mine/images/1.jpg").write_bytes(whole[: len(whole) // 2])
    for workers in (1, 2):
        with pytest.raises(files.InputError, match="images/1.jpg: not a picture that can be read"):
            benchmarks.check_labels(benchmarks.read_spec(spec), workers)
    code, rows, below = checked(capsys, [spec], tmp_path)
    assert code == 1 and rows["mine"][0] == "wrong" and "mine/images/1.jpg" in below[0]


@pytest.mark.parametrize("turn", [3, 6])
def test_a_label_has_the_size_of_the_upright_picture(tmp_path, turn):
    spec = make_set(tmp_path / "mine", n=1)
    path = tmp_path / "mine/images/0.png"
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = turn  # 6: stored on its side
        stored = image.rotate(90, expand=True) if turn == 6 else image
        stored.save(path, exif=exif)
    benchmarks.check_labels(benchmarks.read_spec(spec))
    with Image.open(path) as image:
        image.rotate(90, expand=True).save(path, exif=exif)
    message = r"0.png: the image is \(32, 40\) upright, its label .*0.png \(40, 32\); widths and "
    with pytest.raises(files.InputError, match=message):
        benchmarks.check_labels(benchmarks.read_spec(spec))


def test_a_label_never_starts_another_program(tmp_path):
    """EPS is what Ghostscript decodes."""
    spec = make_set(tmp_path / "mine", n=1)
    Image.new("L", (40, 32)).save(tmp_path / "mine/labels/0.png", "EPS")
    with pytest.raises(files.InputError, match="labels/0.png: not a label .*cannot identify"):
        benchmarks.check_labels(benchmarks.read_spec(spec))


@pytest.mark.parametrize("kind", ["grey", "palette", "4-bit palette", "16-bit grey", "32-bit grey"])
def test_palette_and_grey_labels_are_the_same(tmp_path, kind):
    values = np.array([[0, 1, 2], [8, 7, 3], [5, 5, 6 if "4-bit" in kind else 255]], dtype=np.uint8)
    wide = {"16-bit grey": np.uint16, "32-bit grey": np.int32}.get(kind, np.uint8)
    image = Image.fromarray(values.astype(wide))
    if "palette" in kind:
        image.putpalette(list(range(255, -1, -1)) * 3)
    path = tmp_path / ("x.tif" if "32" in kind else "x.png")
    image.save(path, **({"bits": 4} if "4-bit" in kind else {}))
    read = benchmarks.read_label(str(path), benchmarks.lookup_table(range(9), [255]))
    assert read.tolist() == values.tolist() and read.dtype == np.int64


def test_values_that_no_rule_allows_are_named_with_what_it_allows(tmp_path):
    lut = benchmarks.lookup_table(range(9), [255])
    for dtype, value in (
        (np.uint8, 9),
        (np.uint8, 254),
        (np.uint16, 256),
        (np.uint16, 65535),
        (np.int32, -1),
    ):
        stored = np.zeros((3, 4), dtype=dtype)
        stored[2, 1] = value
        path = tmp_path / ("x.tif" if dtype is np.int32 else "x.png")
        Image.fromarray(stored).save(path)
        message = f"{path.name}: label value {value} is outside .* \\(it allows 0-8, 255\\)"
        with pytest.raises(files.InputError, match=message):
            benchmarks.read_label(str(path), lut)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "F"])
def test_labels_saved_as_colours_are_named_as_what_they_are(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "F" else "x.png")
    Image.fromarray(np.zeros((3, 4), dtype=np.uint8)).convert(mode).save(path)
    message = (
        f"{path.name}: stored as {mode}, not as class indices; a label is a palette or grey PNG"
    )
    with pytest.raises(files.InputError, match=message):
        benchmarks.read_label(str(path), benchmarks.lookup_table(range(9), [255]))


def grey_png(rows, depth):
    """A grey PNG of 2 or 4 bits a pixel by the format's own rules; Pillow does not write them."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    lines = ["".join(format(value, f"0{depth}b") for value in row) for row in rows]
    packed = b"".join(b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big") for bits in lines)
    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), depth, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("depth", [2, 4])
def test_a_grey_label_of_few_bits_is_read_as_stored(tmp_path, depth):
    """3 of 2 bits would be 255, ignored, where Pillow spreads grey."""
    rows = [[0, 1, 2, 3], [3, 2, 1, 0]] if depth == 2 else [[0, 8, 15, 3], [5, 5, 7, 1]]
    (tmp_path / "x.png").write_bytes(grey_png(rows, depth))
    assert (
        benchmarks.read_label(
            str(tmp_path / "x.png"), benchmarks.lookup_table(range(16), [255])
        ).tolist()
        == rows
    )


def test_a_label_of_one_bit_is_zeros_and_ones(tmp_path):
    values = np.array([[0, 1, 1], [1, 0, 0]], dtype=np.uint8)
    Image.fromarray(values.astype(bool)).save(tmp_path / "x.png")
    assert (
        benchmarks.read_label(
            str(tmp_path / "x.png"), benchmarks.lookup_table(range(2), [255])
        ).tolist()
        == values.tolist()
    )


# ---- the eight benchmarks ----


def expected_class(name, path, value):
    """The protocol's rule for a stored value in other words: a class, 255 ignored, -1 wrong."""
    n, coco, city = len(RULES[name]["classes"]), RULES["coco_ids"], RULES["cityscapes_ids"]
    if name in ("voc20", "context59", "ade20k"):
        return 255 if value in (0, 255) else value - 1 if value <= n else -1
    if path.endswith("_labelIds.png"):
        return city.index(value) if value in city else 255
    if name == "coco_object" and not path.endswith("TrainIds.png"):
        return coco[:80].index(value) + 1 if value in coco[:80] else 0
    if name == "coco_stuff" and not path.endswith("TrainIds.png"):
        return coco.index(value) if value in coco else 255
    return 255 if value == 255 else value if value < n else -1


def make_benchmark(data_root, name, ids=("one", "two"), values=((0, 1), (2, 255)), converted=False):
    """A benchmark as it is downloaded, every label with these values; returns the label paths."""
    rule = RULES[name]
    patterns = rule["label"] if isinstance(rule["label"], list) else [rule["label"]]
    root, labels = data_root / rule["root"], []
    for image_id in ids:
        for pattern in (rule["image"], patterns[0 if converted else -1]):
            path = root / pattern.format(id=image_id, city="ulm")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.array(values, dtype=np.uint8)).save(path)
        labels.append(path)
    if rule["list"]:
        (root / rule["list"]).parent.mkdir(parents=True, exist_ok=True)
        (root / rule["list"]).write_text("".join(f"{i}\n" for i in ids))
    return labels


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_in_its_own_layout_reads_every_stored_value(tmp_path, name):
    """The original files first; the converted ones are preferred once they are there."""
    for converted in (False, True):
        labels = make_benchmark(tmp_path, name, converted=converted)
        read = benchmarks.read_set(name, str(tmp_path))
        ids = ["one", "two"] if name != "cityscapes" else ["ulm/one", "ulm/two"]
        assert [i for i, *_ in read.items] == ids and read.full == RULES[name]["images"]
        _, _, path, lut = read.items[0]
        assert path == str(labels[0])
        expected = [expected_class(name, path, value) for value in range(256)]
        allowed = [value for value in range(256) if expected[value] != -1]
        Image.fromarray(np.array([allowed], dtype=np.uint8)).save(path)
        assert benchmarks.read_label(path, lut).tolist() == [[expected[value] for value in allowed]]
        for value in sorted({*range(256)} - {*allowed})[::25]:
            Image.fromarray(np.full((2, 3), value, dtype=np.uint8)).save(path)
            with pytest.raises(
                files.InputError, match=f"{labels[0].name}: label value {value} is outside"
            ):
                benchmarks.read_label(path, lut)
        assert [k for k in range(256) if lut[k] == benchmarks.INVALID] == [
            k for k in range(256) if expected[k] == -1
        ]


@pytest.mark.parametrize("name", NAMES)
def test_names_and_colours_are_those_of_the_protocol(name):
    found, rule = benchmarks.BENCHMARKS[name], RULES[name]
    assert found.classes == rule["classes"] and found.palette == rule["palette"]
    assert found.background == rule["background"]
    assert list(found.partial) == RULES["partial_classes"].get(name, [])


PINNED = {  # stored value -> class, from the label lists that come with the datasets
    "voc": {0: "background", 1: "aeroplane", 15: "person", 20: "tvmonitor", 255: None},
    "voc20": {0: None, 1: "aeroplane", 15: "person", 20: "tvmonitor", 255: None},
    "context": {0: "background", 1: "aeroplane", 37: "person", 59: "wood", 255: None},
    "context59": {0: None, 1: "aeroplane", 37: "person", 59: "wood", 255: None},
    "coco_object": {
        0: "person",
        12: "stop sign",
        15: "bird",
        89: "toothbrush",
        11: "background",
        91: "background",
    }
    | {148: "background", 255: "background"},
    "coco_stuff": {
        0: "person",
        12: "stop sign",
        89: "toothbrush",
        91: "banner",
        123: "grass",
        148: "road",
    }
    | {156: "sky-other", 168: "tree", 181: "wood", 11: None, 90: None, 182: None, 255: None},
    "cityscapes": {
        7: "road",
        8: "sidewalk",
        11: "building",
        17: "pole",
        20: "traffic sign",
        24: "person",
        26: "car",
    }
    | {28: "bus", 31: "train", 33: "bicycle", 0: None, 9: None, 18: None, 29: None, 255: None},
    "ade20k": {
        0: None,
        1: "wall",
        3: "sky",
        5: "tree",
        8: "bed ",
        13: "person",
        150: "flag",
        255: None,
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_known_values_have_known_names(name):
    found = benchmarks.BENCHMARKS[name]
    lut = list(found.labels.values())[-1]
    for value, expected in PINNED[name].items():
        assert (
            None if lut[value] == benchmarks.IGNORE else found.classes[lut[value]]
        ) == expected, value


def test_files_that_archives_bring_along_are_no_images(tmp_path):
    for path in make_benchmark(tmp_path, "ade20k"):
        image = tmp_path / "ade/ADEChallengeData2016/images/validation" / f"._{path.stem}.jpg"
        image.write_bytes(b"of another system")
    assert len(benchmarks.read_set("ade20k", str(tmp_path))) == 2


def test_all_that_is_missing_of_a_benchmark_is_one_line(tmp_path):
    def message(name):
        with pytest.raises(files.InputError) as error:
            benchmarks.read_set(name, str(tmp_path))
        return str(error.value)

    for name in NAMES:
        root = tmp_path / RULES[name]["root"] / (RULES[name]["list"] or "")
        assert message(name).startswith(f"{name}: {root} missing")
    root = tmp_path / "VOCdevkit/VOC2010"
    (root / "JPEGImages").mkdir(parents=True)
    line = message("context")
    listed = root / "ImageSets/SegmentationContext/val.txt"
    assert f"{listed} missing" in line and "python benchmarks.py prepare-context" in line
    for label in make_benchmark(tmp_path, "voc", ids=("a", "b", "c"))[1:]:
        label.unlink()
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages/b.jpg").unlink()
    voc = tmp_path / "VOCdevkit/VOC2012"
    first, second = voc / "JPEGImages/b.jpg", voc / "SegmentationClass/b.png"
    assert message("voc").startswith(f"voc: {first}, {second}, ") and "more" not in message("voc")
    (voc / "ImageSets/Segmentation/val.txt").write_text("d\ne\nf\n")
    assert message("voc").endswith("f.jpg and 1 more images or labels missing")
    make_benchmark(tmp_path, "coco_object")[1].unlink()
    assert (
        message("coco_stuff")
        == f"coco_stuff: {tmp_path / 'coco_stuff164k/annotations/val2017/two.png'} missing"
    )
    (tmp_path / "cityscapes/leftImg8bit/val").mkdir(parents=True)
    (tmp_path / "cityscapes/gtFine/val").mkdir(parents=True)
    assert message("cityscapes").endswith("{id}_leftImg8bit.png missing")


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("cityscape", "cityscapes"),
        ("VOC", "voc"),
        ("COCO-Stuff", "coco_stuff"),
        ("pascal_voc", "voc"),
        ("ade", "ade20k"),
    ],
)
def test_unknown_names_get_the_close_ones(name, close):
    with pytest.raises(
        files.InputError,
        match=f"--datasets {name}: unknown; did you mean {close}.*, or a SPEC.json",
    ):
        benchmarks.read_set(name, "data")


# ---- python benchmarks.py check ----


def checked(capsys, names, data_root, workers=1):
    """(exit code, {set: its row}, the lines below the rows) of check_sets."""
    code = benchmarks.check_sets(names, str(data_root), workers)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line[0] != " "}
    return code, rows, [line[4:] for line in lines if line[0] == " "]


def test_check_is_content_with_whole_sets_alone(tmp_path, capsys, monkeypatch):
    for name in ("voc", "voc20", "coco_object"):
        monkeypatch.setitem(
            benchmarks.BENCHMARKS, name, dataclasses.replace(benchmarks.BENCHMARKS[name], full=2)
        )
    make_benchmark(tmp_path, "voc")
    make_benchmark(tmp_path, "coco_object", values=((0, 89), (181, 255)))
    code, rows, below = checked(capsys, ["voc", "voc20", "coco_object"], tmp_path, workers=2)
    assert code == 0 and below == []
    assert rows == dict.fromkeys(("voc", "voc20", "coco_object"), ["ok", "2", "of", "2", "images"])
    code, rows, below = checked(capsys, ["voc", "context"], tmp_path)
    assert code == 1 and rows["voc"][0] == "ok" and rows["context"][-1] == "missing"
    assert re.match(rf"context: {tmp_path}/VOCdevkit/VOC2010/.*/val.txt missing", below[0])
    code, rows, below = checked(capsys, ["coco_stuff"], tmp_path)
    assert code == 1 and rows["coco_stuff"] == ["wrong", "(1)", "2", "of", "5000", "images"]
    assert below == ["the benchmark has 5000 images: results will be marked partial"]


def test_check_names_every_kind_of_wrong_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        benchmarks.BENCHMARKS, "voc", dataclasses.replace(benchmarks.BENCHMARKS["voc"], full=9)
    )
    labels = make_benchmark(tmp_path, "voc", ids="abcdefghi")
    Image.fromarray(np.full((2, 2), 21, dtype=np.uint8)).save(labels[0])
    Image.fromarray(np.zeros((2, 3), dtype=np.uint8)).save(labels[1])
    Image.fromarray(np.zeros((2, 2, 3), dtype=np.uint8)).save(labels[2])
    labels[3].write_bytes(b"nothing")
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages/e.jpg").write_bytes(b"nothing")
    code, rows, below = checked(capsys, ["voc"], tmp_path)
    assert code == 1 and rows["voc"] == ["wrong", "(5)", "9", "of", "9", "images"]
    kinds = (
        "a.png: label value 21",
        r"b.jpg: the image is \(2, 2\)",
        "c.png: stored as RGB",
        "d.png: not a label",
        "e.jpg: not a picture",
    )
    for line, words in zip(below, kinds, strict=True):
        assert re.search(words, line)
    labels[5].write_bytes(b"nothing")
    labels[6].write_bytes(b"nothing")
    code, rows, more = checked(capsys, ["voc"], tmp_path)
    assert rows["voc"][:2] == ["wrong", "(7)"] and more == below


def test_labels_of_instances_do_not_fill_the_memory_of_check(tmp_path):
    spec = make_set(tmp_path / "mine", n=1, label_suffix=".tif")
    ids = np.arange(40 * 32, dtype=np.int32).reshape(32, 40)
    Image.fromarray(ids).save(tmp_path / "mine/labels/0.tif")
    values, wrong = benchmarks.check_item(benchmarks.read_spec(spec).items[0])
    assert values == [] and "0.tif: label value 3 is outside" in wrong


def test_check_on_the_command_line(tmp_path):
    spec = make_set(tmp_path / "mine", n=2)
    result = run("benchmarks.py", "check", "--datasets", spec, "--workers", 1)
    assert result.returncode == 0 and re.search(r"mine +ok +2 of 2 images\n", result.stdout), (
        result.stderr
    )
    result = run("benchmarks.py", "check", "--data-root", tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    for name in NAMES:
        root = tmp_path / RULES[name]["root"] / (RULES[name]["list"] or "")
        row = rf"^{name} +wrong \(1\) +missing\n    {name}: {root} missing"
        assert re.search(row, result.stdout, re.M)


# ---- python benchmarks.py prepare-context ----

# What scipy.io.savemat wrote of GENUINE as LabelMap, with and without do_compression; here in zlib
# and base85.
GENUINE = [[13 * (7 * y + x) for x in range(7)] for y in range(5)]
GENUINE[0][0], GENUINE[4][6] = 459, 0
SCIPY = {
    "compressed": (
        "c-r%I4DoSvQZUssQ1EpO(M`+DNmU5QNi0drFUqx2D9A6)tk6+#E=o--Nlj76&$ChpDNR-I%P&(fGEp!xure~UGB5"
        "`+jLaCw0F0i#{6MM{h%4qiPEJV3U`R4kc*c;F$HtM+`pMD6TEN)pr(LJ#O3QtntU3<cqy^@u^`zZ6rf_1$;S;AP9"
        "4wgO*tc;~VAsMa51E?HlBE}0ISU_-W#c|}vPX^QFVA|37)f!UBhMuMI45vq$Fz(6iK@)p$u=i4*ckRd7S03!_+Lk"
        "b"
    ),
    "plain": (
        "c-r%I4DoSvQZUssQ1EpO(M`+DNmU5QNi0drFUqx2D9A6)tk6+#E=o--Nlj76&$ChpDNR-I%P&(fGEp!xure~UGB5"
        "`+jLaCw0F0i#d_bxJh}nRc1BkhyQmjxuh-L>Vh4Ot8lTveh6AM^?Y&Rf2%^1zFjX{txhmn^dgW)iP9AhP;6hkS)1"
        "qN-#Hb!-ZCWgBV7L1b_O&IzaUNN{bE?{(In8Wa$A&7A;qaVXc1{TJ6kkJeP8aXL8"
    ),
}


def element(kind, body):
    return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8)


def mat_file(values, name="LabelMap", compress=True, kind=4, flags=11):
    """A MATLAB 5 MAT-file of one matrix by the format's description; kind: of the values."""
    stored = np.array(values).astype({2: "<u1", 4: "<u2", 9: "<f8"}[kind])
    body = element(6, struct.pack("<II", flags, 0)) + element(5, struct.pack("<2i", *stored.shape))
    short = struct.pack("<I", len(name) << 16 | 1) + name.encode().ljust(4, b"\0")
    body += short if len(name) <= 4 else element(1, name.encode())
    body = element(14, body + element(kind, stored.tobytes(order="F")))
    return mat_header(packed(body) if compress else body)


def packed(body):
    """Elements of a MAT-file as one compressed element."""
    return struct.pack("<II", 15, len(small := zlib.compress(body))) + small


def mat_header(body, version=b"\0\1IM"):
    return b"MATLAB 5.0 MAT-file".ljust(124) + version + body


def classes_of(stored):
    """PASCAL Context's rule in words: a list of ids has the place of an id, 0 where it has none."""
    ids = RULES["context_ids"]
    return [[ids.index(k) if k in ids else 0 for k in row] for row in np.array(stored).tolist()]


@pytest.mark.parametrize("kind", list(SCIPY))
def test_mat_files_of_scipy_are_read(tmp_path, kind):
    (tmp_path / "x.mat").write_bytes(zlib.decompress(base64.b85decode(SCIPY[kind])))
    assert benchmarks.read_mat(tmp_path / "x.mat").tolist() == classes_of(GENUINE)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    ("shape", "kind"),
    [((375, 500), 4), ((500, 333), 2), ((2, 3), 4), ((1, 9), 2), ((7, 5), 2)],
)
def test_mat_files_of_any_size_are_read(tmp_path, shape, kind, compress):
    values = np.random.default_rng(0).integers(0, 256 if kind == 2 else 460, shape)
    (tmp_path / "x.mat").write_bytes(mat_file(values, compress=compress, kind=kind))
    assert benchmarks.read_mat(tmp_path / "x.mat").tolist() == classes_of(values)


def test_mat_files_that_cannot_be_read_are_named(tmp_path):
    whole, path = mat_file(GENUINE, compress=False), tmp_path / "x.mat"
    hdf5, big_endian = (mat_header(whole[128:], v) for v in (b"\0\2IM", b"\1\0MI"))
    for content in (
        whole[:200],
        whole[:-5],
        mat_file(GENUINE)[:-5],
        mat_file(GENUINE, name="OtherMap"),
        mat_file(GENUINE, name="odd"),
        mat_file([[]]),
        mat_file([[460] * 9]),
        mat_file([[65_535] * 9]),
        mat_file([[7.5] * 9], kind=9),
        mat_header(whole[128:-80] + struct.pack("<2I", 4, 1 << 31)),
        b"",
        b"short",
        hdf5,
        big_endian,
        b"\x89HDF" * 99,
    ):
        path.write_bytes(content)
        with pytest.raises(
            files.InputError, match="x.mat: no whole MATLAB 5 MAT-file with .* of ids 0 to 459"
        ):
            benchmarks.read_mat(path)
    with pytest.raises(files.InputError, match="no.mat: no whole .*No such file.*trainval.tar.gz"):
        benchmarks.read_mat(tmp_path / "no.mat")


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (1, "cell"),
        (2, "struct"),
        (3, "object"),
        (4, "char"),
        (5, "sparse"),
        (6, "double"),
        (0x080B, "complex"),
    ],
)
def test_matrices_of_other_kinds_are_refused_by_name(tmp_path, flags, kind, compress):
    (tmp_path / "x.mat").write_bytes(mat_file(GENUINE, compress=compress, flags=flags))
    with pytest.raises(
        files.InputError, match=f"x.mat: .* a uint16 matrix LabelMap .*it is {kind}"
    ):
        benchmarks.read_mat(tmp_path / "x.mat")


def test_mat_files_that_unpack_without_end_are_refused_at_once(tmp_path):
    path, big = tmp_path / "x.mat", element(14, bytes(65 << 20))
    for body in (packed(big), packed(packed(packed(big)))):
        path.write_bytes(mat_header(body))
        tracemalloc.start()
        with pytest.raises(files.InputError, match="x.mat: no whole MATLAB 5 MAT-file"):
            benchmarks.read_mat(path)
        assert path.stat().st_size < 2**20 and tracemalloc.get_traced_memory()[1] < 300e6
        tracemalloc.stop()


KNOWN_IDS = {  # from labels.txt of the 459 classes
    2: "aeroplane", 9: "bag", 18: "bed", 19: "bedclothes", 22: "bench", 23: "bicycle", 25: "bird",
    31: "boat", 33: "book", 34: "bottle", 44: "building", 45: "bus", 59: "car", 65: "cat", 72:
    "chair", 98: "cow", 113: "dog", 207: "horse", 258: "motorbike", 284: "person", 308:
    "pottedplant", 347: "sheep", 360: "sky", 368: "sofa", 397: "table", 416: "train", 420: "tree",
    427: "tvmonitor", 440: "wall", 458: "wood",
}  # fmt: skip


def test_the_ids_of_the_459_classes_have_their_names():
    names = benchmarks.BENCHMARKS["context"].classes
    assert (
        benchmarks.CONTEXT_IDS == RULES["context_ids"]
        and len(names) == len(benchmarks.CONTEXT_IDS) == 60
    )
    assert {i: names[benchmarks.CONTEXT_IDS.index(i)] for i in KNOWN_IDS} == KNOWN_IDS


def make_mats(data_root, ids=("a", "b", "c")):
    """VOC2010 whose val.txt has the ids, and their .mat files: {id: map of 459 classes}."""
    root, rng = data_root / "VOCdevkit/VOC2010", np.random.default_rng(1)
    for folder in ("trainval", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Main/val.txt").write_text("".join(f"{i}\n" for i in ids))
    maps = {i: rng.permutation(460).reshape(20, 23) for i in (*ids, "train")}
    for i, values in maps.items():
        (root / f"trainval/{i}.mat").write_bytes(mat_file(values))
        Image.new("RGB", (23, 20)).save(root / f"JPEGImages/{i}.jpg")
    return root, maps


def test_prepare_context_makes_what_the_benchmark_reads(tmp_path):
    root, maps = make_mats(tmp_path)
    result = run("benchmarks.py", "prepare-context", "--data-root", tmp_path, "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert "val.txt: 3 images; 3 PNGs written, 0 were there" in result.stdout
    assert "warning: the benchmark has 5104 images, so results are marked partial" in result.stderr
    found = benchmarks.read_set("context", str(tmp_path))
    assert [i for i, *_ in found.items] == ["a", "b", "c"] and not list(root.rglob("*.tmp"))
    for i, _, path, lut in found.items:
        label = benchmarks.read_label(path, lut)
        assert label.tolist() == classes_of(maps[i])
    benchmarks.check_labels(found)
    with Image.open(found.items[0][2]) as image:
        assert image.mode == "P" and image.getpalette()[3:6] == RULES["context"]["palette"][1]


def test_prepare_context_goes_on_where_it_was(tmp_path, capsys):
    root, maps = make_mats(tmp_path)
    (root / "trainval/b.mat").write_bytes(mat_file(maps["b"])[:-9])
    with pytest.raises(files.InputError, match="b.mat: no whole .*cut off"):
        benchmarks.prepare_context(str(tmp_path))
    labels, listed = (
        root / "SegmentationClassContext",
        root / "ImageSets/SegmentationContext/val.txt",
    )
    assert [p.name for p in labels.iterdir()] == ["a.png"] and not listed.exists()
    made = (labels / "a.png").stat()
    (root / "trainval/b.mat").write_bytes(mat_file(maps["b"]))
    benchmarks.prepare_context(str(tmp_path))
    assert "2 PNGs written, 1 were there" in capsys.readouterr().out
    assert (
        labels / "a.png"
    ).stat().st_mtime_ns == made.st_mtime_ns and listed.read_text() == "a\nb\nc\n"


def test_an_interrupted_file_is_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "x.png", interrupted)
    assert not (tmp_path / "x.png").exists()


def interrupted(path):
    path.write_text("half")
    raise KeyboardInterrupt


def test_prepare_context_takes_the_best_list_there_is(tmp_path):
    root, _ = make_mats(tmp_path, ids=("a", "c"))
    listed = root / "ImageSets/SegmentationContext/val.txt"
    benchmarks.prepare_context(str(tmp_path))
    assert listed.read_text() == "a\nc\n"  # VOC2010's
    images = [
        {"file_name": f"{i}.jpg", "phase": phase} for i, phase in (("c", "val"), ("train", "train"))
    ]
    (root / "trainval_merged.json").write_text(json.dumps({"images": images}))
    benchmarks.prepare_context(str(tmp_path))
    assert listed.read_text() == "a\nc\n"
    listed.write_bytes(b"c\r\n\r\na")
    benchmarks.prepare_context(str(tmp_path))
    assert listed.read_bytes() == b"c\r\n\r\na"  # a val.txt that is there is never written again
    listed.unlink()
    benchmarks.prepare_context(str(tmp_path))
    assert listed.read_text() == "c\n"
    listed.unlink()
    for content in ("{}", "[", '{"images": [{"phase": "val"}]}'):
        (root / "trainval_merged.json").write_text(content)
        with pytest.raises(files.InputError, match="trainval_merged.json: has no images"):
            benchmarks.prepare_context(str(tmp_path))
    listed.write_text("b\n")
    with pytest.raises(files.InputError, match="b.mat: no whole .*No such file"):
        benchmarks.prepare_context(str(tmp_path))


def test_prepare_context_says_nothing_of_partial_when_the_benchmark_is_whole(
    tmp_path, capsys, monkeypatch
):
    make_mats(tmp_path)
    monkeypatch.setitem(
        benchmarks.BENCHMARKS,
        "context",
        dataclasses.replace(benchmarks.BENCHMARKS["context"], full=3),
    )
    benchmarks.prepare_context(str(tmp_path))
    assert "warning" not in capsys.readouterr().err


def test_ids_that_are_none_of_the_459_are_refused(tmp_path):
    root, maps = make_mats(tmp_path)
    stored = np.where(maps["a"] == 7, 460, maps["a"])
    (root / "trainval/a.mat").write_bytes(mat_file(stored))
    with pytest.raises(files.InputError, match=r"a.mat: .* of ids 0 to 459 \(index 460 is out"):
        benchmarks.prepare_context(str(tmp_path))
    assert not list(root.rglob("*.png")) and not list(root.rglob("SegmentationContext/*"))


def test_prepare_context_refuses_in_one_line(tmp_path):
    result = run("benchmarks.py", "prepare-context", "--data-root", tmp_path)
    check_refused(result, 1, "ImageSets/Main/val.txt: not a text file", "No such file")
    (tmp_path / "mats").mkdir()
    make_mats(tmp_path)
    with pytest.raises(files.InputError, match="mats/a.mat: no whole .*No such file"):
        benchmarks.prepare_context(str(tmp_path), str(tmp_path / "mats"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "required: command"),
        ("check a.tar --datasets voc", "unrecognized arguments"),
        ("prepare-contest", "invalid choice"),
    ],
)
def test_wrong_data_commands_are_refused(capsys, line, message):
    with pytest.raises(SystemExit) as stop:
        benchmarks.parse_args(line.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_every_command_of_the_pages_and_the_docstring_is_accepted():
    pages = [conftest.ROOT / "README.md", *(conftest.ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text() for page in pages) + benchmarks.__doc__
    lines = re.findall(r"python benchmarks\.py +([^#`\n]+)", text)
    assert {line.split()[0] for line in lines} == {"check", "prepare-context"}
    for line in lines:
        benchmarks.parse_args([word.strip("'") for word in line.split()])


def test_a_list_names_each_image_once_and_may_begin_with_a_mark(tmp_path):
    spec = make_set(tmp_path / "set", n=2, list="ids.txt")
    (tmp_path / "set" / "ids.txt").write_bytes(b"\xef\xbb\xbf1\n0\n")
    assert [item[0] for item in benchmarks.read_spec(spec).items] == ["1", "0"]
    (tmp_path / "set" / "ids.txt").write_text("0\n1\n\n 0\n")
    assert [item[0] for item in benchmarks.read_spec(spec).items] == ["0", "1"]
    (tmp_path / "set" / "ids.txt").write_text("\n \n")
    with pytest.raises(files.InputError, match="ids.txt: holds no image ids"):
        benchmarks.read_spec(spec)


def test_control_characters_in_the_names_of_files_never_reach_the_terminal(tmp_path, capsys):
    spec = make_set(tmp_path / "mine")
    images = tmp_path / "mine" / "images"
    (images / "\x1b[31m.jpg").write_bytes(b"")  # is left out, which is said
    (images / "0.png").rename(images / "\x1b[32m.png")  # has no label
    benchmarks.check_sets([spec], tmp_path)
    (images / "\x1b[32m.png").unlink()
    (tmp_path / "mine/labels/0.png").unlink()
    benchmarks.check_sets([spec], tmp_path)
    said = capsys.readouterr()
    assert "\\x1b[32m" in said.out and "\\x1b[31m" in said.err
    assert "\x1b" not in said.out + said.err
