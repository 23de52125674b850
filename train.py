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

In the file's order: the command line, what a run is made of, checkpoints, one step, seeing it run,
the loop. `run` is one namespace for a whole run: the flags, and what start_run adds to them.
"""

import argparse
import fcntl
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate
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

# ---- the command line ----


def parse_args(argv=None):
    """The command line; values that cannot be end with exit code 2."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name, text, default=None, kind=str, **how):
        p.add_argument(f"--{name}", help=text, default=default, type=kind, **how)

    shards = ["data/gcc3m/*.tar", "data/gcc12m/*.tar"]
    add("data", "tar shards: files, globs, {000..331} (Sec. 4.1)", shards, nargs="+")
    add("model", "open_clip name or config .json (Sec. 4.1: ViT-B/16)", "ViT-B-16-quickgelu")
    add("pretrained", "open_clip tag, a local weights file, or random", "openai")
    add("recipe", "the paper's text, or the authors' release", "paper", choices=gcl.RECIPES)
    add("losses", "Sec. 3.3, Table 2a", ["gcl_v", "gcl_f"], nargs="+", choices=gcl.LOSSES)
    add("lambda-gcl", "weight of the contrastive losses (Sec. 4.1)", 0.1, weight)
    add("lambda-area", "weight of the area prior (Sec. 4.1)", 0.4, weight)
    add("lambda-tv", "weight of the smooth prior (Sec. 4.1)", 1.0, weight)
    add("area-prior", "p+, expected area of a positive mask (Sec. 3.3)", 0.4, share)
    add("batch-size", "global batch, shared out among the ranks (Sec. 4.1)", 1024, count)
    add("micro-batch", "images of a rank at a time, to bound memory; same result", kind=count)
    add("lr", "peak learning rate (Sec. 4.1)", 7.5e-5, positive)
    add("min-lr", "learning rate at the end of the cosine (paper silent)", 1e-5, positive)
    add("scalar-lr-mult", "of gates, w, b, temperatures; for very short runs", 1.0, positive)
    add("weight-decay", "AdamW's, on weight matrices alone (Sec. 4.1)", 0.05, weight)
    add("steps", "optimiser steps (Sec. 4.1)", 50_000, count)
    add("warmup-steps", "linear warm-up (Sec. 4.1)", 15_000, count_or_zero)
    add("clip-grad", "largest gradient norm (paper silent)", 5.0, positive)
    add("image-size", "training crop; default: the CLIP's own, 224 (Sec. 4.1)", kind=count)
    add("workers", "loader processes per rank", 4, count_or_zero)
    add("seed", "of the data's order, augmentation, noise, adapter's start", 0, count_or_zero)
    add("out", "folder for checkpoints and logs", "runs/gcl")
    add("resume", "auto: the newest whole checkpoint in OUT; never; or a file", "auto")
    add("save-every", "steps between checkpoints, and pictures", 1000, count)
    add("log-every", "steps between log lines", 50, count)
    add("eval", "sets evaluated as it goes, for best.pt", nargs="+", metavar="NAME|SPEC.json")
    add("eval-every", "steps between evaluations of --eval (without PAMR)", 5000, count)
    area = "print p+ of Sec. 3.3, MaskCLIP's mean area over so many pairs; no training"
    add("measure-area-prior", area, kind=count, nargs="?", const=10_000)
    add("max-bad", "stop when a larger share of samples than this is unusable", 0.1, share)
    add("timeout", "seconds to wait for another rank in a step", 1800, count)
    add("device", "cuda, mps or cpu; default: the best there is")
    add("precision", "auto: half on CUDA, or fp32", "auto", choices=["auto", *evaluate.PRECISIONS])
    p.add_argument("--compile", action="store_true", help="masks by torch.compile, for GPUs")
    args = p.parse_args(argv)
    if wrong := complaint(args):
        p.error(wrong)
    return args


def complaint(args):
    """What is wrong with flags and environment together, or None. Sets args.rank, args.ranks."""
    try:
        args.rank, args.ranks = files.rank_of()
    except InputError as error:
        return str(error)
    if args.batch_size % args.ranks:
        return f"--batch-size {args.batch_size} is not divisible by the {args.ranks} ranks"
    if args.warmup_steps > args.steps:
        return f"--warmup-steps {args.warmup_steps} must lie between 0 and --steps {args.steps}"
    if args.min_lr > args.lr:
        return f"--min-lr {args.min_lr} must lie between 0 and --lr {args.lr}"


