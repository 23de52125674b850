# SPDX-License-Identifier: MIT
"""Measures each stage against its floor, as ratios: the table of speed.

    python bench.py                                     # all stages; the best device there is
    python bench.py --stages segment train --precision bf16 --json bench.json
    CUDA_VISIBLE_DEVICES= python bench.py --threads 2   # two CPU cores

Stages: segment (a window against open_clip's own image forward of it), train (forward and backward
against open_clip's forward of the batch), pamr (against the tensor of all neighbours), loader (64
pairs of one process against decode and resize), evaluate (an image against open_clip's forward of
its windows). Both sides of a ratio run in turn; it is the median of the rounds' ratios. Floors are
always float32.
"""

import argparse
import copy
import itertools
import json
import sys
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

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
    return F.normalize(torch.randn(k, net.clip.visual.output_dim, device=net.w.device))


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
        """[B, C, H, W] -> [B, C, 9 * dilations, H * W], each nine with the centre fifth."""
        cuts = [F.unfold(F.pad(x, (d,) * 4, "replicate"), 3, d) for d in DILATIONS]  # [B, C*9, H*W]
        return torch.cat([cut.unflatten(1, (-1, 9)) for cut in cuts], 2)  # [B, C, 9*d, H*W]

    near = around(image)
    weights = (near - near[:, :, 4:5]).abs() / (1e-8 + 0.1 * near.std(2, keepdim=True))
    weights = (-weights.mean(1, keepdim=True)).exp()  # [B, 1, 9 * dilations, H * W]
    weights[:, :, 4::9] = 0  # the place itself
    weights /= weights.sum(2, keepdim=True)
    for _ in range(10):
        mask = (weights * around(mask)).sum(2).view_as(mask)  # [B, K, H*W] -> [B, K, H, W]
    return mask


def refine(net, tokenizer, args):
    """PAMR for each number of classes; the usual way is no floor, so its ratio is below 1."""
    size = [args.window // 4] * 2
    for k in args.classes:
        pair = [torch.rand(1, channels, *size, device=net.w.device) for channels in (3, k)]
        yield f"{k} classes", partial(yardstick, *pair), partial(pamr.pamr, *pair)


def loader(net, tokenizer, args):
    """Pairs of one loader process, from a shard on the disk; a smooth picture of a photo's size."""
    size = net.clip.visual.image_size[0]
    with tempfile.TemporaryDirectory() as folder:
        jpg, txt, shard = (Path(folder, name) for name in ("0.jpg", "0.txt", "0.tar"))
        Image.radial_gradient("L").resize((500, 375)).convert("RGB").save(jpg, quality=90)
        txt.write_text("a photo")
        with tarfile.open(shard, "w") as tar:
            tar.add(jpg, jpg.name)
            tar.add(txt, txt.name)
        transform = data.train_transform(size, gcl.CLIP_NORM, False)
        pairs = data.PairDataset([str(shard)], transform, tokenizer, (size // 4, size // 4))

        def floor():
            for _ in range(64):
                Image.open(jpg).resize((size, size), Image.Resampling.BICUBIC)

        yield "64 pairs", floor, lambda: [pairs[position, 0] for position in range(64)]


def whole(net, tokenizer, args):
    """Windows, masks and scores of an image of a photo's size."""
    side, stride, text = args.window, -(-args.window // 2), classes(net, args.classes[0])
    flags = f"--datasets voc --precision {args.precision} --short-side {side}"
    settings = evaluate.parse_args(f"{flags} --window {side} --stride {stride}".split())
    image = np.zeros((375, 500, 3), np.uint8)
    label = torch.zeros(375, 500, dtype=torch.int64, device=text.device)
    n = len(evaluate.windows(*evaluate.resized(375, 500, side), side, stride))

    def run():
        masks = evaluate.segment_image(net, image, text, settings)
        evaluate.confusion(label, evaluate.best_class(masks, label.shape)[1], len(text))

    yield f"{n} windows, {len(text)} classes", plain(net, n, 3, side, side), run


STAGES = {"segment": segment, "train": train, "pamr": refine, "loader": loader, "evaluate": whole}


# ---- time, the table ----


def measure(stage, args):
    """Yields the rows of a stage."""
    torch.set_num_threads(1 if stage == "loader" else args.threads)  # a loader process has one
    device, half = backbone.pick_device(args.device), evaluate.PRECISIONS[args.precision]
    clip, tokenizer = gcl.load_clip(args.model, None, device)

    def seconds(side, half=None):
        """Of one call, until the device has done its work."""
        start = time.perf_counter()
        with torch.autocast(device.type, half, enabled=bool(half)):
            side()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    for what, floor, run in STAGES[stage](gcl.GCL(clip), tokenizer, args):
        # The first round warms up.
        rounds = [(seconds(floor), seconds(run, half)) for _ in range(1 + args.rounds)][1:]
        floors, times = zip(*rounds, strict=True)
        yield {
            "stage": stage,
            "what": what,
            "floor_times": floors,
            "times": times,
            "floor_seconds": median(floors),
            "seconds": median(times),
            "ratio": median(own / floor for floor, own in rounds),
        }


def main(args):
    """Measures the stages one after the other; then --json."""
    print(f"{args.model}, {args.precision}, torch {torch.__version__}, {args.rounds} rounds\n")
    print("| stage | what | seconds | floor | ratio |\n|---|---|---|---|---|", flush=True)
    rows, line = [], "| {stage} | {what} | {seconds:.3g} | {floor_seconds:.3g} | {ratio:.3g} |"
    for stage in args.stages:
        for row in measure(stage, args):
            print(line.format(**row), flush=True)
            rows.append(row)
    if args.json:
        facts = vars(args) | {"torch": torch.__version__, "rows": rows}
        files.write_text(args.json, json.dumps(facts, indent=1))


def parse_args(argv=None):
    """The command line; wrong calls end with exit code 2."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add, number = p.add_argument, {"type": files.count}
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    add("--json", metavar="FILE", help="also write the rows, with the times of every round")
    half = "of segment, train and evaluate"
    add("--precision", choices=evaluate.PRECISIONS, default="fp32", help=half)
    add("--model", default="ViT-B-16-quickgelu", help="open_clip name or config, random weights")
    add("--device", help="cuda, mps or cpu; default: the best there is")
    add("--classes", **number, nargs="+", default=[21, 60, 171], help="numbers of classes")
    add("--batches", **number, nargs="+", default=[8, 16], help="of the training step")
    add("--micro-batch", **number, help="images at a time, as train.py has it")
    side = "side of the window in pixels; PAMR's masks have a quarter"
    add("--window", **number, default=448, help=side)
    add("--rounds", **number, default=5, help="of each measurement, after one to warm up")
    own = torch.get_num_threads()
    add("--threads", **number, default=own, help="of the CPU; default: torch's own")
    return p.parse_args(argv)


if __name__ == "__main__":
    sys.exit(files.command(main, parse_args()))
