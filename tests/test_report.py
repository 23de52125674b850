# SPDX-License-Identifier: MIT
"""What is drawn: the paper's tables beside the run, sheets with names, radar, page, curves."""

import base64
import cmath
import collections
import csv
import html.parser
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageColor, ImageDraw
from tiny import check_refused, make_set, run

import benchmarks
import files
import report

MIOU = {
    "voc": 51.0,
    "context": 27.0,
    "coco_object": 29.5,
    "voc20": 80.0,
    "context59": 31.0,
    "coco_stuff": 25.0,
}
MIOU |= {"cityscapes": 20.0, "ade20k": 15.0}  # only on COCO-Stuff above the paper's best
TABLE_3 = """ViL-Seg 34.4 16.3 16.4 22.4
ReCo 57.9 32.0 18.4 36.1
GroupViT (RedCaps) 79.0 49.2 16.1 48.1
MaskCLIP 73.0 56.5 21.9 50.5
GCL 84.5 62.0 27.6 58.0"""


def results_of(names=tuple(MIOU), partial=(), protocol=True, **more):
    """Results with some of the eight sets, and the entries of `more`."""
    sets = {}
    for name in names:
        full = benchmarks.BENCHMARKS[name].full
        sets[name] = {
            "miou": MIOU.get(name, 30.0),
            "images": 9 if name in partial else full,
            "full": full,
        }
        sets[name] |= {"iou": {"cat": MIOU[name], "dog": None}, "partial_miou": None}
        if benchmarks.BENCHMARKS[name].partial:
            sets[name]["partial_miou"] = MIOU[name] + 0.26
    settings = {
        "method": "gcl",
        "checkpoint": 'runs/<größe> & "x"/last.pt',
        "unified_protocol": protocol,
    }
    return {"average": None, "settings": settings, "datasets": sets | more}


OWN = {
    "miou": 12.0,
    "images": 5,
    "full": 5,
    "iou": {"<b>Müll</b> & Co": 12.0, "a|b": None},
    "partial_miou": None,
}


def set_of(classes=("background", "sky", "tree"), n=1, full=None, name="mine"):
    return benchmarks.SegmentationSet(
        name, list(classes), True, [None] * n, benchmarks.voc_palette(len(classes)), full
    )


