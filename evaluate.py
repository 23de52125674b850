# SPDX-License-Identifier: MIT
"""Evaluates a model under the unified protocol (Sec. 4.1): results.json, results.md and pictures.

    python evaluate.py --all --checkpoint runs/gcl/last.pt    # the eight under --data-root data
    python evaluate.py --all --checkpoint tcl.pth             # the authors' released checkpoint
    python evaluate.py --datasets voc mine/SPEC.json --method maskclip   # CLIP alone
    python evaluate.py --all --predictions DIR                # anyone's label PNGs, no model
    torchrun --nproc_per_node=8 evaluate.py --all --checkpoint runs/gcl/last.pt

The protocol: shorter side 448, windows of 448 with stride 224, masks averaged where windows
overlap, resized to the label, argmax; a constant background channel where a set has background
(0.4 with PAMR, 0.5 without); class names as they are, never "background" as a prompt; one
confusion matrix per set. Fewer images than the whole set has give a result that is marked partial
everywhere. With --precision fp32 (the default) nothing is rounded to TF32.

In the file's order: geometry and metric, which need numpy and torch alone; one image; one set;
label PNGs; all that is checked before the long work; main. K classes that are prompts, n classes
of a set, h w pixels.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

import backbone
import benchmarks
import files
import gcl
import pamr
import report
import winograd

# ---- geometry and metric: they use nothing of this file nor of others ----


def resized(height, width, short_side, long_side=2048):
    """(height, width) with the aspect kept: the shorter side short_side, the longer limited.

    Paper silent: the longer side is at most 2048, as in GroupViT's protocol and the release.
    """
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def windows(height, width, size, stride):
    """Corners (y1, y2, x1, x2) of windows that cover the image, the last flush with its border."""

    def spans(length):
        count = max(-(-(length - size) // stride), 0) + 1  # rounded up
        ends = [min(k * stride + size, length) for k in range(count)]
        return [(max(end - size, 0), end) for end in ends]

    return [(*y, *x) for y in spans(height) for x in spans(width)]


def confusion(label, prediction, n, ignore=255):
    """int64 [n, n]: pixels of class i (rows) predicted as class j (columns), without ignored."""
    scored = label != ignore
    pairs = label[scored] * n + prediction[scored]  # one number for each (i, j)
    return torch.bincount(pairs, minlength=n * n).view(n, n)  # [n*n] -> [n, n]


def iou_per_class(matrix):
    """TP / (TP + FP + FN) in percent, float64 [n]; nan for a class that occurs nowhere."""
    matrix = matrix.double()
    hit = matrix.diag()
    return 100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)


def mean_iou(matrix, among=slice(None)):
    """Mean IoU in percent over the classes that occur in labels or predictions, 4 digits.

    among: indices of the classes to take, all by default. None where none of them occurs.
    """
    mean = iou_per_class(matrix)[among].nanmean()
    return None if mean.isnan() else round(mean.item(), 4)


def accuracies(matrix):
    """Pixel accuracy, mean accuracy over the classes of labels, and IoU weighted by how often a
    class is a label, each in percent; None where no pixel is scored."""
    hit, label = matrix.double().diag(), matrix.double().sum(1)  # [n] each, pixels
    weighted = (iou_per_class(matrix).nan_to_num() * label).sum() / 100
    values = hit.sum() / label.sum(), (hit / label).nanmean(), weighted / label.sum()
    return [None if value.isnan() else round(100 * value.item(), 4) for value in values]


# ---- one image ----

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def segment_image(net, image, text, args):
    """Masks [K, h, w] of one image: sliding windows as one batch, averaged where they overlap.

    image: uint8 [h0, w0, 3]. text: [K, C]. Returns float32 on the net's device, at the protocol's
    size of the image.
    """
    recipe = net.recipe if args.method == "gcl" else gcl.RECIPES["paper"]
    mean, std = torch.tensor(recipe.norm, device=text.device).view(2, 3, 1, 1)  # [3, 1, 1] each
    x = torch.from_numpy(image).to(text.device).permute(2, 0, 1).float()  # [3, h0, w0]
    size = resized(*image.shape[:2], args.short_side)
    # Paper silent: how images are resized. Bilinear without antialiasing, as the release.
    x = backbone.resize(x[None], size)  # [1, 3, h, w]
    if recipe.resize_bytes:  # Release differs: before the normalisation, and so rounded
        x = x.round()
    x = (x / 255 - mean) / std
    corners = windows(*size, args.window, args.stride)
    crops = torch.cat([x[..., y1:y2, x1:x2] for y1, y2, x1, x2 in corners])  # [windows, 3, ...]
    half, refine = PRECISIONS[args.precision], pamr.pamr if args.pamr else None
    with torch.autocast(crops.device.type, half, enabled=bool(half)):
        if args.method == "gcl":
            masks = net.segment(crops, text, refine, args.kp_weight)  # [windows, K, ...]
        else:
            masks = net.segment_clip(crops, text, args.method, refine)
    total, count = masks.new_zeros(len(text), *size), masks.new_zeros(size)
    for mask, (y1, y2, x1, x2) in zip(masks, corners, strict=True):
        total[:, y1:y2, x1:x2] += mask
        count[y1:y2, x1:x2] += 1
    return total / count  # [K, h, w]


def best_class(masks, size, chunk=16):
    """Masks [K, h, w] resized to size, then the maximum over classes: values, indices [*size].

    A few classes at a time, so that no [K, *size] map is ever held; the first of equal ones wins.
    """
    value = masks.new_full(size, -1.0)  # masks are not negative
    index = torch.zeros_like(value, dtype=torch.int64)
    for k in range(0, len(masks), chunk):
        high, at = backbone.resize(masks[None, k : k + chunk], size)[0].max(0)  # [*size]
        index = torch.where(high > value, at + k, index)
        value = torch.maximum(high, value)
    return value, index


def best_text(net, image, text, args, size):
    """best_class of segment_image for texts [K, C] in groups, whose masks alone are held at once.

    The refined MaskCLIP compares all texts with each other, so they are one group.
    """
    group = len(text) if args.method == "maskclip-refined" else 256
    parts = text.split(group)
    found = [best_class(segment_image(net, image, part, args), size) for part in parts]
    values, indices = (torch.stack(x) for x in zip(*found, strict=True))  # [groups, *size]
    value, best = values.max(0)
    return value, indices.gather(0, best[None])[0] + best * group  # [1, *size] -> [*size]


def with_background(value, index, threshold):
    """Labels under a constant channel in front: 0 where no class exceeds it, else 1 + class."""
    return torch.where(value > threshold, index + 1, 0)


# ---- one set ----

WORST = 20  # images of --per-image that are shown
SWEEP = [k / 20 for k in range(1, 20)]  # thresholds of --sweep-threshold


def read_item(item):
    """(image id, image uint8 [h, w, 3], label uint8 or uint16 [h, w]), or the InputError."""
    image_id, image, label, lut = item
    try:
        image, label = np.array(files.read_picture(image)), benchmarks.read_label(label, lut)
        return image_id, image, label.astype(np.min_scalar_type(label.max()))
    except files.InputError as error:  # raised again by the main process, in one line
        return error


def loaded(items, workers):
    """read_item of each of the items, by loader processes that are ahead of the model.

    They send arrays, through a pipe: tensors would go through /dev/shm, which Docker keeps small.
    """
    try:
        loader = DataLoader(items, batch_size=None, collate_fn=read_item, num_workers=workers)
        with files.held_signals():
            items = iter(loader)
        yield from items
    except RuntimeError as error:  # of DataLoader alone, when a process of its own is gone
        killed = "a loader process was killed; try fewer --workers, in Docker a larger --shm-size"
        raise files.InputError(killed) from error


def evaluate_set(dataset, net, tokenizer, args, device, rank=0, ranks=1):
    """One set on this rank, then the sum over ranks.

    Returns its entry of results.json, and what is drawn: the confusion matrix, example pictures
    (image, label, prediction), and with --per-image (mIoU, image id) of all images.
    """
    started, n, pictures, images = time.perf_counter(), len(dataset.classes), [], []
    if net:
        prompts, templates = dataset.prompts(), read_templates(args.templates)
        text = net.encode_classes(prompts, tokenizer, templates)  # [K, C]
    sweep = SWEEP if args.sweep_threshold and dataset.background else []
    matrices = torch.zeros(1 + len(sweep), n, n, dtype=torch.int64)  # the result's, the sweep's
    mine = dataset.items[rank::ranks]  # dealt out without padding: every image counts once
    shown = np.linspace(0, len(mine) - 1, report.ROWS).astype(int)  # of rank 0's images
    bar = tqdm(loaded(mine, args.workers), dataset.name, len(mine), disable=rank > 0)
    for k, item in enumerate(bar):
        if isinstance(item, files.InputError):
            raise item
        image_id, image, label = item
        if args.predictions:
            found = read_prediction(args, dataset, image_id, label.shape)
            predictions = [torch.from_numpy(found)]
        else:
            value, index = best_text(net, image, text, args, label.shape)  # [h, w]
            if (~value.isfinite()).any():
                raise files.InputError(f"{image_id}: masks are not finite; try --precision fp32")
            predictions = [index]
            if dataset.background:
                thresholds = args.bg_threshold, *sweep
                predictions = [with_background(value, index, t) for t in thresholds]
        scored = torch.from_numpy(label.astype(np.int64)).to(predictions[0].device)
        for matrix, prediction in zip(matrices, predictions, strict=True):
            matrix += confusion(scored, prediction, n, max(benchmarks.IGNORE, n)).cpu()
        prediction = predictions[0].cpu().numpy().astype(np.uint8 if n <= 256 else np.uint16)
        if args.save_predictions or args.per_image and net:
            save_prediction(args, dataset, image_id, prediction)
        if k in shown:
            pictures.append((image, label, prediction))
        if args.per_image:
            own = confusion(scored, predictions[0], n, max(benchmarks.IGNORE, n))
            images.append((mean_iou(own), image_id))
    if ranks > 1:
        matrices = matrices.to(device if dist.get_backend() == "nccl" else "cpu")
        try:
            dist.all_reduce(matrices)  # of integers: the order of the ranks does not matter
        except RuntimeError as error:
            gone = "another rank is gone, see its message: " + files.first_line(error)
            raise files.InputError(gone) from error
        if args.per_image:
            everyone = [None] * ranks
            dist.all_gather_object(everyone, images)
            images = sum(everyone, [])
    result = summary(dataset, matrices.cpu(), sweep, time.perf_counter() - started)
    return result, (matrices[0].cpu(), pictures, images)


def summary(dataset, matrices, sweep, seconds):
    """The entry of results.json: percent, None where a class does not occur."""
    iou = zip(dataset.classes, iou_per_class(matrices[0]).tolist(), strict=True)
    partial = [dataset.classes.index(name) for name in dataset.partial]
    names = "pixel_accuracy", "mean_accuracy", "fw_iou"
    result = {
        "miou": mean_iou(matrices[0]),
        **dict(zip(names, accuracies(matrices[0]), strict=True)),
        "images": len(dataset),
        "full": dataset.full,
        "partial": len(dataset) != (dataset.full or len(dataset)),
        "iou": {name: round(v, 4) if v == v else None for name, v in iou},
        "partial_miou": mean_iou(matrices[0], partial),  # Table 3
        "seconds": round(seconds, 1),
    }
    if sweep:
        values = map(mean_iou, matrices[1:])
        result["sweep"] = {f"{t:.2f}": v for t, v in zip(sweep, values, strict=True)}
    return result


def draw(args, dataset, matrix, pictures, images):
    """All files of one set that are not its numbers."""
    out = Path(args.out, dataset.name)
    report.write_sheet(f"{out}.png", dataset, pictures)
    report.write_confusion(args.out, dataset.name, matrix.numpy(), dataset.classes)
    if args.per_image:
        images = sorted(entry for entry in images if entry[0] is not None)  # the worst first
        rows = [f'"{image_id}",{iou}\n' for iou, image_id in images]
        files.write_text(f"{out}.images.csv", "".join(["image,miou\n", *rows]))
        items, worst = {item[0]: item for item in dataset.items}, []
        for iou, image_id in images[:WORST]:
            print(f"{iou:7.1f}  {files.printable(image_id)}")
            _, image, label = read_item(items[image_id])
            worst.append((image, label, read_prediction(args, dataset, image_id, label.shape)))
        report.write_sheet(f"{out}.worst.png", dataset, worst)


# ---- label PNGs of any method: DIR/<dataset>/<image id>.png ----


def prediction_path(folder, dataset, image_id):
    return Path(folder, dataset.name, f"{image_id}.png")


def save_prediction(args, dataset, image_id, prediction):
    """A palette PNG of class indices; past 256 classes one of 16 bits, which has no palette."""
    picture = Image.fromarray(prediction)
    if prediction.dtype == np.uint8:
        picture.putpalette(np.ravel(dataset.palette).tolist())
    files.save_png(prediction_path(Path(args.out, "predictions"), dataset, image_id), picture)


def read_prediction(args, dataset, image_id, shape):
    """Class indices int64 [h, w] of a method's label PNG, or of what save_prediction wrote."""
    folder = args.predictions or Path(args.out, "predictions")
    path = prediction_path(folder, dataset, image_id)
    if dataset.name == "cityscapes" and not path.is_file():
        path = path.parents[1] / path.name  # most tools write no folder for the city
    values = benchmarks.lookup_table(range(len(dataset.classes)), [])
    prediction = benchmarks.read_label(path, values)
    if prediction.shape != shape:
        sizes = f"the prediction is {prediction.shape}, the label {shape} (height, width)"
        raise files.InputError(f"{path}: {sizes}")
    return prediction


