# SPDX-License-Identifier: MIT
"""Trains GCL from image-text pairs alone. The defaults are the paper's run (Sec. 4.1): CC3M + CC12M, batch 1024.

    torchrun --nproc_per_node=8 train.py                                   # one node with 8 GPUs
    python train.py --micro-batch 64                                       # the same batch on one GPU, or on the CPU
    torchrun --nproc_per_node=8 train.py --batch-size 512 --steps 40000 --warmup-steps 10000    # Table 2's schedule
    python train.py --measure-area-prior                                   # p+ of Sec. 3.3 on these pairs, no training

Writes --out (runs/gcl): last.pt (a checkpoint for evaluate.py, and for --resume), previous.pt (the one before),
log.jsonl, loss.png, samples.png, config.json, and with --eval best.pt. SIGTERM and Ctrl-C write last.pt first.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import backbone
import benchmarks
import data
import evaluate
import files
import gcl
import report

try:
    import resource
except ImportError:  # Windows
    resource = None

STOP = (signal.SIGINT, signal.SIGTERM)
CHECKPOINTS = (
    "next.pt",
    "last.pt",
    "previous.pt",
)  # the newest first; next.pt exists while two files are renamed


def parse_args(argv=None):
    """The command line; values that cannot be end with exit code 2."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(p)
    args = p.parse_args(argv)
    if wrong := complaint(args):
        p.error(wrong)
    return args


def add_flags(p):
    """Every flag, with its section of the paper."""
    add = p.add_argument
    shards = ["data/gcc3m/*.tar", "data/gcc12m/*.tar"]
    add(
        "--data",
        nargs="+",
        default=shards,
        help="tar shards: files, globs, {000..331} ranges (Sec. 4.1: CC3M, CC12M)",
    )
    add(
        "--model",
        default="ViT-B-16-quickgelu",
        help="open_clip name or model-config .json (Sec. 4.1: CLIP ViT-B/16)",
    )
    add("--pretrained", default="openai", help="open_clip tag, or a local weights file")
    add(
        "--recipe",
        choices=list(gcl.RECIPES),
        default="paper",
        help="the paper's text, or the authors' release",
    )
    add(
        "--losses",
        nargs="+",
        choices=gcl.LOSSES,
        default=["gcl_v", "gcl_f"],
        help="Sec. 3.3; rows of Table 2a",
    )
    add("--lambda-gcl", type=float, default=0.1, help="weight of the contrastive losses (Sec. 4.1)")
    add("--lambda-area", type=float, default=0.4, help="weight of the area prior (Sec. 4.1)")
    add("--lambda-tv", type=float, default=1.0, help="weight of the smooth prior (Sec. 4.1)")
    add(
        "--area-prior",
        type=float,
        default=0.4,
        help="p+, expected area of a positive mask (Sec. 3.3)",
    )
    add(
        "--batch-size",
        type=int,
        default=1024,
        help="global batch, shared out among the ranks (Sec. 4.1)",
    )
    add(
        "--micro-batch",
        type=int,
        metavar="M",
        help="images of a rank at a time, to bound memory; the same result",
    )
    add("--lr", type=float, default=7.5e-5, help="peak learning rate (Sec. 4.1)")
    add(
        "--min-lr",
        type=float,
        default=1e-5,
        help="learning rate at the end of the cosine (paper silent)",
    )
    add(
        "--scalar-lr-mult",
        type=float,
        default=1.0,
        help="factor for gates, w, b, temperatures; for very short runs",
    )
    add(
        "--weight-decay",
        type=float,
        default=0.05,
        help="AdamW's, on weight matrices alone (Sec. 4.1)",
    )
    add("--steps", type=int, default=50_000, help="optimiser steps (Sec. 4.1)")
    add("--warmup-steps", type=int, default=15_000, help="linear warm-up (Sec. 4.1)")
    add("--clip-grad", type=float, default=5.0, help="largest gradient norm (paper silent)")
    add(
        "--image-size",
        type=int,
        help="training crop in pixels; default: the CLIP's own, 224 for ViT-B/16 (Sec. 4.1)",
    )
    add("--workers", type=int, default=4, help="loader processes per rank")
    add(
        "--seed",
        type=int,
        default=0,
        help="order of the data, augmentation, gumbel noise, adapter's start",
    )
    add("--out", default="runs/gcl", help="folder for checkpoints and logs")
    add(
        "--resume",
        default="auto",
        help="auto: go on from the newest whole checkpoint in OUT; never; or a file",
    )
    add("--save-every", type=int, default=1000, help="steps between checkpoints, and pictures")
    add("--log-every", type=int, default=50, help="steps between log lines")
    add(
        "--eval",
        nargs="+",
        metavar="NAME|SPEC.json",
        help="sets to evaluate as it goes (no PAMR), for best.pt",
    )
    add("--eval-every", type=int, default=5000, help="steps between evaluations of --eval")
    add(
        "--max-bad",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="stop when more samples than this are unusable",
    )
    add(
        "--timeout",
        type=int,
        default=1800,
        metavar="SECONDS",
        help="longest wait for another rank in a step",
    )
    area = "print MaskCLIP's mean positive mask area over N pairs, then end: p+ (Sec. 3.3)"
    add("--measure-area-prior", type=int, nargs="?", const=10_000, metavar="N", help=area)
    add("--device", help="cuda, mps or cpu; default: the best there is")
    add(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="auto: bf16 (or fp16) on CUDA",
    )


