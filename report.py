# SPDX-License-Identifier: MIT
"""Renders the results of evaluate.py: results.json, results.md with the paper's rows beside, one picture sheet per set.

python report.py results        # renders results/results.md again from results/results.json
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROWS = 6  # images on a picture sheet
CELL = 224  # pixels of a picture's longer side
COLUMNS = ("voc", "context", "coco_object", "voc20", "context59", "coco_stuff", "cityscapes", "ade20k")
TITLES = ("VOC", "Context", "Object", "VOC20", "Context59", "Stuff", "City", "ADE")
TABLE_1 = {  # the paper's figures, mIoU in percent, in the order of COLUMNS, then the average
    "GroupViT (YFCC)": (49.5, 19.0, 24.3, 74.1, 20.8, 12.6, 6.9, 8.7, 27.0),
    "GroupViT (RedCaps)": (50.4, 18.7, 27.5, 79.7, 23.4, 15.3, 11.1, 9.2, 29.4),
    "MaskCLIP-dagger": (29.3, 21.1, 15.5, 53.7, 23.3, 14.7, 21.6, 10.8, 23.7),
    "MaskCLIP": (38.8, 23.6, 20.6, 74.9, 26.4, 16.4, 12.6, 9.8, 27.9),
    "ReCo": (25.1, 19.9, 15.7, 57.7, 22.3, 14.8, 21.1, 11.2, 23.5),
    "GCL": (55.0, 30.4, 31.6, 83.2, 33.9, 22.4, 24.0, 17.1, 37.2),
}


def write_text(path, text):
    """Whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_results(folder, results):
    """results.json and results.md of one run, or of the part of it that is done."""
    write_text(Path(folder, "results.json"), json.dumps(results, indent=1) + "\n")
    write_text(Path(folder, "results.md"), markdown(results))


def row(name, cells):
    return f"| {name} | " + " | ".join(cells) + " |"


def number(value):
    return "" if value is None else f"{value:.1f}"


def markdown(results):
    """The run beside the paper's Table 1 where it has benchmarks; its own sets; IoU per class."""
    settings, sets = results["settings"], results["datasets"]
    lines = [f"# mIoU, {settings['method'] or settings['predictions']}", ""]
    if settings["unified_protocol"] is False:
        lines += [
            "**Outside the unified protocol**: these settings differ from it, so do not compare with the paper.",
            "",
        ]
    partial = [name for name, r in sets.items() if r["images"] != (r["full"] or r["images"])]
    if partial:
        lines += [f"**Partial**: only some of the images of {', '.join(partial)}.", ""]
    lines += [f"`{json.dumps(settings)}`", ""]
    if any(name in COLUMNS for name in sets):
        lines += table_1(sets, partial)
    lines += [
        row("set", ("mIoU", "images", "mIoU of Table 3's classes", "best of the sweep (diagnostic)")),
        "|---" * 5 + "|",
    ]
    for name, r in sets.items():
        best = max(r["sweep"].items(), key=lambda item: item[1]) if "sweep" in r else None
        sweep = "" if best is None else f"{best[1]:.1f} at {best[0]}"
        mark = " (partial)" if name in partial else ""
        lines.append(row(name + mark, (number(r["miou"]), str(r["images"]), number(r["partial_miou"]), sweep)))
    for name, r in sets.items():
        lines += ["", f"## {name}", "", row("class", ("IoU",)), "|---|---|"]
        lines += [row(c, (number(v),)) for c, v in r["iou"].items()]
    return "\n".join(lines) + "\n"


def table_1(sets, partial):
    """This run under the rows of Table 1; an average only where all eight sets are there."""
    lines = [row("Table 1 (the paper's figures)", (*TITLES, "Avg.")), "|---" * (len(COLUMNS) + 2) + "|"]
    lines += [row(name, [f"{v:.1f}" for v in values]) for name, values in TABLE_1.items()]
    cells = [number(sets[c]["miou"]) + " (partial)" * (c in partial) if c in sets else "" for c in COLUMNS]
    whole = all(c in sets and sets[c]["miou"] is not None for c in COLUMNS)
    average = f"{np.mean([sets[c]['miou'] for c in COLUMNS]):.1f}{' (partial)' if partial else ''}" if whole else ""
    return [*lines, row("**this run**", (*cells, average)), ""]


# ---- pictures -------------------------------------------------------------------------------------------------------


def colour(indices, palette):
    """uint8 [h, w, 3] of class indices [h, w]; what lies outside the palette (ignored) is black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    return table[indices]


def fit(picture, nearest=False):
    """A PIL picture whose longer side is CELL pixels."""
    scale = CELL / max(picture.size)
    size = tuple(max(round(side * scale), 1) for side in picture.size)
    return picture.resize(size, Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR)


def write_sheet(path, dataset, pictures):
    """A PNG of rows image / label / prediction, with a legend of the classes that occur.

    pictures: (image uint8 [h, w, 3], label [h, w], prediction [h, w]).
    """
    present = sorted(set(np.concatenate([np.unique(m) for _, *maps in pictures for m in maps]).tolist()) - {255})
    font, gap, line = ImageFont.load_default(14), 8, 20
    per_row = 4
    legend = -(-len(present) // per_row) * line
    width = 3 * (CELL + gap) + gap
    sheet = Image.new("RGB", (width, line + gap + len(pictures) * (CELL + gap) + legend + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for k, title in enumerate(("image", "label (black: ignored)", "prediction")):
        draw.text((gap + k * (CELL + gap), 4), f"{dataset.name}: {title}" if k == 0 else title, "black", font)
    for r, (image, label, prediction) in enumerate(pictures):
        cells = [Image.fromarray(image), *(Image.fromarray(colour(m, dataset.palette)) for m in (label, prediction))]
        for k, cell in enumerate(cells):
            sheet.paste(fit(cell, nearest=k > 0), (gap + k * (CELL + gap), line + gap + r * (CELL + gap)))
    top = line + gap + len(pictures) * (CELL + gap)
    for i, k in enumerate(present):
        x, y = gap + (i % per_row) * (width // per_row), top + (i // per_row) * line
        draw.rectangle((x, y + 3, x + 12, y + 15), tuple(dataset.palette[k]), "black")
        draw.text((x + 18, y), dataset.classes[k].strip(), "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    sheet.save(temporary, format="PNG")
    os.replace(temporary, path)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "results.json").is_file():
        print("usage: python report.py FOLDER   (a folder with the results.json of evaluate.py)", file=sys.stderr)
        sys.exit(2)
    write_results(sys.argv[1], json.loads(Path(sys.argv[1], "results.json").read_text()))
