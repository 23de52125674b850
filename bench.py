# SPDX-License-Identifier: MIT
"""Measures each stage against its floor, as ratios, in one run: the README's table of speed.

    python bench.py                                     # all stages; the best device there is
    python bench.py --stages segment train --precision bf16 --json bench.json
    CUDA_VISIBLE_DEVICES= python bench.py --threads 2   # two CPU cores

The stages: segment (a window against open_clip's own image forward of it), train (forward and backward against
open_clip's image forward of the batch), pamr (against the tensor of all neighbours), loader (against decode and
resize), shards (the scan of tar headers against tarfile's, and pairs read in random order against in order, from a disk
whose cache was dropped), evaluate (images a second, and where the time goes). Both sides of a ratio run in turn; it is
the median of the rounds' ratios. Floors are always float32. Memory is the peak above an idle process, each in its own.
"""

import argparse
import copy
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import partial
from multiprocessing.pool import ThreadPool
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

STAGES = ("segment", "train", "pamr", "loader", "shards", "evaluate")
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
DILATIONS = (1, 2, 4, 8, 12, 24)


def parse_args(argv=None):
    """The command line; wrong calls end with exit code 2."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=list(STAGES),
        help="what to measure; default: all",
    )
    add("--json", metavar="FILE", help="also write the rows, with the times of every round")
    add(
        "--precision",
        choices=list(DTYPES),
        default="fp32",
        help="of the measured side of segment, train, evaluate",
    )
    add(
        "--model",
        default="ViT-B-16-quickgelu",
        help="open_clip name or model-config .json, with random weights",
    )
    add("--window", type=int, default=448, help="side of the segmented window in pixels")
    add("--classes", type=int, nargs="+", default=[21, 60, 171], help="numbers of classes")
    add("--batches", type=int, nargs="+", default=[8, 16], help="batch sizes of the training step")
    add(
        "--micro-batch",
        type=int,
        metavar="M",
        help="images at a time in the training step, train.py's flag",
    )
    add("--pamr-size", type=int, default=112, help="side of PAMR's masks")
    add(
        "--images",
        type=int,
        default=4,
        help="images of the evaluation, and a sixteenth of the loader's pairs",
    )
    add("--pairs", type=int, default=20_000, help="synthetic pairs of the shards, about 30 kB each")
    add("--rounds", type=int, default=5, help="rounds of each measurement, after one to warm up")
    add("--threads", type=int, help="CPU threads; default: torch's own")
    add("--device", help="cuda, mps or cpu; default: the best there is")
    add("--peak", help=argparse.SUPPRESS)  # the child process of one memory measurement
    args = p.parse_args(argv)
    sizes = [
        args.window,
        args.pamr_size,
        args.images,
        args.rounds,
        args.pairs,
        *args.classes,
        *args.batches,
    ]
    sizes += [args.threads or 1, args.micro_batch or 1]
    if min(sizes) < 1:
        p.error("sizes, numbers, --rounds and --threads must be at least 1")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        p.error(f"--json {args.json}: its folder does not exist")
    return args


def clock(device):
    """Seconds, once the device has done its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def compare(stage, floor, cases, args, device, prepare=lambda: None):
    """Rows of cases {name: function}, each run in turn with the function floor; prepare runs before each, untimed."""
    times = {name: [] for name in ("floor", *cases)}
    for k in range(args.rounds + 1):
        for name, function in {"floor": floor, **cases}.items():
            prepare()
            start = clock(device)
            function()
            if k:  # the first round warms up
                times[name].append(clock(device) - start)
    return [row(stage, name, times[name], times["floor"]) for name in cases]


def row(stage, name, times, floors):
    """One row of the table. ratio: the median over rounds of time / floor."""
    ratio = statistics.median(t / f for t, f in zip(times, floors, strict=True))
    medians = {"seconds": statistics.median(times), "floor_seconds": statistics.median(floors)}
    return {
        "stage": stage,
        "what": name,
        **medians,
        "ratio": ratio,
        "times": times,
        "floor_times": floors,
    }


