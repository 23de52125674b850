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
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont, ImageOps

import files

ROWS = 6  # images on a picture sheet
CELL = 256  # pixels of a cell's longer side
GAP = 8  # pixels between cells
COLUMNS = "voc context coco_object voc20 context59 coco_stuff cityscapes ade20k".split()
TITLES = "VOC Context Object VOC20 Context59 Stuff City ADE".split()
# The paper's figures: mIoU in percent in the order of COLUMNS, then the average.
TABLE_1 = json.loads("""{
"GroupViT (YFCC)": [49.5, 19.0, 24.3, 74.1, 20.8, 12.6, 6.9, 8.7, 27.0],
"GroupViT (RedCaps)": [50.4, 18.7, 27.5, 79.7, 23.4, 15.3, 11.1, 9.2, 29.4],
"MaskCLIP†": [29.3, 21.1, 15.5, 53.7, 23.3, 14.7, 21.6, 10.8, 23.7],
"MaskCLIP": [38.8, 23.6, 20.6, 74.9, 26.4, 16.4, 12.6, 9.8, 27.9],
"ReCo": [25.1, 19.9, 15.7, 57.7, 22.3, 14.8, 21.1, 11.2, 23.5],
"GCL": [55.0, 30.4, 31.6, 83.2, 33.9, 22.4, 24.0, 17.1, 37.2]
}""")
# GCL without PAMR, as TLH-CLIP and DeCLIP print it, from one source; its average is their own.
WITHOUT_PAMR = "51.2 24.3 30.4 77.5 30.3 19.6 23.1 14.9 33.9".split()
# Of some classes alone: VOC20, Context59, COCO-Stuff, then the average.
TABLE_3 = json.loads("""{
"ViL-Seg": [34.4, 16.3, 16.4, 22.4],
"ReCo": [57.9, 32.0, 18.4, 36.1],
"GroupViT (RedCaps)": [79.0, 49.2, 16.1, 48.1],
"MaskCLIP": [73.0, 56.5, 21.9, 50.5],
"GCL": [84.5, 62.0, 27.6, 58.0]
}""")
RUN = "this run"
ACCURACIES = "pixel_accuracy", "mean_accuracy", "fw_iou"


# ---- results.json -----------------------------------------------------------------------------


def write_results(folder, results):
    """results.json of one run, or of the part of it that is done, and all that shows it:
    results.md, radar.png (with three of the eight sets or more) and report.html."""
    files.write_text(f"{folder}/results.json", json.dumps(results, indent=1) + "\n")
    files.write_text(f"{folder}/results.md", markdown(results))
    Path(f"{folder}/radar.png").unlink(missing_ok=True)  # an earlier run's
    drawn = radar(results)
    if drawn:
        files.save_png(f"{folder}/radar.png", drawn)
    files.write_text(f"{folder}/report.html", page(folder, results))


def main(args):
    """Shows a results.json again; files.InputError where it is not one of evaluate.py's."""
    path = f"{args.FOLDER}/results.json"
    text = files.read_text(path)
    try:
        write_results(args.FOLDER, json.loads(text))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise files.InputError(f"{path}: not as evaluate.py writes it ({error!r})") from error


# ---- tables -----------------------------------------------------------------------------------


def is_partial(r):
    """Whether the entry of a set covers only some of its images."""
    return r["full"] not in (None, r["images"])


def heading(name, r):
    """A set's name, with a mark where not all of its images are there."""
    return name + f" (partial: {r['images']} of {r['full']} images)" * is_partial(r)


def number(value, *entries):
    """A figure, with a mark where it comes from sets of which one is partial; empty for None."""
    if value is None:
        return ""
    return f"{value:.1f}" + " (partial)" * any(map(is_partial, entries))


def notes(results):
    """What must be read before any number."""
    settings = results["settings"]
    protocol = settings.get("unified_protocol")
    partial = [name for name, r in results["datasets"].items() if is_partial(r)]
    if protocol is False:
        yield "Outside the unified protocol: do not compare these numbers with the paper's."
    if protocol is None:
        yield "Protocol not known: nothing records whether this run kept to it."
    if settings.get("clip", {}).get("pretrained") == "random":
        yield "Random weights: these numbers mean nothing."
    if partial:
        yield f"Partial: only some of the images of {', '.join(partial)}."


