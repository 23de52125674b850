# SPDX-License-Identifier: MIT
"""Segments your own pictures by any texts (Figure 4b), with every method that evaluate.py has.

    python segment.py photo.jpg "a boatman standing on a boat" moon sunset --checkpoint tcl.pth
    python segment.py holiday/ beach.png moon sunset --checkpoint runs/gcl/last.pt --no-background
    python segment.py photo.jpg moon sunset --method maskclip --json

Pictures come first, texts after them: every argument from the start that is a file or a folder is a
picture or a folder of pictures, and the first one that is neither is the first text; --texts says
outright what is a text. For photo.jpg, OUT (default out/) then holds
    photo.overlay.png     the labels over the grey photo, numbered, with a legend
    photo.labels.png      an index PNG with palette: 0 background, k the k-th text
    photo.1-a-boatman-standing-on-a-boat.png, ...   each text's soft mask as a heat map
Exit code 1: some pictures could not be segmented (each is named, the others are done); 2: a wrong
call.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
import unicodedata
from collections import namedtuple
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import backbone
import evaluate
import files
import report

# Of pictures in a folder: what Pillow calls the formats that are read.
SUFFIXES = sorted(k for k, v in Image.registered_extensions().items() if v in files.FORMATS)
MAX_TEXTS = 254  # a label PNG has 256 values, and 255 means ignored
VIEW = 1024  # pixels of the longer side of overlays and heat maps


# ---- masks ------------------------------------------------------------------------------------


def check_texts(texts):
    """ValueError names a text that is empty or there twice, as CLIP reads them."""
    if not 0 < len(texts) <= MAX_TEXTS:
        raise ValueError(f"{len(texts)} texts; give 1 to {MAX_TEXTS}")
    names = [" ".join(text.lower().split()) for text in texts]
    for name in names:
        if not name or names.count(name) > 1:
            raise ValueError(f"the text {name!r} is empty, or given twice")


def protocol(texts, **settings):
    """evaluate.py's arguments for these texts and settings, None for its own; args.texts are the
    texts. ValueError says what is wrong, in its words."""
    check_texts(texts)
    flags = ["--datasets=-", "--out=."]
    threshold = settings.pop("bg_threshold", None)
    for name, value in settings.items():
        flag = "no-" * (value is False) + name.replace("_", "-")
        if value is not None:
            flags.append(f"--{flag}" if isinstance(value, bool) else f"--{flag}={value}")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            args = evaluate.parse_args(flags)
        except SystemExit:
            raise ValueError(said.getvalue().strip().split("error: ", 1)[-1]) from None
    args.texts = texts
    if threshold is not None:
        args.bg_threshold = threshold
    return args


def encode(net, args):
    """Embeddings [K, C] of args.texts; args.note becomes what pictures must say of the weights."""
    random = getattr(net.clip, "source", {}).get("pretrained") == "random"
    args.note = "random weights: these masks mean nothing" * random
    templates, tokenizer = evaluate.read_templates(args.templates), backbone.tokenizer_of(net.clip)
    for text in args.texts:
        tokens = tokenizer([template.replace("{}", text) for template in templates])
        if tokens[:, -1].any():  # the last place is taken, so the end may be cut off
            limit = f"CLIP reads {tokens.shape[1]} tokens, and may not see all"
            print(f"warning: {limit} of {text[:60]!r}", file=sys.stderr)
    return net.encode_classes(args.texts, tokenizer, templates)


def pixels(image):
    """uint8 [h, w, 3], upright, of a PIL image or an array of any mode."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    return np.array(files.rgb(image))


def labelled(net, image, text, args, name="the picture"):
    """Masks [K, h', w'] at the protocol's size, and labels int64 [h, w] of image [h, w, 3]."""
    masks = evaluate.segment_image(net, image, text, args)
    if (~masks.isfinite()).any():
        why = "masks are not finite; try --precision fp32, or other weights"
        raise files.InputError(f"{name}: {why}")
    value, index = evaluate.best_class(masks, image.shape[:2])
    return masks, evaluate.with_background(value, index, args.bg_threshold)


class Segmentation(namedtuple("Pair", "labels masks")):
    """labels, masks = segment_image(...); notebooks show its `overlay`, a PIL image."""

    @property
    def overlay(self):
        return draw_overlay(*self.drawn)

    def _repr_png_(self):
        return self.overlay._repr_png_()


