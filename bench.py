# SPDX-License-Identifier: MIT
"""Measures each stage against its floor, as ratios: the table of speed.

    python bench.py                                     # all stages; the best device there is
    python bench.py --stages segment train --precision bf16 --json bench.json
    CUDA_VISIBLE_DEVICES= python bench.py --threads 2   # two CPU cores

Stages: segment (a window against open_clip's own image forward of it), train (forward and backward
against open_clip's forward of the batch), pamr (against the tensor of all neighbours), loader (64
pairs of one process against decode and resize), evaluate (an image against open_clip's forward of
its windows). Both sides of a ratio run in turn; it is the median of the rounds' ratios. Floors are
always float32. Memory is the peak above an idle process, each stage in a process of its own.
"""

import argparse
import copy
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import backbone
import data
import evaluate
import files
import gcl
import pamr

DILATIONS = 1, 2, 4, 8, 12, 24


def plain(net, *shape):
    """open_clip's own forward of images of this shape, its positions resized once."""
    visual, images = copy.deepcopy(net.clip.visual), torch.randn(shape, device=net.w.device)
    grid, positions = backbone.patch_grid(images, net.patch), visual.positional_embedding
    positions.data = backbone.resize_positions(positions, visual.grid_size, grid)
    return partial(torch.no_grad()(visual), images)


def classes(net, k):
    """Random text embeddings [k, C]."""
    return F.normalize(torch.randn(k, net.clip.visual.proj.shape[1], device=net.w.device))


# ---- the stages: each yields its cases (what, floor, run), two functions to be measured ----


def segment(net, tokenizer, args):
    """One window for each number of classes, PAMR off and on."""
    images = torch.randn(1, 3, args.window, args.window, device=net.w.device)
    for k, refine in itertools.product(args.classes, (None, pamr.pamr)):
        run = partial(net.segment, images, classes(net, k), refine)
        yield f"{k} classes" + ", PAMR" * bool(refine), plain(net, *images.shape), run


def train(net, tokenizer, args):
    """A forward and backward pass for each batch size."""

    def step(images, tokens):
        gcl.total_loss(net(images, tokens, micro_batch=args.micro_batch)).backward()
        net.zero_grad()

    for batch in args.batches:
        images = torch.randn(batch, 3, *net.clip.visual.image_size, device=net.w.device)
        tokens = tokenizer([f"a small brown dog on wet grass, {k}" for k in range(batch)])
        run = partial(step, images, tokens.to(images.device))
        yield f"batch {batch}", plain(net, *images.shape), run


def yardstick(image, mask):
    """PAMR in the usual way, with all neighbours: image [B, 3, H, W], mask [B, K, H, W]."""

    def around(x):
        """[B, C, H, W] -> [B, dilations, C, 9, H, W], the centre fifth."""
        cuts = [F.unfold(F.pad(x, (d,) * 4, "replicate"), 3, dilation=d) for d in DILATIONS]
        return torch.stack(cuts, 1).view(
            len(x), len(cuts), -1, 9, *x.shape[2:]
        )  # [B, d, C, 9, H, W]

    near = around(image)
    sigma = near.std((1, 3), keepdim=True)  # [B, 1, 3, 1, H, W]
    weights = (near - image[:, None, :, None]).abs() / (1e-8 + 0.1 * sigma)
    weights = (-weights.mean(2, keepdim=True)).exp()  # [B, dilations, 1, 9, H, W]
    weights[:, :, :, 4] = 0  # the place itself
    weights /= weights.sum((1, 3), keepdim=True)
    for _ in range(10):
        mask = (weights * around(mask)).sum((1, 3))  # [B, K, H, W]
    return mask


