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

In the file's order: geometry and metric, which need torch alone, for copying; one image; one set;
label PNGs; all that is checked before the long work; main. K classes that are prompts, n classes
of a set, h w pixels.
"""

import argparse
import os
import sys

import numpy as np
import open_clip
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import normalize
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
        ends = *range(size, length, stride), length
        return [(max(end - size, 0), end) for end in ends]

    return [(*y, *x) for y in spans(height) for x in spans(width)]


def confusion(label, prediction, n):
    """int64 [n, n]: pixels of class i (rows) predicted as class j (columns).

    label, prediction: integers [h, w], a tensor or array and a tensor. 255 is ignored, with more
    classes n; RuntimeError for another label past the classes.
    """
    label = torch.as_tensor(label, dtype=torch.int64, device=prediction.device)
    scored = label < max(n, 255)
    pairs = label[scored] * n + prediction[scored]  # one number for each (i, j)
    return torch.bincount(pairs, minlength=n * n).view(n, n)  # [n*n] -> [n, n]


def iou_per_class(matrix):
    """TP / (TP + FP + FN) in percent, float64 [n]; nan for a class that occurs nowhere."""
    matrix = matrix.double()
    hit = matrix.diag()
    return 100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)


def mean_of(values):
    """The mean of those that are not nan, 4 digits; None where all are."""
    mean = values.nanmean()
    return None if mean.isnan() else round(mean.item(), 4)


def mean_iou(matrix, among=slice(None)):
    """Mean IoU in percent over the classes that occur in labels or predictions, 4 digits.

    among: indices of the classes to take, all by default. None where none of them occurs.
    """
    return mean_of(iou_per_class(matrix)[among])


def accuracies(matrix):
    """In percent: the share of pixels that are right, its mean over the classes of labels, and IoU
    weighted by how often a class is a label; None where no pixel is scored."""
    hit, label = matrix.double().diag(), matrix.double().sum(1)  # [n] each, pixels
    return {
        "pixel_accuracy": mean_of(100 * hit.sum() / label.sum()),
        "mean_accuracy": mean_of(100 * hit / label),
        "fw_iou": mean_of((iou_per_class(matrix) * label).nansum() / label.sum()),
    }


# ---- one image ----

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def segment_image(net, image, text, args):
    """Masks [K, h, w] of one image: sliding windows as one batch, averaged where they overlap.

    image: uint8 [h0, w0, 3]. text: [K, C]. Returns float32 on the net's device, at the protocol's
    size of the image.
    """
    recipe = net.recipe if args.method == "gcl" else gcl.RECIPES["paper"]
    x = torch.from_numpy(image).to(text.device).permute(2, 0, 1).float()  # [3, h0, w0]
    size = resized(*image.shape[:2], args.short_side)
    # Paper silent: how images are resized. Bilinear without antialiasing, as the release.
    x = backbone.resize(x[None], size)  # [1, 3, h, w]
    if recipe.resize_bytes:  # Release differs: before the normalisation, and so rounded
        x = x.round()
    x = normalize(x / 255, *recipe.norm)
    corners = windows(*size, args.window, args.stride)
    places = [(..., slice(y1, y2), slice(x1, x2)) for y1, y2, x1, x2 in corners]
    crops = torch.cat([x[place] for place in places])  # [windows, 3, ...]
    half, refine = PRECISIONS[args.precision], pamr.pamr if args.pamr else None
    with torch.autocast(crops.device.type, half, enabled=bool(half)):
        if args.method == "gcl":
            masks = net.segment(crops, text, refine, args.kp_weight)  # [windows, K, ...]
        else:
            masks = net.segment_clip(crops, text, args.method, refine)
    total, count = masks.new_zeros(len(text), *size), masks.new_zeros(size)
    for mask, place in zip(masks, places, strict=True):
        total[place] += mask
        count[place] += 1
    return total / count  # [K, h, w]


def best_class(masks, size):
    """Masks [K, h, w] resized to size, then the maximum over classes: values, indices [*size].

    One class at a time, so that no [K, *size] map is ever held; the first of equal ones wins.
    """
    value = masks.new_full(size, -1.0)  # masks are not negative
    index = value.long()
    for k, mask in enumerate(masks):
        mask = backbone.resize(mask[None, None], size)[0, 0]  # [*size]
        index = torch.where(mask > value, k, index)
        value = torch.maximum(mask, value)
    return value, index


def with_background(value, index, threshold):
    """Labels under a constant channel in front: 0 where no class exceeds it, else 1 + class."""
    return torch.where(value > threshold, index + 1, 0)


# ---- one set ----

WORST = 20  # images of --per-image that are shown
SWEEP = """0.05 0.10 0.15 0.20 0.25 0.30 0.35 0.40 0.45 0.50
0.55 0.60 0.65 0.70 0.75 0.80 0.85 0.90 0.95""".split()  # thresholds of --sweep-threshold


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
        with files.held_signals():
            items = iter(
                DataLoader(items, batch_size=None, collate_fn=read_item, num_workers=workers)
            )
        for item in items:
            if isinstance(item, files.InputError):
                raise item
            yield item
    except RuntimeError as error:  # of DataLoader alone, when a process of its own is gone
        raise files.InputError(
            "a loader process was killed; try fewer --workers, in Docker a larger --shm-size"
        ) from error


def evaluate_set(dataset, net, tokenizer, args, device, rank=0, ranks=1):
    """One set on this rank, then the sum over ranks.

    Returns its entry of results.json, and what is drawn: the confusion matrix and example pictures
    (image, label, prediction).
    """
    n, pictures = len(dataset.classes), {}
    if net:
        # Once for the whole set: [K, C].
        text = net.encode_classes(dataset.prompts(), tokenizer, read_templates(args.templates))
    sweep = SWEEP if args.sweep_threshold and dataset.background else []
    # One for the result, and one for each threshold of the sweep.
    matrices = torch.zeros(1 + len(sweep), n, n, dtype=torch.int64)
    mine = dataset.items[rank::ranks]  # dealt out without padding: every image counts once
    bar = tqdm(loaded(mine, args.workers), dataset.name, len(mine), disable=rank > 0)
    for k, (image_id, image, label) in enumerate(bar):
        if args.predictions:
            predictions = [read_prediction(args, dataset, image_id, label.shape)]
        else:
            masks = segment_image(net, image, text, args)
            value, index = best_class(masks, label.shape)  # [h, w]
            if (~value.isfinite()).any():
                raise files.InputError(f"{image_id}: masks are not finite; try --precision fp32")
            predictions = [index]
            if dataset.background:
                thresholds = args.bg_threshold, *map(float, sweep)
                predictions = [with_background(value, index, t) for t in thresholds]
        for matrix, prediction in zip(matrices, predictions, strict=True):
            matrix += confusion(label, prediction, n).cpu()
        prediction = predictions[0].cpu().numpy()
        if args.save_predictions or args.per_image and net:
            save_prediction(args, dataset, image_id, prediction)
        # The last one stays of each of ROWS parts, so they come from all over the set.
        pictures[k * report.ROWS // len(mine)] = image, label, prediction
    if ranks > 1:
        matrices = matrices.to(device if dist.get_backend() == "nccl" else "cpu")
        try:
            dist.all_reduce(matrices)  # of integers: the order of the ranks does not matter
        except RuntimeError as error:
            raise files.InputError(f"another rank is gone, see its message: {error}") from error
    matrices = matrices.cpu()
    result = summary(dataset, matrices, sweep, bar.format_dict["elapsed"])
    return result, (matrices[0], pictures.values())


def summary(dataset, matrices, sweep, seconds):
    """The entry of results.json: percent, None where a class does not occur."""
    matrix = matrices[0]
    partial = [dataset.classes.index(name) for name in dataset.partial]
    result = {
        "miou": mean_iou(matrix),
        **accuracies(matrix),
        "images": len(dataset),
        "full": dataset.full,
        "partial": len(dataset) != dataset.full,
        "iou": dict(zip(dataset.classes, map(mean_of, iou_per_class(matrix)), strict=True)),
        "partial_miou": mean_iou(matrix, partial),  # Table 3
        "seconds": round(seconds, 1),
    }
    if sweep:
        result["sweep"] = dict(zip(sweep, map(mean_iou, matrices[1:]), strict=True))
    return result


# ---- label PNGs of any method: DIR/<dataset>/<image id>.png ----


def prediction_path(args, dataset, image_id):
    """Where the label PNG of an image is, or will be."""
    folder = args.predictions or f"{args.out}/predictions"
    return f"{folder}/{dataset.name}/{image_id}.png"


def save_prediction(args, dataset, image_id, prediction):
    """A palette PNG of class indices; past 256 classes one of 16 bits, which has no palette."""
    picture = Image.fromarray(prediction.astype(np.min_scalar_type(len(dataset.classes) - 1)))
    if picture.mode == "L":
        picture.putpalette(sum(dataset.palette, []))
    files.save_png(prediction_path(args, dataset, image_id), picture)


def read_prediction(args, dataset, image_id, shape):
    """Class indices int64 [h, w] of a method's label PNG, or of what save_prediction wrote."""
    path = prediction_path(args, dataset, image_id)
    table = benchmarks.lookup_table(range(len(dataset.classes)), [])
    prediction = benchmarks.read_label(path, table)
    if prediction.shape != shape:
        raise files.InputError(
            f"{path}: the prediction is {prediction.shape}, the label {shape} (height, width)"
        )
    return torch.from_numpy(prediction)


