# SPDX-License-Identifier: MIT
"""Renders the results of evaluate.py: tables beside the paper's, a radar like Figure 1b, one picture sheet per set.
And what train.py shows as it goes: log lines, loss.png, samples.png.

    python report.py results     # results.md, radar.png and report.html again, from results.json and the sheets there

report.html is one file that shows it all, on a phone and on a desktop. Needs numpy and pillow.
"""

import argparse
import base64
import functools
import html
import json
import math
import re
import sys
import unicodedata
from datetime import timedelta
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import files

ROWS = 6  # images on a picture sheet
CELL = 256  # pixels of a picture's longer side
COLUMNS = (
    "voc",
    "context",
    "coco_object",
    "voc20",
    "context59",
    "coco_stuff",
    "cityscapes",
    "ade20k",
)
TITLES = ("VOC", "Context", "Object", "VOC20", "Context59", "Stuff", "City", "ADE")
TABLE_1 = {  # the paper's figures, mIoU in percent, in the order of COLUMNS, then the average
    "GroupViT (YFCC)": (49.5, 19.0, 24.3, 74.1, 20.8, 12.6, 6.9, 8.7, 27.0),
    "GroupViT (RedCaps)": (50.4, 18.7, 27.5, 79.7, 23.4, 15.3, 11.1, 9.2, 29.4),
    "MaskCLIP†": (29.3, 21.1, 15.5, 53.7, 23.3, 14.7, 21.6, 10.8, 23.7),
    "MaskCLIP": (38.8, 23.6, 20.6, 74.9, 26.4, 16.4, 12.6, 9.8, 27.9),
    "ReCo": (25.1, 19.9, 15.7, 57.7, 22.3, 14.8, 21.1, 11.2, 23.5),
    "GCL": (55.0, 30.4, 31.6, 83.2, 33.9, 22.4, 24.0, 17.1, 37.2),
}
TABLE_3 = {  # the paper's figures, mIoU of some classes alone: VOC20, Context59, COCO-Stuff, then the average
    "ViL-Seg": (34.4, 16.3, 16.4, 22.4),
    "ReCo": (57.9, 32.0, 18.4, 36.1),
    "GroupViT (RedCaps)": (79.0, 49.2, 16.1, 48.1),
    "MaskCLIP": (73.0, 56.5, 21.9, 50.5),
    "GCL": (84.5, 62.0, 27.6, 58.0),
}
RUN = "this run"
NUMBER = (int, float, type(None))
FIELDS = {
    "miou": NUMBER,
    "images": int,
    "iou": dict,
    "partial_miou": NUMBER,
}  # of every set in results.json


# ---- files ----------------------------------------------------------------------------------------------------------


def write_results(folder, results):
    """results.json of one run, or of the part of it that is done, and all that is rendered from it."""
    files.write_text(Path(folder, "results.json"), json.dumps(results, indent=1) + "\n")
    render(folder, results)


def render(folder, results):
    """results.md, radar.png (with three of the eight sets or more) and report.html, with the sheets that are there."""
    files.write_text(Path(folder, "results.md"), markdown(results))
    drawn, path = radar(results), Path(folder, "radar.png")
    if "radar" not in results["datasets"]:  # else radar.png is the picture sheet of that set
        path.unlink(missing_ok=True)  # an earlier run's
        if drawn:
            files.save_png(path, drawn)
    files.write_text(Path(folder, "report.html"), page(folder, results))


def read_results(folder):
    """The checked results.json of a folder; files.InputError names what is wrong with it."""
    path = Path(folder, "results.json")
    if not path.is_file():
        raise files.InputError(
            f"{path}: no such file; give the folder that evaluate.py --out wrote"
        )
    try:
        results = json.loads(path.read_text(encoding="utf-8"), parse_constant=int)  # NaN is none
    except ValueError as error:
        raise files.InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(results, dict) or not all(
        isinstance(results.get(f), dict) for f in ("settings", "datasets")
    ):
        raise files.InputError(
            f"{path}: needs the fields settings and datasets, as evaluate.py writes them"
        )
    for name, r in results["datasets"].items():
        _check(path, name, r)
    return results


