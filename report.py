# SPDX-License-Identifier: MIT
"""Everything that is drawn: tables, a radar like Figure 1b, sheets of pictures, curves, one page.

    python report.py results     # results.md, radar.png, report.html again, from what is there

report.html is one file that shows all of an evaluation, on a phone and on a desktop. Pictures are
sheets of captioned cells in one font and one palette (`sheet`). Needs numpy and pillow.
"""

import argparse
import base64
import csv
import functools
import html
import io
import json
import math
import re
import string
import sys
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont, ImageOps

import files

ROWS = 6  # images on a picture sheet
CELL = 256  # pixels of a cell's longer side
GAP = 8  # pixels between cells
COLUMNS = "voc context coco_object voc20 context59 coco_stuff cityscapes ade20k".split()
TITLES = "VOC Context Object VOC20 Context59 Stuff City ADE".split()


def figures(table):
    """{name: numbers} of lines with a colon after the name."""
    lines = (line.split(":") for line in table.strip().splitlines())
    return {name: tuple(map(float, numbers.split())) for name, numbers in lines}


# The paper's figures: mIoU in percent in the order of COLUMNS, then the average.
TABLE_1 = figures("""
GroupViT (YFCC): 49.5 19.0 24.3 74.1 20.8 12.6 6.9 8.7 27.0
GroupViT (RedCaps): 50.4 18.7 27.5 79.7 23.4 15.3 11.1 9.2 29.4
MaskCLIP†: 29.3 21.1 15.5 53.7 23.3 14.7 21.6 10.8 23.7
MaskCLIP: 38.8 23.6 20.6 74.9 26.4 16.4 12.6 9.8 27.9
ReCo: 25.1 19.9 15.7 57.7 22.3 14.8 21.1 11.2 23.5
GCL: 55.0 30.4 31.6 83.2 33.9 22.4 24.0 17.1 37.2
""")
# Of some classes alone: VOC20, Context59, COCO-Stuff, then the average.
TABLE_3 = figures("""
ViL-Seg: 34.4 16.3 16.4 22.4
ReCo: 57.9 32.0 18.4 36.1
GroupViT (RedCaps): 79.0 49.2 16.1 48.1
MaskCLIP: 73.0 56.5 21.9 50.5
GCL: 84.5 62.0 27.6 58.0
""")
RUN = "this run"


# ---- results.json -----------------------------------------------------------------------------


def write_results(folder, results):
    """results.json of one run, or of the part of it that is done, and all that shows it."""
    files.write_text(Path(folder, "results.json"), json.dumps(results, indent=1) + "\n")
    render(folder, results)


def render(folder, results):
    """results.md, radar.png (with three of the eight sets or more) and report.html."""
    files.write_text(Path(folder, "results.md"), markdown(results))
    drawn, path = radar(results), Path(folder, "radar.png")
    if "radar" not in results["datasets"]:  # else radar.png is the picture sheet of that set
        path.unlink(missing_ok=True)  # an earlier run's
        if drawn:
            files.save_png(path, drawn)
    files.write_text(Path(folder, "report.html"), page(folder, results))


def main(args):
    """Renders a results.json again; files.InputError where it is not one of evaluate.py's."""
    path = Path(args.folder, "results.json")
    try:
        render(args.folder, json.loads(files.read_text(path)))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise files.InputError(f"{path}: not as evaluate.py writes it ({error!r})") from error


# ---- tables -----------------------------------------------------------------------------------


def number(value):
    return "" if value is None else f"{value:.1f}"


def is_partial(r):
    """Whether the entry of a set covers only some of its images."""
    return bool(r.get("partial", r["images"] != (r.get("full") or r["images"])))


def marked(r, value):
    """A figure of a set, with its mark where it comes from some of the images alone."""
    return number(value) + " (partial)" * (is_partial(r) and value is not None)


def counted(r):
    """How many images the numbers of a set come from."""
    return f"{r['images']} of {r['full']}" if r.get("full") else str(r["images"])


def heading(name, r):
    return f"{name} (partial: {counted(r)} images)" if is_partial(r) else name


def title(results):
    settings = results["settings"]
    return f"mIoU, {settings.get('method') or settings.get('predictions') or 'method unknown'}"