def beside(results, paper, columns, field):
    """A table of the paper's rows and this run's; the average stands where every set is there."""
    entries = [results["datasets"].get(name) for name in COLUMNS[columns]]
    cells = [number(r[field], r) if r else "" for r in entries]
    average = np.mean([r[field] for r in entries]) if all(cells) else None
    rows = [(name, *map(number, values)) for name, values in paper.items()]
    run = RUN + " (outside the protocol)" * (results["settings"].get("unified_protocol") is False)
    mine = run, *cells, number(average, *entries)
    return [("method", *TITLES[columns], "Avg."), *rows, mine] if any(cells) else []


def tables(results):
    """(caption, name of the picture beside it, rows, header first) of all that there is."""
    sets = results["datasets"]
    table_1 = beside(results, TABLE_1, slice(8), "miou")
    table_3 = beside(results, TABLE_3, slice(3, 6), "partial_miou")
    if table_1:
        yield "Table 1 (the paper's figures)", "radar", table_1
    if table_3:
        yield "Table 3 (the paper's figures)", "", table_3
    rows = [
        (name, number(r["miou"], r), f"{r['images']} of {r['full'] or r['images']}")
        for name, r in sets.items()
    ]
    yield "All sets of this run", "", [("set", "mIoU", "images"), *rows]
    settings = (map(str, pair) for pair in results["settings"].items())
    yield "Settings", "", [("setting", "value"), *settings]
    for name, r in sets.items():
        whole = [(key.replace("_", " "), r.get(key)) for key in ACCURACIES]
        sweep = [
            (f"mIoU at threshold {t} (a diagnostic)", x) for t, x in r.get("sweep", {}).items()
        ]
        figures = [("mIoU", r["miou"]), *whole, *sweep, *r["iou"].items()]
        rows = [(key, number(value, r)) for key, value in figures]
        yield heading(name, r), name, [("class", "IoU"), *rows]


def cell(text):
    """Any text as one cell of a markdown table."""
    return re.sub(r"([|\\`*_\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def markdown(results):
    """results.md as text: notes and tables."""
    parts = ["# mIoU", *("**" + cell(text).replace(":", "**:", 1) for text in notes(results))]
    for caption, _, rows in tables(results):
        lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
        lines.insert(1, "|---" * len(rows[0]) + "|")
        parts += [f"## {cell(caption)}", "\n".join(lines).replace(f"| {RUN}", f"| **{RUN}**")]
    return "\n\n".join(parts) + "\n"


# ---- page -------------------------------------------------------------------------------------

HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mIoU</title><style>
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #ccc; --soft: #f2f2f2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #161616; --line: #444; --soft: #252525 }
}
body { margin: 0 auto; padding: 1rem; max-width: 60rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
.note { border-left: 4px solid #d55e00; padding: .3rem .8rem; background: var(--soft) }
div { overflow: auto; max-height: 80vh }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: right;
  white-space: nowrap; overflow-wrap: normal }
td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper);
  min-width: 7rem; white-space: normal }