def draw_worst(args, dataset, out):
    """For --per-image, from the label PNGs: the mIoU of every image, and a sheet of the worst."""
    table, worst = "image,miou\n", []
    for image_id, image, label in loaded(dataset.items, args.workers):
        prediction = read_prediction(args, dataset, image_id, label.shape)
        iou = mean_iou(confusion(label, prediction, len(dataset.classes)))
        if iou is not None:
            table += f'"{image_id}",{iou}\n'
            # No more than these are held; ids differ, so that pictures are never compared.
            worst = sorted([*worst, (iou, image_id, (image, label, prediction.numpy()))])[:WORST]
    files.write_text(f"{out}.images.csv", table)
    for iou, image_id, _ in worst:
        print(f"{iou:7.1f}  {files.printable(image_id)}")
    report.write_sheet(f"{out}.worst.png", dataset, [row for *_, row in worst])


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
FLAGS = {  # by kind: names, and help with the section of the paper
    str: {
        "data-root": "folder of the benchmarks, laid out as downloaded",
        "checkpoint": "of train.py (default runs/gcl/last.pt), or the authors' tcl.pth",
        "model": "open_clip name or config .json; default: the checkpoint's, else ViT-B/16",
        "pretrained": "open_clip tag, weights file or random; default: the checkpoint's, or openai",
        "templates": "release, simple, imagenet, or a file: a prompt a line, {} for names",
        "predictions": "folder of any method's <dataset>/<image id>.png; needs no model",
        "out": "folder for results.json, results.md and pictures",
        "device": "cuda, mps or cpu; default: the best there is",
    },
    files.share: {
        "bg-threshold": "background channel; 0.4 with PAMR, 0.5 without",
        "kp-weight": "of gcl: knowledge preservation, 0.3 (Appendix A)",
    },
    files.count: {
        "short-side": "pixels of the shorter side, 448 (Sec. 4.1)",
        "window": "side of the sliding window, 448 (paper silent)",
        "stride": "step of the sliding window, 224 (paper silent)",
        "limit": "only the first so many images of each set: partial results",
    },
    files.count_or_zero: {"workers": "loader processes"},
    bool: {
        "available": "leave out the sets that are not there",
        "pamr": "refine masks (Sec. 3.4); the default",
        "sweep-threshold": "a diagnostic: mIoU at 0.05 to 0.95",
        "partial-only": "Table 3's classes are the only prompts, and no other is scored",
        "per-image": "mIoU of every image, a sheet of the worst 20",
        "save-predictions": "label PNGs, to OUT/predictions",
    },
}