def complaint(args):
    """What is wrong with the values of the flags, or None."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    counts = (
        "save_every",
        "log_every",
        "eval_every",
        "timeout",
        "micro_batch",
        "image_size",
        "measure_area_prior",
    )
    low = [name for name in counts if getattr(args, name) is not None and getattr(args, name) < 1]
    weights = (
        args.seed,
        args.workers,
        args.weight_decay,
        args.lambda_gcl,
        args.lambda_area,
        args.lambda_tv,
    )
    checks = (
        (
            args.batch_size < 1 or args.batch_size % ranks,
            f"--batch-size {args.batch_size} is not divisible by the {ranks} ranks",
        ),
        (
            not 0 <= args.warmup_steps <= args.steps or args.steps < 1,
            f"--warmup-steps {args.warmup_steps} must lie between 0 and --steps {args.steps} (at least 1)",
        ),
        (low, f"--{low[0].replace('_', '-') if low else ''} must be at least 1"),
        (
            not all(weight >= 0 for weight in weights),
            "--seed, --workers, --weight-decay and the --lambda flags cannot be negative",
        ),
        (
            not (args.clip_grad > 0 and args.scalar_lr_mult > 0),
            "--clip-grad and --scalar-lr-mult must be above 0",
        ),
        (not 0 <= args.area_prior <= 1, f"--area-prior {args.area_prior} must lie between 0 and 1"),
        (args.seed >= 2**32, f"--seed {args.seed} must be below 2^32"),
        (not 0 <= args.max_bad <= 1, f"--max-bad {args.max_bad} must lie between 0 and 1"),
        (
            os.path.exists(args.out) and not os.path.isdir(args.out),
            f"--out {args.out}: is a file, not a folder",
        ),
        (
            not 0 < args.min_lr <= args.lr,
            f"--min-lr {args.min_lr} must lie between 0 and --lr {args.lr}",
        ),
    )
    return next((words for wrong, words in checks if wrong), None)


def precision_of(args, device):
    """(autocast dtype or None, GradScaler): float16 needs its loss scaled, bfloat16 and float32 do not."""
    name = args.precision
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if native else "fp16" if device.type == "cuda" else "fp32"
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    return dtype, torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


def build_optimizer(net, args):
    """AdamW over all trained parameters, those that are unfrozen later too.

    Release differs: it also decays its scalars (gates, w, b, temperatures); here matrices and kernels alone decay.
    """
    groups = {"matrix": [], "vector": [], "scalar": []}
    for name, parameter in net.named_parameters():
        if not name.startswith("clip."):
            groups[("scalar", "vector")[parameter.ndim] if parameter.ndim < 2 else "matrix"].append(
                parameter
            )
    return torch.optim.AdamW(
        [
            {"params": groups["matrix"], "weight_decay": args.weight_decay, "lr_mult": 1.0},
            {"params": groups["vector"], "weight_decay": 0.0, "lr_mult": 1.0},
            {"params": groups["scalar"], "weight_decay": 0.0, "lr_mult": args.scalar_lr_mult},
        ],
        lr=args.lr,
        betas=(0.9, 0.999),
        eps=1e-6,  # Paper silent: the release's
    )


def learning_rate(step, args):
    """Linear warm-up from 1e-4 of the peak, then a cosine down to min_lr (Sec. 4.1; Paper silent: both ends)."""
    if step < args.warmup_steps:
        return args.lr * (1e-4 + (1 - 1e-4) * step / args.warmup_steps)
    progress = (step - args.warmup_steps) / max(args.steps - args.warmup_steps, 1)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def build_pairs(args, net, tokenizer):
    """The image-text pairs at the size of training: image [3, h, w], tokens [context], noise [1, H, W], bad."""
    size = args.image_size or max(net.clip.visual.image_size)
    if size % net.patch:
        raise files.InputError(
            f"--image-size {size} is not a multiple of this CLIP's patch, {net.patch}"
        )
    mask_size = (4 * size // net.patch,) * 2  # the adapter's grid
    transform = data.train_transform(size, net.recipe.norm, net.recipe.strong_augmentation)
    shards = data.expand_shards(args.data)
    return data.PairDataset(shards, transform, tokenizer, mask_size, args.seed, cache=args.out)


def batches(run, args, batch_size, steps, start=0):
    """Iterator over this rank's batches from a step on: images [B, 3, h, w], tokens, noise [B, 1, H, W], bad."""
    order = data.GlobalOrder(
        len(run.pairs), batch_size, steps, args.seed, start, run.rank, run.ranks
    )
    pin = run.device.type == "cuda"
    with held_signals():
        return iter(
            DataLoader(run.pairs, batch_sampler=order, num_workers=args.workers, pin_memory=pin)
        )