# ---- what a run is made of ----


def start_run(args):
    """The flags and the state of a run in one namespace, such as run.lr and run.net.

    Everything that can be wrong with flags, data, CLIP and sets is found here, before the first
    step: InputError. signals: those that have come; stop: the one that ends the run, or 0.
    """
    run = SimpleNamespace(**vars(args), flags=vars(args), signals=[], stop=0, times=[])
    run.out, run.launcher = Path(args.out), os.getppid()
    run.device = backbone.pick_device(args.device)
    run.shards = data.expand_shards(args.data)
    torch.manual_seed(args.seed)
    clip, run.tokenizer = gcl.load_clip(args.model, args.pretrained, run.device)
    if run.tokenizer.vocab_size > clip.vocab_size:
        raise InputError(f"--model {args.model}: its vocabulary is smaller than its tokenizer's")
    run.net = gcl.GCL(clip, args.recipe, args.losses, args.area_prior).train()
    if run.device.type == "cpu":
        winograd.use(run.net)
    run.optimizer = build_optimizer(run.net, args)
    if run.compile:
        compile_masks(run)
    set_precision(run)
    read_eval_sets(run)
    run.pairs = build_pairs(run)
    return run


def set_precision(run):
    """Half precision by autocast; float16 needs its loss scaled, the others do not."""
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if run.precision == "auto":
        run.precision = "fp32"
        if run.device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            run.precision = "bf16" if native else "fp16"
    dtype = evaluate.PRECISIONS[run.precision]
    run.autocast = torch.autocast(run.device.type, dtype, enabled=bool(dtype))
    run.scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16")


