# SPDX-License-Identifier: MIT
"""Trains GCL from image-text pairs alone. The defaults are the paper's run: CC3M + CC12M, batch
1024.

    torchrun --nproc_per_node=8 train.py                # one node with 8 GPUs (Sec. 4.1)
    python train.py --micro-batch 64                    # the same batch on one GPU, or on the CPU
    torchrun --nproc_per_node=8 train.py --batch-size 512 --steps 40000 --warmup-steps 10000
                                                        # the schedule of Table 2
    python train.py --measure-area-prior                # p+ of Sec. 3.3 on these pairs, no training

Writes --out (runs/gcl): last.pt (a checkpoint for evaluate.py, and for --resume), previous.pt (the
one before), log.jsonl, loss.png, samples.png, config.json, and with --eval best.pt. SIGTERM and
Ctrl-C write last.pt first. Float32 products are TF32 on GPUs that have it, the rest bfloat16
(--precision).
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import socket
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
import winograd
from files import STOP, InputError, count, count_or_zero, positive, share, weight

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

# the newest first; next.pt is about to be last.pt
CHECKPOINTS = ("next.pt", "last.pt", "previous.pt")


SHARDS = ["data/gcc3m/*.tar", "data/gcc12m/*.tar"]
FLAGS = {  # name: (kind, default, help with the section of the paper)
    "model": (str, "ViT-B-16-quickgelu", "open_clip name or config .json (Sec. 4.1: ViT-B/16)"),
    "pretrained": (str, "openai", "open_clip tag, or a local weights file"),
    "lambda-gcl": (weight, 0.1, "weight of the contrastive losses (Sec. 4.1)"),
    "lambda-area": (weight, 0.4, "weight of the area prior (Sec. 4.1)"),
    "lambda-tv": (weight, 1.0, "weight of the smooth prior (Sec. 4.1)"),
    "area-prior": (share, 0.4, "p+, expected area of a positive mask (Sec. 3.3)"),
    "batch-size": (count, 1024, "global batch, shared out among the ranks (Sec. 4.1)"),
    "micro-batch": (count, None, "images of a rank at a time, to bound memory; the same result"),
    "lr": (positive, 7.5e-5, "peak learning rate (Sec. 4.1)"),
    "min-lr": (positive, 1e-5, "learning rate at the end of the cosine (paper silent)"),
    "scalar-lr-mult": (positive, 1.0, "factor for gates, w, b, temperatures; for very short runs"),
    "weight-decay": (weight, 0.05, "AdamW's, on weight matrices alone (Sec. 4.1)"),
    "steps": (count, 50_000, "optimiser steps (Sec. 4.1)"),
    "warmup-steps": (count_or_zero, 15_000, "linear warm-up (Sec. 4.1)"),
    "clip-grad": (positive, 5.0, "largest gradient norm (paper silent)"),
    "image-size": (count, None, "training crop in pixels; default: the CLIP's own, 224 (Sec. 4.1)"),
    "workers": (count_or_zero, 4, "loader processes per rank"),
    "seed": (count_or_zero, 0, "order of the data, augmentation, gumbel noise, adapter's start"),
    "out": (str, "runs/gcl", "folder for checkpoints and logs"),
    "resume": (str, "auto", "go on from the newest whole checkpoint in OUT; never; or a file"),
    "save-every": (count, 1000, "steps between checkpoints, and pictures"),
    "log-every": (count, 50, "steps between log lines"),
    "eval-every": (count, 5000, "steps between evaluations of --eval"),
    "max-bad": (share, 0.1, "stop when a larger share of samples than this is unusable"),
    "timeout": (count, 1800, "seconds to wait for another rank in a step"),
    "device": (str, None, "cuda, mps or cpu; default: the best there is"),
}


def parse_args(argv=None):
    """The command line; values that cannot be end with exit code 2."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--data", nargs="+", default=SHARDS, help="files, globs, {000..331} (Sec. 4.1)")
    text = "the paper's text, or the authors' release"
    p.add_argument("--recipe", choices=list(gcl.RECIPES), default="paper", help=text)
    text, two = "Sec. 3.3; rows of Table 2a", ["gcl_v", "gcl_f"]
    p.add_argument("--losses", nargs="+", choices=gcl.LOSSES, default=two, help=text)
    text = "sets to evaluate as it goes (no PAMR), for best.pt"
    p.add_argument("--eval", nargs="+", metavar="NAME|SPEC.json", help=text)
    text = "print MaskCLIP's mean positive mask area over N pairs, then end: p+ (Sec. 3.3)"
    p.add_argument("--measure-area-prior", type=count, nargs="?", const=10_000, help=text)
    kinds = ["auto", "fp32", "bf16", "fp16"]
    text = "auto: bf16 (or fp16) on CUDA, else fp32"
    p.add_argument("--precision", choices=kinds, default="auto", help=text)
    for name, (kind, default, text) in FLAGS.items():
        p.add_argument(f"--{name}", type=kind, default=default, help=text)
    args = p.parse_args(argv)
    args.rank, args.ranks = rank_of(p)
    if wrong := complaint(args):
        p.error(wrong)
    return args