# ---- start, resume, checkpoints -------------------------------------------------------------------------------------

SAME_RUN = (
    "data",
    "recipe",
    "losses",
    "lambda_gcl",
    "lambda_area",
    "lambda_tv",
    "area_prior",
    "batch_size",
    "lr",
)
SAME_RUN += (
    "min_lr",
    "scalar_lr_mult",
    "weight_decay",
    "steps",
    "warmup_steps",
    "clip_grad",
    "image_size",
    "seed",
)


def newest_checkpoint(args):
    """(path, checkpoint) that --resume names, or None for a fresh start; an older one where the newest is broken."""
    if args.resume != "auto":
        return (
            None
            if args.resume == "never"
            else (Path(args.resume), gcl.read_checkpoint(args.resume))
        )
    there = [path for name in CHECKPOINTS if (path := Path(args.out, name)).is_file()]
    for path in there:
        try:
            return path, gcl.read_checkpoint(path)
        except files.InputError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"warning: {error}; looking for an older one", file=sys.stderr)
    if there:
        raise files.InputError(
            f"{there[0]}: no checkpoint here can be read; --resume never starts over"
        )
    return None


def restore(run, args):
    """Takes up the checkpoint that --resume names: sets run.start and run.progress, 0 and zeros for a fresh start."""
    run.start, run.progress = (
        0,
        {"skipped": 0, "in_a_row": 0, "bad": [0] * len(data.REASONS), "best": None},
    )
    found = None if args.measure_area_prior else newest_checkpoint(args)
    if found is None:
        return
    path, checkpoint = found
    if not {"optimizer", "scaler", "step", "args", "progress", "pairs"} <= checkpoint.keys():
        raise files.InputError(f"{path}: has no optimiser state, so training cannot go on from it")
    for name in SAME_RUN:
        if checkpoint["args"].get(name) != getattr(args, name):
            flag = f"--{name.replace('_', '-')} {checkpoint['args'].get(name)}"
            raise files.InputError(
                f"{path}: was trained with {flag}; give the same, or another --out"
            )
    if checkpoint["pairs"] != run.pairs.fingerprint():
        now = f"--data now has {len(run.pairs):,} pairs whose places in the shards differ"
        raise files.InputError(
            f"{path}: was trained on other pairs, {now}; give the same shards, or another --out"
        )
    gcl.restore(run.net, checkpoint, path)
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:  # empty unless the run was in float16
        run.scaler.load_state_dict(checkpoint["scaler"])
    run.start, run.progress = checkpoint["step"], checkpoint["progress"]


def save(run, done, args):
    """last.pt for step done, and the one before as previous.pt: at any moment a whole one is there."""
    out = Path(args.out)
    state = {
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "args": vars(args),
    }
    run.net.save(
        out / "next.pt", step=done, progress=run.progress, pairs=run.pairs.fingerprint(), **state
    )
    if (out / "last.pt").exists():
        os.replace(out / "last.pt", out / "previous.pt")
    os.replace(out / "next.pt", out / "last.pt")