def segment_image(net, image, texts, background=None, **settings):
    """Labels and soft masks of one picture for any texts, under evaluate.py's protocol (Sec. 4.1).

    net: a GCL (gcl.load). image: a PIL image or a uint8 array, any size. texts: list of str.
    background: where no mask exceeds it, the label is 0; None for the protocol's threshold (0.4
    refined, 0.5 not), False for no background. settings: of evaluate.py's flags, such as
    method="maskclip", pamr=False, kp_weight=0, short_side=448.
    Returns labels int64 [h, w], 0 for background and k for the k-th text, and masks float32
    [K, h, w] in 0..1, both at the image's own (upright) size on the net's device; the result's
    `overlay` shows them. Raises ValueError for what cannot be segmented.
    """
    threshold = -1.0 if background is False else background  # every mask exceeds -1
    image, args = pixels(image), protocol(texts, bg_threshold=threshold, **settings)
    masks, labels = labelled(net, image, encode(net, args), args)
    result = Segmentation(labels, backbone.resize(masks[None], labels.shape)[0])
    result.drawn = image, labels, args
    return result


# ---- pictures out -----------------------------------------------------------------------------


def grey_view(image):
    """A PIL picture as it is looked at: grey, since all colours are then labels."""
    return report.fit(image, VIEW, Image.Resampling.BICUBIC).convert("L").convert("RGB")


def shares(labels, args):
    """The share of all pixels that each label has, the background's first."""
    counts = torch.bincount(labels.flatten(), minlength=1 + len(args.texts))
    return (counts.double() / labels.numel()).tolist()


def draw_overlay(image, labels, args):
    """Labels int64 [h, w] in colour over the grey picture, numbered, with a legend of shares."""
    grey, colours = grey_view(image), [report.GREY, *report.palette(len(args.texts))]
    at_view = np.asarray(report.fit(labels.byte().cpu(), VIEW))
    blend = Image.blend(grey, Image.fromarray(report.colour(at_view, colours)), 0.6)
    painted = Image.composite(blend, grey, Image.fromarray(at_view > 0))
    numbers = [str(k) for k in range(len(colours))]
    report.draw_names(painted, at_view, ["", *numbers[1:]], 20)
    names = "background", *map(" ".join, zip(numbers[1:], args.texts, strict=True))
    entries = zip(names, shares(labels, args), colours, strict=True)
    legend = [(f"{name} {100 * share:.1f} %", colour) for name, share, colour in entries]
    return report.sheet([[painted]], [], legend[args.bg_threshold < 0 :], args.note)


def draw_heat(image, mask, text, args):
    """One soft mask [h, w] in 0..1 over the grey picture, under its text, with a scale."""
    grey = grey_view(image)
    values = backbone.resize(mask[None, None], grey.size[::-1])[0, 0].cpu().numpy()
    painted = Image.blend(grey, report.heat(values), 0.75)
    bar = report.heat(np.linspace(0, 1, grey.width)[None].repeat(16, 0))
    scale = "0 to 1" + f"; background below {args.bg_threshold:g}" * (args.bg_threshold > 0)
    return report.sheet([[painted], [bar]], [text, scale], [], args.note)


