# SPDX-License-Identifier: MIT
"""Segments your own pictures by any texts (Figure 4b), with every method that evaluate.py has.

    python segment.py photo.jpg "a boatman standing on a boat" moon sunset --checkpoint tcl.pth
    python segment.py holiday/ beach.png moon sunset --checkpoint runs/gcl/last.pt --no-background
    python segment.py photo.jpg moon sunset --method maskclip --json

Pictures come first, texts after them: every argument from the start that is a file or a folder is a
picture or a folder of pictures, and the first one that is neither is the first text. What looks
like a path but does not exist, or could be both, is an error and not a guess; --texts says it
outright. For photo.jpg, OUT (default out/) then holds
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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import backbone
import evaluate
import files
import report

# Of pictures in a folder: what Pillow calls the formats that are read.
SUFFIXES = sorted(k for k, v in Image.registered_extensions().items() if v in files.FORMATS)
MAX_PIXELS, MAX_ASPECT = 50_000_000, 100
MAX_TEXTS = 254  # a label PNG has 256 values, and 255 means ignored
VIEW = 1024  # pixels of the longer side of overlays and heat maps


# ---- masks ------------------------------------------------------------------------------------


def protocol(**settings):
    """evaluate.py's arguments with these changes; ValueError says in its words what is wrong."""
    flags = ["--datasets=-", "--out=."]
    for name, value in settings.items():
        flag = "no-" * (value is False) + name.replace("_", "-")
        flags.append(f"--{flag}" if isinstance(value, bool) else f"--{flag}={value}")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            return evaluate.parse_args(flags)
        except SystemExit:
            raise ValueError(said.getvalue().strip().split("error: ", 1)[-1]) from None


def check_texts(texts):
    """ValueError names a text that is empty or the same as another, as CLIP reads them."""
    known = {}
    for text in texts:
        first = known.setdefault(" ".join(text.lower().split()), text)
        if not text.strip() or first is not text:
            raise ValueError(f"{text!r} is empty, or the same text as {first!r}; give it once")
    if not 0 < len(texts) <= MAX_TEXTS:
        raise ValueError(f"{len(texts)} texts; give 1 to {MAX_TEXTS}")


def usable(image):
    """uint8 [h, w, 3] of a PIL image or array; files.InputError for one too large or too narrow."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    short, long = sorted(image.size)
    if short * long > MAX_PIXELS or long > MAX_ASPECT * short:
        why = "is too large (50 million pixels) or too narrow (sides 100 times apart)"
        raise files.InputError(f"{image.width}x{image.height} {why}")
    return np.array(files.rgb(image))


def resize(mask, size):
    """One mask [h, w] at another size, as the protocol resizes them."""
    size = tuple(size)
    mask = F.interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)
    return mask[0, 0]


def labelled(net, image, text, args):
    """Masks [K, h', w'] at the protocol's size, and labels int64 [h, w] of image [h, w, 3]."""
    masks = evaluate.segment_image(net, image, text, args)
    if (~masks.isfinite()).any():
        raise files.InputError("its masks are not finite; try --precision fp32, or other weights")
    value, index = evaluate.best_class(masks, image.shape[:2])
    return masks, evaluate.with_background(value, index, args.bg_threshold)


class Segmentation(NamedTuple("Pair", [("labels", torch.Tensor), ("masks", torch.Tensor)])):
    """labels, masks = segment_image(...); notebooks show its `overlay`, a PIL image."""

    @property
    def overlay(self):
        return draw_overlay(*self.drawn)

    def _repr_png_(self):
        return self.overlay._repr_png_()


def note_of(net, args):
    """What pictures must say of the weights."""
    sources = getattr(net.clip, "source", {}).get("pretrained"), args.pretrained
    return "random weights: these masks mean nothing" * ("random" in sources)


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
    check_texts(texts)
    image, args = usable(image), protocol(**settings)
    if background is not None:
        args.bg_threshold = background if background is not False else -1.0  # every mask exceeds it
    templates = evaluate.read_templates(args.templates)
    text = net.encode_classes(texts, backbone.tokenizer_of(net.clip), templates)  # [K, C]
    masks, labels = labelled(net, image, text, args)
    result = Segmentation(labels, torch.stack([resize(mask, labels.shape) for mask in masks]))
    result.drawn = image, labels, texts, args.bg_threshold >= 0, note_of(net, args)
    return result


# ---- pictures out -----------------------------------------------------------------------------


def grey_view(image):
    """A PIL picture as it is looked at: grey, since all colours are then labels."""
    grey = Image.fromarray(image).convert("L").convert("RGB")
    return report.fit(grey, VIEW, Image.Resampling.BICUBIC)