def wrap(net, device, ranks):
    """net under DistributedDataParallel where there are several ranks.

    Wrapped again when the release recipe unfreezes its last block, since DDP reduces only what was trainable when it
    was built. Release differs: it unfreezes later than it wraps, so those gradients are never reduced across ranks.
    """
    if ranks == 1:
        return net
    return DistributedDataParallel(
        net, device_ids=[device.index] if device.type == "cuda" else None
    )


def join(run, args):
    """The process group of all ranks, once all of them are there with the same pairs and the same step to start from.

    Nobody waits for another's scan of the shards in a collective, whose timeout would be too short, but at the store.
    """
    pairs = f"{len(run.pairs)} pairs ({run.pairs.fingerprint()[:8]})"
    mine, keys = f"step {run.start} of {pairs}", [f"start/{rank}" for rank in range(run.ranks)]
    try:
        store, _, _ = next(dist.rendezvous("env://", run.rank, run.ranks))
        store.set(keys[run.rank], mine)
        store.wait(keys, timedelta(days=1))
    except RuntimeError as error:
        raise files.InputError(
            f"not all {run.ranks} ranks have started ({files.first_line(error)})"
        ) from error
    for rank, key in enumerate(keys):
        if (other := store.get(key).decode()) != mine:
            words = f"rank {run.rank} would start at {mine}, rank {rank} at {other}"
            raise files.InputError(f"{words}; all nodes need the same --data and a shared --out")
    backend, wait = "nccl" if run.device.type == "cuda" else "gloo", timedelta(seconds=args.timeout)
    dist.init_process_group(backend, store=store, rank=run.rank, world_size=run.ranks, timeout=wait)


def start_run(args):
    """All that stands before the first step, as a namespace; nothing is written before all of it has succeeded."""
    data.expand_shards(args.data)
    rank, ranks = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    run = SimpleNamespace(
        rank=rank, ranks=ranks, device=backbone.pick_device(args.device), signals=[]
    )
    torch.manual_seed(args.seed)
    clip, run.tokenizer = gcl.load_clip(args.model, args.pretrained, run.device)
    if run.tokenizer.vocab_size > clip.vocab_size:
        raise files.InputError(
            f"--model {args.model}: its vocabulary is smaller than CLIP's tokenizer needs"
        )
    run.net = gcl.GCL(clip, args.recipe, args.losses, args.area_prior).train()
    run.optimizer = build_optimizer(run.net, args)
    run.dtype, run.scaler = precision_of(args, run.device)
    read_eval_sets(run, args)
    run.pairs = build_pairs(args, run.net, run.tokenizer)
    restore(run, args)
    run.net.set_trainable(run.start)
    if ranks > 1:
        join(run, args)
    return run


def git_commit():
    """The commit of this code, None outside a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git
        return None


def begin_logs(run, args):
    """config.json, and log.jsonl cut back to the step that the run goes on from."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob("*.pt.*.tmp"):  # of a kill during a write
        leftover.unlink()
    if args.resume == "never":  # or a later --resume auto would go on with the old run
        for name in (*CHECKPOINTS, "best.pt"):
            (out / name).unlink(missing_ok=True)
    facts = {
        "ranks": run.ranks,
        "pairs": len(run.pairs),
        "commit": git_commit(),
        "python": platform.python_version(),
    }
    facts |= {
        name: version(name)
        for name in ("torch", "torchvision", "open_clip_torch", "numpy", "pillow")
    }
    old = (
        (out / "log.jsonl").read_text().splitlines()
        if run.start and (out / "log.jsonl").is_file()
        else []
    )
    kept = [line for line in old if report.log_step(line) <= run.start]
    config = json.dumps(vars(args) | facts, indent=1)
    for name, lines in (("config.json", [config]), ("log.jsonl", kept)):
        (out / (name + ".tmp")).write_text("".join(line + "\n" for line in lines))
        os.replace(out / (name + ".tmp"), out / name)
    trained = sum(p.numel() for p in run.net.parameters() if p.requires_grad)
    what = f"{len(run.pairs):,} pairs, {trained:,} trained parameters, {run.ranks} rank(s) on {run.device}"
    print(f"{what}, {run.dtype or torch.float32}, steps {run.start} to {args.steps}", flush=True)