def background_threshold(refined):
    """Paper silent: the constant of the background channel; the release's, the same everywhere."""
    return 0.4 if refined else 0.5


def parse_args(argv=None):
    """The command line; flags that do not go together end with exit code 2."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--all", action="store_const", dest="datasets", const=report.COLUMNS, help="Table 1's eight"
    )
    which.add_argument(
        "--datasets", nargs="+", help=f"SPEC.json, or of {', '.join(report.COLUMNS)}"
    )
    p.add_argument(
        "--method",
        choices=["gcl", *backbone.METHODS],
        help="gcl, or CLIP alone; of Table 1, maskclip is MaskCLIP-dagger, -refined MaskCLIP",
    )
    p.add_argument("--precision", choices=PRECISIONS, help="of CLIP and adapter; masks are float32")
    for kind, flags in FLAGS.items():
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        for name, text in flags.items():
            p.add_argument(f"--{name}", help=text, **how)
    p.set_defaults(
        method="gcl",
        pamr=True,
        precision="fp32",
        data_root="data",
        out="results",
        workers=2,
        **PROTOCOL,
    )
    args = p.parse_args(argv)
    if args.checkpoint and (args.predictions or args.method != "gcl"):
        p.error("--checkpoint goes with --method gcl alone")
    if args.predictions and (args.sweep_threshold or args.save_predictions):
        p.error("--sweep-threshold and --save-predictions need a model's masks")
    if os.path.isfile(args.out):
        p.error(f"--out {args.out}: is a file, not a folder")
    if args.stride > args.window:
        p.error("--stride must be at most --window")
    if args.method == "gcl":
        args.checkpoint = args.checkpoint or "runs/gcl/last.pt"
    if args.bg_threshold is None:
        args.bg_threshold = background_threshold(args.pamr)
    return args


def read_templates(name):
    """Prompt templates of --templates; InputError for a file without any."""
    lines = TEMPLATES.get(name) or files.read_text(name).strip().splitlines()
    if {line.count("{}") for line in lines} != {1}:
        raise files.InputError(
            f"--templates {name}: needs one prompt per line, each with one {{}} for the class name"
        )
    return lines


def read_sets(args):
    """The sets to evaluate, every path checked; InputError for what is missing."""
    sets = []
    for name in args.datasets:
        try:
            sets.append(benchmarks.read_set(name, args.data_root))
        except files.InputError as error:
            if not args.available:
                raise
            benchmarks.note(f"left out: {error}")
    if not sets:
        raise files.InputError(f"--data-root {args.data_root}: none of the sets is there")
    if len({dataset.name for dataset in sets}) < len(sets):
        raise files.InputError("--datasets: two sets have the same name, and so the same results")
    for dataset in sets:
        dataset.full = dataset.full or len(dataset)
        dataset.items = dataset.items[: args.limit]
        if args.partial_only:
            keep_partial(dataset)
    return sets


def keep_partial(dataset):
    """Leaves Table 3's classes alone in a set: labels of others are not scored."""
    if not dataset.partial:
        raise files.InputError(f"--partial-only: Table 3 has no classes of {dataset.name}")
    kept = [dataset.classes.index(name) for name in dataset.partial]
    # Of class indices, IGNORE, and INVALID, which is -1 and so finds the last.
    table = np.append(benchmarks.lookup_table(kept, range(256)), benchmarks.INVALID)
    dataset.items = [(*item, table[lut]) for *item, lut in dataset.items]
    dataset.palette = [dataset.palette[k] for k in kept]
    dataset.classes = dataset.partial