def refine(net, tokenizer, args):
    """PAMR for each number of classes; the usual way is no floor, so its ratio is below 1."""
    size = [args.window // 4] * 2
    for k in args.classes:
        pair = [torch.rand(1, channels, *size, device=net.w.device) for channels in (3, k)]
        yield f"{k} classes", partial(yardstick, *pair), partial(pamr.pamr, *pair)


def loader(net, tokenizer, args):
    """Pairs of one loader process, from a shard on the disk; smooth pictures of a photo's size."""
    torch.set_num_threads(1)  # as a loader process has
    size, folder = net.clip.visual.image_size[0], tempfile.TemporaryDirectory()
    jpg, txt, shard = (Path(folder.name, name) for name in ("jpg", "txt", "0.tar"))
    Image.radial_gradient("L").resize((500, 375)).convert("RGB").save(jpg, "JPEG", quality=90)
    txt.write_text("a photo")
    with tarfile.open(shard, "w") as tar:
        for k, path in itertools.product(range(64), (jpg, txt)):
            tar.add(path, f"{k:09d}.{path.name}")
    transform = data.train_transform(size, gcl.CLIP_NORM, False)
    pairs = data.PairDataset([str(shard)], transform, tokenizer, (size // 4, size // 4))

    def floor():
        for _ in range(64):
            Image.open(f"{folder.name}/jpg").resize((size, size), Image.Resampling.BICUBIC)

    yield "64 pairs", floor, lambda: [pairs[k, k] for k in range(64)]


def whole(net, tokenizer, args):
    """Windows, masks and scores of an image of a photo's size."""
    settings, side = evaluate.parse_args(["--datasets", "voc"]), args.window
    vars(settings).update(window=side, short_side=side, stride=-(-side // 2))
    text = classes(net, args.classes[0])
    image = np.zeros((375, 500, 3), np.uint8)
    label = torch.zeros(image.shape[:2], dtype=torch.int64, device=text.device)
    n = len(evaluate.windows(*evaluate.resized(*label.shape, side), side, settings.stride))
    settings.precision = args.precision

    def run():
        masks = evaluate.segment_image(net, image, text, settings)
        evaluate.confusion(label, evaluate.best_class(masks, label.shape)[1], len(text))

    yield f"{n} windows, {len(text)} classes", plain(net, n, 3, side, side), run


STAGES = {"segment": segment, "train": train, "pamr": refine, "loader": loader, "evaluate": whole}


# ---- time, memory, the table ----


def memory(device):
    """The peak of this process so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, but on macOS bytes
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(stage, args):
    """The rows of a stage. In a fresh process, where no other stage has left its memory."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = backbone.pick_device(args.device)
    clip, tokenizer = gcl.load_clip(args.model, None, device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
    cases, rows = list(STAGES[stage](gcl.GCL(clip), tokenizer, args)), []

    def seconds(side, dtype=None):
        start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            side()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    idle = memory(device)
    for what, _, run in cases:  # from small to large, and before any floor: a peak only rises
        seconds(run, dtype)
        rows.append({"stage": stage, "what": what, "bytes": memory(device) - idle})
    for row, (_, floor, run) in zip(rows, cases, strict=True):
        seconds(floor)  # both sides are warm now
        rounds = [(seconds(floor), seconds(run, dtype)) for _ in range(args.rounds)]
        row["floor_times"], row["times"] = zip(*rounds, strict=True)
        row["floor_seconds"], row["seconds"] = map(statistics.median, zip(*rounds, strict=True))
        row["ratio"] = statistics.median(time / floor for floor, time in rounds)
    return rows


def main(args):
    """Measures the stages one after the other; then --json."""
    print(f"{args.model}, {args.precision}, torch {torch.__version__}, {args.rounds} rounds\n")
    print("| stage | what | seconds | floor | ratio | MB |\n|---|---|---|---|---|---|", flush=True)
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for found in pool.imap(partial(measure, args=args), args.stages):
            for row in found:
                figures = (f"{row[key]:.3g}" for key in ("seconds", "floor_seconds", "ratio"))
                cells = row["stage"], row["what"], *figures, f"{row['bytes'] / 1e6:.0f}"
                print("|", " | ".join(cells), "|", flush=True)
            rows += found
    if args.json:
        facts = vars(args) | {"torch": torch.__version__, "rows": rows}
        files.write_text(args.json, json.dumps(facts, indent=1))


def positive(text):
    """A whole number above 0."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args(argv=None):
    """The command line; wrong calls end with exit code 2."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    add("--json", metavar="FILE", help="also write the rows, with the times of every round")
    add(
        "--precision",
        choices=["fp32", "bf16", "fp16"],
        default="fp32",
        help="of segment, train and evaluate",
    )
    add("--model", default="ViT-B-16-quickgelu", help="open_clip name or config, random weights")
    add("--device", help="cuda, mps or cpu; default: the best there is")
    for flag, count, default, what in (
        ("--classes", "+", [21, 60, 171], "numbers of classes"),
        ("--batches", "+", [8, 16], "of the training step"),
        ("--micro-batch", None, None, "images at a time, as train.py has it"),
        ("--window", None, 448, "side of the window in pixels; PAMR's masks have a quarter"),
        ("--rounds", None, 5, "of each measurement, after one to warm up"),
        ("--threads", None, None, "of the CPU; default: torch's own"),
    ):
        add(flag, type=positive, nargs=count, default=default, help=what)
    return p.parse_args(argv)


if __name__ == "__main__":
    sys.exit(files.command(main, parse_args()))