# ---- one step -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held_signals():
    """Processes that start inside never see SIGINT and SIGTERM: one sent to the whole group stops the run, not them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def caught_signals(seen):
    """SIGINT and SIGTERM only add themselves to the list seen; the loop looks there after every step."""
    before = {
        number: signal.signal(number, lambda caught, _: seen.append(caught)) for number in STOP
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def no_loaders_left():
    """After an error, kills the loader processes: Python ends what is left by SIGTERM, which they do not see."""
    try:
        yield
    finally:
        left = multiprocessing.active_children()
        if left and hasattr(signal, "SIGCHLD"):  # on which torch would say that a loader has died
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for process in left:
            process.kill()


def weights_of(args):
    return {"gcl": args.lambda_gcl, "area": args.lambda_area, "tv": args.lambda_tv}


def gradients(model, batch, run, args):
    """Forward and backward pass. Returns (loss terms without a graph, gradient norm before it was clipped)."""
    with torch.autocast(batch[0].device.type, run.dtype, enabled=run.dtype is not None):
        losses = model(*batch, micro_batch=args.micro_batch)
        loss = gcl.total_loss(losses, weights_of(args))
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
    return {name: value.detach() for name, value in losses.items()}, norm


def over_ranks(losses, norm, areas, counts, ranks):
    """Means of terms, norm and areas, sums of counts, over all ranks by one small all_reduce: plain numbers."""
    values = torch.stack([*losses.values(), norm, *areas]).float()
    values = torch.cat([values, counts.to(values)])
    if ranks > 1:
        dist.all_reduce(values)
    *means, norm, pos, neg = (value / ranks for value in values[: len(losses) + 3].tolist())
    terms = dict(sorted(zip(losses, means, strict=True)))
    counts = [int(n) for n in values[len(losses) + 3 :].tolist()]
    return terms, norm, {"mean_area_pos": pos, "mean_area_neg": neg}, counts


def train_step(model, batch, bad, run, args):
    """One optimiser step, skipped on all ranks when a loss term or the gradient of any is not finite.

    bad: [B, reasons] counts of unusable samples. Returns what all ranks agree on: terms, norm, areas, finite,
    and stop, a signal that some rank has got, or 0.
    """
    losses, norm = gradients(model, batch, run, args)
    got = torch.tensor([number in run.signals for number in STOP])
    counts = torch.cat([got, bad.sum(0)])  # [2 + reasons]
    terms, norm, areas, counts = over_ranks(losses, norm, run.net.mask_areas, counts, run.ranks)
    finite = all(map(math.isfinite, (*terms.values(), norm)))
    if finite:
        run.scaler.step(run.optimizer)
        run.scaler.update()
    else:  # float16's scaler would decide on each rank alone
        run.scaler.update(run.scaler.get_scale() / 2)
    progress = run.progress
    progress["skipped"] += not finite
    progress["in_a_row"] = 0 if finite else progress["in_a_row"] + 1
    progress["bad"] = [a + b for a, b in zip(progress["bad"], counts[len(STOP) :], strict=True)]
    stop = next((int(number) for number, n in zip(STOP, counts, strict=False) if n), 0)
    return SimpleNamespace(terms=terms, norm=norm, areas=areas, finite=finite, stop=stop)


def check_health(run, done, args):
    """DataError after 20 skipped steps in a row, or when too many samples cannot be used."""
    progress = run.progress
    if progress["in_a_row"] == 20:
        raise files.InputError(
            f"step {done - 1}: 20 non-finite gradients in a row; lower --lr or use --precision fp32"
        )
    if done % args.log_every == 0:
        data.too_many_bad(progress["bad"], done * args.batch_size, args.max_bad)


# ---- seeing it run --------------------------------------------------------------------------------------------------


def memory_gb(device):
    """Peak GiB: of the GPU's allocator, or the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else math.nan
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def log_record(done, facts, clock, run, args):
    """What one log line says; plain numbers. clock: time and step of the line before, seconds waited for data since."""
    net, seconds = run.net, time.perf_counter() - clock.since
    speed = (done - clock.step) * args.batch_size / seconds
    record = (
        {"step": done, "loss": gcl.total_loss(facts.terms, weights_of(args))}
        | facts.terms
        | facts.areas
    )
    record |= {"w": net.w.item(), "b": net.b.item()}
    record |= {f"tau_{name}": math.exp(-net.log_scale[name].item()) for name in net.losses}
    record |= {"lr": run.optimizer.param_groups[0]["lr"], "grad_norm": facts.norm}
    record |= {
        "images_per_second": speed,
        "data_wait": clock.waited / seconds,
        "memory_gb": memory_gb(run.device),
    }
    record |= {
        "skipped": run.progress["skipped"],
        "bad": dict(zip(data.REASONS, run.progress["bad"], strict=True)),
    }
    return record | {"eta_seconds": round((args.steps - done) * args.batch_size / speed)}


