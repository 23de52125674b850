# SPDX-License-Identifier: MIT
"""Evaluates a model under the paper's unified protocol (Sec. 4.1) and writes results.json, results.md and pictures.

    python evaluate.py --all --checkpoint runs/gcl/last.pt            # the eight benchmarks under --data-root data
    python evaluate.py --all --checkpoint tcl.pth                     # the authors' released checkpoint
    python evaluate.py --datasets voc mine/SPEC.json --method maskclip   # CLIP alone; or clip, sclip, naclip, ...
    python evaluate.py --all --predictions DIR                        # anyone's label PNGs, no model needed
    torchrun --nproc_per_node=8 evaluate.py --all --checkpoint runs/gcl/last.pt

The protocol: shorter side 448, windows of 448 with stride 224, masks averaged where windows overlap, resized to the
label, argmax; a constant background channel where a set has background (0.4 with PAMR, 0.5 without); class names
as they are, never "background" as a prompt; one confusion matrix per set. Fewer images than the whole set has give a
result that is marked partial everywhere.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import backbone
import benchmarks
import files
import gcl
import pamr
import report

LONG_SIDE = (
    2048  # Paper silent: the longer side is at most this, as in GroupViT's protocol and the release
)
TEMPLATES = {  # Paper silent: prompts; the release's nine
    "release": (
        "itap of a {}.",
        "a bad photo of a {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
        "a photo of many {}.",
        "a photo of {}s.",
    ),
    "simple": ("a photo of a {}.",),
}
SWEEP = [round(0.05 * k, 2) for k in range(1, 20)]  # background thresholds of --sweep-threshold
ERRORS = (
    files.InputError,
    files.InputError,
    OSError,
)  # what a user can cause; each is one clear line
PROTOCOL = {
    "short_side": 448,
    "window": 448,
    "stride": 224,
}  # Paper silent: window and stride; the release's


def parse_args(argv=None):
    """The command line; flags that do not go together end with exit code 2, defaults that hang on others are filled."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="the eight benchmarks of Table 1")
    which.add_argument(
        "--datasets",
        nargs="+",
        metavar="NAME|SPEC.json",
        help=f"of {', '.join(benchmarks.BENCHMARKS)}",
    )
    add(
        "--data-root",
        default="data",
        help="folder of the benchmarks, in the layout of their downloads",
    )
    add(
        "--available",
        action="store_true",
        help="with --all: evaluate the benchmarks that are there, name the others",
    )
    add(
        "--checkpoint",
        help="a checkpoint of train.py (default runs/gcl/last.pt), or the authors' tcl.pth",
    )
    add(
        "--model",
        help="open_clip name or config .json; default: what the checkpoint names, or ViT-B-16-quickgelu",
    )
    add(
        "--pretrained",
        help="open_clip tag or local weights; default: what the checkpoint names, or openai",
    )
    alone = (
        "gcl, or CLIP alone: of Table 1, maskclip is MaskCLIP-dagger and maskclip-refined MaskCLIP"
    )
    add("--method", choices=["gcl", *backbone.METHODS], default="gcl", help=alone)
    add(
        "--pamr",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="refine masks (Sec. 3.4)",
    )
    add(
        "--bg-threshold",
        type=float,
        help="background channel; default 0.4 with PAMR, 0.5 without (paper silent)",
    )
    add(
        "--sweep-threshold",
        action="store_true",
        help="also mIoU at thresholds 0.05 to 0.95: a diagnostic alone",
    )
    add("--short-side", type=int, default=448, help="pixels of the shorter side (Sec. 4.1)")
    add("--window", type=int, default=448, help="side of the sliding window (paper silent)")
    add("--stride", type=int, default=224, help="step of the sliding window (paper silent)")
    add(
        "--kp-weight",
        type=float,
        default=0.3,
        help="of gcl: the knowledge preservation branch (Appendix A)",
    )
    add(
        "--templates",
        default="release",
        help="release, simple, or a file with one prompt per line, {} for the name",
    )
    add(
        "--limit",
        type=int,
        metavar="N",
        help="the first N images of each set; the result is marked partial",
    )
    add(
        "--predictions",
        metavar="DIR",
        help="score any method's PNGs DIR/<dataset>/<image id>.png; needs no model",
    )
    add(
        "--save-predictions",
        action="store_true",
        help="write label PNGs to OUT/predictions/<dataset>/<image id>.png",
    )
    add("--out", default="results", help="folder for results.json, results.md and pictures")
    add("--device", help="cuda, mps or cpu; default: the best there is")
    add(
        "--precision",
        choices=["fp32", "bf16", "fp16"],
        default="fp32",
        help="of CLIP and adapter; masks stay float32",
    )
    add("--workers", type=int, default=2, help="loader processes")
    args = p.parse_args(argv)
    if args.checkpoint and (args.predictions or args.method != "gcl"):
        p.error("--checkpoint goes with --method gcl alone")
    if args.predictions and (args.sweep_threshold or args.save_predictions):
        p.error(
            "--sweep-threshold and --save-predictions need a model's masks, --predictions holds labels alone"
        )
    if args.method == "gcl" and not args.predictions:
        args.checkpoint = args.checkpoint or "runs/gcl/last.pt"
    if min(args.short_side, args.window, args.stride, 1 if args.limit is None else args.limit) < 1:
        p.error("--short-side, --window, --stride and --limit must be positive")
    if args.stride > args.window or args.workers < 0 or not 0 <= args.kp_weight <= 1:
        p.error(
            "--stride must be at most --window, --workers at least 0, --kp-weight between 0 and 1"
        )
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        p.error(f"--out {args.out}: is a file, not a folder")
    if args.available and not args.all:
        p.error("--available goes with --all")
    if args.bg_threshold is None:
        args.bg_threshold = 0.4 if args.pamr and not args.predictions else 0.5
    return args


