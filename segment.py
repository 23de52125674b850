# SPDX-License-Identifier: MIT
"""Segments your own pictures by any texts, as in Figure 4b of the paper; with every method that evaluate.py has.

    python segment.py photo.jpg "a boatman standing on a boat" moon sunset --checkpoint tcl.pth --out out/
    python segment.py holiday/ beach.png moon sunset --checkpoint runs/gcl/last.pt --no-background
    python segment.py photo.jpg moon sunset --method maskclip --json

Pictures come first, texts after them: every argument from the start that is a file or a folder is a picture or a folder
of pictures, and the first one that is neither is the first text. What looks like a path but does not exist, or could be
both, is an error and not a guess; --texts says it outright. For photo.jpg, OUT then holds
    photo.overlay.png     the labels over the grey photo, numbered, with a legend
    photo.labels.png      an index PNG with palette: 0 background, k the k-th text
    photo.1-a-boatman-standing-on-a-boat.png, ...   each text's soft mask as a heat map
Exit code 1: some pictures could not be segmented (each is named, the others are done); 2: a wrong call.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import backbone
import data
import evaluate
import files

SUFFIXES = (*data.IMAGE_SUFFIXES, ".bmp", ".gif", ".tif", ".tiff")  # of pictures in a folder
MAX_PIXELS, MAX_ASPECT, MAX_TEXTS = (
    50_000_000,
    100,
    254,
)  # a label PNG has 256 values, and 255 means ignored
VIEW = 640, 1600  # pixels of the longer side of overlays and heat maps, at least and at most
GREY = (150, 150, 150)  # the background in legends


# ---- colours that stay apart ----------------------------------------------------------------------------------------

# Okabe and Ito's palette, made to be told apart with every kind of colour vision (its black is left to the background).
OKABE_ITO = [
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
]
# Linear RGB as people with normal vision, protanopia and deuteranopia see it; Machado et al. 2009, severity 1.
VISION = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
    ]
)
XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)  # of linear sRGB, D65


def seen(colours):
    """CIELAB [3, n, 3] of RGB colours [n, 3] in 0..255, one for each of VISION: distances there are what eyes see."""
    c = np.asarray(colours, float) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    linear = (linear @ VISION.transpose(0, 2, 1)).clip(0, 1)  # [3, n, 3]
    t = linear @ XYZ.T / XYZ.sum(1)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def palette(n):
    """n colours for n texts: Okabe and Ito's seven, then always the one farthest from all before it, from black and
    from white, for the eye to which it is nearest. Returns a list of (r, g, b)."""
    grid = list(itertools.product(range(15, 256, 30), repeat=3))
    grid = [
        c for c, lab in zip(grid, seen(grid)[0], strict=True) if lab[0] > 20
    ]  # darker ones all look black
    lab, chosen = seen(grid), OKABE_ITO[:n]

    def distance(colour):
        return np.linalg.norm(lab - seen([colour]), axis=-1).min(0)  # [candidates]

    nearest = np.min(
        [distance(colour) for colour in [(0, 0, 0), (255, 255, 255), GREY, *chosen]], axis=0
    )
    while len(chosen) < n:
        chosen.append(grid[nearest.argmax()])
        nearest = np.minimum(nearest, distance(chosen[-1]))
    return chosen


VIRIDIS = [
    (68, 1, 84),
    (70, 50, 127),
    (54, 92, 141),
    (39, 127, 142),
    (31, 161, 135),
    (74, 194, 109),
    (160, 218, 57),
]
VIRIDIS += [(253, 231, 37)]


def heat(values):
    """Viridis colours uint8 [..., 3] of values in 0..1: brighter is higher, in print and to every eye."""
    stops = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(values, stops, channel) for channel in zip(*VIRIDIS, strict=True)]
    return np.stack(channels, -1).round().astype(np.uint8)


# ---- pictures in ----------------------------------------------------------------------------------------------------


def pixels(image):
    """uint8 [h, w, 3] of a PIL image or uint8 array of any mode, upright (EXIF), transparency over white.

    16-bit grey keeps its 8 high bits. Raises DataError for one that is too large, too narrow, or of float pixels.
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise files.InputError(
            f"{width}x{height} is more than {MAX_PIXELS // 10**6} million pixels; make it smaller"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise files.InputError(
            f"{width}x{height} is too narrow, sides may differ {MAX_ASPECT} times at most"
        )
    if image.mode == "F":
        raise files.InputError("has float pixels; convert it to 8 or 16 bits first")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def read_picture(path):
    """pixels() of a file; DataError names one that cannot be used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # pixels() has a limit of its own
            with Image.open(path) as image:
                return pixels(image)
    except Exception as error:  # each of PIL's decoders has its own; the picture is what is wrong
        raise files.InputError(
            f"{path}: not a picture that can be used ({files.first_line(error)})"
        ) from error


# ---- masks ----------------------------------------------------------------------------------------------------------


def protocol(**settings):
    """evaluate.py's arguments with these changes, checked as it checks them; ValueError says what is wrong."""
    flags = ["--datasets=-", "--out=."]
    for name, value in settings.items():
        flag = name.replace("_", "-")
        flags.append(
            f"--{flag}={value}"
            if not isinstance(value, bool)
            else f"--{flag}"
            if value
            else f"--no-{flag}"
        )
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            return evaluate.parse_args(flags)
        except SystemExit:
            raise ValueError(said.getvalue().strip().split("error: ", 1)[-1]) from None


def check_texts(texts):
    """The texts as a list; ValueError names one that is empty or the same as another."""
    known = {}
    for text in texts:
        key = " ".join(text.lower().split())  # as CLIP reads it
        if not key:
            raise ValueError("a text is empty")
        if key in known:
            raise ValueError(f"{text!r} is the same text as {known[key]!r}; give it once")
        known[key] = text
    if not 0 < len(known) <= MAX_TEXTS:
        raise ValueError(f"{len(known)} texts; give 1 to {MAX_TEXTS}")
    return list(texts)


def label(masks, size, threshold):
    """int64 [*size] from masks [K, h, w]: 0 where none exceeds the threshold, else the number of the text, from 1."""
    return evaluate.with_background(*evaluate.best_class(masks, size), threshold)


def resize(mask, size):
    """One mask [h, w] at another size, as the protocol resizes them."""
    return F.interpolate(mask[None, None], size=tuple(size), mode="bilinear", align_corners=False)[
        0, 0
    ]


def segment_image(net, image, texts, background=None, **settings):
    """Labels and soft masks of one picture for any texts, under the protocol of evaluate.py (Sec. 4.1).

    net: a GCL (gcl.load). image: a PIL image or a uint8 array, any size. texts: list of str. background: where no mask
    exceeds it, the label is 0; None for the protocol's threshold (0.4 refined, 0.5 not), False for no background.
    settings: of evaluate.py's flags, such as method="maskclip", pamr=False, kp_weight=0, short_side=448.
    Returns labels int64 [h, w], 0 for background and k for the k-th text, and masks float32 [K, h, w] in 0..1, both at
    the image's own (upright) size on the net's device. Raises ValueError for what cannot be segmented.
    """
    image, texts, args = pixels(image), check_texts(texts), protocol(**settings)
    if background is not None:
        args.bg_threshold = background if background is not False else -1.0  # every mask exceeds it
    text = net.encode_classes(
        texts, backbone.tokenizer_of(net.clip), evaluate.read_templates(args.templates)
    )  # [K, C]
    masks = evaluate.segment_image(net, image, text, args)  # [K, h', w'], the protocol's size
    size = image.shape[:2]
    return label(masks, size, args.bg_threshold), torch.stack(
        [resize(mask, size) for mask in masks]
    )


# ---- pictures out ---------------------------------------------------------------------------------------------------


def font(size):
    return ImageFont.load_default(size)


def short(text, length):
    """At most this many characters of a text, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: max(length - 3, 1)] + "..."


def view_size(height, width):
    """(height, width) at which a picture is looked at."""
    longer = max(height, width)
    scale = min(max(longer, VIEW[0]), VIEW[1]) / longer
    return max(round(height * scale), 1), max(round(width * scale), 1)


def grey_view(image):
    """The picture at its view size without its colours, float [h, w, 1]: all colours are then labels."""
    height, width = view_size(*image.shape[:2])
    return np.asarray(Image.fromarray(image).convert("L").resize((width, height)), np.float32)[
        ..., None
    ]


def framed(picture, above, below):
    """An RGB canvas with room above and below a picture uint8 [h, w, 3], and its pen."""
    height, width = picture.shape[:2]
    canvas = Image.new("RGB", (max(width, 480), above + height + below), "white")
    canvas.paste(Image.fromarray(picture), (0, above))
    return canvas, ImageDraw.Draw(canvas)


def middle(region):
    """(y, x) well inside a region, bool [h, w]: where most of the pixels around belong to it."""
    step = max(max(region.shape) // 160, 1)
    part = torch.from_numpy(region[::step, ::step]).float()[None, None]
    around = sum(F.avg_pool2d(part, k, 1, k // 2) for k in (5, 15, 31)) * part  # [1, 1, h, w]
    y, x = divmod(int(around.argmax()), part.shape[-1])
    return y * step, x * step


def draw_overlay(image, labels, texts, colours):
    """The labels uint8 [h, w] in colour over the grey picture, numbered, with a legend of shares; a PIL image."""
    grey = grey_view(image)
    at_view = np.asarray(
        Image.fromarray(labels).resize(grey.shape[1::-1], Image.Resampling.NEAREST)
    )
    painted = np.where(
        at_view[..., None] > 0, 0.4 * grey + 0.6 * np.array([GREY, *colours])[at_view], grey
    )
    edge = np.zeros(at_view.shape, bool)
    edge[:, 1:] |= at_view[:, 1:] != at_view[:, :-1]
    edge[1:] |= at_view[1:] != at_view[:-1]
    painted[edge] = 255
    width = max(grey.shape[1], 480)
    columns = 1 if max(map(len, texts)) > 24 else width // 240
    rows = -(-(len(texts) + 1) // columns)
    canvas, pen = framed(painted.round().astype(np.uint8), 0, 16 + 26 * rows)
    share = 100 * np.bincount(labels.ravel(), minlength=len(texts) + 1) / labels.size
    for k in sorted(range(len(texts) + 1), key=lambda k: k == 0):  # the background last
        place = (k - 1) % (len(texts) + 1)
        x, y = (
            8 + place % columns * (width // columns),
            grey.shape[0] + 10 + 26 * (place // columns),
        )
        pen.rectangle((x, y, x + 26, y + 20), GREY if k == 0 else colours[k - 1], "black")
        pen.text(
            (x + 13, y + 10),
            str(k),
            "black",
            font(14),
            anchor="mm",
            stroke_width=2,
            stroke_fill="white",
        )
        name = "background" if k == 0 else short(texts[k - 1], width // columns // 9 - 10)
        pen.text((x + 34, y + 10), f"{name}  {share[k]:.1f} %", "black", font(16), anchor="lm")
        if k and (at_view == k).any():
            y, x = middle(at_view == k)
            pen.text(
                (x, y), str(k), "black", font(20), anchor="mm", stroke_width=3, stroke_fill="white"
            )
    return canvas


def draw_heat(image, mask, text, threshold):
    """One soft mask [h, w] in 0..1 over the grey picture, under its text, with a scale; a PIL image."""
    grey = grey_view(image)
    values = resize(mask, grey.shape[:2]).cpu().numpy()
    canvas, pen = framed((0.25 * grey + 0.75 * heat(values)).round().astype(np.uint8), 34, 52)
    width, bottom = canvas.width, 34 + grey.shape[0]
    pen.text((8, 17), short(text, width // 10), "black", font(18), anchor="lm")
    bar = Image.fromarray(heat(np.linspace(0, 1, width - 80)[None].repeat(16, 0)))
    canvas.paste(bar, (40, bottom + 8))
    marks = {0.0: "0", 1.0: "1"} | (
        {threshold: f"background below {threshold:g}"} if 0 < threshold < 1 else {}
    )
    for value, name in marks.items():
        x = 40 + round(value * (width - 81))
        pen.line((x, bottom + 8, x, bottom + 29), "black", 2)
        pen.text((x, bottom + 40), name, "black", font(14), anchor="mm")
    return canvas


def save(picture, path):
    """A PNG, whole or not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        picture.save(temporary, "PNG")
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return str(path)


def safe(text, length=40):
    """Letters and digits of a text as a piece of a file name, plain ASCII; empty where there are none."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:length].strip("-")


# ---- the command line -----------------------------------------------------------------------------------------------


def split(things):
    """(pictures and folders, texts) of the arguments in order; ValueError where one is neither or could be both."""
    paths = []
    for thing in things:
        path_like = Path(thing).suffix.lower() in SUFFIXES or (os.sep in thing and " " not in thing)
        if os.path.exists(thing):
            if paths and not path_like:
                kind = "folder" if os.path.isdir(thing) else "file"
                raise ValueError(
                    f"{thing!r} is a {kind} here, but could be a text: write ./{thing}, or --texts {thing}"
                )
            paths.append(thing)
        elif path_like or not paths:
            raise ValueError(
                f"{thing}: no such picture or folder (pictures come first; --texts if it is a text)"
            )
        else:
            break
    texts = things[len(paths) :]
    for text in texts:
        if Path(text).suffix.lower() in SUFFIXES:
            raise ValueError(
                f"{text}: a picture after the text {texts[0]!r}; pictures come first (or use --texts)"
            )
    return paths, texts


def pictures(paths):
    """Every picture of files and folders, in order, each once; ValueError for a folder without any."""
    found = {}
    for path in map(Path, paths):
        inside = [path]
        if path.is_dir():
            inside = sorted(
                p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "."
            )
        if not inside:
            raise ValueError(f"{path}: no pictures in this folder ({' '.join(SUFFIXES)})")
        found |= {p.resolve(): p for p in inside if p.resolve() not in found}
    return list(found.values())


def output_names(paths):
    """{picture: beginning of its files' names}: its stem, with a number where another picture has the same."""
    names, taken = {}, set()
    for path in paths:
        stem = path.stem.encode("utf-8", "ignore")[:100].decode("utf-8", "ignore") or "picture"
        name, k = stem, 1
        while name.lower() in taken:  # some file systems do not tell A from a
            k += 1
            name = f"{stem}-{k}"
        taken.add(name.lower())
        names[path] = name
    return names


def parse_args(argv=None):
    """The command line, with evaluate.py's own arguments for all that is its; wrong calls end with exit code 2."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, same = p.add_argument, "as in evaluate.py"
    add(
        "things",
        nargs="+",
        metavar="PICTURE|TEXT",
        help="files and folders of pictures, then texts in any words",
    )
    add(
        "--texts",
        nargs="+",
        metavar="TEXT",
        help="the texts; all other arguments are then pictures",
    )
    add("--checkpoint", help="of train.py (default runs/gcl/last.pt), or the authors' tcl.pth")
    add(
        "--model",
        help=f"{same}: open_clip name or model-config .json; default: what the checkpoint names",
    )
    add(
        "--pretrained",
        help=f"{same}: open_clip tag or local weights; default: what the checkpoint names",
    )
    add(
        "--method",
        help=f"{same} --method: gcl (default), or a method that uses CLIP alone, such as maskclip",
    )
    which = p.add_mutually_exclusive_group()
    text = "no text where no mask exceeds it; default 0.4 with PAMR, 0.5 without (the protocol's)"
    which.add_argument("--background", type=float, metavar="THRESHOLD", help=text)
    which.add_argument(
        "--no-background", action="store_true", help="every pixel gets the text of its highest mask"
    )
    add(
        "--pamr",
        action=argparse.BooleanOptionalAction,
        help="refine masks along edges (Sec. 3.4); default: yes",
    )
    add(
        "--kp-weight",
        type=float,
        help=f"{same}: w_kp of the knowledge preservation branch (Appendix A)",
    )
    add(
        "--templates",
        help=f"{same}: release, simple, or a file with one prompt per line, {{}} for the text",
    )
    add("--short-side", type=int, help=f"{same}: pixels of the shorter side, 448 (Sec. 4.1)")
    add("--window", type=int, help=f"{same}: side of the sliding window, 448")
    add("--stride", type=int, help=f"{same}: step of the sliding window, 224")
    add("--precision", help=f"{same}: fp32, bf16 or fp16")
    add("--device", help="cuda, mps or cpu; default: the best there is")
    add("--out", default="out", help="folder for everything that is written")
    add(
        "--json",
        action="store_true",
        help="one JSON document on stdout: files, shares of pixels, masks' means",
    )
    given = vars(p.parse_intermixed_args(argv))
    things, texts, background = (given.pop(name) for name in ("things", "texts", "background"))
    as_json, no_background = given.pop("json"), given.pop("no_background")
    try:
        paths, texts = split(things) if texts is None else (things, texts)
        if missing := [path for path in paths if not os.path.exists(path)]:
            raise ValueError(f"{missing[0]}: no such picture or folder")
        if not texts:
            raise ValueError(f"no texts after {paths[-1]}: what is to be found there?")
        if background is not None and not 0 <= background <= 1:
            raise ValueError(f"--background {background} must lie between 0 and 1")
        args = protocol(**{name: value for name, value in given.items() if value is not None})
        args.images, args.texts, args.json = pictures(paths), check_texts(texts), as_json
        if Path(args.out).resolve() in {path.parent.resolve() for path in args.images}:
            raise ValueError(
                f"--out {args.out}: has the pictures in it; what is written would become pictures of the next run"
            )
    except (ValueError, OSError) as error:
        p.error(str(error))
    if no_background or background is not None:
        args.bg_threshold = -1.0 if no_background else background
    return args


def segment_file(path, name, net, text, args):
    """Writes everything of one picture and says what, as an entry of the JSON document. text: [K, C]."""
    image = read_picture(path)
    masks, size = evaluate.segment_image(net, image, text, args), image.shape[:2]  # [K, h', w']
    labels = label(masks, size, args.bg_threshold).cpu().numpy().astype(np.uint8)  # [h, w]
    share = np.bincount(labels.ravel(), minlength=len(text) + 1) / labels.size
    colours, out = palette(len(text)), Path(args.out)
    indexed = Image.fromarray(labels)
    indexed.putpalette([v for colour in [(0, 0, 0), *colours] for v in colour])
    entry = {"image": str(path), "height": size[0], "width": size[1], "background": share[0]}
    entry |= {"labels": save(indexed, out / f"{name}.labels.png"), "texts": []}
    entry["overlay"] = save(
        draw_overlay(image, labels, args.texts, colours), out / f"{name}.overlay.png"
    )
    for k, words in enumerate(args.texts, start=1):
        file = out / f"{name}.{'-'.join(filter(None, (str(k), safe(words))))}.png"
        picture = draw_heat(image, masks[k - 1], words, args.bg_threshold)
        mean = resize(masks[k - 1], size).mean().item()
        entry["texts"].append(
            {
                "text": words,
                "label": k,
                "share": share[k],
                "mean": mean,
                "heat_map": save(picture, file),
            }
        )
    return entry


def warn_of_cut_texts(texts, templates, tokenizer):
    """Says on stderr which texts are longer than this CLIP reads."""
    for text in texts:
        longest = (
            max(len(tokenizer.encode(template.replace("{}", text))) for template in templates) + 2
        )
        if longest > tokenizer.context_length:
            print(
                f"warning: CLIP reads {tokenizer.context_length} tokens, cut: {short(text, 60)!r}",
                file=sys.stderr,
            )


def main(args):
    """All pictures of a parsed command line. Returns the exit code."""
    templates = evaluate.read_templates(args.templates)
    device = backbone.pick_device(args.device)
    net, tokenizer = evaluate.load_model(args, device)
    warn_of_cut_texts(args.texts, templates, tokenizer)
    text = net.encode_classes(args.texts, tokenizer, templates)  # [K, C]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    names, done, failed = output_names(args.images), [], []
    with tqdm(args.images, "segmenting", disable=len(args.images) == 1) as bar:
        for path in bar:
            try:
                done.append(segment_file(path, names[path], net, text, args))
            except files.InputError as error:
                failed.append({"image": str(path), "error": str(error)})
                bar.write(f"error: {error}", sys.stderr)
                continue
            if not args.json:
                entry = done[-1]
                shares = [
                    f"{short(t['text'], 30)} {100 * t['share']:.1f} %" for t in entry["texts"]
                ]
                what = ", ".join([*shares, f"background {100 * entry['background']:.1f} %"])
                bar.write(f"{path}: {what} -> {entry['overlay']}", sys.stdout)
    if failed and len(names) > 1:
        first = failed[0]["error"]
        print(
            f"error: {len(failed)} of {len(names)} pictures were left out, the first: {first}",
            file=sys.stderr,
        )
    if args.json:
        settings = {
            name: getattr(args, name)
            for name in ("method", "checkpoint", "pamr", "templates", "short_side")
        }
        settings["background"] = args.bg_threshold if args.bg_threshold >= 0 else None
        print(json.dumps({"settings": settings, "images": done, "failed": failed}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    arguments = parse_args()
    try:
        sys.exit(main(arguments))
    except (files.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