def read_eval_sets(run, args):
    """run.sets and run.eval_args of --eval, every label checked before the first step."""
    run.sets, flags = [], ["--no-pamr", "--workers", str(args.workers), "--out", args.out]
    if args.eval and not args.measure_area_prior:
        run.eval_args = evaluate.parse_args(["--datasets", *args.eval, *flags])
        run.eval_args.precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[
            run.dtype
        ]
        run.sets = evaluate.read_sets(run.eval_args)
        for dataset in run.sets:
            benchmarks.check_labels(dataset)


def evaluate_now(run, done, args, bar):
    """mIoU of the --eval sets under the protocol without PAMR, which is slow; the best net so far becomes best.pt.

    Returns whether it is the best.
    """
    run.net.eval()
    results = {}
    with held_signals():
        for dataset in run.sets:
            where = (run.tokenizer, run.eval_args, run.device, run.rank, run.ranks)
            results[dataset.name], _ = evaluate.evaluate_set(dataset, run.net, *where)
    run.net.train()
    values, best = [result["miou"] for result in results.values()], run.progress["best"]
    miou = None if None in values else round(sum(values) / len(values), 4)
    better = miou is not None and (best is None or miou > best["miou"])
    if better:
        run.progress["best"] = {"step": done, "miou": miou}
    if run.rank == 0:
        record = {
            "step": done,
            "miou": miou,
            "partial": any(result.get("partial") for result in results.values()),
        }
        record |= {f"miou_{name}": result["miou"] for name, result in results.items()}
        report.write_log(
            record | {"best_step": (run.progress["best"] or {}).get("step")}, args.out, bar
        )
        if better:
            run.net.save(Path(args.out, "best.pt"), **run.progress["best"])
    return better