tr:first-child { font-weight: bold }
img { max-width: 100%; height: auto; background: #fff }
h2 { font-size: 1.1rem }
</style></head><body><main><h1>mIoU</h1>"""


def page(folder, results):
    """report.html as text: all tables and pictures on one page, nothing loaded from elsewhere."""
    parts = [HEAD, *(f'<p class="note">{html.escape(text)}</p>' for text in notes(results))]
    for caption, picture, rows in tables(results):
        caption, path, image = html.escape(caption), Path(f"{folder}/{picture}.png"), ""
        if path.is_file():
            data = base64.b64encode(path.read_bytes()).decode()
            image = f'<img alt="drawn: {caption}" src="data:image/png;base64,{data}">'
        lines = "</td></tr>\n<tr><td>".join("</td><td>".join(map(html.escape, r)) for r in rows)
        table = f"<div><table><tr><td>{lines}</td></tr></table></div>"
        parts.append(f"<section><h2>{caption}</h2>{image}{table}</section>")
    return "\n".join(parts) + "</main></body></html>\n"


# ---- colours ----------------------------------------------------------------------------------

# Okabe and Ito's colours, which stay apart for colour-blind eyes; black comes first.
OKABE_ITO = "#000000 #e69f00 #56b4e9 #009e73 #f0e442 #0072b2 #d55e00 #cc79a7".split()
GREY = (150, 150, 150)  # the background in legends


def palette(n):
    """n colours (r, g, b): Okabe and Ito's seven, then darker ones of them, which differ in
    lightness and so for every eye."""
    colours = []
    for k in range(n):
        light = 1 - 0.8 * (k // 7 * 0.618 % 1)  # steps of the golden ratio stay apart
        base = ImageColor.getrgb(OKABE_ITO[1 + k % 7])
        colours.append(tuple(int(light * value) for value in base))
    return colours


def heat(values):
    """A PIL picture of values [h, w] in 0..1: brighter is higher, to every eye (as viridis)."""
    grey = Image.fromarray((255 * values).astype(np.uint8))
    return ImageOps.colorize(grey, "#440154", "#fde725", "#21918c")


def colour(indices, colours):
    """uint8 [h, w, 3] of class indices [h, w]; what has no colour (ignored) is white."""
    table = np.array([*colours, (255, 255, 255)], np.uint8)
    return table[np.minimum(indices, len(colours))]


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


def draw_names(picture, indices, names, size=14):
    """Writes each class's name where its region is widest, if that is as high as the letters, as
    wide as the picture at most, and no other name stands in the same lines.

    indices: class per pixel [h, w], of the picture's size; those without a name get none.
    """
    step = max(indices.shape) // 128 + 1  # a coarser map is quick, and as good to find the place
    none, draw = len(names), ImageDraw.Draw(picture)
    small = np.pad(indices[::step, ::step], 1, constant_values=none)
    letters = ImageFilter.MinFilter(size // step // 2 * 2 + 1)
    for k in np.unique(small[small < none]):
        name, places = names[k], []
        room = Image.fromarray(small == k).filter(letters)  # where letters have room around them
        while room.getbbox():  # its rim is peeled off until nothing is left
            places, room = np.argwhere(room), room.filter(ImageFilter.MinFilter(3))
        half = font(size).getlength(name) / 2 + 2
        if name and len(places) and 2 * half < picture.width:
            y, x = places[len(places) // 2]
            small[abs(np.arange(len(small)) - y) * step <= size / 2] = none  # now taken
            xy = np.clip(step * x, half, picture.width - half), step * y  # the whole name is inside
            put_text(
                draw, xy, name, size, "white", anchor="mm", stroke_width=2, stroke_fill="black"
            )


def fit(picture, side=CELL, method=Image.Resampling.NEAREST):
    """A picture (PIL, or uint8 array) whose longer side is `side` pixels, by default without new
    colours."""
    picture = Image.fromarray(np.asarray(picture))
    size = [max(round(length * side / max(picture.size)), 1) for length in picture.size]
    return picture.resize(size, method)


def sheet(rows, titles=(), legend=(), heading="", size=14):
    """A PIL picture of captioned cells, a heading above and a legend below them.

    rows: lists of PIL images. titles: the words above each of them, as far as they reach.
    legend: (name, colour) pairs. size: of the letters, in pixels.
    """
    titles, line, strips = iter(titles), size + 4, []
    step = GAP + max(c.width for row in rows for c in row)
    width = max(GAP + step * max(map(len, rows)), 480)

    def strip(height):  # a new one below the others
        strips.append(Image.new("RGB", (width, height), "white"))
        return ImageDraw.Draw(strips[-1])

    put_text(strip(GAP + line * bool(heading)), (GAP, 4), heading, size, width=width - GAP)
    for row in rows:
        draw = strip(line + max(c.height for c in row) + GAP)
        for k, c in enumerate(row):
            put_text(draw, (GAP + k * step, 0), next(titles, ""), size, width=step - GAP)
            strips[-1].paste(c, (GAP + k * step, line))
    for name, fill in legend:
        draw = strip(line)
        draw.rectangle((GAP, 0, GAP + size, size), fill, "black")
        put_text(draw, (GAP + line, 0), name, size, width=width - 2 * line)
    return Image.fromarray(np.concatenate(strips))


def write_sheet(path, dataset, pictures):
    """A PNG of rows image / label / prediction with names, and a legend.

    pictures: (image uint8 [h, w, 3], label [h, w], prediction [h, w]).
    """
    rows, present = [], set()
    for image, *maps in pictures:
        cells = [fit(image, method=Image.Resampling.BILINEAR)]
        for indices in maps:
            indices = np.asarray(fit(indices.astype(np.int32)))
            cells.append(Image.fromarray(colour(indices, dataset.palette)))
            draw_names(cells[-1], indices, dataset.classes, 18)
            present.update(indices[indices < len(dataset.classes)])
        rows.append(cells)
    legend = [(dataset.classes[k], tuple(dataset.palette[k])) for k in sorted(present)]
    titles = "image, label (white: ignored), prediction".split(", ")
    top = heading(dataset.name, {"images": len(dataset), "full": dataset.full})
    files.save_png(path, sheet(rows, titles, legend, top, size=18))


# ---- confusion --------------------------------------------------------------------------------


def draw_confusion(matrix, classes):
    """A picture of a confusion matrix [n, n]: rows are labels, columns predictions, each as a share
    of its row."""
    side, room = max(2000 // max(len(classes), 66), 1), 150  # pixels of a cell, and of a name
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    cells = fit(heat(shares), side * len(classes))
    canvas = ImageOps.expand(cells, (room, room, 0, 0), "white")
    for k, name in enumerate(classes):
        place = room - 4, room + (k + 0.5) * side
        put_text(ImageDraw.Draw(canvas), place, name, min(side, 14), width=room - 8, anchor="rm")
    names = canvas.crop((0, room, room, canvas.height))
    canvas.paste(names.rotate(90, expand=True), (room, 0))
    return sheet([[canvas]], heading="rows: labels, columns: predictions, bright: most of a row")


def write_confusion(folder, name, matrix, classes):
    """NAME.confusion.png, NAME.confusion.npy of a matrix of counts int64 [n, n], and NAME.csv: IoU
    and accuracy of every class in percent, empty for one that does not occur."""
    path, stream, text = f"{folder}/{name}", io.BytesIO(), io.StringIO()
    np.save(stream, matrix)
    files.write_bytes(f"{path}.confusion.npy", stream.getvalue())
    files.save_png(f"{path}.confusion.png", draw_confusion(matrix, classes))
    hit, label = matrix.diagonal(), matrix.sum(1)
    whole = np.stack([label + matrix.sum(0) - hit, label])  # [2, n]
    values = np.where(whole, (100 * hit / np.maximum(whole, 1)).round(4), "")
    csv.writer(text, lineterminator="\n").writerows(zip(classes, *values, strict=True))
    files.write_text(f"{path}.csv", "class,iou,accuracy\n" + text.getvalue())


# ---- radar ------------------------------------------------------------------------------------

STYLES = "#56b4e9 #0072b2 #e69f00 #cc79a7 #009e73 #d55e00 #000000".split()  # TABLE_1, this run
CENTRE = 1050 + 960j  # x + iy, in pixels of a picture three times as large: its lines get smooth


def radar(results):
    """A picture like Figure 1b: Table 1 and this run, an axis for each set that has a number, from
    0 in the middle to its best row; None with fewer than three."""
    found = zip(*beside(results, TABLE_1, slice(8), "miou"), strict=True)
    columns = [column for column in found if column[-1] and column[0] != "Avg."]
    if len(columns) < 4:  # names, then sets
        return None
    (_, *names), *columns = columns
    table = np.array([[float(text[:4]) for text in column[1:]] for column in columns])
    best, n = table.max(1), len(columns)  # table [n, 7]
    axes = -660j * np.exp(2j * np.pi * np.arange(n) / n)  # x + iy, from the top, clockwise
    picture = Image.new("RGB", (2100, 1950), "white")
    draw = ImageDraw.Draw(picture)
    for (name, *_, mine), top, z in zip(columns, best, CENTRE + 1.25 * axes, strict=True):
        text = f"{name}\n{mine}\nbest {top:.1f}"
        draw.text((z.real, z.imag), text, "black", font(54), "mm", align="center")
    for fill, values in zip(STYLES, table.T, strict=True):
        ends = (CENTRE + values / best * axes).view(float)  # [2 n]: x, y, x, y, ...
        draw.line([*ends, *ends[:4]], fill, 12, "curve")  # closed, and round at the first too
    words = "mIoU, each axis from 0 to its best"
    return sheet([[picture.reduce(3)]], [], zip(names, STYLES, strict=True), words, size=18)


# ---- training ---------------------------------------------------------------------------------


def write_log(record, out, bar):
    """A plain line above the bar, one in OUT/log.jsonl. record: plain values, bad: {reason: n}."""
    shown = dict(record)
    if "eta_seconds" in record:  # of a step, not of an evaluation
        shown["eta"] = timedelta(seconds=shown.pop("eta_seconds"))
        shown["bad"] = sum(record["bad"].values())  # log.jsonl has the reasons
    words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()]
    bar.write("  ".join(words), sys.stdout)
    with open(f"{out}/log.jsonl", "a") as file:  # JSON has no NaN
        file.write(re.sub("NaN|-?Infinity", "null", json.dumps(record)) + "\n")


def write_samples(path, images, masks, texts, norm):
    """A PNG of training pairs, dark where a mask is low: the image, under its own caption's mask,
    under that of the pair before.

    images: float [n, 3, h, w], norm: their mean and std. masks: [n, n, h, w], of image i and text
    j. texts: as decoded, captions between the tokenizer's marks. On the CPU.
    """
    texts = [text.split("<end_of_text>")[0].removeprefix("<start_of_text>") for text in texts]
    mean, std = np.reshape(norm, (2, 3, 1, 1))  # [3, 1, 1] each
    rows, titles, masks = [], [], masks.numpy()
    for i, image in enumerate((images.numpy() * std + mean).clip(0, 1)):
        titles += ["image", f"+ {texts[i].strip()}", f"- {texts[i - 1].strip()}"]
        shown = 255 * image, 255 * image * masks[i, i], 255 * image * masks[i, i - 1]
        # [h, w, 3]
        rows.append([fit(x.astype(np.uint8).transpose(1, 2, 0), 224) for x in shown])
    files.save_png(path, sheet(rows, titles))


def log_step(line):
    """The step of a line of log.jsonl; infinite for a line that a kill has cut off."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


# Of loss.png: what shares one scale.
PANELS = "loss gcl_v gcl_f cl, area_pos area_neg, tv_mask tv_dense, grad_norm, miou".split(", ")


def curves(series):
    """A picture of curves with numbered axes. series: {name: [n, 2] of step and value}.

    The axes are 400 pixels wide and 156 high, their origin at (60, 180).
    """
    picture, points = Image.new("RGB", (480, 210), "white"), np.concatenate([*series.values()])
    low, span = points.min(0), np.ptp(points, 0) + 1e-9
    draw = ImageDraw.Draw(picture)
    for share in np.linspace(0, 1, 5):
        y = 180 - 156 * share
        step, value = low + share * span
        draw.line([60, y, 460, y], "#dddddd")
        put_text(draw, (60 + 400 * share, 190), f"{step:.0f}", 12, anchor="mt")
        put_text(draw, (60, y), f"{value:.3g} ", 12, anchor="rm")
    for k, (name, values) in enumerate(series.items()):
        places = (60, 180) + (values - low) / span * (400, -156)  # [n, 2]
        draw.line([*places.ravel()], OKABE_ITO[k], 2)
        put_text(draw, (60 + 90 * k, 2), name, 14, OKABE_ITO[k])
    return picture


def write_curves(path, log):
    """A PNG of what train.py's log.jsonl says over the steps, a scale for each kind of term."""
    series, panels = {}, []
    for text in files.read_text(log).splitlines():
        if log_step(text) < math.inf:
            for name, value in json.loads(text).items():
                if value is not None:
                    series.setdefault(name, []).append((log_step(text), value))
    for names in PANELS:
        found = {name: np.array(series[name]) for name in names.split() if name in series}
        if found:
            panels.append([curves(found)])  # of [n, 2] each
    if panels:
        files.save_png(path, sheet(panels))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("FOLDER", help="what evaluate.py --out wrote: results.json, sheets")
    sys.exit(files.command(main, parser.parse_args()))