# ---- before the long work: the command line, sets and model ----

TEMPLATES = {  # Paper silent: prompts; the release's nine
    "release": """itap of a {}.
a bad photo of a {}.
a origami {}.
a photo of the large {}.
a {} in a video game.
art of the {}.
a photo of the small {}.
a photo of many {}.
a photo of {}s.""".splitlines(),
    "simple": ["a photo of a {}."],
    "imagenet": [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES],  # CLIP's 80
}
PROTOCOL = {  # the same for all sets and methods; kp_weight is of the method gcl (Appendix A)
    "short_side": 448,
    "window": 448,  # Paper silent: window and stride; the release's
    "stride": 224,
    "templates": "release",
    "kp_weight": 0.3,
    "partial_only": False,
}
# GCL without PAMR, as TLH-CLIP and DeCLIP print it, from one source; its average is their own.
WITHOUT_PAMR = (51.2, 24.3, 30.4, 77.5, 30.3, 19.6, 23.1, 14.9, 33.9)


def background_threshold(refined):
    """Paper silent: the constant of the background channel; the release's, the same everywhere."""
    return 0.4 if refined else 0.5


def parse_args(argv=None):
    """The command line; flags that do not go together end with exit code 2."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.set_defaults(**PROTOCOL)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="the eight benchmarks of Table 1")
    known = f"of {', '.join(benchmarks.BENCHMARKS)}"
    which.add_argument("--datasets", nargs="+", metavar="NAME|SPEC.json", help=known)
    add = p.add_argument
    add("--data-root", default="data", help="folder of the benchmarks, laid out as downloaded")
    add("--available", action="store_true", help="with --all: only those that are there")
    add("--checkpoint", help="of train.py (default runs/gcl/last.pt), or the authors' tcl.pth")
    add("--model", help="open_clip name or config .json; default: the checkpoint's, else ViT-B/16")
    add("--pretrained", help="open_clip tag or weights file; default: the checkpoint's, or openai")
    alone = "gcl, or CLIP alone; of Table 1, maskclip is MaskCLIP-dagger, -refined MaskCLIP"
    add("--method", choices=["gcl", *backbone.METHODS], default="gcl", help=alone)
    flag = argparse.BooleanOptionalAction
    add("--pamr", action=flag, default=True, help="refine masks (Sec. 3.4)")
    add("--bg-threshold", type=float, help="background channel; 0.4 with PAMR, 0.5 without")
    add("--sweep-threshold", action="store_true", help="a diagnostic: mIoU at 0.05 to 0.95")
    add("--short-side", type=int, help="pixels of the shorter side, 448 (Sec. 4.1)")
    add("--window", type=int, help="side of the sliding window, 448 (paper silent)")
    add("--stride", type=int, help="step of the sliding window, 224 (paper silent)")
    add("--kp-weight", type=float, help="of gcl: knowledge preservation, 0.3 (Appendix A)")
    add("--templates", help="release, simple, imagenet, or a file: a prompt a line, {} for names")
    alone = "Table 3's classes are the only prompts, and no other is scored"
    add("--partial-only", action="store_true", help=alone)
    add("--per-image", action="store_true", help="mIoU of every image, a sheet of the worst 20")
    add("--limit", type=int, metavar="N", help="the first N images of each set: partial results")
    add("--predictions", help="folder of any method's <dataset>/<image id>.png; needs no model")
    add("--save-predictions", action="store_true", help="label PNGs, to OUT/predictions")
    add("--out", default="results", help="folder for results.json, results.md and pictures")
    add("--device", help="cuda, mps or cpu; default: the best there is")
    half = "of CLIP and adapter; masks stay float32"
    add("--precision", choices=PRECISIONS, default="fp32", help=half)
    add("--workers", type=int, default=2, help="loader processes")
    args = p.parse_args(argv)
    if args.checkpoint and (args.predictions or args.method != "gcl"):
        p.error("--checkpoint goes with --method gcl alone")
    if args.predictions and (args.sweep_threshold or args.save_predictions):
        p.error("--sweep-threshold and --save-predictions need a model's masks")
    if args.available and not args.all:
        p.error("--available goes with --all")
    if min(args.short_side, args.window, args.stride, 1 if args.limit is None else args.limit) < 1:
        p.error("--short-side, --window, --stride and --limit must be positive")
    if args.stride > args.window or args.workers < 0 or not 0 <= args.kp_weight <= 1:
        p.error(
            "--stride must be at most --window, --workers at least 0, --kp-weight between 0 and 1"
        )
    if os.path.isfile(args.out):
        p.error(f"--out {args.out}: is a file, not a folder")
    if args.method == "gcl" and not args.predictions:
        args.checkpoint = args.checkpoint or "runs/gcl/last.pt"
    if args.bg_threshold is None:
        args.bg_threshold = background_threshold(args.pamr and not args.predictions)
    return args


def read_templates(name):
    """Prompt templates of --templates; InputError for a file without any."""
    lines = TEMPLATES.get(name) or files.read_text(name).splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    if not lines or any(line.count("{}") != 1 for line in lines):
        needs = "needs one prompt per line, each with one {} for the class name"
        raise files.InputError(f"--templates {name}: {needs}")
    return lines


def read_sets(args):
    """The sets to evaluate, every path checked; InputError lists all that is missing at once."""
    sets, missing = [], []
    for name in benchmarks.BENCHMARKS if args.all else args.datasets:
        try:
            sets.append(benchmarks.read_set(name, args.data_root))
        except files.InputError as error:
            missing.append(str(error))
    if missing and not (args.available and sets):
        raise files.InputError("\n       ".join(missing))
    for line in missing:
        benchmarks.note(f"left out: {line}")
    if len({dataset.name for dataset in sets}) < len(sets):
        raise files.InputError("--datasets: two sets have the same name, and so the same results")
    for dataset in sets:
        dataset.full = dataset.full or len(dataset)
        dataset.items = dataset.items[: args.limit]
    return [partial_set(dataset) for dataset in sets] if args.partial_only else sets


def partial_set(dataset):
    """The set with Table 3's classes alone: other labels are not scored."""
    if not dataset.partial:
        raise files.InputError(f"--partial-only: Table 3 has no classes of {dataset.name}")
    kept = [dataset.classes.index(name) for name in dataset.partial]
    table = np.full(257, benchmarks.IGNORE, np.int16)  # of class indices and IGNORE
    table[kept], table[benchmarks.INVALID] = range(len(kept)), benchmarks.INVALID  # its last
    return dataclasses.replace(
        dataset,
        classes=[dataset.classes[k] for k in kept],
        palette=[dataset.palette[k] for k in kept],
        items=[(*item, table[lut]) for *item, lut in dataset.items],
    )