def safe(text):
    """Letters and digits of a text as a piece of a file name, in ASCII."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:42].strip("-")


# ---- the command line -------------------------------------------------------------------------


def split(things):
    """(pictures and folders, texts): what is there, up to the first that is not, and the rest."""
    paths = list(takewhile(os.path.exists, things))
    texts = things[len(paths) :]
    for text in texts:
        if not paths or Path(text).suffix.lower() in SUFFIXES:
            why = "pictures come first, or write --texts before all texts"
            raise ValueError(f"{text}: no such picture or folder, or one after a text ({why})")
    return paths, texts


def pictures(paths):
    """Every picture of files and folders, in order, each once; ValueError for one without any."""
    found = {}
    for path in map(Path, paths):
        inside = sorted(p for p in path.glob("[!.]*") if p.suffix.lower() in SUFFIXES)
        if path.is_file():
            inside = [path]
        if not inside:
            why = f"no such picture or folder, or none in it ({' '.join(SUFFIXES)})"
            raise ValueError(f"{path}: {why}; for a text that is also a folder there is --texts")
        found |= {p.resolve(): p for p in inside}
    return list(found.values())


def output_names(paths):
    """The beginning of each picture's files' names: its stem, numbered where another has it."""
    names = {}  # by their lower case: some disks do not tell A from a
    for path in paths:
        stem = name = os.fsencode(path.stem)[:100].decode(errors="ignore") or "picture"
        number = 1
        while name.lower() in names:
            number += 1
            name = f"{stem}-{number}"
        names[name.lower()] = name
    return names.values()


SAME = {  # evaluate.py's flags that are passed on
    "checkpoint": "of train.py (default runs/gcl/last.pt), or the authors' tcl.pth",
    "model": "open_clip name or model-config .json; default: what the checkpoint names",
    "pretrained": "open_clip tag, local weights or random; default: what the checkpoint names",
    "method": "gcl (default), or a method that uses CLIP alone, such as maskclip",
    "kp-weight": "w_kp of the knowledge preservation branch (Appendix A)",
    "templates": "release, simple, imagenet, or a file: a prompt a line, {} for the text",
    "short-side": "pixels of the shorter side, 448 (Sec. 4.1)",
    "window": "side of the sliding window, 448",
    "stride": "step of the sliding window, 224",
    "precision": "fp32, bf16 or fp16",
    "device": "cuda, mps or cpu; default: the best there is",
}


def parse_args(argv=None):
    """The parsed and checked command line; wrong calls end with exit code 2."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add, which = p.add_argument, p.add_mutually_exclusive_group()
    first = "files and folders of pictures, then texts in any words"
    add("things", nargs="+", metavar="PICTURE|TEXT", help=first)
    add("--texts", nargs="+", help="the texts; all other arguments are then pictures")
    for name, text in SAME.items():
        add(f"--{name}", help=f"as in evaluate.py: {text}")
    edges = "refine masks along edges (Sec. 3.4); default: yes"
    add("--pamr", action=argparse.BooleanOptionalAction, help=edges)
    flags = {"dest": "bg_threshold", "metavar": "THRESHOLD", "type": files.share}
    none = "no text where no mask exceeds it; default 0.4 with PAMR, 0.5 without (the protocol's)"
    which.add_argument("--background", **flags, help=none)
    every = {"dest": "bg_threshold", "action": "store_const", "const": -1.0}
    which.add_argument("--no-background", **every, help="every pixel gets its highest mask's text")
    add("--out", default="out", help="folder for everything that is written")
    shares = "one JSON document on stdout: files, shares of pixels, masks' means"
    add("--json", action="store_true", help=shares)
    settings = vars(p.parse_intermixed_args(argv))
    things, texts, as_json = map(settings.pop, ("things", "texts", "json"))
    try:
        things, texts = (things, texts) if texts else split(things)
        args = protocol(texts, **settings)
        args.images, args.json = pictures(things), as_json
    except (ValueError, OSError) as error:
        p.error(files.printable(str(error)))
    return args


def segment_file(path, name, net, text, args):
    """Writes all of one picture; returns its entry of the JSON document. text: [K, C]."""
    image = np.array(files.read_picture(path))
    masks, labels = labelled(net, image, text, args, path)

    def save(suffix, picture):
        file = Path(args.out, f"{name}.{suffix}.png")
        files.save_png(file, picture)
        return str(file)

    background, *share = shares(labels, args)
    texts = [{"text": words, "label": k} for k, words in enumerate(args.texts, start=1)]
    for entry, mask, part in zip(texts, masks, share, strict=True):
        mean = backbone.resize(mask[None, None], labels.shape).mean().item()
        drawn = draw_heat(image, mask, entry["text"], args)
        file = save(safe(f"{entry['label']} {entry['text']}"), drawn)
        entry |= {"share": part, "mean": mean, "heat_map": file}
    indexed = Image.fromarray(labels.byte().cpu().numpy())
    indexed.putpalette(np.ravel([(0, 0, 0), *report.palette(len(texts))]).tolist())
    return {
        "image": str(path),
        "height": image.shape[0],
        "width": image.shape[1],
        "texts": texts,
        "background": background if args.bg_threshold >= 0 else None,
        "labels": save("labels", indexed),
        "overlay": save("overlay", draw_overlay(image, labels, args)),
    }


def line_of(entry):
    """What is said of one picture."""
    parts = [(text["text"][:30], text["share"]) for text in entry["texts"]]
    if entry["background"] is not None:
        parts.append(("background", entry["background"]))
    said = ", ".join(f"{name} {100 * share:.1f} %" for name, share in parts)
    return files.printable(f"{entry['image']}: {said} -> {entry['overlay']}")


def main(args):
    """All pictures of a parsed command line. Returns the exit code."""
    net, _ = evaluate.load_model(args, backbone.pick_device(args.device))
    text, done, failed = encode(net, args), [], []  # [K, C]
    with tqdm(args.images, "segmenting", disable=len(args.images) == 1) as bar:
        for path, name in zip(bar, output_names(args.images), strict=True):
            try:
                done.append(segment_file(path, name, net, text, args))
                if not args.json:
                    bar.write(line_of(done[-1]))
            except files.InputError as error:
                failed.append({"image": str(path), "error": str(error)})
    for picture in failed:  # now, where no bar and no other line hides them
        print(files.printable(f"error: {picture['error']}"), file=sys.stderr)
    if args.json:
        kept = "method", "checkpoint", "pamr", "templates", "short_side"
        settings = {name: getattr(args, name) for name in kept}
        settings["background"] = args.bg_threshold if args.bg_threshold >= 0 else None
        print(json.dumps({"settings": settings, "images": done, "failed": failed}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(files.command(main, parse_args()))