def rank_of(p):
    """(rank, ranks) as torchrun says it in the environment; (0, 1) without it."""
    try:
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        rank, ranks = 0, 0
    if not 0 <= rank < ranks or (ranks > 1 and "MASTER_ADDR" not in os.environ):
        names = "RANK, WORLD_SIZE and MASTER_ADDR"
        p.error(f"{names} do not go together; start several ranks by torchrun")
    return rank, ranks


def complaint(args):
    """What is wrong with the values of the flags together, or None."""
    if args.batch_size % args.ranks:
        return f"--batch-size {args.batch_size} is not divisible by the {args.ranks} ranks"
    if args.warmup_steps > args.steps:
        return f"--warmup-steps {args.warmup_steps} must lie between 0 and --steps {args.steps}"
    if args.min_lr > args.lr:
        return f"--min-lr {args.min_lr} must lie between 0 and --lr {args.lr}"
    if args.measure_area_prior and args.ranks > 1:
        return "--measure-area-prior takes one process"
    return f"--out {args.out}: is a file, not a folder" if os.path.isfile(args.out) else None


# ---- what a run is made of ----


def precision_of(args, device):
    """(autocast dtype or None, GradScaler): float16 needs its loss scaled, the others do not."""
    name = args.precision
    if name == "auto":
        cuda = device.type == "cuda"
        native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if native else "fp16" if cuda else "fp32"
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    return dtype, torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


def autocast(run):
    return torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None)


def build_optimizer(net, args):
    """AdamW over all trained parameters, those that are unfrozen later too.

    Release differs: it also decays its scalars (gates, w, b, temperatures); here matrices and
    kernels alone decay.
    """
    groups = [  # in this order in every checkpoint
        {"params": [], "weight_decay": args.weight_decay, "lr_mult": 1.0},  # matrices and kernels
        {"params": [], "weight_decay": 0.0, "lr_mult": 1.0},  # vectors
        {"params": [], "weight_decay": 0.0, "lr_mult": args.scalar_lr_mult},  # scalars
    ]
    for name, parameter in net.named_parameters():
        if not name.startswith("clip."):
            groups[2 - min(parameter.ndim, 2)]["params"].append(parameter)
    # Paper silent: betas and eps; the release's.
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), eps=1e-6)


