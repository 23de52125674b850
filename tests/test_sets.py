# SPDX-License-Identifier: MIT
"""Labelled sets: SPEC.json, label files, the eight benchmarks."""

import json

import conftest
import numpy as np
import pytest
from PIL import Image
from tiny import make_set

import data

RULES = json.loads((conftest.GOLDEN / "datasets.json").read_text())


# ---- labelled sets ----


def test_a_spec_lists_its_images_and_maps_its_labels(tmp_path):
    found = data.read_spec(make_set(tmp_path / "mine", n=3, background=True))
    assert found.name == "mine" and len(found) == 3 and found.prompts() == ["cat", "dog", "tree"]
    _, image, label, lut = found.items[1]
    assert data.read_image(image).shape == (48, 32, 3) and data.read_label(label, lut).shape == (48, 32)
    assert lut[[0, 1, 2, 3, 255]].tolist() == [0, 1, 2, 3, 255] and (lut[4:255] == data.INVALID).all()
    assert len(found.palette) == 4 and found.palette[0] == [0, 0, 0]


def test_zero_can_be_ignored_and_a_list_can_choose(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "val.txt").write_text("2\n0\n")
    path = make_set(tmp_path / "mine", n=3, zero_is_ignored=True, ignore=[9, 255], list="val.txt")
    found = data.read_spec(path)
    lut = found.items[0][3]
    assert [i for i, *_ in found.items] == ["2", "0"]
    assert lut[[0, 1, 2, 3, 4, 9, 255]].tolist() == [255, 0, 1, 2, -1, 255, 255]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clases": []}, "unknown field 'clases'"),
        ({"classes": []}, "classes must be"),
        ({"background": True, "classes": ["cat", "dog"]}, 'the first class is "background"'),
        ({"name": "a/b"}, "becomes a file name"),
        ({"images": "nowhere"}, "no \\*.png in"),
        ({"labels": "nowhere"}, "0.png is missing"),
        ({"list": "nowhere.txt"}, "nowhere.txt: the list"),
        ({"palette": [[0, 0, 0]]}, "palette needs"),
        ({"palette": [[0, 0, 300]] * 3}, "palette needs"),
        ({"image_suffix": None}, "image_suffix cannot be None"),
        ({"zero_is_ignored": "no"}, "zero_is_ignored cannot be 'no'"),
        ({"ignore": 255}, "ignore cannot be 255"),
        ({"ignore": [-1]}, "ignore must be"),
        ({"classes": ["cat", "cat"]}, "class names must differ"),
        ({"classes": ["cat", "background"]}, "class names must differ"),
        ({"name": "voc"}, "voc is the name of a benchmark"),
    ],
)
def test_a_wrong_spec_is_explained(tmp_path, change, message):
    path = make_set(tmp_path / "mine", **change)
    with pytest.raises(data.DataError, match=message):
        data.read_spec(path)


def test_labels_that_do_not_fit_are_named(tmp_path):
    found = data.read_spec(make_set(tmp_path / "mine", n=2))
    data.check_labels(found)
    label = tmp_path / "mine/labels/1.png"
    stored = np.array(Image.open(label))
    stored[5, 5] = 7
    Image.fromarray(stored).save(label)
    with pytest.raises(data.DataError, match="labels/1.png: label value 7"):
        data.check_labels(found)
    Image.fromarray(stored).convert("RGB").save(label)
    with pytest.raises(data.DataError, match="labels/1.png: stored as RGB"):
        data.check_labels(found)
    Image.fromarray(stored[:-1]).save(label)
    with pytest.raises(data.DataError, match="label value 7"):
        data.check_labels(found)
    Image.fromarray(np.zeros((47, 32), dtype=np.uint8)).save(label)
    with pytest.raises(data.DataError, match="images/1.png: the image is 32x48.*32x47"):
        data.check_labels(found)
    label.write_bytes(b"nothing")
    with pytest.raises(data.DataError, match="labels/1.png: not a label"):
        data.check_labels(found)


def test_palette_and_grey_labels_are_the_same(tmp_path):
    values = np.arange(9, dtype=np.uint8).reshape(3, 3)
    grey, palette = Image.fromarray(values), Image.fromarray(values)
    palette.putpalette(list(range(255, -1, -1)) * 3)
    grey.save(tmp_path / "g.png")
    palette.save(tmp_path / "p.png")
    lut = data.lookup_table(range(9), [255])
    for name in ("g.png", "p.png"):
        assert data.read_label(str(tmp_path / name), lut).tolist() == values.tolist()


# ---- the eight benchmarks ----


def expected_class(name, path, value):
    """The protocol's rule for one stored value, in words of its own: a class index, 255 ignored, -1 not allowed."""
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


@pytest.mark.parametrize("name", list(RULES)[1:9])
def test_a_benchmark_in_its_own_layout_reads_every_stored_value(tmp_path, name):
    rule, found = RULES[name], data.BENCHMARKS[name]
    patterns = rule["label"] if isinstance(rule["label"], list) else [rule["label"]]
    root = tmp_path / rule["root"]
    for pattern in reversed(patterns):  # the original first; the converted file is preferred once it is there
        for image_id in ("one", "two"):
            for path in (rule["image"], pattern):
                target = root / path.format(id=image_id, city="ulm")
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(target)
        if rule["list"]:
            (root / rule["list"]).parent.mkdir(parents=True, exist_ok=True)
            (root / rule["list"]).write_text("one\ntwo\n")
        read = data.read_set(name, str(tmp_path))
        assert [str(i).split("/")[-1] for i, *_ in read.items] == ["one", "two"] and read.full == rule["images"]
        _, _, label, lut = read.items[0]
        assert label == str(root / pattern.format(id="one", city="ulm"))
        assert lut.tolist() == [expected_class(name, pattern, value) for value in range(256)]
    assert found.classes == rule["classes"] and found.palette == rule["palette"] and found.title == rule["title"]
    assert found.background == rule["background"]
    assert list(found.partial) == RULES["partial_classes"].get(name, [])


def test_missing_benchmarks_and_unknown_names_are_explained(tmp_path):
    for name in data.BENCHMARKS:
        with pytest.raises(data.DataError):
            data.read_set(name, str(tmp_path))
    with pytest.raises(data.DataError, match="did you mean cityscapes"):
        data.read_set("cityscape", str(tmp_path))