# ---- geometry of the protocol ---------------------------------------------------------------------------------------


def resized(height, width, short_side, long_side=LONG_SIDE):
    """(height, width) with the aspect kept: the shorter side at short_side, the longer at most long_side."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def windows(height, width, size, stride):
    """Corners (y1, y2, x1, x2) of windows that cover the image, the last ones flush with the border."""

    def spans(length):
        count = max(-(-(length - size) // stride), 0) + 1
        ends = [min(k * stride + size, length) for k in range(count)]
        return [(max(end - size, 0), end) for end in ends]

    return [(y1, y2, x1, x2) for y1, y2 in spans(height) for x1, x2 in spans(width)]


def segment_image(net, image, text, args):
    """Masks [K, h, w] of one image: sliding windows as one batch, averaged where they overlap.

    image: uint8 [h0, w0, 3]. Returns float32 on the net's device, at the protocol's size of the image.
    """
    norm = net.recipe.norm if args.method == "gcl" else gcl.CLIP_NORM
    mean, std = (torch.tensor(v, device=text.device).view(3, 1, 1) for v in norm)  # [3, 1, 1]
    x = (torch.from_numpy(image).to(text.device).permute(2, 0, 1) / 255 - mean) / std  # [3, h0, w0]
    height, width = resized(*image.shape[:2], args.short_side)
    x = F.interpolate(
        x[None], size=(height, width), mode="bilinear", align_corners=False
    )  # [1, 3, h, w]
    corners = windows(height, width, args.window, args.stride)
    crops = torch.cat(
        [x[..., y1:y2, x1:x2] for y1, y2, x1, x2 in corners]
    )  # [n, 3, window, window]
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    refine = pamr.pamr if args.pamr else None
    with torch.autocast(crops.device.type, dtype, enabled=dtype is not None):
        if args.method == "gcl":
            masks = net.segment(crops, text, refine, args.kp_weight)  # [n, K, window, window]
        else:
            masks = net.segment_clip(crops, text, args.method, refine)
    if len(corners) == 1:
        return masks[0]
    total = masks.new_zeros(masks.shape[1], height, width)
    count = masks.new_zeros(height, width)
    for mask, (y1, y2, x1, x2) in zip(masks, corners, strict=True):
        total[:, y1:y2, x1:x2] += mask
        count[y1:y2, x1:x2] += 1
    return total / count  # [K, h, w]


def best_class(masks, size, chunk=16):
    """Resizes masks [K, h, w] to size and takes the maximum over classes: (values, indices), each [*size].

    A few classes at a time, so that no [K, *size] map is ever held; on equal values the first class wins, as argmax.
    """
    value, index = None, None
    for k in range(0, len(masks), chunk):
        part = F.interpolate(
            masks[None, k : k + chunk], size=size, mode="bilinear", align_corners=False
        )[0]
        high, at = part.max(0)  # [*size]
        if value is None:
            value, index = high, at
        else:
            better = high > value
            value, index = torch.where(better, high, value), torch.where(better, at + k, index)
    return value, index


def with_background(value, index, threshold):
    """Labels once a constant channel stands in front: 0 where no class exceeds it, else 1 + class."""
    return torch.where(value > threshold, index + 1, 0)


# ---- metric ---------------------------------------------------------------------------------------------------------


def confusion(label, prediction, n):
    """int64 [n, n]: pixels of class i (rows) predicted as class j (columns), ignored pixels left out."""
    scored = label != benchmarks.IGNORE
    return torch.bincount(label[scored] * n + prediction[scored], minlength=n * n).view(
        n, n
    )  # [n*n] -> [n, n]


def iou_per_class(matrix):
    """TP / (TP + FP + FN) in percent, float64 [n]; nan for a class in neither labels nor predictions."""
    matrix = matrix.double()
    hit = matrix.diag()
    return 100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)


def mean_iou(matrix, among=None):
    """Mean IoU in percent over the classes that occur (of the indices `among`), 4 digits; None where none does."""
    iou = iou_per_class(matrix)
    mean = float((iou if among is None else iou[list(among)]).nanmean())
    return None if math.isnan(mean) else round(mean, 4)


# ---- running --------------------------------------------------------------------------------------------------------


class Images(Dataset):
    """(image uint8 [h, w, 3], label int64 [h, w], image id) of a set."""

    def __init__(self, dataset):
        self.items = dataset.items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, k):
        image_id, image, label, lut = self.items[k]
        try:
            return np.array(files.read_picture(image)), benchmarks.read_label(label, lut), image_id
        except files.InputError as error:  # raised again by the main process, whole and in one line
            return error


def evaluate_set(dataset, net, tokenizer, args, device, rank=0, ranks=1):
    """One set. Returns (result dict for results.json, example images for the picture sheet)."""
    started, text = time.perf_counter(), None
    if not args.predictions:
        text = net.encode_classes(
            dataset.prompts(), tokenizer, read_templates(args.templates)
        )  # [K, C]
    sweep = SWEEP if args.sweep_threshold and dataset.background else []
    matrices, pictures = count(dataset, net, text, args, sweep, rank, ranks)
    if ranks > 1:
        matrices = matrices.to(device if dist.get_backend() == "nccl" else "cpu")
        try:
            dist.all_reduce(matrices)  # of integers: the order of the ranks does not matter
        except RuntimeError as error:
            reason = f"another rank is gone, see its message ({files.first_line(error)})"
            raise files.InputError(f"{dataset.name}: {reason}") from error
    return summary(dataset, matrices.cpu(), sweep, time.perf_counter() - started), pictures


def count(dataset, net, text, args, sweep=(), rank=0, ranks=1):
    """Confusion matrices int64 [1 + len(sweep), n, n] of this rank's images: the result's, then each threshold's."""
    n = len(dataset.classes)
    matrices = torch.zeros(1 + len(sweep), n, n, dtype=torch.int64)
    mine = range(rank, len(dataset), ranks)  # dealt out without padding: every image counts once
    loader = DataLoader(Images(dataset), None, sampler=mine, num_workers=args.workers)
    shown, pictures = (
        set(np.linspace(0, len(mine) - 1, report.ROWS).astype(int).tolist()),
        [],
    )  # of rank 0's images
    with tqdm(total=len(mine), desc=dataset.name, disable=rank > 0) as bar:
        for k, item in enumerate(loader):
            if isinstance(item, files.InputError):
                raise item
            image, label, image_id = (
                item[0].numpy(),
                *item[1:],
            )  # the loader has made tensors of both
            if args.predictions:
                prediction = read_prediction(args, dataset, image_id, tuple(label.shape))
            else:
                value, index = best_class(segment_image(net, image, text, args), label.shape)
                prediction = (
                    with_background(value, index, args.bg_threshold)
                    if dataset.background
                    else index
                )
            label = label.to(prediction.device)
            matrices[0] += confusion(label, prediction, n).cpu()
            for row, threshold in enumerate(sweep, start=1):
                matrices[row] += confusion(label, with_background(value, index, threshold), n).cpu()
            prediction = prediction.cpu().numpy().astype(np.uint8)
            if args.save_predictions:
                save_prediction(args, dataset, image_id, prediction)
            if k in shown:
                pictures.append((image, label.cpu().numpy(), prediction))
            bar.update()
    return matrices, pictures