def run_name(results):
    return RUN + " (outside the protocol)" * (results["settings"].get("unified_protocol") is False)


def notes(results):
    """What must be read before any number."""
    protocol = results["settings"].get("unified_protocol")
    partial = [name for name, r in results["datasets"].items() if is_partial(r)]
    if protocol is False:
        yield "Outside the unified protocol: do not compare these numbers with the paper's."
    if protocol is None:
        yield "Protocol not known: nothing records whether this run kept to it."
    if results["settings"].get("clip", {}).get("pretrained") == "random":
        yield "Random weights: these numbers mean nothing."
    if partial:
        yield f"Partial: only some of the images of {', '.join(partial)}."
    elif results.get("partial"):
        yield "Unfinished: sets that were asked for are missing."


def beside(results, paper, header, names, field):
    """A table of the paper's rows and this run's; the average stands where every set is there."""
    entries = [results["datasets"].get(name) for name in names]
    cells = [marked(r, r[field]) if r else "" for r in entries]
    if all(cells):
        average = number(sum(r[field] for r in entries) / len(entries))
        cells.append(average + " (partial)" * any(map(is_partial, entries)))
    rows = [(name, *map(number, values)) for name, values in paper.items()]
    return [("method", *header, "Avg."), *rows, (run_name(results), *cells)] if any(cells) else []


def own_row(name, r):
    """The row of a set in the table of all sets of a run."""
    best = max(((v, t) for t, v in r.get("sweep", {}).items() if v is not None), default=None)
    at = f"{marked(r, best[0])} at {best[1]}" if best else ""
    return name, marked(r, r["miou"]), counted(r), marked(r, r["partial_miou"]), at


def tables(results):
    """(caption, name of the picture beside it, rows, header first), without empty columns."""
    sets, settings = results["datasets"], results["settings"].items()
    some = ("VOC20", "Context59", "Stuff"), ("voc20", "context59", "coco_stuff")
    own = ("set", "mIoU", "images", "mIoU of Table 3's classes", "best of the sweep")
    said = [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in settings]
    found = {
        "Table 1 (the paper's figures)": beside(results, TABLE_1, TITLES, COLUMNS, "miou"),
        "Table 3 (the paper's figures)": beside(results, TABLE_3, *some, "partial_miou"),
        "All sets of this run (the sweep is a diagnostic)": [
            own,
            *map(own_row, sets, sets.values()),
        ],
        "Settings": [("setting", "value"), *said],
    }
    radar = "radar" * ("radar" not in sets)  # else that is the picture of this set
    found = [(caption, radar * ("1" in caption), rows) for caption, rows in found.items() if rows]
    for name, r in sets.items():
        rows = [(c, marked(r, v)) for c, v in (("mIoU", r["miou"]), *r["iou"].items())]
        found.append((heading(name, r), name, [("class", "IoU"), *rows]))
    for caption, picture, rows in found:
        columns = [column for column in zip_longest(*rows, fillvalue="") if any(column[1:])]
        yield caption, picture, list(zip(*columns, strict=True))


def cell(text):
    """Any text as one cell of a markdown table."""
    return re.sub(r"([|\\`*_\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def markdown(results):
    """results.md as text: notes and tables."""
    parts = [
        f"# {cell(title(results))}",
        *("**" + cell(text).replace(":", "**:", 1) for text in notes(results)),
    ]
    for caption, _, rows in tables(results):
        lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
        lines.insert(1, "|---" * len(rows[0]) + "|")
        parts += [f"## {cell(caption)}", "\n".join(lines).replace(f"| {RUN}", f"| **{RUN}**")]
    return "\n\n".join(parts) + "\n"


# ---- page -------------------------------------------------------------------------------------

PAGE = string.Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #ccc; --soft: #f2f2f2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #161616; --line: #444; --soft: #252525 }
}
body { margin: 0 auto; padding: 1rem; max-width: 60rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
.note { border-left: 4px solid #d55e00; padding: .3rem .8rem; background: var(--soft) }
div { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: right;
  white-space: nowrap; overflow-wrap: normal }
td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper);
  min-width: 7rem; white-space: normal }