def compile_masks(run):
    """net.mask_rows as few kernels where the device has a compiler, or a line that says why not.

    Each size of a slice has kernels of its own: the backward pass has to compute it again by those
    of the forward pass. They are made in the first step.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(9, device=run.device))
        run.net.mask_rows = torch.compile(run.net.mask_rows, dynamic=False)
    except Exception as error:  # each compiler has its own
        run.flags["compile"] = False
        error = getattr(error, "inner_exception", error)
        benchmarks.note(f"note: --compile is off: {files.first_line(error)}")


def build_optimizer(net, args):
    """AdamW over all trained parameters, those that are unfrozen later too.

    Release differs: it also decays its scalars (gates, w, b, temperatures); here matrices and
    kernels alone decay.
    """
    kinds = (args.weight_decay, 1.0), (0.0, 1.0), (0.0, args.scalar_lr_mult)
    # Matrices and kernels, vectors, scalars: in this order in every checkpoint.
    groups = [{"params": [], "weight_decay": decay, "lr_mult": mult} for decay, mult in kinds]
    for name, parameter in net.named_parameters():
        if not name.startswith("clip."):
            groups[2 - min(parameter.ndim, 2)]["params"].append(parameter)
    # Paper silent: betas and eps; the release's, its betas are torch's default (0.9, 0.999).
    return torch.optim.AdamW(groups, args.lr, eps=1e-6)


def learning_rate(step, args):
    """Linear warm-up from 1e-4 of the peak, a cosine down to min_lr (Paper silent: both ends)."""
    if step < args.warmup_steps:
        return args.lr * (1e-4 + (1 - 1e-4) * step / args.warmup_steps)
    progress = (step - args.warmup_steps) / (args.steps - args.warmup_steps)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def build_pairs(run):
    """The image-text pairs: image [3, h, w], tokens [context], noise [1, H, W], bad [reasons]."""
    net = run.net
    size = run.image_size or max(net.clip.visual.image_size)
    if size % net.patch:
        raise InputError(f"--image-size {size} is not a multiple of this CLIP's patch, {net.patch}")
    mask_size = (4 * size // net.patch,) * 2  # the adapter's grid
    transform = data.train_transform(size, net.recipe.norm, net.recipe.strong_augmentation)
    return data.PairDataset(run.shards, transform, run.tokenizer, mask_size, run.seed, run.out)


def batches(run):
    """Iterator over this rank's batches from run.start on.

    Images [B, 3, h, w], tokens [B, context], noise [B, 1, H, W], bad [B, reasons].
    """
    where = run.seed, run.start, run.rank, run.ranks
    return iter(
        DataLoader(
            run.pairs,
            batch_sampler=data.GlobalOrder(len(run.pairs), run.batch_size, run.steps, *where),
            num_workers=run.workers,
            pin_memory=run.device.type == "cuda",
            worker_init_fn=files.ignore_signals,
        )
    )


def wrap(net, ranks):
    """net under DistributedDataParallel where there are several ranks.

    Wrapped again when the release recipe unfreezes its last block, since DDP reduces only what was
    trainable when it was built. Release differs: it unfreezes later than it wraps, so those
    gradients are never reduced across ranks.
    """
    return DistributedDataParallel(net) if ranks > 1 else net


# ---- checkpoints: what a run goes on from ----

CHECKPOINTS = "last.pt", "previous.pt"
SAME_RUN = (
    "recipe losses lambda_gcl lambda_area lambda_tv area_prior batch_size lr min_lr scalar_lr_mult"
    " weight_decay steps warmup_steps clip_grad image_size seed"
).split()
SAME_BITS = "ranks", "micro_batch", "precision", "compile"


def newest_checkpoint(args):
    """(path, checkpoint) that --resume names, the newest that is whole; for a fresh start Nones."""
    if args.resume == "never":
        return None, None
    if args.resume != "auto":
        return Path(args.resume), gcl.read_checkpoint(args.resume)
    broken = None
    for name in CHECKPOINTS:
        path = Path(args.out, name)
        try:
            if path.exists():
                return path, gcl.read_checkpoint(path)
        except InputError as error:
            broken = error
            benchmarks.note(f"warning: {error}; looking for an older one")
    if broken:
        raise InputError(f"{broken}: no checkpoint here can be read; --resume never starts over")
    return None, None


def restore(run):
    """Takes up the checkpoint that --resume names: sets run.start and run.progress."""
    bad = [0] * len(data.REASONS)
    run.progress = {"skipped": 0, "in_a_row": 0, "bad": bad, "best": None, "evaluated": 0}
    run.start, (run.path, checkpoint) = 0, newest_checkpoint(run)
    if not checkpoint:
        return
    if not set("optimizer scaler step args progress pairs".split()) <= checkpoint.keys():
        raise InputError(f"{run.path}: has no optimiser state, so training cannot go on from it")
    for name, before in checkpoint["args"].items():
        now, flag = run.flags.get(name), f"--{name.replace('_', '-')} {before}"
        if name in SAME_RUN and before != now:
            raise InputError(
                f"{run.path}: was trained with {flag}; give the same, or another --out"
            )
        if name in SAME_BITS and before != now:
            benchmarks.note(f"note: {flag} is {now} now: the run goes on, but not to the same bits")
    if checkpoint["pairs"] != run.pairs.fingerprint():
        raise InputError(f"{run.path}: trained on other pairs; give the same, or another --out")
    run.start = int(checkpoint["step"])
    if run.start not in range(run.steps + 1):
        raise InputError(f"{run.path}: says step {run.start} of {run.steps}; give another --out")
    gcl.restore(run.net, checkpoint, run.path)
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:  # empty unless the run was in float16
        run.scaler.load_state_dict(checkpoint["scaler"])
    run.progress |= checkpoint["progress"]


def save(run, done):
    """last.pt for step done, previous.pt the one before: at any moment a whole one is there."""
    last = run.out / "last.pt"
    if last.exists():
        files.write_whole(run.out / "previous.pt", lambda file: shutil.copyfile(last, file))
    run.net.save(
        last,
        step=done,
        optimizer=run.optimizer.state_dict(),
        scaler=run.scaler.state_dict(),
        args=run.flags,
        pairs=run.pairs.fingerprint(),
        progress=run.progress,
    )


def lock(out):
    """OUT for this process alone, however it ends; InputError names the process that has it."""
    file = open(out / ".lock", "a+")  # open as long as the run
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when we die
    except OSError as error:
        file.seek(0)
        raise InputError(f"--out {out}: in use by {file.read()}; wait, or end it") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def join(run):
    """The process group of all ranks, once all are there with the same pairs and first step.

    Nobody waits for another's scan of the shards in a collective, whose timeout would be too short,
    but at the store. A restart by torchrun has keys of its own, so that it never reads those of the
    first.
    """
    mine = f"step {run.start} of {len(run.pairs)} pairs ({run.pairs.fingerprint()[:8]})"
    keys = [f"start/{rank}" for rank in range(run.ranks)]
    backend, wait = "nccl" if run.device.type == "cuda" else "gloo", timedelta(seconds=run.timeout)
    try:
        store, _, _ = next(dist.rendezvous("env://", run.rank, run.ranks))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        store.set(keys[run.rank], mine)
        store.wait(keys, timedelta(days=1))
        others = {store.get(key).decode() for key in keys} - {mine}
        dist.init_process_group(backend, None, wait, run.ranks, run.rank, store)
    except (RuntimeError, ValueError) as error:  # a rank may be gone at any of these lines
        why = files.first_line(error)
        raise InputError(f"not all {run.ranks} ranks have started ({why})") from error
    if others:
        raise InputError(
            f"would start at {mine}, others at {max(others)}; "
            "all nodes need the same --data and a shared --out"
        )


def begin_logs(run):
    """Locks OUT, and finishes what a kill has left: temporary files, log lines beyond the
    checkpoint."""
    run.lock = lock(run.out)
    for leftover in run.out.glob("*.tmp"):
        leftover.unlink()
    if run.resume == "never":  # or a later --resume auto would go on with the old run
        for name in (*CHECKPOINTS, "best.pt"):
            (run.out / name).unlink(missing_ok=True)
    if run.resume == "auto" and run.start:  # a broken last.pt must not become previous.pt
        os.replace(run.path, run.out / "last.pt")
    log = run.out / "log.jsonl"
    log.touch()
    # An evaluation that the checkpoint does not know is made again.
    until = run.start, run.progress["evaluated"]  # of steps, of evaluations
    lines = log.read_text(errors="replace").splitlines()
    kept = [line for line in lines if report.log_step(line) <= until['"miou"' in line]]
    files.write_text(log, "\n".join([*kept, ""]))
    facts = run.flags | {
        name: version(name) for name in "torch torchvision open_clip_torch numpy pillow".split()
    }
    facts |= {"pairs": len(run.pairs), "python": platform.python_version()}
    files.write_text(run.out / "config.json", json.dumps(facts, indent=1))
    print(
        f"{len(run.pairs):,} pairs, {run.ranks} rank(s) on {run.device}, {run.precision},"
        f" steps {run.start} to {run.steps}",
        flush=True,
    )


# ---- one step ----


def gradients(run, batch):
    """Forward and backward pass: (the loss and its terms, gradient norm before clipping)."""
    lambdas = {"gcl": run.lambda_gcl, "area": run.lambda_area, "tv": run.lambda_tv}
    with run.autocast:
        terms = run.wrapped(*batch, micro_batch=run.micro_batch)
        loss = gcl.total_loss(terms, lambdas)
    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.net.parameters(), run.clip_grad)
    return {"loss": loss} | terms, norm


def train_step(run, batch, bad):
    """One optimiser step, skipped on all ranks when a loss or the gradient of any is not finite.

    bad: [B, reasons] counts of unusable samples. Returns what is logged of the step, the same on
    all ranks, as are run.progress and run.stop: 0, or the signal that some rank has got.
    """
    losses, norm = gradients(run, batch)
    names = [*losses, "grad_norm", "mean_area_pos", "mean_area_neg"]
    means = torch.stack([*losses.values(), norm, *run.net.mask_areas]).detach().float()  # [names]
    counts = torch.cat([torch.tensor([len(run.signals)]), bad.sum(0)])  # [1 + reasons]
    # Without non_blocking the CPU would wait here too.
    values = torch.cat([means / run.ranks, counts.to(means, non_blocking=True)])
    if run.ranks > 1:
        dist.all_reduce(values)
    values = values.tolist()  # the one place of a step where the CPU waits for the GPU
    facts = dict(zip(names, values, strict=False))  # the counts stand after them
    signals, *bad = map(int, values[len(names) :])
    if signals:  # a rank that has got none was told by another
        run.stop = [*run.signals, signal.SIGTERM][0]
    p, finite = run.progress, all(map(math.isfinite, facts.values()))
    if finite:
        run.scaler.step(run.optimizer)
        run.scaler.update()
    else:  # float16's scaler would decide on each rank alone
        run.scaler.update(run.scaler.get_scale() / 2)
    p["skipped"] += not finite
    p["in_a_row"] = 0 if finite else p["in_a_row"] + 1
    p["bad"] = [a + b for a, b in zip(p["bad"], bad, strict=True)]
    return facts


# ---- seeing it run ----


def log_record(run, done, facts):
    """What a log line says. run.times: (seconds waited for data, of all) of the steps since the
    last one."""
    net = run.net
    waited, seconds = map(sum, zip(*run.times, strict=True))
    speed = len(run.times) * run.batch_size / seconds
    return {
        "step": done,
        **facts,
        "w": net.w.item(),
        "b": net.b.item(),
        **{f"tau_{name}": (-net.log_scale[name]).exp().item() for name in net.losses},
        "lr": run.optimizer.param_groups[0]["lr"],
        "images_per_second": speed,
        "data_wait": waited / seconds,
        "memory_gb": torch.cuda.max_memory_allocated() / 2**30,  # of the GPU; 0 without one
        "skipped": run.progress["skipped"],
        "bad": dict(zip(data.REASONS, run.progress["bad"], strict=True)),
        "eta_seconds": round((run.steps - done) * run.batch_size / speed),
    }


def read_eval_sets(run):
    """The sets of --eval as run.sets, every label checked before the first step."""
    run.sets = []
    if run.eval:
        flags = f"--workers={run.workers}", f"--out={run.out}", f"--precision={run.precision}"
        run.eval_args = evaluate.parse_args(["--datasets", *run.eval, "--no-pamr", *flags])
        run.sets = evaluate.read_sets(run.eval_args)
    for dataset in run.sets:
        benchmarks.check_labels(dataset, run.workers)


def evaluate_now(run, done):
    """mIoU of the --eval sets by the protocol, but without PAMR; the best net is best.pt."""
    run.net.eval()
    how = run.net, run.tokenizer, run.eval_args, run.device, run.rank, run.ranks
    results = {each.name: evaluate.evaluate_set(each, *how)[0] for each in run.sets}
    run.net.train()
    scores = [result["miou"] or 0.0 for result in results.values()]
    now, best = {"step": done, "miou": round(sum(scores) / len(scores), 4)}, run.progress["best"]
    if best is None or now["miou"] > best["miou"]:
        run.progress["best"] = best = now
    run.progress["evaluated"] = done
    if run.rank == 0:
        record = now | {f"miou_{name}": result["miou"] for name, result in results.items()}
        record["partial"] = any(result["partial"] for result in results.values())
        report.write_log(record | {"best_step": best["step"]}, run.out, tqdm)
        if best is now:
            run.net.save(run.out / "best.pt", **best)


@torch.no_grad()
def draw_samples(run):
    """samples.png: always the same pairs, under masks of their own captions and the next ones."""
    pairs = [run.pairs[k, k * len(run.pairs) // 4][:2] for k in range(4)]
    images, tokens = default_collate(pairs)  # [4, 3, h, w], [4, context]
    with run.autocast:
        t = run.net.encode_text(tokens.to(run.device))  # [4, C]
        masks = run.net.segment(images.to(run.device), t, kp_weight=0).cpu()  # [4, 4, h, w]
    texts = map(run.tokenizer.decode, tokens.tolist())
    report.write_samples(run.out / "samples.png", images, masks, texts, run.net.recipe.norm)


@torch.no_grad()
def measure_area_prior(run):
    """Prints the mean area of MaskCLIP's masks of N pairs, by which Sec. 3.3 chose p+ = 0.4.

    Paper silent: what an area is, and the crops. Here: the mean of sigmoid(10 cos - 2.5), the mask
    that training starts from (the release's w and b), on the random crops that training sees.
    """
    n, net, total = min(run.measure_area_prior, len(run.pairs)), run.net, 0.0
    for k in tqdm(range(n), "measuring"):
        pair = run.pairs[k, k * len(run.pairs) // n][:2]
        image, tokens = (x[None].to(run.device) for x in pair)  # [1, 3, h, w], [1, context]
        with run.autocast:
            total += net.segment_clip(image, net.encode_text(tokens)).mean().item()
    print(
        f"mean area of MaskCLIP's masks: {total / n:.4f} ({n:,} pairs);"
        f" train with --area-prior {total / n:.2f}"
    )


# ---- the loop ----


def train(run):
    """From run.start to the last step, or until run.stop."""
    loader = batches(run)
    with tqdm(total=run.steps, initial=run.start, desc="training", disable=run.rank > 0) as bar:
        if run.start:
            follow_up(run, run.start)  # what a kill may have cut off
        for step in range(run.start, run.steps):
            if run.net.set_trainable(step) or step == run.start:
                run.wrapped = wrap(run.net, run.ranks)
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(step, run) * group["lr_mult"]
            asked = time.perf_counter()
            *batch, bad = next(loader)  # images, tokens, noise
            waited = time.perf_counter() - asked
            batch = [x.to(run.device, non_blocking=True) for x in batch]
            if os.getppid() != run.launcher and "TORCHELASTIC_RUN_ID" in os.environ:
                # torchrun was killed: nobody would end this rank
                run.signals.append(signal.SIGTERM)
            facts = train_step(run, batch, bad)
            run.times.append((waited, time.perf_counter() - asked))
            bar.update()
            after_step(run, step + 1, facts)
            if run.stop:
                return


def due(run, done, every):
    """Whether something happens after this step: every so many, and after the last."""
    return done % every == 0 or done == run.steps


def after_step(run, done, facts):
    """The log line, the checkpoint, and what follows a checkpoint."""
    if run.progress["in_a_row"] == 20:
        raise InputError(
            f"step {done - 1}: 20 non-finite gradients in a row; lower --lr or use --precision fp32"
        )
    if due(run, done, run.log_every):
        data.too_many_bad(run.progress["bad"], done * run.batch_size, run.max_bad)
        if run.rank == 0:
            report.write_log(log_record(run, done, facts), run.out, tqdm)
        run.times.clear()
    evaluation = run.sets and due(run, done, run.eval_every)
    if run.rank == 0 and (run.stop or evaluation or due(run, done, run.save_every)):
        save(run, done)  # first of all: a launcher that has sent a signal does not wait
    if not run.stop:
        follow_up(run, done)


def follow_up(run, done):
    """Evaluation and pictures that are due after a checkpoint; after a kill, once more."""
    if run.sets and due(run, done, run.eval_every) and run.progress["evaluated"] < done:
        evaluate_now(run, done)
        if run.rank == 0:
            save(run, done)  # it holds that this is done, and which step was the best
    if run.rank == 0 and due(run, done, run.save_every):
        draw_samples(run)
        report.write_curves(run.out / "loss.png", run.out / "log.jsonl")


def catch_signals(run):
    """SIGINT and SIGTERM only add themselves to run.signals, where train_step looks.

    During an evaluation, which may be long, they end it: the checkpoint before it is written, and
    the same command makes it again.
    """

    def catch(number, frame):
        run.signals.append(number)
        if not run.net.training:
            files.interrupt(number, frame)

    for number in STOP:
        signal.signal(number, catch)


def end_loaders():
    """No loader process is left, whatever happened: they do not see SIGTERM."""
    for process in multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # on which torch would say that one has died
        process.kill()


def main(args):
    """A parsed command line from start to end. Returns 0, or 128 + the signal that stopped it."""
    run = start_run(args)
    if args.measure_area_prior:
        return measure_area_prior(run)
    try:
        restore(run)
    except InputError:
        raise
    except Exception as error:  # whatever a field of another kind makes torch stumble over
        words = f"fields are not as train.py writes them ({files.first_line(error)})"
        raise InputError(f"{run.path}: {words}; give another --out or --resume") from error
    if run.ranks > 1:
        join(run)
    catch_signals(run)
    try:
        if run.rank == 0:
            begin_logs(run)
        train(run)
    finally:
        end_loaders()
    if run.rank == 0:
        words = "trained"
        if run.stop:
            words = f"stopped by {signal.Signals(run.stop).name}, the same command goes on"
        print(files.printable(f"{run.out}/last.pt: {words} to step {run.steps}"))
    if run.ranks > 1:
        dist.destroy_process_group()
    return run.stop and 128 + run.stop


def run_rank(args):
    """main, with what ends a rank said in one line, and once where all of a node find the same."""
    try:
        return main(args)
    except (InputError, OSError) as error:
        # A loader process sends its whole traceback as the message; the last line is what happened.
        words = f"\n{error}".splitlines()[-1].removeprefix("files.InputError: ")
    except RuntimeError as error:
        words, text = files.first_line(error), str(error).lower()
        if "dataloader worker" in text:
            words = f"a loader process was killed; try fewer --workers, more --shm-size ({words})"
        elif dist.is_initialized() and re.search("gloo|nccl|timed out|connection", text):
            what = "broke off: another rank has failed or was killed"
            if "timed out" in text:
                what = f"was not completed within --timeout {args.timeout} s: another rank hangs"
            words = f"a collective {what} ({words})"
        else:
            raise
    if dist.is_initialized():
        words = f"rank {args.rank}: {words}"
    elif os.environ.get("LOCAL_RANK", "0") != "0":
        return 1
    raise InputError(words)


def command(argv=None):
    """The command line as a program. Returns the exit status."""
    return files.command(run_rank, parse_args(argv))


if __name__ == "__main__":
    sys.exit(command())