def summary(dataset, matrices, sweep, seconds):
    """The entry of results.json: percent, None where a class does not occur."""
    iou = iou_per_class(matrices[0])
    per_class = {
        name: None if v != v else round(v, 4)
        for name, v in zip(dataset.classes, iou.tolist(), strict=True)
    }
    partial = [dataset.classes.index(name) for name in dataset.partial]
    result = {
        "miou": mean_iou(matrices[0]),
        "images": len(dataset),
        "full": dataset.full,
        "partial": len(dataset) != (dataset.full or len(dataset)),
        "iou": per_class,
        "partial_miou": mean_iou(matrices[0], partial) if partial else None,
        "seconds": round(seconds, 1),
    }
    if sweep:
        result["sweep"] = {
            f"{t:.2f}": mean_iou(m) for t, m in zip(sweep, matrices[1:], strict=True)
        }
    return result


# ---- files ----------------------------------------------------------------------------------------------------------


def read_templates(name):
    """Prompt templates of --templates; DataError for a file without any."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not os.path.isfile(name):
        raise files.InputError(f"--templates {name}: not release, not simple, and no such file")
    lines = [line.strip() for line in files.read_text(name).splitlines() if line.strip()]
    if not lines or not all(line.count("{}") == 1 for line in lines):
        raise files.InputError(
            f"--templates {name}: needs one prompt per line, each with one {{}} for the class name"
        )
    return lines


def prediction_path(folder, dataset, image_id):
    return Path(folder, dataset.name, f"{image_id}.png")


def save_prediction(args, dataset, image_id, prediction):
    """A palette PNG of class indices, whole or not at all."""
    path = prediction_path(Path(args.out, "predictions"), dataset, image_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(prediction)
    picture.putpalette([v for colour in dataset.palette for v in colour])
    temporary = path.with_suffix(".tmp")
    picture.save(temporary, format="PNG")
    os.replace(temporary, path)


def check_predictions(args, dataset):
    """DataError that names the first missing prediction of a set, before any is scored."""
    paths = [prediction_path(args.predictions, dataset, image_id) for image_id, *_ in dataset.items]
    if missing := [path for path in paths if not path.is_file()]:
        raise files.InputError(
            f"{missing[0]}: this prediction is missing ({len(missing)} of {len(paths)} are)"
        )


def read_prediction(args, dataset, image_id, shape):
    """Class indices int64 [h, w] of any method's label PNG; DataError when it does not fit."""
    path = prediction_path(args.predictions, dataset, image_id)
    prediction = benchmarks.read_label(
        path, benchmarks.lookup_table(range(len(dataset.classes)), [])
    )
    if prediction.shape != shape:
        raise files.InputError(
            f"{path}: the prediction is {prediction.shape}, the label {shape} (height, width)"
        )
    return torch.from_numpy(prediction)