tr:first-child, .run { font-weight: bold }
img { max-width: 100%; height: auto; background: #fff }
h2 { font-size: 1.1rem }
</style></head><body><main><h1>$title</h1>
$body
</main></body></html>
""")


def page(folder, results):
    """report.html as text: all tables and pictures on one page, nothing loaded from elsewhere."""
    body = [f'<p class="note">{html.escape(text)}</p>' for text in notes(results)]
    for caption, picture, rows in tables(results):
        caption, path = html.escape(caption), Path(folder, f"{picture}.png")
        body.append(f"<section><h2>{caption}</h2>")
        if path.is_file():
            data = base64.b64encode(path.read_bytes()).decode()
            body.append(f'<img alt="drawn: {caption}" src="data:image/png;base64,{data}">')
        opened = " open" * (rows[0][0] != "class")  # there may be 171 classes
        body.append(f"<details{opened}><summary>table</summary><div><table>")
        for row in rows:
            mark = ' class="run"' * row[0].startswith(RUN)
            cells = "".join(f"<td>{html.escape(text)}</td>" for text in row)
            body.append(f"<tr{mark}>{cells}</tr>")
        body.append("</table></div></details></section>")
    return PAGE.substitute(title=html.escape(title(results)), body="\n".join(body))


# ---- colours ----------------------------------------------------------------------------------

# Okabe and Ito's colours, which stay apart for colour-blind eyes; black comes first.
OKABE_ITO = "#000000 #e69f00 #56b4e9 #009e73 #f0e442 #0072b2 #d55e00 #cc79a7".split()
GREY = (150, 150, 150)  # the background in legends


def palette(n):
    """n colours (r, g, b): Okabe and Ito's seven, then paler and darker ones of them, which differ
    in lightness and so for every eye."""
    colours = []
    for k in range(n):
        base = np.array(ImageColor.getrgb(OKABE_ITO[1 + k % 7]))
        shade = 0.8 - 1.6 * ((k // 7 * 0.618 + 0.5) % 1)  # 0 first; -0.8 is dark, 0.8 pale
        colours.append(base + (abs(shade) * (255 * (shade > 0) - base)).astype(int))
    return [tuple(colour.tolist()) for colour in colours]


def heat(values):
    """A PIL picture of values [h, w] in 0..1: brighter is higher, to every eye (as viridis)."""
    grey = Image.fromarray((255 * values).astype(np.uint8))
    return ImageOps.colorize(grey, "#440154", "#fde725", "#21918c")


def colour(indices, colours):
    """uint8 [h, w, 3] of class indices [h, w]; what has no colour (ignored) is white."""
    table = np.full((max(256, len(colours), indices.max(initial=0) + 1), 3), 255, dtype=np.uint8)
    table[: len(colours)] = colours
    return table[indices]


# ---- words and sheets -------------------------------------------------------------------------


@functools.cache
def font(size):
    """A font of the system with many letters, where one is found; else Pillow's own."""
    for name in ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:  # not on this system
            continue
    return ImageFont.load_default(size)


def put_text(draw, xy, text, size, fill="black", width=math.inf, **options):
    """Draws text in one line, cut to `width` pixels."""
    text = files.printable(" ".join(text.split()))
    while len(text) > 3 and font(size).getlength(text) > width:
        text = text.removesuffix("...")[:-1] + "..."
    draw.text(xy, text, fill, font(size), **options)


def deepest(region):
    """(y, x) as far inside a region bool [h, w] as any, and how far: its rim is peeled off until
    nothing is left."""
    left, depth = ImageOps.expand(Image.fromarray(region.astype(np.uint8)), 1, 0), 0
    while left.getbbox():
        last, left, depth = left, left.filter(ImageFilter.MinFilter(3)), depth + 1
    places = np.argwhere(np.asarray(last)) - 1
    return places[len(places) // 2].tolist(), depth


def draw_names(picture, indices, names, size=14):
    """Writes each class's name where its region is widest, if that is as high as the letters, and
    no name of a wider region is in the way.

    indices: class per pixel [h, w], of the picture's size; those without a name get none.
    """
    step = max(indices.shape) // 128 + 1  # a coarser map is quick, and as good to find the place
    small, done, draw = indices[::step, ::step], [], ImageDraw.Draw(picture)
    present = set(np.unique(small).tolist()) & set(range(len(names)))
    places = [(*deepest(small == k), names[k]) for k in present]
    for (y, x), depth, name in sorted(places, key=lambda place: -place[1]):
        half = font(size).getlength(name) / 2 + 2
        x, y = max(min(step * x, picture.width - half), half), step * y  # the whole name is inside
        free = all(abs(x - a) > half + b or abs(y - c) > size for a, b, c in done)
        if free and 2 * depth * step > size:
            done.append((x, half, y))
            rim = {"anchor": "mm", "stroke_width": 2, "stroke_fill": "black"}
            put_text(draw, (x, y), name, size, "white", **rim)


def fit(picture, side=CELL, method=Image.Resampling.NEAREST):
    """A picture (PIL, or uint8 array) whose longer side is `side` pixels, by default without new
    colours."""
    picture = Image.fromarray(np.asarray(picture))
    scale = side / max(picture.size) if side else 1
    return picture.resize([max(round(length * scale), 1) for length in picture.size], method)


def sheet(rows, titles=(), legend=(), heading="", side=CELL, size=14):
    """A PIL picture of captioned cells, a heading above and a legend below them.

    rows: lists of PIL images or uint8 arrays, made `side` pixels large (None: left as they are).
    titles: the words above a row, a list for each row, or one text a column for the first.
    legend: (name, colour) pairs. size: of the letters, in pixels.
    """
    rows = [[fit(c, side) for c in row] for row in rows]
    titles = [titles] if titles and isinstance(titles[0], str) else titles
    line, step = size + 4, GAP + max(c.width for row in rows for c in row)
    width = max(GAP + step * max(map(len, rows)), 480)
    height = sum(c.height + line + GAP for row in rows for c in row) + line * (len(legend) + 2)
    canvas = Image.new("RGB", (width, height), "white")  # cut to what was needed in the end
    draw, x, y = ImageDraw.Draw(canvas), GAP, GAP + line * bool(heading)
    put_text(draw, (GAP, GAP // 2), heading, size, width=width - 2 * GAP)
    for row, words in zip_longest(rows, titles, fillvalue=()):
        for k, (c, text) in enumerate(zip_longest(row, words, fillvalue="")):
            put_text(draw, (GAP + k * step, y), text, size, width=step - GAP)
            canvas.paste(c, (GAP + k * step, y + line))
        y += line + max(c.height for c in row) + GAP
    for name, fill in legend:
        length = font(size).getlength(name) + 2 * line
        if x > GAP and x + length > width:
            x, y = GAP, y + line
        draw.rectangle((x, y, x + size, y + size), fill, "black")
        put_text(draw, (x + line, y), name, size, width=width - x - line - GAP)
        x += length
    return canvas.crop((0, 0, width, y + (line + GAP) * bool(legend)))


def write_sheet(path, dataset, pictures, note=""):
    """A PNG of rows image / label / prediction with names, and a legend.

    pictures: (image uint8 [h, w, 3], label [h, w], prediction [h, w]). note: words for the heading.
    """
    rows, present = [], set()
    for image, *maps in pictures:
        rows.append([fit(image, method=Image.Resampling.BILINEAR)])
        for indices in maps:
            present |= set(np.unique(indices).tolist()) & set(range(len(dataset.classes)))
            indices = np.asarray(fit(indices.astype(np.int32)))
            rows[-1].append(Image.fromarray(colour(indices, dataset.palette)))
            draw_names(rows[-1][-1], indices, dataset.classes, 18)
    legend = [(dataset.classes[k], tuple(dataset.palette[k])) for k in sorted(present)]
    top = heading(dataset.name, {"images": len(dataset), "full": dataset.full}) + note
    titles = ["image", "label (white: ignored)", "prediction"]
    files.save_png(path, sheet(rows, titles, legend, top, size=18))


# ---- confusion --------------------------------------------------------------------------------


def draw_confusion(matrix, classes):
    """A picture of a confusion matrix [n, n]: rows are labels, columns predictions, each as a share
    of its row."""
    side, room = max(min(2000 // len(classes), 30), 1), 150  # pixels of a cell, and of a name
    size = side * len(classes)
    names = Image.new("RGB", (room, size), "white")
    for k, name in enumerate(classes if side > 7 else ()):  # else they could not be read
        place = room - 4, (k + 0.5) * side
        put_text(ImageDraw.Draw(names), place, name, min(side, 14), width=room - 8, anchor="rm")
    canvas = Image.new("RGB", (room + size, room + size), "white")
    canvas.paste(names, (0, room))
    canvas.paste(names.rotate(90, expand=True), (room, 0))
    canvas.paste(
        fit(heat(matrix / np.maximum(matrix.sum(1, keepdims=True), 1)), size), (room, room)
    )
    text = "rows: labels, columns: predictions, bright: most of the row"
    return sheet([[canvas]], [text], side=None)


def write_csv(path, matrix, classes):
    """IoU and accuracy of every class in percent, empty for one that does not occur."""
    hit, label = matrix.diagonal(), matrix.sum(1)
    text, whole = io.StringIO(), np.stack([label + matrix.sum(0) - hit, label])  # [2, n]
    values = np.where(whole > 0, (100 * hit / np.maximum(whole, 1)).round(4), "")
    lines = [("class", "iou", "accuracy"), *zip(classes, *values, strict=True)]
    csv.writer(text, lineterminator="\n").writerows(lines)
    files.write_text(path, text.getvalue())


def write_confusion(folder, name, matrix, classes):
    """NAME.confusion.png, NAME.confusion.npy and NAME.csv of a matrix of counts int64 [n, n]."""
    matrix, path, stream = np.asarray(matrix), Path(folder, name), io.BytesIO()
    np.save(stream, matrix)
    files.write_whole(f"{path}.confusion.npy", lambda file: file.write_bytes(stream.getvalue()))
    files.save_png(f"{path}.confusion.png", draw_confusion(matrix, classes))
    write_csv(f"{path}.csv", matrix, classes)


# ---- radar ------------------------------------------------------------------------------------

STYLES = dict(zip((*TABLE_1, RUN), (OKABE_ITO[k] for k in (2, 5, 1, 7, 3, 6, 0)), strict=True))
SCALE = 3  # the radar is drawn this much larger, then reduced, so its lines are smooth
CENTRE = 1050 + 960j  # pixels, x + iy
AXES = 660 * np.exp(2j * np.pi * (np.arange(9) / 8 - 0.25))  # upwards, clockwise, closed


def radar(results):
    """A picture like Figure 1b: the paper's rows and this run; None with fewer than three of the
    eight sets.

    Each axis goes from 0 in the middle to the best of its rows. Where this run has no number, its
    line has a gap.
    """
    entries = [results["datasets"].get(name) for name in COLUMNS]
    rows = [*TABLE_1.values(), [r and r["miou"] for r in entries]]
    table = np.array([[*row[:8], row[0]] for row in rows], float)  # [7, 9], nan for None
    if np.isfinite(table[-1, :8]).sum() < 3:
        return None
    best = np.nanmax(table, 0)
    picture = Image.new("RGB", (2100, 1950), "white")
    draw = ImageDraw.Draw(picture)
    for name, r, top, z in zip(TITLES, entries, best, CENTRE + 1.25 * AXES, strict=False):
        text = (marked(r, r["miou"]) or "no number") if r else "not run"
        text = f"{name}\n{text}\nbest {top:.1f}"
        draw.text((z.real, z.imag), text, "black", font(54), "mm", align="center")
    lines = [("#cccccc", np.ones(9)), *zip(STYLES.values(), table / best, strict=True)]
    for fill, shares in lines:
        ends = CENTRE + shares * AXES
        for a, b in zip(ends, ends[1:], strict=False):
            if np.isfinite(a):
                draw.regular_polygon((a.real, a.imag, 15), 24, 0, fill)
            if np.isfinite(a + b):
                draw.line([a.real, a.imag, b.real, b.imag], fill, 9)
    run = run_name(results) + " (partial)" * any(r and is_partial(r) for r in entries)
    names = [f"{name} (paper)".replace("†", "-dagger") for name in TABLE_1]  # few fonts have it
    legend = list(zip([*names, run], STYLES.values(), strict=True))
    top = "mIoU, each axis from 0 to its best row"
    return sheet([[picture.reduce(SCALE)]], [], legend, top, None, 18)


# ---- training ---------------------------------------------------------------------------------


def write_log(record, out, bar):
    """A plain line above the bar, one in OUT/log.jsonl. record: plain values, bad: {reason: n}."""
    flat = dict(record)
    if "bad" in flat:
        flat["bad"] = {reason: n for reason, n in record["bad"].items() if n} or 0
    if "eta_seconds" in flat:
        flat["eta"] = timedelta(seconds=flat.pop("eta_seconds"))
    words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in flat.items()]
    bar.write("  ".join(words), sys.stdout)
    valid = json.loads(json.dumps(record), parse_constant=lambda nan: None)  # JSON has no NaN
    with open(Path(out, "log.jsonl"), "a") as file:
        file.write(json.dumps(valid) + "\n")


def write_samples(path, images, masks, captions):
    """A PNG of training pairs, dark where a mask is low: the image, under its own caption's mask,
    under the next one's.

    images: float [n, 3, h, w] in 0..1. masks: [n, n, h, w], of image i and caption j. On the CPU.
    """
    rows, titles = [], []
    for i, image in enumerate(images):
        j = (i + 1) % len(images)
        titles.append(["image", f"+ {captions[i]}", f"- {captions[j]}"])
        shown = [255 * image * (0.1 + 0.9 * mask) for mask in (1, masks[i, i], masks[i, j])]
        rows.append([x.byte().permute(1, 2, 0).numpy() for x in shown])  # [h, w, 3]
    files.save_png(path, sheet(rows, titles, side=224))


def log_step(line):
    """The step of a line of log.jsonl; infinite for a line that a kill has cut off."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


PANELS = {  # of loss.png: what shares one scale
    "losses": "loss gcl_v gcl_f cl",
    "area": "area_pos area_neg",
    "total variation": "tv_mask tv_dense",
    "gradient norm": "grad_norm",
    "mIoU": "miou",
}


def curves(series, width=480, height=200):
    """A picture of curves with numbered axes. series: {name: [n, 2] of step and value}."""
    picture, points = Image.new("RGB", (width, height), "white"), np.concatenate([*series.values()])
    low, high = points.min(0), points.max(0)
    span = np.maximum(high - low, 0.01 * np.abs(high) + 1e-9)  # rounding is no slope
    corner, far = np.array((60, height - 20)), np.array((width - 20, 24))  # of the axes, in pixels
    draw = ImageDraw.Draw(picture)
    for share in np.linspace(0, 1, 5):
        (x, y), (step, value) = corner + share * (far - corner), low + share * span
        draw.line([x, corner[1], x, far[1]], "#dddddd")
        draw.line([corner[0], y, far[0], y], "#dddddd")
        put_text(draw, (x, corner[1] + 5), f"{step:.0f}", 12, anchor="mt")
        put_text(draw, (corner[0], y), f"{value:.3g} ", 12, anchor="rm")
    for k, (name, values) in enumerate(series.items()):
        places = corner + (values - low) / span * (far - corner)
        draw.line(places.ravel().tolist(), OKABE_ITO[k], 2)  # [n, 2] -> [2 n]
        put_text(draw, (60 + 90 * k, 2), name, 14, OKABE_ITO[k])
    return picture


def write_curves(path, log):
    """A PNG of what train.py's log.jsonl says over the steps, a scale for each kind of term."""
    lines = [text for text in Path(log).read_text().splitlines() if log_step(text) < math.inf]
    lines, rows, titles = [json.loads(text) for text in lines], [], []
    for title, names in PANELS.items():
        series = {}
        for name in names.split():
            points = [(x["step"], x[name]) for x in lines if x.get(name) is not None]
            series |= {name: np.array(points, float)} if points else {}  # [n, 2]
        if series:
            rows.append([curves(series)])
            titles.append([title])
    if rows:
        files.save_png(path, sheet(rows, titles, side=None))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="what evaluate.py --out wrote: results.json, sheets"
    )
    sys.exit(files.command(main, parser.parse_args()))