@pytest.fixture
def texts(monkeypatch):
    """[(text, (x, y)), ...] of all that is written into pictures while the test runs."""
    seen, real = [], ImageDraw.ImageDraw.text

    def text(self, xy, text, *args, **options):
        if text:
            seen.append((text, tuple(xy)))
        return real(self, xy, text, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return seen


class Page(html.parser.HTMLParser):
    """Checks while it reads that tags are balanced; keeps tags, attributes, texts of cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.cells, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.text += text
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += text


# ---- tables ----


def test_the_papers_averages_are_its_rows_means():
    for table in (report.TABLE_1, report.TABLE_3):
        for name, (*figures, average) in table.items():
            assert np.mean(figures) == pytest.approx(average, abs=0.06), name
    assert {len(row) for row in report.TABLE_1.values()} == {9}
    lines = [" ".join([name, *map(str, figures)]) for name, figures in report.TABLE_3.items()]
    assert lines == TABLE_3.splitlines()


def md_row(text, name, nth=0):
    """The cells of the n-th markdown row of this name."""
    rows = [line.split("|")[2:-1] for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in rows[nth]]


def test_the_run_stands_under_both_tables_with_its_means():
    text = report.markdown(results_of(mine=OWN))
    assert md_row(text, "MaskCLIP†") == "29.3 21.1 15.5 53.7 23.3 14.7 21.6 10.8 23.7".split()
    assert (
        md_row(text, "**this run**") == "51.0 27.0 29.5 80.0 31.0 25.0 20.0 15.0 34.8".split()
    )  # 278.5 / 8
    assert (
        md_row(text, "**this run**", 1) == "80.3 31.3 25.3 45.6".split()
    )  # 136.78 / 3, the own set not in it
    assert md_row(text, "ViL-Seg") == "34.4 16.3 16.4 22.4".split() and "partial)" not in text
    assert text.count("the paper's figures") == 2


def test_an_average_needs_every_set_and_a_number_for_each():
    for results in (results_of([n for n in MIOU if n != "coco_stuff"]), results_of()):
        results["datasets"].get("coco_stuff", {}).update(miou=None, partial_miou=None)
        text = report.markdown(results)
        assert md_row(text, "**this run**")[5::3] == ["", ""] and md_row(text, "**this run**", 1)[
            2:
        ] == ["", ""]
    assert "Table 3 (" not in report.markdown(results_of(["voc"])) and "Table 1" in report.markdown(
        results_of(["voc"])
    )
    assert "the paper's figures" not in report.markdown(results_of([], mine=OWN))


def test_training_pairs_stand_in_their_own_colours_under_both_masks(tmp_path, texts):
    norm = (0.5, 0.25, 0.0), (0.5, 0.25, 0.125)  # mean and std
    images = torch.stack([torch.full((3, 8, 8), 1.0), torch.full((3, 8, 8), 5.0)])
    masks = torch.tensor([[1.0, 0.5], [0.25, 0.0]])[:, :, None, None].expand(-1, -1, 8, 8)
    decoded = "<start_of_text>a <b> kite <end_of_text>!!", "<start_of_text>dogs <end_of_text>"
    report.write_samples(tmp_path / "samples.png", images, masks, decoded, norm)
    assert [text for text, _ in texts] == "image,+ a <b> kite,- dogs".split(",") + [
        *("image", "+ dogs", "- a <b> kite")
    ]
    with Image.open(tmp_path / "samples.png") as sheet:
        seen = [[sheet.getpixel((100 + 232 * k, y)) for k in range(3)] for y in (100, 350)]
    assert seen[0] == [(255, 127, 31), (255, 127, 31), (127, 63, 15)]
    assert seen[1] == [(255, 255, 159), (0, 0, 0), (63, 63, 39)]  # no colour is brighter than white


def test_a_partial_set_is_marked_wherever_its_number_stands(texts):
    results = results_of(partial=["voc20"])
    results["datasets"]["voc20"]["sweep"] = {"0.40": 80.0, "0.50": 79.0}
    text = report.markdown(results)
    first = "51.0,27.0,29.5,80.0 (partial),31.0,25.0,20.0,15.0,34.8 (partial)"
    assert md_row(text, "**this run**") == first.split(",")
    assert md_row(text, "**this run**", 1) == ["80.3 (partial)", "31.3", "25.3", "45.6 (partial)"]
    assert md_row(text, "voc20") == ["80.0 (partial)", "9 of 1449"]
    for threshold, value in ("0.40", "80.0 (partial)"), ("0.50", "79.0 (partial)"):
        assert md_row(text, f"mIoU at threshold {threshold} (a diagnostic)") == [value]
    assert "**Partial**: only some of the images of voc20." in text
    assert "## voc20 (partial: 9 of 1449 images)" in text
    page = Page(report.page("nowhere", results))
    for shown in (text, page.text):
        assert (
            len(re.findall(r"80\.[03](?! \(partial\))", shown)) == 0
            and shown.count("80.0 (partial)") >= 4
        )
        assert "34.8 (partial)" in shown and "34.8" not in shown.replace("34.8 (partial)", "")
    report.radar(results)
    seen = [text for text, _ in texts if "partial" in text]
    # An older Pillow draws line by line.
    assert set(seen) - {"80.0 (partial)"} == {"VOC20\n80.0 (partial)\nbest 83.2"}


def test_a_figure_is_marked_where_its_set_is_partial():
    part, whole, own = OWN | {"full": 9}, OWN, OWN | {"full": None}
    assert [report.is_partial(r) for r in (part, whole, own)] == [True, False, False]
    marked = [report.number(*pair) for pair in ((3, part), (3, whole), (None, part))]
    assert marked == ["3.0 (partial)", "3.0", ""] and report.number(3, whole, part) == marked[0]


def test_a_table_without_any_entry_is_not_there():
    results = results_of([], mine=OWN)
    for text in (report.markdown(results), report.page("nowhere", results)):
        assert "Table" not in text and "All sets of this run" in text


@pytest.mark.parametrize(
    "protocol, mark",
    [(True, None), (False, "Outside the unified protocol"), (None, "Protocol not known")],
)
def test_a_run_outside_the_protocol_says_so(protocol, mark, texts):
    results = results_of(protocol=protocol)
    report.radar(results)
    outside = "this run (outside the protocol)"
    for text in (
        report.markdown(results).replace("**", ""),
        report.page("nowhere", results),
        " ".join(text for text, _ in texts),
    ):
        assert (outside in text) == (protocol is False)
    for text in (report.markdown(results), report.page("nowhere", results)):
        assert [m for m in ("Outside the unified protocol", "Protocol not known") if m in text] == [
            mark
        ] * bool(mark)


def test_names_of_classes_and_settings_do_not_break_the_markdown():
    """Whatever stands in a cell: a table stays one, and nothing is a tag or a link."""
    results = results_of([], mine=OWN | {"sweep": {"<i>0.4|": 3.0}})
    results["settings"] |= {"templates": "a|b\n</table>", "`method`": ["[x](y)"]}
    text = report.markdown(results)
    lines = text.splitlines()
    assert "| &lt;b&gt;Müll&lt;/b&gt; &amp; Co | 12.0 |" in lines and "| a\\|b |  |" in lines
    assert "| templates | a\\|b &lt;/table&gt; |" in lines
    assert "| \\`method\\` | \\['\\[x\\](y)'\\] |" in lines
    assert "<" not in text and any("threshold &lt;i&gt;0.4\\| (a" in x for x in lines)


# ---- sheets ----


def flood(indices, start):
    """The pixels that hang together with start, one after the other."""
    todo, seen = [start], set()
    while todo:
        y, x = todo.pop()
        inside = 0 <= y < indices.shape[0] and 0 <= x < indices.shape[1]
        if (y, x) not in seen and inside and indices[y, x] == indices[start]:
            seen.add((y, x))
            todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return seen


def test_a_name_stands_inside_the_widest_region_of_its_class(texts):
    indices = np.zeros((120, 200), dtype=np.uint8)
    indices[10:110, 20:180] = 1
    indices[40:80, 50:180] = 0  # a C of sky around a bay, whose mean is outside of it
    indices[90:119, 185:199] = 1  # a second sky, smaller
    indices[20:24, 140:144] = 2  # a speck
    indices[:4] = 255
    ys, xs = np.nonzero(indices == 1)
    assert indices[int(ys.mean()), int(xs.mean())] == 0
    picture = Image.new("RGB", (200, 120), "#4060a0")
    report.draw_names(picture, indices, ["background", "sky", "tree"])
    assert sorted(text for text, _ in texts) == ["background", "sky"]
    x, y = dict(texts)["sky"]
    assert (round(y), round(x)) in flood(indices, (12, 22))
    pixels = np.array(picture)[round(y) - 7 : round(y) + 8, round(x) - 14 : round(x) + 15]
    letters, rim = (pixels > 200).all(2).sum(), (pixels < 40).all(2).sum()
    assert letters > 10 and rim > 30  # white, with a dark rim


@pytest.mark.parametrize("widest", [0, 11])
def test_names_stay_in_the_picture_and_out_of_each_others_way(texts, widest):
    """Only the widest stripe is as wide as letters are high."""
    widths = [15 if k == widest else 9 for k in range(12)]
    indices = np.repeat(np.arange(12, dtype=np.uint8), widths)[None].repeat(60, 0)
    report.draw_names(Image.new("RGB", (114, 60)), indices, [f"long name {k}" for k in range(12)])
    half = report.font(14).getlength(f"long name {widest}") / 2
    text, (x, _) = texts[0]
    assert len(texts) == 1 and text == f"long name {widest}" and half <= x <= 114 - half
    texts.clear()
    stripes = np.repeat(np.arange(3, dtype=np.uint8), 30)[None].repeat(70, 0)
    report.draw_names(
        Image.new("RGB", (90, 70)), stripes, ["name 1", "name 2", "a long name of one"]
    )
    assert [text for text, _ in texts] == ["name 1", "name 2"]  # the third is wider than all
    assert abs(texts[0][1][1] - texts[1][1][1]) > 14


def test_a_sheet_has_every_cell_title_and_legend_in_the_picture(texts):
    """Cells of any kind and size, more titles in one row than in another, names of any length."""
    cells = [Image.new("L", (30, 20)), np.zeros((9, 12, 3), np.uint8)]
    cells = [report.fit(cell, 64) for cell in cells]
    legend = [("a name that is longer than the whole picture " * 3, "red"), ("b", (0, 0, 255))]
    legend += [(f"class number {k}", (0, 100 + k, 0)) for k in range(12)]
    picture = report.sheet([cells, cells[:1]], ["one", "two"], legend, "above")
    pixels = np.array(picture)
    assert (pixels[-report.GAP // 3 :] == 255).all() and (pixels[:, -2:] == 255).all()
    assert (pixels == 0).all(2).sum() > 2 * 64 * 43 + 64 * 48
    seen = [text for text, _ in texts]
    assert seen[:3] == ["above", "one", "two"] and seen[-12:] == [n for n, _ in legend[2:]]
    assert seen[3].endswith("...")
    for _, colour in legend[1:]:
        assert (pixels == np.array(colour)).all(2).sum() > 100
    ends = [x + report.font(14).getlength(text) for text, (x, _) in texts]
    assert max(ends) <= picture.width
    assert report.sheet([[cells[1]]], ["one"]).size == (480, 2 * report.GAP + 18 + 48)


def test_a_sheet_shows_the_palette_and_says_that_it_is_partial(tmp_path, texts):
    label = np.zeros((300, 400), dtype=np.int64)
    label[100:, 200:], label[:30] = 2, 255
    prediction = np.ones_like(label)
    image = np.full((300, 400, 3), (9, 99, 199), dtype=np.uint8)
    report.write_sheet(
        tmp_path / "new/part.png", set_of(n=3, full=7), [(image, label, prediction)] * 2
    )
    assert "mine (partial: 3 of 7 images)" in [text for text, _ in texts]
    sheet = np.array(Image.open(tmp_path / "new/part.png"))
    colours = {
        tuple(c): n
        for c, n in zip(*np.unique(sheet.reshape(-1, 3), axis=0, return_counts=True), strict=True)
    }
    cell = 256 * 192  # per cell, of two; names and legend cover a little
    for colour, share in (((9, 99, 199), 1), ((0, 128, 0), 1 / 3), ((128, 0, 0), 1)):
        assert 0.9 * share < colours[colour] / (2 * cell) < 1.02 * share, colour
    names = collections.Counter(text for text, _ in texts)
    assert (
        names["sky"] == 3 and names["tree"] == 3 and names["background"] == 3
    )  # two cells and the legend
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["part.png"]
    texts.clear()
    report.write_sheet(tmp_path / "whole.png", set_of(n=7, full=7), [(image, label, prediction)])
    assert texts and not [text for text, _ in texts if "partial" in text]


def test_a_smaller_label_map_holds_no_class_that_was_not_there(tmp_path):
    label = (
        np.random.default_rng(0).integers(0, 2, (500, 700)) * 2
    )  # background and trees; between them would be sky
    image = np.full((500, 700, 3), 99, dtype=np.uint8)
    report.write_sheet(tmp_path / "a.png", set_of(), [(image, label, label)])
    colours = set(map(tuple, np.array(Image.open(tmp_path / "a.png")).reshape(-1, 3).tolist()))
    assert (0, 128, 0) in colours and (128, 0, 0) not in colours


def test_ignored_pixels_are_white_and_the_last_class_has_its_colour():
    palette = benchmarks.voc_palette(254)
    shown = report.colour(np.array([[0, 253, 255]]), palette)
    assert shown.tolist() == [[palette[0], palette[253], [255, 255, 255]]]


# ---- colours ----


def lab_of_pillow(colours):
    """CIELAB by little CMS, in its 8-bit coding: L 0..255 for 0..100, a and b as signed bytes."""
    image = Image.fromarray(np.array([colours], np.uint8))
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(*profiles, "RGB", "LAB")
    lab = np.asarray(ImageCms.applyTransform(image, transform))[0]
    return np.stack([lab[:, 0] / 2.55, *(lab[:, k].astype(np.int8) for k in (1, 2))], -1)


# What eyes without long or middle cones see, on linear RGB (Machado et al. 2009).
PROTAN = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216]]
PROTAN += [[-0.003882, -0.048116, 1.051998]]
DEUTAN = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413]]
DEUTAN += [[-0.011820, 0.042940, 0.968881]]


def smallest_distance(colours, eye):
    """In CIELAB, as an eye sees them; 2.3 is a just noticeable difference."""
    linear = (np.array(colours) / 255) ** 2.2 @ np.array(eye).T
    lab = lab_of_pillow((255 * linear.clip(0, 1) ** (1 / 2.2)).round())
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return distances[~np.eye(len(lab), dtype=bool)].min()


@pytest.mark.parametrize("eye", [np.eye(3), PROTAN, DEUTAN])
def test_colours_stay_apart_for_every_eye(eye):
    colours = report.palette(254)
    assert colours[:7] == [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66),
                           (0, 114, 178), (213, 94, 0), (204, 121, 167)]  # fmt: skip
    assert len(set(colours)) == 254 and report.palette(3) == colours[:3]
    assert smallest_distance([(0, 0, 0), *colours[:7]], eye) > 8
    assert smallest_distance([(0, 0, 0), *colours[:21]], eye) > 3
    styles = [ImageColor.getrgb(colour) for colour in report.STYLES]
    assert smallest_distance(styles, eye) > 8


def test_brighter_heat_is_higher():
    colours = np.array(report.heat(np.linspace(0, 1, 50)[None]))[0]
    assert (np.diff(lab_of_pillow(colours)[:, 0]) > 0).all()
    assert colours[0].tolist() == [68, 1, 84] and colours[-1].tolist() == [253, 231, 37]


# ---- confusion ----


def test_a_confusion_matrix_is_a_picture_numbers_and_a_table(tmp_path, texts):
    classes = ["sky, blue", 'a "b"', "gone"]
    matrix = np.array([[6, 2, 0], [0, 4, 0], [0, 0, 0]])
    report.write_confusion(tmp_path / "new", "mine", matrix, classes)
    names = ["mine.confusion.npy", "mine.confusion.png", "mine.csv"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    assert np.array_equal(np.load(tmp_path / "new/mine.confusion.npy"), matrix)
    with open(tmp_path / "new/mine.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["class", "iou", "accuracy"]
    assert rows[1:] == [
        [classes[0], "75.0", "75.0"],
        [classes[1], "66.6667", "100.0"],
        ["gone", "", ""],
    ]
    pixels = np.array(Image.open(tmp_path / "new/mine.confusion.png"))
    left = 150 + report.GAP
    found = pixels[left + 2 * 18 + 15 :: 30, left + 15 :: 30][:3, :3]
    expected = np.array(report.heat(np.array([[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]])))
    assert np.array_equal(found, expected)
    assert [text for text, _ in texts if text in classes] == classes


@pytest.mark.parametrize("n", [1, 171, 900])
def test_a_confusion_matrix_of_any_size_is_a_picture(n):
    matrix = np.eye(n, dtype=np.int64)
    width, height = report.draw_confusion(matrix, [f"class {k}" for k in range(n)]).size
    assert 150 < height < 2250 and 150 < width < 2250


# ---- radar ----


def spot(k, share):
    """(x, y) on axis k of eight, clockwise from the top, of the radar in its sheet."""
    z = report.CENTRE + 660 * share * cmath.exp(2j * cmath.pi * (k / 8 - 0.25))
    above = 22  # a line of text
    return round(z.real / 3) + report.GAP, round(z.imag / 3) + report.GAP + 2 * above


def test_the_radar_has_each_number_at_its_place():
    picture = report.radar(results_of())
    best = [max(row[k] for row in report.TABLE_1.values()) for k in range(8)]
    best[5] = 25.0  # this run's COCO-Stuff
    values = list(MIOU.values())
    for k, value in enumerate(values):
        assert max(picture.getpixel(spot(k, value / best[k]))) < 40, k  # a corner's rim is grey
        gcl = np.array(picture.getpixel(spot(k, report.TABLE_1["GCL"][k] / best[k])))
        assert abs(gcl - (0xD5, 0x5E, 0)).max() < 40, k
        after = (k + 1) % 8
        a, b = spot(k, value / best[k]), spot(after, values[after] / best[after])
        middle = (a[0] + b[0]) // 2, (a[1] + b[1]) // 2
        assert picture.getpixel(middle) == (0, 0, 0), k  # the line between


def test_only_sets_with_a_number_have_an_axis(texts):
    assert report.radar(results_of(["voc", "context"])) is None
    results = results_of(["voc", "context", "voc20", "ade20k"])
    results["datasets"]["ade20k"]["miou"] = None
    assert report.radar(results) and not report.radar(results_of([], mine=OWN))
    seen = [text for text, _ in texts if "\nbest" in text]
    assert seen == ["VOC\n51.0\nbest 55.0", "Context\n27.0\nbest 30.4", "VOC20\n80.0\nbest 83.2"]


# ---- page and files ----


def write(folder, results, **sizes):
    """A folder as evaluate.py leaves it: a sheet per set, then the results."""
    for name, size in sizes.items():
        files.save_png(folder / f"{name}.png", Image.new("RGB", size, "red"))
    report.write_results(folder, results)


def test_the_page_is_one_sound_file_with_all_in_it(tmp_path):
    write(tmp_path, results_of(mine=OWN), voc=(30, 20), mine=(9, 8))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert text.startswith("<!DOCTYPE html>") and names.count("h1") == names.count("main") == 1
    assert (
        "meta",
        {"charset": "utf-8"},
    ) in page.tags and 'name="viewport" content="width=device-width' in text
    assert not {"script", "link", "iframe", "object", "b", "i"} & set(names) and not re.search(
        r"url\(|@import|https?:", text
    )
    for _, attributes in page.tags:
        assert not {
            name for name in attributes if name in ("href", "srcset") or name.startswith("on")
        }
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(len(image["alt"]) > 8 for image in images)
    sources = [
        base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        for image in images
    ]
    assert sources == [(tmp_path / f"{name}.png").read_bytes() for name in ("radar", "voc", "mine")]
    assert names.count("table") == names.count("section") == 4 + 9
    for name in ("<b>Müll</b> & Co", "a|b", "MaskCLIP†", "34.8", "45.6"):
        assert name in page.cells
    assert '"x"/last.pt' in page.text and "runs/<größe> &" in page.text


def test_rendering_again_gives_the_same_bytes(tmp_path):
    write(tmp_path, results_of(partial=["ade20k"], mine=OWN), voc=(30, 20))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"results.json", "results.md", "report.html", "radar.png", "voc.png"}
    for name in ("results.md", "report.html", "radar.png"):
        (tmp_path / name).unlink()
    result = run("report.py", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_earlier_runs_radar_does_not_stay(tmp_path):
    write(tmp_path, results_of())
    report.write_results(tmp_path, results_of(["voc"]))
    assert not (tmp_path / "radar.png").exists()
    assert "data:image" not in (tmp_path / "report.html").read_text()


def test_evaluate_leaves_the_whole_report(tmp_path):
    """Label files scored against themselves, three of five: 100, partial."""
    specs = [make_set(tmp_path / name) for name in ("one", "two")]
    for name in ("one", "two"):
        for k in range(5):
            label = np.array(Image.open(tmp_path / name / f"labels/{k}.png"))
            (tmp_path / "made" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.where(label == 255, 0, label)).save(
                tmp_path / "made" / name / f"{k}.png"
            )
    result = run(
        *(
            "evaluate.py",
            "--datasets",
            *specs,
            "--predictions",
            tmp_path / "made",
            "--limit",
            3,
            "--workers",
            0,
        ),
        *("--out", tmp_path / "out"),
    )
    assert result.returncode == 0, result.stderr
    page = Page((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count(
        "img"
    ) == 2 and "one (partial: 3 of 5 images)" in page.text
    assert page.cells.count("100.0 (partial)") == 2 * (2 + 3 + 3) and "100.0" not in page.cells


BAD = ["{", "[]", '{"settings": {}}', '{"settings": {}, "datasets": {"voc": 3}}', "[" * 10**5]
BAD += [{k: v for k, v in OWN.items() if k != gone} for gone in ("iou", "miou", "images")]
BAD += [OWN | {"iou": {"cat": "3"}}, OWN | {"sweep": 3}]


@pytest.mark.parametrize("bad", BAD)
def test_results_that_cannot_be_rendered_are_named(tmp_path, bad):
    if isinstance(bad, dict):
        bad = json.dumps({"settings": {}, "datasets": {"voc": bad}})
    (tmp_path / "results.json").write_text(bad)
    with pytest.raises(files.InputError, match="results.json: not as evaluate.py writes it"):
        report.main(SimpleNamespace(FOLDER=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_mistakes_on_the_command_line_are_one_line(tmp_path):
    check_refused(run("report.py"), 2, "FOLDER")
    missing = run("report.py", tmp_path / "nowhere")
    check_refused(missing, 1, "nowhere", "results.json", "No such file")
    assert "not as evaluate.py writes it" not in missing.stderr
    assert "FOLDER" in run("report.py", "--help").stdout


def test_a_log_line_is_json_and_says_how_many_samples_were_bad(tmp_path, capsys):
    class Bar:
        write = staticmethod(lambda text, file: print(text, file=file))

    record = {
        "step": 4,
        "loss": float("nan"),
        "bad": {"image": 2, "caption": 0},
        "eta_seconds": 3661,
    }
    report.write_log(record, tmp_path, Bar)
    line = capsys.readouterr().out
    assert "bad 2" in line and "caption" not in line and "eta 1:01:01" in line

    def refuse(name):
        raise ValueError(name)

    found = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    assert found == record | {"loss": None}


def test_curves_have_axes_and_a_cut_line_is_left_out(tmp_path, texts):
    lines = [{"step": 10 * k, "loss": 1.0 + k, "cl": 4.0, "area_pos": 0.1} for k in range(5)]
    log = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(log + '{"step": 5, "bad": {"image": 0}')
    report.write_curves(tmp_path / "loss.png", tmp_path / "log.jsonl")
    seen = [text for text, _ in texts]
    for word in ("loss", "cl", "area_pos", "10", "40", "1", "5"):
        assert word in seen, word
    assert "gcl_v" not in seen and "miou" not in seen  # no curve, no word
    x = {text: place[0] for text, place in texts[:10:2]}
    y = {text: place[1] for text, place in texts[1:10:2]}
    assert x["40"] - x["20"] == pytest.approx(x["20"] - x["0"]) and y["5"] < y["3"] < y["1"]
    pixels = np.array(Image.open(tmp_path / "loss.png").convert("RGB"))
    curve = (pixels[60:200, 70:460] < 50).all(2)  # without words and numbers
    rows, columns = np.nonzero(curve)
    assert rows[columns == columns.min()].min() > rows[columns == columns.max()].max() + 100