def read_sets(args):
    """The sets to evaluate, every path checked; DataError lists all that is missing at once."""
    sets, missing, names = [], [], list(benchmarks.BENCHMARKS) if args.all else args.datasets
    for name in names:
        try:
            sets.append(benchmarks.read_set(name, args.data_root))
        except files.InputError as error:
            missing.append(str(error))
    if missing and not (args.available and sets):
        head = [f"{len(missing)} of {len(names)} sets cannot be read:"] if len(names) > 1 else []
        raise files.InputError("\n       ".join(head + missing))
    for line in missing if os.environ.get("RANK", "0") == "0" else []:
        print(f"left out: {line}", file=sys.stderr)
    if len({dataset.name for dataset in sets}) < len(sets):
        raise files.InputError(
            "--datasets: two sets have the same name, and would overwrite each other's results"
        )
    for dataset in sets:
        dataset.full = dataset.full or len(dataset)
        dataset.items = dataset.items[: args.limit]
    return sets


def settings_of(args, net):
    """What results.json says of the run; unified_protocol is true only with the protocol's own settings."""
    settings = {name: getattr(args, name) for name in ("predictions", "limit")}
    if args.predictions:
        return {"method": None, **settings, "unified_protocol": None}  # whoever made them knows
    used = ("method", "checkpoint", "pamr", "bg_threshold", "templates", "precision", *PROTOCOL)
    settings |= {name: getattr(args, name) for name in used} | {"clip": net.clip.source}
    same = (
        all(getattr(args, name) == value for name, value in PROTOCOL.items())
        and args.templates == "release"
    )
    same = same and args.bg_threshold == (0.4 if args.pamr else 0.5)
    if args.method == "gcl":
        settings["kp_weight"] = args.kp_weight
        same = same and args.kp_weight == 0.3
    return settings | {"unified_protocol": same}