def draw_overlay(image, labels, texts, background=True, note=""):
    """Labels [h, w] in colour over the grey picture, numbered, with a legend of shares.

    background: whether there is one. note: words above.
    """
    grey, colours = grey_view(image), [report.GREY, *report.palette(len(texts))]
    labels = np.asarray(labels.cpu() if torch.is_tensor(labels) else labels).astype(np.uint8)
    at_view = np.asarray(report.fit(labels, max(grey.size)))
    colour = Image.fromarray(report.colour(at_view, colours))
    mask = Image.fromarray(np.where(at_view > 0, 153, 0).astype(np.uint8))  # 153 of 255: 0.6
    painted = Image.composite(colour, grey, mask)
    report.draw_names(painted, at_view, ["", *map(str, range(1, len(colours)))], 20)
    share = 100 * np.bincount(labels.ravel(), minlength=len(colours)) / labels.size
    names = ["background", *(f"{k} {text}" for k, text in enumerate(texts, 1))]
    legend = [(f"{name} {s:.1f} %", c) for name, s, c in zip(names, share, colours, strict=True)]
    return report.sheet([[painted]], [], legend[not background :], note)


def draw_heat(image, mask, text, threshold, note=""):
    """One soft mask [h, w] in 0..1 over the grey picture, under its text, with a scale."""
    grey = grey_view(image)
    values = resize(mask, grey.size[::-1]).cpu().numpy()
    painted = Image.blend(grey, report.heat(values), 0.75)
    bar = report.heat(np.linspace(0, 1, grey.width)[None].repeat(16, 0))
    scale = f"0 to 1; background below {threshold:g}" if threshold > 0 else "0 to 1"
    return report.sheet([[painted], [bar]], [text, scale], [], note)