def load_model(args, device):
    """(net, tokenizer); an untrained GCL around CLIP for the methods that use CLIP alone.

    Turns TF32 off, for products and convolutions: what is float32 stays so, on GPUs too.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if args.method != "gcl":
        clip = args.model or "ViT-B-16-quickgelu", args.pretrained or "openai"
        net = gcl.GCL(gcl.load_clip(*clip, device)[0]).eval()
    elif not os.path.exists(args.checkpoint):
        raise files.InputError(args.checkpoint + ": no such file; train first, or give another")
    else:
        net = gcl.load(args.checkpoint, args.model, args.pretrained, device)
    if device.type == "cpu":
        winograd.use(net)  # the same convolutions, in fewer products
    return net, backbone.tokenizer_of(net.clip)


def prepare(args, rank, ranks):
    """(sets, device, net, tokenizer): everything that can be checked before the long work is.

    Where that fails on one rank, all end, and the first says why.
    """
    errors = [None] * ranks
    try:
        read_templates(args.templates)
        sets, device = read_sets(args), backbone.pick_device(args.device)
        net, tokenizer = (None, None) if args.predictions else load_model(args, device)
        for dataset in sets:
            benchmarks.check_labels(dataset, args.workers)
        Path(args.out).mkdir(parents=True, exist_ok=True)  # found out now, not after a set
    except (files.InputError, OSError) as error:
        errors[rank] = str(error)
    if ranks > 1:
        dist.all_gather_object(errors, errors[rank])
    if any(errors):
        raise SystemExit(1) if rank else files.InputError(next(filter(None, errors)))
    return sets, device, net, tokenizer


def settings_of(args, net):
    """What results.json says of the run; is it the protocol's own settings, the same for all?"""
    settings = {"method": None, "predictions": args.predictions, "limit": args.limit}
    if args.predictions:
        return settings | {"unified_protocol": None}  # whoever made them knows
    names = ["method", "checkpoint", "pamr", "bg_threshold", "precision", *PROTOCOL]
    settings |= {name: getattr(args, name) for name in names} | {"clip": net.clip.source}
    if args.method != "gcl":
        del settings["kp_weight"]
    protocol = PROTOCOL | {"bg_threshold": background_threshold(args.pamr)}
    same = all(settings.get(name, value) == value for name, value in protocol.items())
    return settings | {"unified_protocol": same}