def load_model(args, device):
    """(net, tokenizer); an untrained GCL around CLIP for the methods that use CLIP alone.

    Turns TF32 off, for products and convolutions: what is float32 stays so, on GPUs too.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if args.method == "gcl":
        net = gcl.load(args.checkpoint, args.model, args.pretrained, device)
    else:
        model, pretrained = args.model or "ViT-B-16-quickgelu", args.pretrained or "openai"
        net = gcl.GCL(gcl.load_clip(model, pretrained, device)[0])
    if device.type == "cpu":
        winograd.use(net)  # the same convolutions, in fewer products
    return net, backbone.tokenizer_of(net.clip)


def settings_of(args, net):
    """What results.json says of the run; is it the protocol's own settings, the same for all?"""
    settings = {"method": None, "predictions": args.predictions, "limit": args.limit}
    if args.predictions:
        return settings | {"unified_protocol": None}  # whoever made them knows
    names = [*"method checkpoint pamr bg_threshold precision".split(), *PROTOCOL]
    settings |= {name: getattr(args, name) for name in names}
    protocol = PROTOCOL | {"bg_threshold": background_threshold(args.pamr)}
    settings |= {"clip": net.clip.source, "unified_protocol": protocol.items() <= settings.items()}
    if args.method != "gcl":
        del settings["kp_weight"]
    return settings