def autocast(args, device):
    dtype = DTYPES[args.precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def make_net(args, device):
    """An untrained GCL with open gates, so that no part of the adapter is multiplied by 0, and the tokenizer."""
    torch.manual_seed(0)
    clip, tokenizer = gcl.load_clip(args.model, None, device)
    net = gcl.GCL(clip)
    for name, parameter in net.adapter.named_parameters():
        if name.endswith("gate"):
            parameter.data.fill_(0.3)
    return net, tokenizer


def plain_forward(clip, size):
    """open_clip's own image forward at this size: its ViT, with positions resized once."""
    visual = copy.deepcopy(clip.visual)
    grid = (size // visual.patch_size[0],) * 2
    positions = backbone.resize_positions(visual.positional_embedding, visual.grid_size, grid)
    visual.positional_embedding = torch.nn.Parameter(positions, requires_grad=False)
    return torch.no_grad()(visual)


# ---- the stages -----------------------------------------------------------------------------------------------------


def segment(args, device):
    """One window for each number of classes, PAMR off and on, against CLIP's forward of that window."""
    net, _ = make_net(args, device)
    window = args.window // net.patch * net.patch
    images, plain = (
        torch.randn(1, 3, window, window, device=device),
        plain_forward(net.clip, window),
    )

    def run(classes, refine):
        with autocast(args, device):
            net.segment(images, texts[classes], refine)

    texts = {
        k: F.normalize(torch.randn(k, net.clip.visual.proj.shape[1], device=device), dim=-1)
        for k in args.classes
    }
    variants = {"": None, ", PAMR": pamr.pamr}
    cases = {
        f"{k} classes{name}": lambda k=k, refine=refine: run(k, refine)
        for k in args.classes
        for name, refine in variants.items()
    }
    return compare("segment", lambda: plain(images), cases, args, device)


def make_step(args, device, batch):
    """(images, function that runs a forward and backward pass on them, net)."""
    net, tokenizer = make_net(args, device)
    images = torch.randn(batch, 3, *net.clip.visual.image_size, device=device)
    captions = [
        f"a photo of a small brown dog that runs over the wet grass, number {k}"
        for k in range(batch)
    ]
    tokens = tokenizer(captions).to(device)

    def step():
        with autocast(args, device):
            loss = gcl.total_loss(net(images, tokens, micro_batch=args.micro_batch))
        loss.backward()
        net.zero_grad(set_to_none=True)

    return images, step, net


def train(args, device):
    """A forward and backward pass for each batch size, against CLIP's forward of the batch; and its memory."""
    rows = []
    for batch in args.batches:
        images, step, net = make_step(args, device, batch)
        plain = plain_forward(net.clip, images.shape[-1])
        found = compare(
            "train", lambda p=plain, x=images: p(x), {f"batch {batch}": step}, args, device
        )
        rows.append(found[0] | {"bytes": peak(f"train {batch}", args)})
    return rows


def yardstick(image, mask, iterations=10, dilations=DILATIONS):
    """PAMR in the usual way, with [B, K, 8 * dilations, H, W] tensors; image [B, 3, H, W], mask [B, K, H, W]."""

    def around(x):
        """[B, C, H, W] -> [B, C, dilations, 9, H, W], the centre fifth."""
        height, width = x.shape[-2:]
        padded = [F.pad(x, (d,) * 4, mode="replicate") for d in dilations]
        cuts = [
            torch.stack(
                [
                    p[..., i : i + height, j : j + width]
                    for i in (0, d, 2 * d)
                    for j in (0, d, 2 * d)
                ],
                2,
            )
            for p, d in zip(padded, dilations, strict=True)
        ]
        return torch.stack(cuts, 2)

    def neighbours(x):  # [B, C, 8 * dilations, H, W]
        return around(x)[:, :, :, [0, 1, 2, 3, 5, 6, 7, 8]].flatten(2, 3)

    sigma = around(image).flatten(2, 3).std(2, keepdim=True)  # [B, 3, 1, H, W]
    weights = -(neighbours(image) - image.unsqueeze(2)).abs() / (1e-8 + 0.1 * sigma)
    weights = weights.mean(1, keepdim=True).softmax(2)  # [B, 1, 8 * dilations, H, W]
    for _ in range(iterations):
        mask = (weights * neighbours(mask)).sum(2)  # [B, K, H, W]
    return mask


def refine(args, device):
    """PAMR against the yardstick: time, memory, and the largest difference."""
    rows, size = [], args.pamr_size
    for classes in args.classes:
        torch.manual_seed(0)
        image, mask = (torch.rand(1, c, size, size, device=device) for c in (3, classes))
        apart = (pamr.pamr(image, mask) - yardstick(image, mask)).abs().max().item()
        slow = {"yardstick": lambda x=image, m=mask: yardstick(x, m)}
        found = compare("pamr", lambda x=image, m=mask: pamr.pamr(x, m), slow, args, device)[0]
        both = {
            "bytes": peak(f"pamr {classes}", args),
            "floor_bytes": peak(f"yardstick {classes}", args),
        }
        times = (
            found["floor_times"],
            found["times"],
        )  # the yardstick is the floor of the row, so the ratio is below 1
        rows.append(
            row("pamr", f"{classes} classes", *times) | both | {"largest_difference": apart}
        )
    return rows


def photo(seed, width=500, height=375):
    """A smooth random picture, of a photo's size as JPEG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def write_shard(path, jpegs):
    """A tar as img2dataset writes it: .jpg, .json and .txt of every pair."""
    with tarfile.open(path, "w") as tar:
        for k, jpeg in enumerate(jpegs):
            caption = f"a photo, number {k}"
            fields = json.dumps(
                {"caption": caption, "status": "success", "width": 500, "height": 375}
            )
            for suffix, content in (
                ("jpg", jpeg),
                ("json", fields.encode()),
                ("txt", caption.encode()),
            ):
                info = tarfile.TarInfo(f"{k:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def loader(args, device):
    """Pairs a second of one process, against decode and resize of the same JPEGs."""
    clip, tokenizer = gcl.load_clip(args.model, None)
    size, jpegs = clip.visual.image_size[0], []
    with tempfile.TemporaryDirectory() as folder:
        for k in range(16 * args.images):
            file = io.BytesIO()
            photo(k).save(file, "JPEG", quality=90)
            jpegs.append(file.getvalue())
        write_shard(f"{folder}/0.tar", jpegs)
        transform = data.train_transform(size, gcl.CLIP_NORM, False)
        pairs = data.PairDataset([f"{folder}/0.tar"], transform, tokenizer, (size // 4, size // 4))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as a loader process has

        def bare():
            for jpeg in jpegs:
                Image.open(io.BytesIO(jpeg)).convert("RGB").resize(
                    (size, size), Image.Resampling.BICUBIC
                )

        cases = {f"{len(jpegs)} pairs": lambda: [pairs[k, k] for k in range(len(jpegs))]}
        found = compare("loader", bare, cases, args, torch.device("cpu"))[0]
        torch.set_num_threads(threads)
    return [found | {"images_per_second": len(jpegs) / found["seconds"]}]


def tarfile_scan(path):
    """The library's way to the places of a shard's members."""
    with tarfile.open(path, "r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar]


def drop_caches(paths):
    """Writes files out and drops them from memory, so that the next read comes from the disk (where the system can)."""
    for path in paths if hasattr(os, "posix_fadvise") else ():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def shards(args, device):
    """The scan of the headers, and 16 readers that take pairs in random order against in the order they lie in."""
    rng, each, bytes_ = np.random.default_rng(0), min(args.pairs, 10_000), os.urandom(32_000)
    with tempfile.TemporaryDirectory() as folder, ThreadPool(16) as pool:
        sizes = rng.integers(24_000, 32_000, (args.pairs // each, each))
        paths = [
            write_shard(f"{folder}/{k}.tar", (bytes_[:n] for n in row))
            for k, row in enumerate(sizes)
        ]
        index = data.index_shards(paths)
        places = [
            (path, index[len(paths) + k * each + i])
            for k, path in enumerate(paths)
            for i in range(each)
        ]
        mixed = [places[k] for k in rng.permutation(len(places))]
        cold, many = partial(drop_caches, paths), {"headers": 3 * len(places), "pairs": len(places)}

        def scan(function):
            return lambda: list(files.in_parallel(function, paths, len(paths), ""))

        def read(items):
            return lambda: list(
                pool.imap_unordered(lambda item: data.read_bytes(*item), items, chunksize=64)
            )

        names = [f"scan of {many['headers']:,} headers", f"random reads of {many['pairs']:,} pairs"]
        found = compare(
            "shards", scan(tarfile_scan), {names[0]: scan(data.scan_shard)}, args, device, cold
        )
        found += compare("shards", read(places), {names[1]: read(mixed)}, args, device, cold)
    return [
        r | {"per_second": {k: n / r["seconds"]}}
        for r, (k, n) in zip(found, many.items(), strict=True)
    ]


def whole_evaluation(args, device):
    """Images a second of reading, windows, resize and scores together, against CLIP's forward of the windows."""
    net, _ = make_net(args, device)
    flags = ["--datasets", "voc", "--precision", args.precision, "--window", str(args.window)]
    ev = evaluate.parse_args(
        [*flags, "--stride", str(max(args.window // 2, 1)), "--short-side", str(args.window)]
    )
    text = F.normalize(
        torch.randn(args.classes[0], net.clip.visual.proj.shape[1], device=device), dim=-1
    )
    label = torch.zeros(375, 500, dtype=torch.int64, device=device)
    plain, parts = plain_forward(net.clip, args.window // net.patch * net.patch), {}
    height, width = evaluate.resized(375, 500, args.window)
    n = len(evaluate.windows(height, width, args.window, ev.stride))
    crops = torch.randn(n, 3, *(args.window // net.patch * net.patch,) * 2, device=device)

    def timed(name, function, *values):
        start = clock(device)
        result = function(*values)
        parts.setdefault(name, []).append(clock(device) - start)
        return result

    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{k}.jpg" for k in range(args.images)]
        for k, path in enumerate(paths):
            photo(k).save(path, quality=90)

        def run():
            for path in paths:
                image = timed("read", data.read_image, path)
                masks = timed("masks", evaluate.segment_image, net, image, text, ev)
                _, index = timed(
                    "resize and argmax", evaluate.best_class, masks, tuple(label.shape)
                )
                timed("scores", evaluate.confusion, label, index, len(text))

        name = f"{args.images} images, {n} windows each, {len(text)} classes"
        found = compare(
            "evaluate", lambda: [plain(crops) for _ in paths], {name: run}, args, device
        )[0]
    whole = sum(map(sum, parts.values()))
    split = {name: sum(times) / whole for name, times in parts.items()}
    return [found | {"images_per_second": args.images / found["seconds"], "split": split}]


# ---- memory, and the table ------------------------------------------------------------------------------------------


def peak(case, args):
    """Bytes above the idle process that a case needs at its peak, measured in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--peak",
        case,
        "--model",
        args.model,
        "--precision",
        args.precision,
    ]
    command += ["--pamr-size", str(args.pamr_size), "--threads", str(torch.get_num_threads())]
    command += ["--device", args.device] if args.device else []
    command += ["--micro-batch", str(args.micro_batch)] if args.micro_batch else []
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def print_peak(args, device):
    """What peak() asks of a fresh process: bytes above what it had when idle, on stdout."""
    kind, number = args.peak.split()
    if kind == "train":
        run = make_step(args, device, int(number))[1]
    else:
        function = pamr.pamr if kind == "pamr" else yardstick
        image, mask = (
            torch.rand(1, c, args.pamr_size, args.pamr_size, device=device)
            for c in (3, int(number))
        )
        function(
            image[..., :32, :32], mask[:, :1, :32, :32]
        )  # libraries are loaded before idle is measured

        def run():
            function(image, mask)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        print(torch.cuda.max_memory_allocated() - before)
    else:
        before = peak_of_process()
        run()
        print(peak_of_process() - before)


def peak_of_process():
    """Bytes; Linux's getrusage also counts the process that this one was started from, /proc does not."""
    if os.path.exists("/proc/self/status"):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def note(found):
    """The last column: memory, speed, how the time splits."""
    said = []
    if "bytes" in found:
        said.append(f"{found['bytes'] / 1e6:.0f} MB")
    if "floor_bytes" in found:
        said.append(
            f"yardstick {found['floor_bytes'] / 1e6:.0f} MB, differs by {found['largest_difference']:.0e}"
        )
    said += [f"{n:,.0f} {name}/s" for name, n in found.get("per_second", {}).items()]
    if "images_per_second" in found:
        said.append(f"{found['images_per_second']:.2f} images/s")
    return ", ".join(
        said + [f"{name} {share:.0%}" for name, share in found.get("split", {}).items()]
    )


def main(args):
    """Measures the stages one after the other, a row of the table at a time; writes --json at the end."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = backbone.pick_device(args.device)
    if args.peak:
        return print_peak(args, device)
    functions = dict(
        zip(STAGES, (segment, train, refine, loader, shards, whole_evaluation), strict=True)
    )
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU thread(s)"
    )
    print(
        f"{args.model}, {args.precision}, {name}, torch {torch.__version__}, median of {args.rounds} rounds\n"
    )
    print("| stage | what | seconds | floor | ratio | |\n|---|---|---|---|---|---|", flush=True)
    rows = []
    for stage in args.stages:
        for found in functions[stage](args, device):
            times = f"{found['seconds']:.3g} | {found['floor_seconds']:.3g} | {found['ratio']:.3g}"
            print(f"| {stage} | {found['what']} | {times} | {note(found)} |", flush=True)
            rows.append(found)
    if args.json:
        facts = {
            "model": args.model,
            "precision": args.precision,
            "threads": torch.get_num_threads(),
            "device": name,
        }
        Path(f"{args.json}.tmp").write_text(
            json.dumps(facts | {"torch": torch.__version__, "rows": rows}, indent=1)
        )
        os.replace(f"{args.json}.tmp", args.json)


if __name__ == "__main__":
    arguments = parse_args()
    try:
        main(arguments)
    except (files.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