def _check(path, name, r):
    """files.InputError where the entry of one set lacks a field, or its values are of another kind."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise files.InputError(f"{path}: the set {name!r} has a name that is no file name")
    where = f"{path}: {name}"
    for field, kind in FIELDS.items():
        if not isinstance(r, dict) or not isinstance(r.get(field, ()), kind):
            raise files.InputError(f"{where}: {field} is missing, or not of its kind")
    if "partial" not in r and not isinstance(r.get("full", ()), int | None):
        raise files.InputError(
            f"{where}: needs partial, or full, to tell whether these are all images of the set"
        )
    sweep = r.get("sweep", {})
    if not isinstance(sweep, dict) or not all(
        isinstance(v, NUMBER) for v in (*r["iou"].values(), *sweep.values())
    ):
        raise files.InputError(f"{where}: iou and sweep must hold numbers")


# ---- tables ---------------------------------------------------------------------------------------------------------


def number(value):
    return "" if value is None else f"{value:.1f}"


def is_partial(r):
    """Whether the entry of a set covers only some of its images."""
    return bool(r.get("partial", r["images"] != (r.get("full") or r["images"])))


def marked(value, partial):
    """A figure, with its mark where it comes from some of the images alone."""
    return number(value) + " (partial)" * (partial and value is not None)


def heading(name, r):
    """A set's name and how many images its numbers come from."""
    of = f" of {r['full']}" if r.get("full") else ""
    return f"{name} (partial: {r['images']}{of} images)" if is_partial(r) else name


def title(results):
    settings = results["settings"]
    return f"mIoU, {settings.get('method') or settings.get('predictions') or 'method unknown'}"


def run_name(results):
    outside = results["settings"].get("unified_protocol") is False
    return RUN + " (outside the protocol)" * outside


def notes(results):
    """(mark, text) pairs that must be read before any number."""
    protocol = results["settings"].get("unified_protocol")
    partial = [name for name, r in results["datasets"].items() if is_partial(r)]
    if protocol is False:
        yield (
            "Outside the unified protocol",
            "these settings differ from it, so do not compare with the paper.",
        )
    if protocol is None:
        yield (
            "Protocol not known",
            "nothing records whether this run, or who made its label files, kept to it.",
        )
    if partial:
        yield "Partial", f"only some of the images of {', '.join(partial)}."
    elif results.get("partial"):
        yield "Unfinished", "sets that were asked for are missing."


def beside(results, caption, paper, titles, names, field):
    """(caption, header, rows): the paper's rows and this run's; None where the run has no such set.

    The average stands only where every set is there, since the paper's is over all of them.
    """
    entries = [results["datasets"].get(name) for name in names]
    values = [r and r[field] for r in entries]
    if all(v is None for v in values):
        return None
    partial = [bool(r) and is_partial(r) for r in entries]
    average = None if None in values else sum(values) / len(values)
    cells = [
        marked(v, p) for v, p in zip([*values, average], [*partial, any(partial)], strict=True)
    ]
    rows = [(name, [number(v) for v in figures]) for name, figures in paper.items()]
    return caption, ("method", *titles, "Avg."), [*rows, (run_name(results), cells)]


def own_table(results):
    """(caption, header, rows) of all sets of this run, the user's own too."""
    rows = []
    for name, r in results["datasets"].items():
        best = max(((v, t) for t, v in r.get("sweep", {}).items() if v is not None), default=None)
        sweep = "" if best is None else f"{marked(best[0], is_partial(r))} at {best[1]}"
        images = f"{r['images']} of {r['full']}" if r.get("full") else str(r["images"])
        rows.append(
            (
                name,
                [
                    marked(r["miou"], is_partial(r)),
                    images,
                    marked(r["partial_miou"], is_partial(r)),
                    sweep,
                ],
            )
        )
    header = (
        "set",
        "mIoU",
        "images",
        "mIoU of Table 3's classes",
        "best of the sweep (diagnostic)",
    )
    return "All sets of this run", header, rows


def tables(results):
    """Every table of the report as (caption, header, rows of a name and its cells)."""
    some, names = ("VOC20", "Context59", "Stuff"), ("voc20", "context59", "coco_stuff")
    found = [
        beside(results, "Table 1 (the paper's figures)", TABLE_1, TITLES, COLUMNS, "miou"),
        beside(
            results,
            "Table 3 (the paper's figures), some classes",
            TABLE_3,
            some,
            names,
            "partial_miou",
        ),
        own_table(results),
    ]
    return [table for table in found if table]