def load_model(args, device):
    """(net, tokenizer); an untrained GCL around CLIP for the methods that use CLIP alone."""
    if args.predictions:
        return None, None
    if args.method == "gcl":
        if not os.path.exists(args.checkpoint):
            raise files.InputError(
                f"--checkpoint {args.checkpoint}: no such file; train first, or give another"
            )
        net = gcl.load(args.checkpoint, args.model, args.pretrained, device)
    else:
        clip, _ = gcl.load_clip(
            args.model or "ViT-B-16-quickgelu", args.pretrained or "openai", device
        )
        net = gcl.GCL(clip).eval()
    return net, backbone.tokenizer_of(net.clip)


def totals(results, asked):
    """Fills in the mean of the sets' mIoU, None while one has none; partial unless every asked set is there, whole."""
    found = results["datasets"].values()
    values = [result["miou"] for result in found]
    results["average"] = None if None in values else round(float(np.mean(values)), 4)
    results["partial"] = len(found) < asked or any(result["partial"] for result in found)


def prepare(args):
    """(sets, device, net, tokenizer): everything that can be checked before the long work is."""
    read_templates(args.templates)
    sets, device = read_sets(args), backbone.pick_device(args.device)
    net, tokenizer = load_model(args, device)
    for dataset in sets:
        benchmarks.check_labels(dataset)
        if args.predictions:
            check_predictions(args, dataset)
    Path(args.out).mkdir(parents=True, exist_ok=True)  # found out now, not after the first set
    return sets, device, net, tokenizer


def prepare_together(args, rank, ranks):
    """prepare on every rank. When it fails on one, all end: the first raises that error, the others are silent."""
    try:
        ready, error = prepare(args), None
    except ERRORS as caught:
        ready, error = None, files.InputError(str(caught))
    errors = [error] * ranks
    if ranks > 1:
        dist.all_gather_object(errors, error)
    if any(errors):
        raise next(filter(None, errors)) if rank == 0 else SystemExit(1)
    return ready


def main(args):
    """All sets of a parsed command line: checks first, then one set after the other, results.json after each."""
    rank, ranks = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    if ranks > 1:
        dist.init_process_group("gloo")  # for one small matrix a set, on any device
    sets, device, net, tokenizer = prepare_together(args, rank, ranks)
    results = {"average": None, "partial": True, "settings": settings_of(args, net), "datasets": {}}
    for dataset in sets:
        result, pictures = evaluate_set(dataset, net, tokenizer, args, device, rank, ranks)
        results["datasets"][dataset.name] = result
        totals(results, len(benchmarks.BENCHMARKS if args.all else sets))
        if rank == 0:  # after every set: a later one that fails loses nothing
            report.write_sheet(Path(args.out, f"{dataset.name}.png"), dataset, pictures)
            report.write_results(args.out, results)
            images = (
                f"{'partial: ' if result['partial'] else ''}{len(dataset)} of {dataset.full} images"
            )
            print(f"{dataset.name}: mIoU {report.number(result['miou'])} ({images})", flush=True)
    if rank == 0:
        mark = " (partial)" if results["partial"] else ""
        print(
            f"{Path(args.out, 'results.md')}: average mIoU {report.number(results['average'])}{mark}"
        )
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    arguments = parse_args()
    try:
        main(arguments)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