def safe(text, length=40):
    """Letters and digits of a text as a piece of a file name, ASCII; empty where there are none."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:length].strip("-")


# ---- the command line -------------------------------------------------------------------------


def split(things):
    """(pictures and folders, texts); ValueError where one is neither or could be both."""
    paths = []
    for thing in things:
        suffix = Path(thing).suffix.lower() in SUFFIXES
        path_like = suffix or (os.sep in thing and " " not in thing)
        if not os.path.exists(thing):
            if path_like or not paths:
                why = "pictures come first; --texts if it is a text"
                raise ValueError(f"{thing}: no such picture or folder ({why})")
            break
        if paths and not path_like:
            why = f"is there, but could be a text: write ./{thing}, or --texts {thing}"
            raise ValueError(f"{thing!r} {why}")
        paths.append(thing)
    texts = things[len(paths) :]
    for text in texts:
        if Path(text).suffix.lower() in SUFFIXES:
            why = f"a picture after the text {texts[0]!r}; pictures come first (or use --texts)"
            raise ValueError(f"{text}: {why}")
    return paths, texts


def pictures(paths):
    """Every picture of files and folders, in order, each once; ValueError for one without any."""
    found = {}
    for path in map(Path, paths):
        inside = [path] if path.is_file() else sorted(path.glob("[!.]*"))
        inside = [p for p in inside if p == path or p.suffix.lower() in SUFFIXES]
        if not inside:
            why = f"no such picture or folder, or none in it ({' '.join(SUFFIXES)})"
            raise ValueError(f"{path}: {why}")
        found |= {p.resolve(): p for p in inside if p.resolve() not in found}
    return list(found.values())


def output_names(paths):
    """{picture: beginning of its files' names}: its stem, numbered where another has the same."""
    names = {}
    for path in paths:
        stem = path.stem.encode("utf-8", "ignore")[:100].decode("utf-8", "ignore") or "picture"
        taken = {name.lower() for name in names.values()}  # some disks do not tell A from a
        tries = [stem, *(f"{stem}-{k}" for k in range(2, len(taken) + 2))]
        names[path] = next(name for name in tries if name.lower() not in taken)
    return names


SAME = {  # evaluate.py's flags that are passed on
    "checkpoint": "of train.py (default runs/gcl/last.pt), or the authors' tcl.pth",
    "model": "open_clip name or model-config .json; default: what the checkpoint names",
    "pretrained": "open_clip tag or local weights; default: what the checkpoint names",
    "method": "gcl (default), or a method that uses CLIP alone, such as maskclip",
    "kp-weight": "w_kp of the knowledge preservation branch (Appendix A)",
    "templates": "release, simple, or a file with one prompt per line, {} for the text",
    "short-side": "pixels of the shorter side, 448 (Sec. 4.1)",
    "window": "side of the sliding window, 448",
    "stride": "step of the sliding window, 224",
    "precision": "fp32, bf16 or fp16",
    "device": "cuda, mps or cpu; default: the best there is",
}


def parser():
    """The command line of this file."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    text = "files and folders of pictures, then texts in any words"
    add("things", nargs="+", metavar="PICTURE|TEXT", help=text)
    text = "the texts; all other arguments are then pictures"
    add("--texts", nargs="+", metavar="TEXT", help=text)
    for name, text in SAME.items():
        add(f"--{name}", help=f"as in evaluate.py: {text}")
    text = "refine masks along edges (Sec. 3.4); default: yes"
    add("--pamr", action=argparse.BooleanOptionalAction, default=True, help=text)
    which = p.add_mutually_exclusive_group()
    text = "no text where no mask exceeds it; default 0.4 with PAMR, 0.5 without (the protocol's)"
    which.add_argument("--background", type=float, metavar="THRESHOLD", help=text)
    text = "every pixel gets the text of its highest mask"
    which.add_argument("--no-background", action="store_true", help=text)
    add("--out", default="out", help="folder for everything that is written")
    text = "one JSON document on stdout: files, shares of pixels, masks' means"
    add("--json", action="store_true", help=text)
    return p


def parse_args(argv=None):
    """The parsed and checked command line; wrong calls end with exit code 2."""
    p = parser()
    p.error = lambda words, error=p.error: error(files.printable(words))
    a = p.parse_intermixed_args(argv)
    given = {k: v for k, v in vars(a).items() if v is not None and k.replace("_", "-") in SAME}
    try:
        paths, texts = split(a.things) if a.texts is None else (a.things, a.texts)
        paths = pictures(paths)
        if not texts:
            raise ValueError(f"no texts after {a.things[-1]}: what is to be found there?")
        check_texts(texts)
        if a.background is not None and not 0 <= a.background <= 1:
            raise ValueError(f"--background {a.background} must lie between 0 and 1")
        args = protocol(out=a.out, pamr=a.pamr, **given)
        if Path(args.out).resolve() in {path.parent.resolve() for path in paths}:
            why = "has the pictures in it; what is written would become pictures of the next run"
            raise ValueError(f"--out {args.out}: {why}")
    except (ValueError, OSError) as error:
        p.error(str(error))
    if a.no_background or a.background is not None:
        args.bg_threshold = -1.0 if a.no_background else a.background
    args.images, args.texts, args.json = paths, texts, a.json
    return args


def segment_file(path, name, net, text, args):
    """Writes all of one picture; returns its entry of the JSON document. text: [K, C]."""
    image, background, note = files.read_picture(path), args.bg_threshold >= 0, note_of(net, args)
    try:
        image = usable(image)
        masks, labels = labelled(net, image, text, args)
    except files.InputError as error:
        raise files.InputError(f"{path}: {error}") from error
    labels = labels.cpu().numpy().astype(np.uint8)  # [h, w]
    share = np.bincount(labels.ravel(), minlength=len(text) + 1) / labels.size

    def save(suffix, picture):
        file = Path(args.out, f"{name}.{suffix}.png")
        files.save_png(file, picture)
        return str(file)

    indexed = Image.fromarray(labels)
    indexed.putpalette(np.ravel([(0, 0, 0), *report.palette(len(text))]).tolist())
    entry = {"image": str(path), "height": len(labels), "width": len(labels[0]), "texts": []}
    entry |= {"background": share[0] if background else None, "labels": save("labels", indexed)}
    drawn = draw_overlay(image, labels, args.texts, background, note)
    entry["overlay"] = save("overlay", drawn)
    for k, words in enumerate(args.texts, start=1):
        mean = resize(masks[k - 1], labels.shape).mean().item()
        drawn = draw_heat(image, masks[k - 1], words, args.bg_threshold, note)
        file = save("-".join(filter(None, (str(k), safe(words)))), drawn)
        one = {"text": words, "label": k, "share": share[k], "mean": mean, "heat_map": file}
        entry["texts"].append(one)
    return entry


def warn_of_cut_texts(texts, templates, tokenizer):
    """Says on stderr which texts are longer than this CLIP reads."""
    limit = tokenizer.context_length
    for text in texts:
        prompts = [template.replace("{}", text) for template in templates]
        if max(len(tokenizer.encode(prompt)) for prompt in prompts) + 2 > limit:
            print(f"warning: CLIP reads {limit} tokens, cut: {text[:60]!r}", file=sys.stderr)


def line_of(entry):
    """What is said of one picture."""
    shares = [f"{t['text'][:30]} {100 * t['share']:.1f} %" for t in entry["texts"]]
    if entry["background"] is not None:
        shares.append(f"background {100 * entry['background']:.1f} %")
    return files.printable(f"{entry['image']}: {', '.join(shares)} -> {entry['overlay']}")


def main(args):
    """All pictures of a parsed command line. Returns the exit code."""
    templates = evaluate.read_templates(args.templates)
    net, tokenizer = evaluate.load_model(args, backbone.pick_device(args.device))
    warn_of_cut_texts(args.texts, templates, tokenizer)
    text = net.encode_classes(args.texts, tokenizer, templates)  # [K, C]
    names, done, failed = output_names(args.images), [], []
    with tqdm(args.images, "segmenting", disable=len(args.images) == 1) as bar:
        for path in bar:
            try:
                done.append(segment_file(path, names[path], net, text, args))
                if not args.json:
                    bar.write(line_of(done[-1]), sys.stdout)
            except files.InputError as error:
                failed.append({"image": str(path), "error": str(error)})
                bar.write(files.printable(f"error: {error}"), sys.stderr)
    if failed and len(names) > 1:
        what = f"{len(failed)} of {len(names)} pictures were left out, the first"
        print(files.printable(f"error: {what}: {failed[0]['error']}"), file=sys.stderr)
    if args.json:
        kept = ("method", "checkpoint", "pamr", "templates", "short_side")
        settings = {name: getattr(args, name) for name in kept}
        settings["background"] = args.bg_threshold if args.bg_threshold >= 0 else None
        print(json.dumps({"settings": settings, "images": done, "failed": failed}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(files.command(main, parse_args()))