def row(name, cells):
    return f"| {name} | " + " | ".join(cells) + " |"


def cell(text):
    """Any text as one cell of a markdown table."""
    return re.sub(r"([|\\`*_\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def markdown(results):
    """The run beside the paper's tables where it has benchmarks; its own sets; IoU per class."""
    lines = [f"# {cell(title(results))}", ""]
    for mark, text in notes(results):
        lines += [f"**{mark}**: {text}", ""]
    lines += ["```json", json.dumps(results["settings"], indent=1, ensure_ascii=False), "```", ""]
    for caption, header, rows in tables(results):
        lines += [f"## {caption}", "", row(header[0], header[1:]), "|---" * len(header) + "|"]
        lines += [
            row(f"**{name}**" if name.startswith(RUN) else name, cells) for name, cells in rows
        ] + [""]
    for name, r in results["datasets"].items():
        lines += [f"## {heading(name, r)}", "", row("class", ("IoU",)), "|---|---|"]
        lines += [row(cell(c), (marked(v, is_partial(r)),)) for c, v in r["iou"].items()] + [""]
    return "\n".join(lines)


# ---- pictures -------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which stay apart for colour-blind eyes; black first, yellow (faint on white) last.
OKABE_ITO = ("#000000", "#d55e00", "#0072b2", "#e69f00", "#cc79a7", "#009e73", "#56b4e9", "#f0e442")
STYLES = {  # of the radar: colour, (dash, gap) in pixels, corners and turn of the marker
    "GroupViT (YFCC)": (OKABE_ITO[6], (4, 4), 3, 0),
    "GroupViT (RedCaps)": (OKABE_ITO[2], (12, 5), 3, 180),
    "MaskCLIP†": (OKABE_ITO[3], (4, 4), 4, 0),
    "MaskCLIP": (OKABE_ITO[4], (12, 5), 4, 45),
    "ReCo": (OKABE_ITO[5], (20, 8), 5, 0),
    "GCL": (OKABE_ITO[1], None, 6, 0),
    RUN: (OKABE_ITO[0], None, 24, 0),
}
SCALE = 3  # the radar's lines are drawn this much larger, then reduced, which smooths them
RADAR, CENTRE, RADIUS = (720, 790), (360, 330), 215  # pixels


@functools.cache
def font(size):
    """A font of the system with many letters, where one is found; else Pillow's own, which has few beyond ASCII."""
    for name in ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:  # not on this system
            continue
    return ImageFont.load_default(size)


@functools.cache
def _has(size, letter):
    """Whether the font has a letter: it is not drawn as the box that stands for none."""
    return letter == " " or bytes(font(size).getmask(letter)) != bytes(
        font(size).getmask("\U0010ffff")
    )


def drawable(text, size):
    """The text in letters that the font has: accents dropped, a dagger spelled out, else a question mark."""
    out = []
    for letter in " ".join(text.split()):
        base = "-dagger" if letter == "†" else unicodedata.normalize("NFKD", letter)[0]
        out.append(
            letter if _has(size, letter) else base if all(_has(size, b) for b in base) else "?"
        )
    return "".join(out)


def put_text(draw, xy, text, size, fill="black", width=None, **options):
    """Draws text in the font of this size, cut to `width` pixels."""
    text = drawable(text, size)
    while width and len(text) > 1 and font(size).getlength(text) > width:
        text = text.removesuffix("...")[:-1] + "..."
    draw.text(xy, text, fill, font(size), **options)


def colour(indices, palette):
    """uint8 [h, w, 3] of class indices [h, w]; what lies outside the palette (ignored) is white."""
    table = np.full((256, 3), 255, dtype=np.uint8)
    table[: len(palette)] = palette
    return table[indices]


def fit(picture, nearest=False):
    """A PIL picture whose longer side is CELL pixels."""
    scale = CELL / max(picture.size)
    size = tuple(max(round(side * scale), 1) for side in picture.size)
    return picture.resize(size, Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR)


def regions(indices):
    """int64 [h, w]: one number for all pixels of a class that hang together (4 neighbours), another elsewhere."""
    at = np.arange(indices.size).reshape(indices.shape)
    across, down = indices[:, 1:] == indices[:, :-1], indices[1:] == indices[:-1]
    a = np.concatenate(
        [at[:, 1:][across], at[1:][down]]
    )  # [edges] pixels and their equal neighbours
    b = np.concatenate([at[:, :-1][across], at[:-1][down]])
    root = at.ravel()
    while (root[a] != root[b]).any():
        low = np.minimum(root[a], root[b])
        root = root.copy()
        np.minimum.at(
            root, np.maximum(root[a], root[b]), low
        )  # the larger root hangs under the smaller
        while (root != root[root]).any():
            root = root[root]
    return root.reshape(indices.shape)


def inside(region):
    """(y, x) of a pixel as deep inside a region bool [h, w] as any: what is left once its rim was peeled off."""
    left = np.pad(region, 1)
    while left.any():
        last = left
        left = last.copy()
        for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
            left &= np.roll(last, shift, axis)
    ys, xs = np.nonzero(last[1:-1, 1:-1])
    k = np.hypot(ys - ys.mean(), xs - xs.mean()).argmin()
    return int(ys[k]), int(xs[k])


def draw_names(picture, indices, names, size=13):
    """Writes each class's name inside its largest region of the picture; specks and names in others' way stay bare.

    indices: class per pixel [h, w], of the picture's size; values without a name (ignored) get none.
    """
    where = regions(indices)
    numbers, area = np.unique(where, return_counts=True)
    draw, done, taken = ImageDraw.Draw(picture), set(), np.zeros(indices.shape, bool)
    for root in numbers[np.argsort(-area, kind="stable")][: (area > indices.size / 100).sum()]:
        k = int(indices.flat[root])
        if k in done or k >= len(names):
            continue
        done.add(k)
        y, x = inside(where == root)
        half = font(size).getlength(drawable(names[k], size)) / 2 + 2
        x = min(
            max(x, half), max(picture.width - half, half)
        )  # the whole name stays in the picture
        y = min(max(y, size // 2 + 1), picture.height - size // 2 - 1)
        box = np.s_[max(y - size // 2, 0) : y + size // 2 + 1, int(x - half) : int(x + half)]
        if not taken[box].any():
            taken[box] = True
            put_text(
                draw,
                (x, y),
                names[k],
                size,
                "white",
                anchor="mm",
                stroke_width=2,
                stroke_fill="black",
            )


def write_sheet(path, dataset, pictures):
    """A PNG of rows image / label / prediction with the classes' names on them, and a legend of those that occur.

    pictures: (image uint8 [h, w, 3], label [h, w], prediction [h, w]).
    """
    rows = [
        [fit(Image.fromarray(image)), *(_named(m, dataset) for m in maps)]
        for image, *maps in pictures
    ]
    present = sorted(
        set(np.concatenate([np.unique(m) for _, *maps in pictures for m in maps]).tolist()) - {255}
    )
    gap, line, per_row = 8, 20, 4
    width, top = 3 * (CELL + gap) + gap, gap + 2 * line
    legend = top + sum(max(cell.height for cell in cells) + gap for cells in rows)
    sheet = Image.new("RGB", (width, legend + -(-len(present) // per_row) * line + gap), "white")
    draw = ImageDraw.Draw(sheet)
    entry = {"images": len(dataset), "full": dataset.full}
    put_text(draw, (gap, 4), heading(dataset.name, entry), 15, width=width - 2 * gap)
    for k, text in enumerate(("image", "label (white: ignored)", "prediction")):
        put_text(draw, (gap + k * (CELL + gap), 4 + line), text, 14)
    for cells in rows:
        for k, cell in enumerate(cells):
            sheet.paste(cell, (gap + k * (CELL + gap), top))
        top += max(cell.height for cell in cells) + gap
    for i, k in enumerate(present):
        x, y = gap + (i % per_row) * (width // per_row), legend + (i // per_row) * line
        draw.rectangle((x, y + 3, x + 12, y + 15), tuple(dataset.palette[k]), "black")
        put_text(draw, (x + 18, y), dataset.classes[k], 14, width=width // per_row - 22)
    files.save_png(path, sheet)


def _named(indices, dataset):
    """A label map as a picture of a sheet: in the set's palette, with names."""
    indices = np.array(fit(Image.fromarray(indices.astype(np.uint8)), nearest=True))
    picture = Image.fromarray(colour(indices, dataset.palette))
    draw_names(picture, indices, dataset.classes)
    return picture


# ---- radar ----------------------------------------------------------------------------------------------------------


def vertex(k, share):
    """(x, y) in the radar of axis k (the first points up, the others follow clockwise), at this share of its length."""
    angle = 2 * np.pi * k / len(COLUMNS)
    return CENTRE[0] + RADIUS * share * np.sin(angle), CENTRE[1] - RADIUS * share * np.cos(angle)


def draw_line(draw, a, b, fill, width, dash=None):
    """A line in a picture that is SCALE times larger, in dashes of (dash, gap) pixels."""
    a, b = np.array(a) * SCALE, np.array(b) * SCALE
    length = np.hypot(*(b - a))
    on, step = (length, length) if dash is None else (dash[0] * SCALE, sum(dash) * SCALE)
    for start in np.arange(0, length, step) if length else []:
        ends = a + (b - a) * start / length, a + (b - a) * min(start + on, length) / length
        draw.line([tuple(end) for end in ends], fill, width * SCALE)


def draw_series(draw, name, points):
    """Markers at the points that are there, lines between neighbours; a point that is not (None) leaves a gap."""
    fill, dash, corners, turn = STYLES[name]
    width, size = (4, 7) if name == RUN else (2, 6)
    for a, b in zip(points, points[1:], strict=False):
        if a and b:
            draw_line(draw, a, b, fill, width, dash)
    for x, y in filter(None, points):
        draw.regular_polygon((x * SCALE, y * SCALE, size * SCALE), corners, turn, fill)


def radar(results):
    """A picture like Figure 1b: the paper's rows and this run; None with fewer than three of the eight sets.

    Each axis goes from 0 in the middle to the best of its rows. Where this run has no number, its line has a gap.
    """
    entries = [results["datasets"].get(name) for name in COLUMNS]
    mine = [r and r["miou"] for r in entries]
    if sum(v is not None for v in mine) < 3:
        return None
    rows = {**TABLE_1, RUN: mine}
    best = [max(r[k] for r in rows.values() if r[k] is not None) for k in range(len(COLUMNS))]
    picture = Image.new("RGB", [side * SCALE for side in RADAR], "white")
    draw = ImageDraw.Draw(picture)
    for k in range(len(COLUMNS)):
        draw_line(draw, CENTRE, vertex(k, 1), "#999999", 1)
        for share in (0.25, 0.5, 0.75, 1):
            draw_line(draw, vertex(k, share), vertex(k + 1, share), "#cccccc", 1)
    for name, figures in rows.items():
        points = [
            None if v is None else vertex(k, v / best[k])
            for k, v in enumerate(figures[: len(COLUMNS)])
        ]
        draw_series(draw, name, [*points, points[0]])
    for name, (x, y) in _legend(rows):
        draw_series(draw, name, [(x, y), (x + 25, y), (x + 50, y)])
    picture = picture.reduce(SCALE)
    _radar_text(ImageDraw.Draw(picture), results, entries, best)
    return picture


def _legend(names):
    """(name, left end of its line), the run first in a row of its own."""
    for i, name in enumerate(sorted(names, key=lambda name: name != RUN)):
        yield name, (40 + (i > 0) * (i - 1) % 2 * 345, 655 + (i + 1) // 2 * 34)


def _radar_text(draw, results, entries, best):
    put_text(draw, (360, 18), "mIoU, each axis from 0 to its best row", 18, anchor="mm")
    for k, (name, r) in enumerate(zip(TITLES, entries, strict=True)):
        state = (
            "not run"
            if r is None
            else "no number"
            if r["miou"] is None
            else "partial" * is_partial(r)
        )
        x, y = vertex(k, 1 + (50 if k % 4 == 0 else 68) / RADIUS)
        lines = [text for text in (name, state, f"max {best[k]:.1f}") if text]
        for j, text in enumerate(lines):
            put_text(draw, (x, y + 22 * j - 11 * (len(lines) - 1)), text, 19, anchor="mm")
    partial = any(r and is_partial(r) for r in entries)
    for name, (x, y) in _legend(STYLES):
        text = run_name(results) + " (partial)" * partial if name == RUN else f"{name} (paper)"
        put_text(draw, (x + 64, y), text, 18, anchor="lm")


# ---- page -----------------------------------------------------------------------------------------------------------

HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>"""
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #ccc; --soft: #f2f2f2; --bar: #9fc9e8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #161616; --line: #444; --soft: #252525; --bar: #1f5a85 }
}
body { margin: 0 auto; padding: 1rem; max-width: 60rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
.note { border-left: 4px solid #d55e00; padding: .3rem .8rem; background: var(--soft) }
.scroll, figure { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: bold }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: right; overflow-wrap: normal }
td { white-space: nowrap }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); max-width: 9rem }
.run > * { font-weight: bold; background: var(--soft) !important }
.iou { width: 100% }
.iou th { width: 40%; overflow-wrap: anywhere }
.iou td { background: linear-gradient(to right, var(--bar) calc(var(--v) * 1%), transparent 0) }
img { max-width: 100%; height: auto; background: #fff }
.sheet { min-width: 640px }
dt, summary { font-weight: bold }
summary { padding: .4rem 0 }
"""


def html_table(caption, header, rows):
    """A table that scrolls sideways on a narrow screen."""
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in header)
    lines = []
    for name, cells in rows:
        mark = ' class="run"' if name.startswith(RUN) else ""
        values = "".join(f"<td>{html.escape(text)}</td>" for text in cells)
        lines.append(f'<tr{mark}><th scope="row">{html.escape(name)}</th>{values}</tr>')
    body = f"<thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody>"
    label = f'tabindex="0" role="region" aria-label="{html.escape(caption)}"'
    return f'<div class="scroll" {label}><table><caption>{html.escape(caption)}</caption>{body}</table></div>'


def html_image(path, alt, kind):
    """A PNG as a figure with its bytes in the page."""
    source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return f'<figure tabindex="0"><img class="{kind}" alt="{html.escape(alt)}" src="{source}"></figure>'


def html_set(folder, name, r):
    """The section of one set: its mIoU, picture sheet and IoU per class."""
    top, sheet = html.escape(heading(name, r)), Path(folder, f"{name}.png")
    miou = marked(r["miou"], is_partial(r)) or "none, as no class occurs,"
    lines = [f"<section><h2>{top}</h2>", f"<p>mIoU {miou} over {r['images']} images</p>"]
    if sheet.is_file():
        alt = f"{heading(name, r)}: images, labels and predictions in rows, the classes' names on them"
        lines.append(html_image(sheet, alt, "sheet"))
    lines.append(f'<details><summary>IoU per class, {top}</summary><table class="iou"><tbody>')
    for c, v in r["iou"].items():
        bar = f'<td style="--v:{v or 0:.1f}">{marked(v, is_partial(r))}</td>'
        lines.append(f'<tr><th scope="row">{html.escape(c)}</th>{bar}</tr>')
    return "\n".join([*lines, "</tbody></table></details></section>"])


def page(folder, results):
    """report.html as text: all tables and pictures on one page, nothing loaded from elsewhere."""
    top, drawn, (first, *others) = (
        html.escape(title(results)),
        Path(folder, "radar.png"),
        tables(results),
    )
    lines = [HEAD.format(title=top, style=STYLE), f"<h1>{top}</h1>"]
    lines += [
        f'<p class="note"><strong>{mark}</strong>: {html.escape(text)}</p>'
        for mark, text in notes(results)
    ]
    lines.append(html_table(*first))
    if "radar" not in results["datasets"] and drawn.is_file():
        sets = "; ".join(
            f"{n} {marked(r['miou'], is_partial(r))}"
            for n, r in results["datasets"].items()
            if n in COLUMNS
        )
        lines.append(
            html_image(
                drawn, f"Radar of the paper's Table 1 and {run_name(results)}: {sets}", "radar"
            )
        )
    lines += [*(html_table(*table) for table in others), "<details><summary>Settings</summary><dl>"]
    for name, value in results["settings"].items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>")
    lines += [
        "</dl></details>",
        *(html_set(folder, name, r) for name, r in results["datasets"].items()),
    ]
    return "\n".join([*lines, "</main></body></html>\n"])


# ---- training -------------------------------------------------------------------------------------------------------


def write_log(record, out, bar):
    """One plain line above the bar and one line of OUT/log.jsonl. record: plain values, bad: {reason: n}."""
    flat = {k: sum(v.values()) if k == "bad" else v for k, v in record.items()}
    flat |= {name: n for name, n in record.get("bad", {}).items() if n}
    if "eta_seconds" in flat:
        flat["eta"] = timedelta(seconds=flat.pop("eta_seconds"))
    bar.write(
        "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in flat.items()),
        sys.stdout,
    )
    valid = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    with open(Path(out, "log.jsonl"), "a") as file:
        file.write(json.dumps(valid) + "\n")


def write_samples(path, images, masks, captions):
    """A PNG of training pairs, dark where a mask is low: the image, under its own caption's mask, under the next one's.

    images: float [n, 3, h, w] in 0..1. masks: [n, n, h, w], of image i and caption j. Tensors on the CPU.
    """
    size, gap, line, n = 224, 8, 18, len(images)
    sheet = Image.new("RGB", (3 * (size + gap) + gap, n * (size + line + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(n):
        other, top = (i + 1) % n, gap + i * (size + line + gap)
        cells = (
            ("image", 1.0),
            (f"+ {captions[i]}", masks[i, i]),
            (f"- {captions[other]}", masks[i, other]),
        )
        for k, (title, mask) in enumerate(cells):
            pixels = (
                (images[i] * (0.1 + 0.9 * mask) * 255).byte().permute(1, 2, 0).numpy()
            )  # [h, w, 3]
            sheet.paste(
                Image.fromarray(pixels).resize((size, size)), (gap + k * (size + gap), top + line)
            )
            put_text(draw, (gap + k * (size + gap), top), title, 13, width=size)
    files.save_png(path, sheet)


def log_step(line):
    """The step of a line of log.jsonl; infinite for a line that a kill has cut off."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


CURVES = (
    "loss",
    "gcl_v",
    "gcl_f",
    "cl",
    "area_pos",
    "area_neg",
    "tv_mask",
    "tv_dense",
    "grad_norm",
    "miou",
)


def write_curves(path, log):
    """A PNG of what train.py's log.jsonl says over the steps: loss, its terms, gradient norm, mIoU; a panel each."""
    lines = [
        json.loads(text) for text in Path(log).read_text().splitlines() if log_step(text) < math.inf
    ]
    series = {
        name: [(x["step"], x[name]) for x in lines if x.get(name) is not None] for name in CURVES
    }
    series = {name: np.array(points) for name, points in series.items() if points}  # [n, 2]
    width, height, gap = 420, 170, 30
    sheet = Image.new(
        "RGB", (2 * (width + gap) + gap, -(-len(series) // 2) * (height + gap) + gap), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for k, (name, points) in enumerate(series.items()):
        left, top = gap + k % 2 * (width + gap), gap + k // 2 * (height + gap)
        low, high = points.min(0), points.max(0)
        span = f"{low[1]:.4g} to {high[1]:.4g}, now {points[-1, 1]:.4g}, steps {low[0]:.0f} to {high[0]:.0f}"
        low[1] = min(low[1], high[1] - 0.01 * abs(high[1]))  # rounding is no slope
        places = (points - low) / np.where(
            high > low, high - low, 1
        )  # [n, 2], 0 to 1 along both axes
        draw.rectangle((left, top, left + width, top + height), outline="grey")
        draw.line([(left + x * width, top + (1 - y) * height) for x, y in places], (200, 40, 40), 2)
        put_text(draw, (left, top - 17), f"{name}: {span}", 13)
    files.save_png(path, sheet)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="what evaluate.py --out wrote: results.json, picture sheets",
    )
    arguments = parser.parse_args()
    try:
        render(arguments.folder, read_results(arguments.folder))
    except (files.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