@torch.no_grad()
def draw_samples(run, path, rows=4):
    """samples.png: the same few pairs each time, under the masks of their own captions and of the next pair's."""
    n = min(rows, len(run.pairs))
    samples = [run.pairs[k, k * len(run.pairs) // n][:2] for k in range(n)]
    images, tokens = (
        torch.stack(x).to(run.device) for x in zip(*samples, strict=True)
    )  # [n, 3, h, w], [n, context]
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
        masks = run.net.segment(
            images, run.net.encode_text(tokens), kp_weight=0
        ).cpu()  # [n, n, h, w]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in run.net.recipe.norm)  # [3, 1, 1]
    words = [run.tokenizer.decode(row.tolist()).split("<end_of_text>")[0] for row in tokens]
    captions = [text.removeprefix("<start_of_text>").strip() for text in words]
    report.write_samples(path, (images.cpu() * std + mean).clamp(0, 1), masks, captions)


# ---- the area prior -------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_area_prior(run, args):
    """Prints the mean area of MaskCLIP's masks of N pairs, image and own caption, by which Sec. 3.3 chose p+ = 0.4.

    Paper silent: what an area is, and the crops. Here: the mean of sigmoid(10 cos - 2.5), the mask that training starts
    from (the release's w and b), on the random crops that training sees.
    """
    n = min(args.measure_area_prior, len(run.pairs))
    batch_size = max(min(args.batch_size, 64 * run.ranks, n) // run.ranks, 1) * run.ranks
    steps, sums = max(n // batch_size, 1), torch.zeros(3, dtype=torch.float64)
    for images, tokens, _, _ in tqdm(
        batches(run, args, batch_size, steps), "measuring", steps, disable=run.rank > 0
    ):
        images = images.to(run.device)
        t, grid = (
            run.net.encode_text(tokens.to(run.device)),
            backbone.patch_grid(images, run.net.patch),
        )
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
            v_d = backbone.dense_features(
                run.net.last_block, backbone.trunk(run.net.clip.visual, images), grid
            )  # [B, D, H, W]
        areas = (
            run.net.preserved_masks(v_d, t, grid).mean((2, 3)).diagonal().double().cpu()
        )  # [B, B, H, W] -> [B]
        sums += torch.stack([torch.tensor(len(areas)), areas.sum(), areas.square().sum()])
    if run.ranks > 1:
        sums = sums.float().to(run.device)
        dist.all_reduce(sums)
    count, mean = int(sums[0]), float(sums[1] / sums[0])
    error = math.sqrt(max(float(sums[2] / count) - mean**2, 0) / max(count - 1, 1))
    if run.rank == 0:
        what = f"mean area of MaskCLIP's masks: {mean:.4f} +- {error:.4f} (standard error, {count:,} pairs)"
        print(f"{what}; train with --area-prior {mean:.2f}")


# ---- the loop -------------------------------------------------------------------------------------------------------


def train(run, args):
    """From run.start to the last step. Returns the signal that stopped it, or 0."""
    net, model = run.net, wrap(run.net, run.device, run.ranks)
    loader = batches(run, args, args.batch_size, args.steps, run.start)
    clock = SimpleNamespace(since=time.perf_counter(), step=run.start, waited=0.0)
    with tqdm(total=args.steps, initial=run.start, desc="training", disable=run.rank > 0) as bar:
        for step in range(run.start, args.steps):
            if net.set_trainable(step):
                model = wrap(net, run.device, run.ranks)
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(step, args) * group["lr_mult"]
            asked = time.perf_counter()
            *batch, bad = next(loader)
            clock.waited += time.perf_counter() - asked
            batch = [x.to(run.device, non_blocking=True) for x in batch]
            facts = train_step(model, batch, bad, run, args)
            after_step(step + 1, facts, clock, run, args, bar)
            if facts.stop:
                return facts.stop
    return 0


def after_step(done, facts, clock, run, args, bar):
    """What is due after a step: the log line, the evaluation, checkpoint and pictures."""
    last = done == args.steps
    bar.update()
    check_health(run, done, args)
    if done % args.log_every == 0 or last:
        if run.rank == 0:
            report.write_log(log_record(done, facts, clock, run, args), args.out, bar)
        clock.since, clock.step, clock.waited = time.perf_counter(), done, 0.0
    trained = time.perf_counter()
    due = done % args.save_every == 0 or last
    if run.rank == 0 and (
        due or facts.stop
    ):  # first of all: a launcher that has sent a signal does not wait
        save(run, done, args)
    if run.sets and not facts.stop and (done % args.eval_every == 0 or last):
        if evaluate_now(run, done, args, bar) and run.rank == 0:
            save(run, done, args)  # it holds which step was the best
    if run.rank == 0 and due and not facts.stop:
        draw_samples(run, Path(args.out, "samples.png"))
        report.write_curves(Path(args.out, "loss.png"), Path(args.out, "log.jsonl"))
    clock.since += (
        time.perf_counter() - trained
    )  # what stands above is no part of images per second


def main(args):
    """A parsed command line from start to end. Returns the exit status: 0, or 128 + the signal that stopped it."""
    run = start_run(args)
    stop = 0
    if args.measure_area_prior:
        with no_loaders_left():
            measure_area_prior(run, args)
    else:
        if run.rank == 0:
            begin_logs(run, args)
        with no_loaders_left(), caught_signals(run.signals):
            stop = train(run, args)
        if run.rank == 0:
            words = (
                f"stopped by {signal.Signals(stop).name}, the same command goes on"
                if stop
                else "trained"
            )
            print(f"{Path(args.out, 'last.pt')}: {words} to step {args.steps}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 128 + stop if stop else 0


def command(argv=None):
    """The command line as a program: one line for a mistake, never a traceback. Returns the exit status."""
    args = parse_args(argv)
    try:
        return main(args)
    except (files.InputError, OSError) as error:
        # A loader process sends its whole traceback as the message; the last line is what happened.
        words = (str(error) or repr(error)).splitlines()[-1].removeprefix("files.InputError: ")
    except RuntimeError as error:
        if not dist.is_initialized() or not re.search(
            "gloo|nccl|timed out|connection", str(error), re.IGNORECASE
        ):
            raise
        words = f"a collective was not completed within --timeout {args.timeout} s: another rank has failed or hangs"
        words += f" ({files.first_line(error)})"
    except KeyboardInterrupt:
        return 130
    if dist.is_initialized():
        print(f"error: rank {dist.get_rank()}: {words}", file=sys.stderr)
    elif os.environ.get("LOCAL_RANK", "0") == "0":  # what all ranks of a node find is said once
        print(f"error: {words}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(command())