# ---- all sets ----


def totals(results, asked):
    """Fills in the mean of the sets' mIoU; partial unless every asked set is there, whole."""
    found = results["datasets"].values()
    values = [result["miou"] for result in found]
    results["average"] = None if None in values else round(float(np.mean(values)), 4)
    results["partial"] = len(found) < asked or any(result["partial"] for result in found)


def main(args):
    """Checks first, then one set after the other, with results.json after each."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")  # for one small matrix a set, on any device
    sets, device, net, tokenizer = prepare(args, rank, ranks)
    results = {"average": None, "partial": True, "settings": settings_of(args, net), "datasets": {}}
    for dataset in sets:
        result, drawn = evaluate_set(dataset, net, tokenizer, args, device, rank, ranks)
        results["datasets"][dataset.name] = result
        totals(results, len(benchmarks.BENCHMARKS if args.all else sets))
        if rank == 0:  # after every set: a later one that fails loses nothing
            draw(args, dataset, *drawn)
            report.write_results(args.out, results)
            images = "partial: " * result["partial"] + f"{len(dataset)} of {dataset.full} images"
            print(f"{dataset.name}: mIoU {report.number(result['miou'])} ({images})", flush=True)
    if rank == 0:
        average = report.number(results["average"]) + " (partial)" * results["partial"]
        print(f"{args.out}/results.md: average mIoU {average}")
        if args.method == "gcl" and not args.predictions and args.all:
            row = report.TABLE_1["GCL"] if args.pamr else WITHOUT_PAMR
            said = zip((*report.COLUMNS, "average"), row, strict=True)
            print("the paper's GCL:", ", ".join(f"{name} {value}" for name, value in said))
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(files.command(main, parse_args()))