def learning_rate(step, args):
    """Linear warm-up from 1e-4 of the peak, a cosine down to min_lr (Paper silent: both ends)."""
    if step < args.warmup_steps:
        return args.lr * (1e-4 + (1 - 1e-4) * step / args.warmup_steps)
    progress = (step - args.warmup_steps) / max(args.steps - args.warmup_steps, 1)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def build_pairs(args, net, tokenizer):
    """The image-text pairs: image [3, h, w], tokens [context], noise [1, H, W], bad [reasons]."""
    size = args.image_size or max(net.clip.visual.image_size)
    if size % net.patch:
        raise InputError(f"--image-size {size} is not a multiple of this CLIP's patch, {net.patch}")
    mask_size = (4 * size // net.patch,) * 2  # the adapter's grid
    transform = data.train_transform(size, net.recipe.norm, net.recipe.strong_augmentation)
    shards = data.expand_shards(args.data)
    return data.PairDataset(shards, transform, tokenizer, mask_size, args.seed, cache=args.out)


def batches(run, args, batch_size, steps, start=0):
    """Iterator over this rank's batches from a step on: images [B, 3, h, w], tokens, noise, bad."""
    where = (run.rank, run.ranks)
    order = data.GlobalOrder(len(run.pairs), batch_size, steps, args.seed, start, *where)
    how = {"num_workers": args.workers, "pin_memory": run.device.type == "cuda"}
    how["worker_init_fn"] = files.ignore_signals
    return iter(DataLoader(run.pairs, batch_sampler=order, **how))


def wrap(net, device, ranks):
    """net under DistributedDataParallel where there are several ranks.

    Wrapped again when the release recipe unfreezes its last block, since DDP reduces only what was
    trainable when it was built. Release differs: it unfreezes later than it wraps, so those
    gradients are never reduced across ranks.
    """
    if ranks == 1:
        return net
    return DistributedDataParallel(net, [device.index] if device.type == "cuda" else None)


# ---- checkpoints: what a run goes on from ----

SAME_RUN = (
    "recipe losses lambda_gcl lambda_area lambda_tv area_prior batch_size lr min_lr scalar_lr_mult"
    " weight_decay steps warmup_steps clip_grad image_size seed"
).split()


def newest_checkpoint(args):
    """(path, checkpoint) that --resume names, the newest that is whole; None for a fresh start."""
    if args.resume != "auto":
        never = args.resume == "never"
        return None if never else (Path(args.resume), gcl.read_checkpoint(args.resume))
    there = [path for name in CHECKPOINTS if (path := Path(args.out, name)).is_file()]
    for path in there:
        try:
            return path, gcl.read_checkpoint(path)
        except InputError as error:
            if args.rank == 0:
                print(f"warning: {error}; looking for an older one", file=sys.stderr)
    if there:
        what = "no checkpoint here can be read; --resume never starts over"
        raise InputError(f"{there[0]}: {what}")
    return None


def restore(run, args):
    """Takes up the checkpoint that --resume names: sets run.start and run.progress."""
    run.start, run.unfinished = 0, False
    run.progress = {"skipped": 0, "in_a_row": 0, "bad": [0] * len(data.REASONS)}
    run.progress |= {"best": None, "evaluated": 0}
    found = None if args.measure_area_prior else newest_checkpoint(args)
    if found is None:
        return
    path, checkpoint = found
    if not {"optimizer", "scaler", "step", "args", "progress", "pairs"} <= checkpoint.keys():
        raise InputError(f"{path}: has no optimiser state, so training cannot go on from it")
    before, step = checkpoint["args"], checkpoint["step"]
    for name in SAME_RUN:
        if before.get(name) != getattr(args, name):
            flag = f"--{name.replace('_', '-')} {before.get(name)}"
            raise InputError(f"{path}: was trained with {flag}; give the same, or another --out")
    if checkpoint["pairs"] != run.pairs.fingerprint():
        now = f"--data now has {len(run.pairs):,} pairs whose places in the shards differ"
        hint = "give the same shards, or another --out"
        raise InputError(f"{path}: was trained on other pairs, {now}; {hint}")
    if not isinstance(step, int) or not 0 <= step <= args.steps:
        raise InputError(f"{path}: says step {step} of {args.steps}; give another --out")
    gcl.restore(run.net, checkpoint, path)
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:  # empty unless the run was in float16
        run.scaler.load_state_dict(checkpoint["scaler"])
    run.start, run.unfinished = step, path.name == "next.pt"
    run.progress |= {"evaluated": step} | checkpoint["progress"]  # older files do not say it
    changed = [
        name
        for name in ("ranks", "micro_batch", "precision")
        if before.get(name, getattr(args, name)) != getattr(args, name)
    ]
    if changed and args.rank == 0:
        words = ", ".join(f"{name} {before.get(name)} -> {getattr(args, name)}" for name in changed)
        print(f"note: {words}: the run goes on, but not to the same bits", file=sys.stderr)


def save(run, done, args):
    """last.pt for step done, previous.pt the one before: at any moment a whole one is there."""
    state = {"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()}
    state |= {"args": vars(args), "pairs": run.pairs.fingerprint()}
    run.net.save(Path(args.out, "next.pt"), step=done, progress=run.progress, **state)
    rename_next(Path(args.out))


def rename_next(out):
    """next.pt becomes last.pt, whose copy is previous.pt; after a kill, once more."""
    if (out / "last.pt").exists():
        files.write_whole(out / "previous.pt", lambda file: shutil.copyfile(out / "last.pt", file))
    os.replace(out / "next.pt", out / "last.pt")


def lock(out):
    """OUT for this process alone, however it ends; InputError names the process that has it."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / ".lock", "a+")  # open as long as the run
    try:
        if fcntl:  # the system frees it when a process dies
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip()
        raise InputError(f"--out {out}: in use by {owner}; wait, or end it") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


# ---- start ----


def join(run, args):
    """The process group of all ranks, once all are there with the same pairs and first step.

    Nobody waits for another's scan of the shards in a collective, whose timeout would be too short,
    but at the store. A restart by torchrun has keys of its own, so that it never reads those of the
    first.
    """
    mine = f"step {run.start} of {len(run.pairs)} pairs ({run.pairs.fingerprint()[:8]})"
    keys = [f"start/{rank}" for rank in range(run.ranks)]
    try:
        store, _, _ = next(dist.rendezvous("env://", run.rank, run.ranks))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        store.set(keys[run.rank], mine)
        store.wait(keys, timedelta(days=1))
    except (RuntimeError, ValueError) as error:
        what = f"not all {run.ranks} ranks have started ({files.first_line(error)})"
        raise InputError(what) from error
    starts = [store.get(key).decode() for key in keys]
    if len(set(starts)) > 1:
        words = f"rank {run.rank} would start at {mine}, others at {max(set(starts) - {mine})}"
        raise InputError(f"{words}; all nodes need the same --data and a shared --out")
    backend, wait = "nccl" if run.device.type == "cuda" else "gloo", timedelta(seconds=args.timeout)
    dist.init_process_group(backend, None, wait, run.ranks, run.rank, store)


def start_run(args):
    """All that stands before the first step, as a namespace; before it nothing is written."""
    data.expand_shards(args.data)
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    run = SimpleNamespace(rank=args.rank, ranks=args.ranks, signals=[], evaluating=False)
    run.device, run.launcher = backbone.pick_device(args.device), os.getppid()
    torch.manual_seed(args.seed)
    clip, run.tokenizer = gcl.load_clip(args.model, args.pretrained, run.device)
    if run.tokenizer.vocab_size > clip.vocab_size:
        what = "its vocabulary is smaller than CLIP's tokenizer needs"
        raise InputError(f"--model {args.model}: {what}")
    run.net = gcl.GCL(clip, args.recipe, args.losses, args.area_prior).train()
    if run.device.type == "cpu":
        winograd.use(run.net)
    run.optimizer = build_optimizer(run.net, args)
    run.dtype, run.scaler = precision_of(args, run.device)
    run.sets = read_eval_sets(run, args)
    run.pairs = build_pairs(args, run.net, run.tokenizer)
    if len(run.pairs) < args.batch_size and args.rank == 0:
        what = "a pair is then its own negative"
        print(f"warning: {len(run.pairs)} pairs, fewer than --batch-size: {what}", file=sys.stderr)
    restore(run, args)
    run.net.set_trainable(run.start)
    if run.rank == 0 and not args.measure_area_prior:
        run.lock = lock(Path(args.out))
    if run.ranks > 1:
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
    """Finishes what a kill has left: renames, temporary files, log lines beyond the checkpoint."""
    out, log = Path(args.out), Path(args.out, "log.jsonl")
    for leftover in out.glob("*.tmp"):
        leftover.unlink()
    if args.resume == "never":  # or a later --resume auto would go on with the old run
        for name in (*CHECKPOINTS, "best.pt"):
            (out / name).unlink(missing_ok=True)
    if run.unfinished:
        rename_next(out)
    lines = log.read_text(errors="replace").splitlines() if run.start and log.is_file() else []
    # An evaluation that the checkpoint does not know is made again.
    until = {True: run.progress["evaluated"], False: run.start}
    kept = [line for line in lines if report.log_step(line) <= until['"miou"' in line]]
    files.write_text(log, "".join(line + "\n" for line in kept))
    facts = {"ranks": run.ranks, "pairs": len(run.pairs), "commit": git_commit()}
    facts |= {"python": platform.python_version()}
    packages = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow")
    facts |= {name: version(name) for name in packages}
    files.write_text(out / "config.json", json.dumps(vars(args) | facts, indent=1) + "\n")
    trained = sum(p.numel() for p in run.net.parameters() if p.requires_grad)
    what = f"{len(run.pairs):,} pairs, {trained:,} trained parameters, {run.ranks} rank(s) on"
    steps = f"steps {run.start} to {args.steps}"
    print(f"{what} {run.device}, {run.dtype or torch.float32}, {steps}", flush=True)


# ---- one step ----


def weights_of(args):
    return {"gcl": args.lambda_gcl, "area": args.lambda_area, "tv": args.lambda_tv}


def gradients(model, batch, run, args):
    """Forward and backward pass: (loss terms without a graph, gradient norm before clipping)."""
    with autocast(run):
        losses = model(*batch, micro_batch=args.micro_batch)
        loss = gcl.total_loss(losses, weights_of(args))
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
    return {name: value.detach() for name, value in losses.items()}, norm


def train_step(model, batch, bad, run, args):
    """One optimiser step, skipped on all ranks when a loss or the gradient of any is not finite.

    bad: [B, reasons] counts of unusable samples. Returns what all ranks agree on: terms, norm,
    areas, finite, and stop, a signal that some rank has got, or 0.
    """
    losses, norm = gradients(model, batch, run, args)
    means = torch.stack([*losses.values(), norm, *run.net.mask_areas]).float()
    counts = torch.cat([torch.tensor([number in run.signals for number in STOP]), bad.sum(0)])
    counts = counts.to(means, non_blocking=True)  # or the CPU would wait here too
    values = torch.cat([means / run.ranks, counts])  # [terms + 3 + 2 + reasons]
    if run.ranks > 1:
        dist.all_reduce(values)
    values = values.tolist()  # the one place of a step where the CPU waits for the GPU
    (*means, norm, pos, neg), counts = values[: len(means)], values[len(means) :]
    finite = all(map(math.isfinite, (*means, norm)))
    if finite:
        run.scaler.step(run.optimizer)
        run.scaler.update()
    else:  # float16's scaler would decide on each rank alone
        run.scaler.update(run.scaler.get_scale() / 2)
    p = run.progress
    p["skipped"] += not finite
    p["in_a_row"] = 0 if finite else p["in_a_row"] + 1
    p["bad"] = [a + int(b) for a, b in zip(p["bad"], counts[len(STOP) :], strict=True)]
    return SimpleNamespace(
        terms=dict(sorted(zip(losses, means, strict=True))),
        norm=norm,
        areas={"mean_area_pos": pos, "mean_area_neg": neg},
        finite=finite,
        stop=next((int(number) for number, n in zip(STOP, counts, strict=False) if n), 0),
    )


def check_health(run, done, args):
    """InputError after 20 skipped steps in a row, or when too many samples cannot be used."""
    if run.progress["in_a_row"] == 20:
        hint = "lower --lr or use --precision fp32"
        raise InputError(f"step {done - 1}: 20 non-finite gradients in a row; {hint}")
    if done % args.log_every == 0:
        data.too_many_bad(run.progress["bad"], done * args.batch_size, args.max_bad)


# ---- seeing it run ----


def memory_gb(device):
    """Peak GiB: of the GPU's allocator, or the resident memory of this process (Linux: in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 if resource else math.nan


def log_record(done, facts, clock, run, args):
    """What a log line says. clock: time and step of the one before, seconds waited for data."""
    net, seconds = run.net, time.perf_counter() - clock.since
    speed = (done - clock.step) * args.batch_size / seconds
    record = {"step": done, "loss": gcl.total_loss(facts.terms, weights_of(args))}
    record |= facts.terms | facts.areas | {"w": net.w.item(), "b": net.b.item()}
    record |= {f"tau_{name}": math.exp(-net.log_scale[name].item()) for name in net.losses}
    record |= {"lr": run.optimizer.param_groups[0]["lr"], "grad_norm": facts.norm}
    record |= {"images_per_second": speed, "data_wait": clock.waited / seconds}
    record |= {"memory_gb": memory_gb(run.device), "skipped": run.progress["skipped"]}
    record |= {"bad": dict(zip(data.REASONS, run.progress["bad"], strict=True))}
    return record | {"eta_seconds": round((args.steps - done) * args.batch_size / speed)}


def read_eval_sets(run, args):
    """The sets of --eval, every label checked before the first step; sets run.eval_args."""
    if not args.eval or args.measure_area_prior:
        return []
    flags = ["--no-pamr", "--workers", str(args.workers), "--out", args.out]
    run.eval_args = evaluate.parse_args(["--datasets", *args.eval, *flags])
    names = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    run.eval_args.precision = names[run.dtype]
    sets = evaluate.read_sets(run.eval_args)
    for dataset in sets:
        benchmarks.check_labels(dataset, args.workers)
    return sets


def evaluate_now(run, done, args, bar):
    """mIoU of the --eval sets by the protocol, but without PAMR; the best net is best.pt."""
    run.net.eval()
    run.evaluating, results = True, {}
    for dataset in run.sets:
        where = (run.tokenizer, run.eval_args, run.device, run.rank, run.ranks)
        results[dataset.name], _ = evaluate.evaluate_set(dataset, run.net, *where)
    run.evaluating = False
    run.net.train()
    values, best = [result["miou"] for result in results.values()], run.progress["best"]
    miou = None if None in values else round(sum(values) / len(values), 4)
    better = miou is not None and (best is None or miou > best["miou"])
    if better:
        run.progress["best"] = best = {"step": done, "miou": miou}
    run.progress["evaluated"] = done
    if run.rank == 0:
        partial = any(result.get("partial") for result in results.values())
        record = {"step": done, "miou": miou, "partial": partial}
        record |= {f"miou_{name}": result["miou"] for name, result in results.items()}
        report.write_log(record | {"best_step": (best or {}).get("step")}, args.out, bar)
        if better:
            run.net.save(Path(args.out, "best.pt"), **best)


@torch.no_grad()
def draw_samples(run, path, rows=4):
    """samples.png: always the same pairs, under masks of their own captions and the next ones."""
    n = min(rows, len(run.pairs))
    samples = [run.pairs[k, k * len(run.pairs) // n][:2] for k in range(n)]
    images, tokens = (torch.stack(x).to(run.device) for x in zip(*samples, strict=True))
    with autocast(run):
        # [n, n, h, w]
        masks = run.net.segment(images, run.net.encode_text(tokens), kp_weight=0).cpu()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in run.net.recipe.norm)  # [3, 1, 1]
    words = [run.tokenizer.decode(row.tolist()).split("<end_of_text>")[0] for row in tokens]
    captions = [text.removeprefix("<start_of_text>").strip() for text in words]
    report.write_samples(path, (images.cpu() * std + mean).clamp(0, 1), masks, captions)


@torch.no_grad()
def measure_area_prior(run, args):
    """Prints the mean area of MaskCLIP's masks of N pairs, by which Sec. 3.3 chose p+ = 0.4.

    Paper silent: what an area is, and the crops. Here: the mean of sigmoid(10 cos - 2.5), the mask
    that training starts from (the release's w and b), on the random crops that training sees.
    """
    n, net, areas = min(args.measure_area_prior, len(run.pairs)), run.net, []
    size = min(args.batch_size, 64, n)
    loader = batches(run, args, size, n // size)
    for images, tokens, _, _ in tqdm(loader, "measuring", n // size):
        images, t = images.to(run.device), net.encode_text(tokens.to(run.device))
        grid = backbone.patch_grid(images, net.patch)
        with autocast(run):
            x = backbone.trunk(net.clip.visual, images)
            v_d = backbone.dense_features(net.last_block, x, grid)  # [B, D, H, W]
        areas.append(net.preserved_masks(v_d, t, grid).mean((2, 3)).diagonal())  # [B, B] -> [B]
    areas = torch.cat(areas).cpu()
    mean, error = areas.mean(), areas.std() / len(areas) ** 0.5 if len(areas) > 1 else 0.0
    what = f"{mean:.4f} +- {error:.4f} (standard error, {len(areas):,} pairs)"
    print(f"mean area of MaskCLIP's masks: {what}; train with --area-prior {mean:.2f}")


# ---- the loop ----


def train(run, args):
    """From run.start to the last step. Returns the signal that stopped it, or 0."""
    net, model = run.net, wrap(run.net, run.device, run.ranks)
    loader = batches(run, args, args.batch_size, args.steps, run.start)
    clock = SimpleNamespace(since=time.perf_counter(), step=run.start, waited=0.0)
    with tqdm(total=args.steps, initial=run.start, desc="training", disable=run.rank > 0) as bar:
        if run.start:
            follow_up(run, run.start, args, bar)  # what a kill may have cut off
        for step in range(run.start, args.steps):
            if net.set_trainable(step):
                model = wrap(net, run.device, run.ranks)
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(step, args) * group["lr_mult"]
            asked = time.perf_counter()
            *batch, bad = next(loader)
            clock.waited += time.perf_counter() - asked
            batch = [x.to(run.device, non_blocking=True) for x in batch]
            if os.getppid() != run.launcher and "TORCHELASTIC_RUN_ID" in os.environ:
                # torchrun was killed: nobody would end this rank
                run.signals.append(signal.SIGTERM)
            facts = train_step(model, batch, bad, run, args)
            after_step(step + 1, facts, clock, run, args, bar)
            if facts.stop:
                return facts.stop
    return 0


def due(done, every, args):
    return done % every == 0 or done == args.steps


def after_step(done, facts, clock, run, args, bar):
    """The log line, the checkpoint, and what follows a checkpoint."""
    bar.update()
    check_health(run, done, args)
    if due(done, args.log_every, args):
        if run.rank == 0:
            report.write_log(log_record(done, facts, clock, run, args), args.out, bar)
        clock.since, clock.step, clock.waited = time.perf_counter(), done, 0.0
    trained = time.perf_counter()
    evaluation = run.sets and due(done, args.eval_every, args)
    if run.rank == 0 and (facts.stop or evaluation or due(done, args.save_every, args)):
        save(run, done, args)  # first of all: a launcher that has sent a signal does not wait
    if not facts.stop:
        follow_up(run, done, args, bar)
    # what stands above is no part of images per second
    clock.since += time.perf_counter() - trained


def follow_up(run, done, args, bar):
    """Evaluation and pictures that are due after a checkpoint; after a kill, once more."""
    evaluation = run.sets and due(done, args.eval_every, args)
    if evaluation and run.progress["evaluated"] < done:
        evaluate_now(run, done, args, bar)
        if run.rank == 0:
            save(run, done, args)  # it holds that this is done, and which step was the best
    if run.rank == 0 and due(done, args.save_every, args):
        draw_samples(run, Path(args.out, "samples.png"))
        report.write_curves(Path(args.out, "loss.png"), Path(args.out, "log.jsonl"))


@contextlib.contextmanager
def caught_signals(run):
    """SIGINT and SIGTERM only add themselves to run.signals, where train_step looks.

    During an evaluation, which may be long, they end it: the checkpoint before it is written, and
    the same command makes it again. In the end no loader process is left, whatever happened.
    """

    def catch(number, frame):
        run.signals.append(number)
        if run.evaluating:
            files.interrupt(number, frame)

    before = {number: signal.signal(number, catch) for number in STOP}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        left = multiprocessing.active_children()
        if left and hasattr(signal, "SIGCHLD"):  # on which torch would say that a loader has died
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for process in left:
            process.kill()  # they do not see SIGTERM


def main(args):
    """A parsed command line from start to end. Returns 0, or 128 + the signal that stopped it."""
    run, stop = start_run(args), 0
    with caught_signals(run):
        if args.measure_area_prior:
            measure_area_prior(run, args)
        else:
            if run.rank == 0:
                begin_logs(run, args)
            stop = train(run, args)
    if run.rank == 0 and not args.measure_area_prior:
        name = signal.Signals(stop).name if stop else ""
        words = f"stopped by {name}, the same command goes on" if stop else "trained"
        print(f"{Path(args.out, 'last.pt')}: {words} to step {args.steps}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 128 + stop if stop else 0


def run_rank(args):
    """main, with what ends a rank said in one line, and once where all of a node find the same."""
    try:
        return main(args)
    except (InputError, OSError) as error:
        # A loader process sends its whole traceback as the message; the last line is what happened.
        words = (str(error) or repr(error)).splitlines()[-1].removeprefix("files.InputError: ")
    except RuntimeError as error:
        words, text = files.first_line(error), str(error).lower()
        if "dataloader worker" in text:
            words = f"a loader process was killed; out of memory? ({words})"
        elif dist.is_initialized() and re.search("gloo|nccl|timed out|connection", text):
            late = f"was not completed within --timeout {args.timeout} s: another rank hangs"
            what = (
                late if "timed out" in text else "broke off: another rank has failed or was killed"
            )
            words = f"a collective {what} ({words})"
        else:
            raise
    if not dist.is_initialized() and os.environ.get("LOCAL_RANK", "0") != "0":
        return 1
    raise InputError(f"rank {args.rank}: {words}" if dist.is_initialized() else words)


def command(argv=None):
    """The command line as a program. Returns the exit status."""
    return files.command(run_rank, parse_args(argv))


if __name__ == "__main__":
    sys.exit(command())