# ---- all sets ----


def totals(results, asked):
    """Fills in the mean of the sets' mIoU; partial unless every asked set is there, whole."""
    found = results["datasets"].values()
    values = [result["miou"] for result in found]
    results["average"] = None if None in values else round(float(np.mean(values)), 4)
    results["partial"] = len(found) < asked or any(result["partial"] for result in found)


def main(args):
    """Checks first, then one set after the other, with results.json after each."""
    rank, ranks = files.rank_of()
    if ranks > 1:
        try:
            dist.init_process_group("gloo")  # for one small matrix a set, on any device
        except (RuntimeError, ValueError) as error:
            why = files.first_line(error)
            raise files.InputError(f"not all {ranks} ranks have started ({why})") from error
    # Everything that can be checked before the long work is.
    read_templates(args.templates)
    sets, device = read_sets(args), backbone.pick_device(args.device)
    net, tokenizer = (None, None) if args.predictions else load_model(args, device)
    for dataset in sets:
        benchmarks.check_labels(dataset, args.workers)
    os.makedirs(args.out, exist_ok=True)
    results = {"average": None, "partial": True, "settings": settings_of(args, net), "datasets": {}}
    for dataset in sets:
        result, (matrix, pictures) = evaluate_set(
            dataset, net, tokenizer, args, device, rank, ranks
        )
        results["datasets"][dataset.name] = result
        totals(results, len(args.datasets))
        if rank == 0:  # after every set: a later one that fails loses nothing
            out = f"{args.out}/{dataset.name}"
            report.write_sheet(f"{out}.png", dataset, pictures)
            report.write_confusion(args.out, dataset.name, matrix.numpy(), dataset.classes)
            if args.per_image:
                draw_worst(args, dataset, out)
            report.write_results(args.out, results)
            print(f"{report.heading(dataset.name, result)}: mIoU {report.number(result['miou'])}")
    if rank == 0:
        average = report.number(results["average"]) + " (partial)" * results["partial"]
        print(files.printable(f"{args.out}/results.md: average mIoU {average}"))
        if args.datasets == report.COLUMNS:
            row = report.TABLE_1["GCL"] if args.pamr else report.WITHOUT_PAMR
            print("the paper's GCL on the eight, and its average:", *row)


if __name__ == "__main__":
    sys.exit(files.command(main, parse_args()))
