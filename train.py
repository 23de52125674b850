# SPDX-License-Identifier: MIT
"""Trains GCL from image-text pairs alone. The defaults are the paper's run (Sec. 4.1): CC3M + CC12M, batch 1024.

    torchrun --nproc_per_node=8 train.py                                   # one node with 8 GPUs
    python train.py                                                        # one GPU, or the CPU
    torchrun --nproc_per_node=8 train.py --batch-size 512 --steps 40000 --warmup-steps 10000    # Table 2's schedule

Writes --out (runs/gcl): last.pt (a checkpoint for evaluate.py, and for --resume), log.jsonl, config.json.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import gcl


def parse_args(argv=None):
    """The command line; values that cannot be end with exit code 2."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    shards = ["data/gcc3m/*.tar", "data/gcc12m/*.tar"]
    add("--data", nargs="+", default=shards, help="tar shards: files, globs, {000..331} ranges (Sec. 4.1: CC3M, CC12M)")
    add("--model", default="ViT-B-16-quickgelu", help="open_clip name or model-config .json (Sec. 4.1: CLIP ViT-B/16)")
    add("--pretrained", default="openai", help="open_clip tag, or a local weights file")
    add("--recipe", choices=list(gcl.RECIPES), default="paper", help="the paper's text, or the authors' release")
    add("--losses", nargs="+", choices=gcl.LOSSES, default=["gcl_v", "gcl_f"], help="Sec. 3.3; rows of Table 2a")
    add("--lambda-gcl", type=float, default=0.1, help="weight of the contrastive losses (Sec. 4.1)")
    add("--lambda-area", type=float, default=0.4, help="weight of the area prior (Sec. 4.1)")
    add("--lambda-tv", type=float, default=1.0, help="weight of the smooth prior (Sec. 4.1)")
    add("--area-prior", type=float, default=0.4, help="p+, expected area of a positive mask (Sec. 3.3)")
    add("--batch-size", type=int, default=1024, help="global batch, shared out among the ranks (Sec. 4.1)")
    add("--lr", type=float, default=7.5e-5, help="peak learning rate (Sec. 4.1)")
    add("--min-lr", type=float, default=1e-5, help="learning rate at the end of the cosine (paper silent)")
    add("--scalar-lr-mult", type=float, default=1.0, help="factor for gates, w, b, temperatures; for very short runs")
    add("--weight-decay", type=float, default=0.05, help="AdamW's, on weight matrices alone (Sec. 4.1)")
    add("--steps", type=int, default=50_000, help="optimiser steps (Sec. 4.1)")
    add("--warmup-steps", type=int, default=15_000, help="linear warm-up (Sec. 4.1)")
    add("--clip-grad", type=float, default=5.0, help="largest gradient norm (paper silent)")
    add("--image-size", type=int, help="training crop in pixels; default: the CLIP's own, 224 for ViT-B/16 (Sec. 4.1)")
    add("--workers", type=int, default=4, help="loader processes per rank")
    add("--seed", type=int, default=0, help="order of the data, augmentation, gumbel noise, adapter's start")
    add("--out", default="runs/gcl", help="folder for checkpoints and logs")
    add("--resume", default="auto", help="auto: go on from OUT/last.pt if it is there; never; or a checkpoint file")
    add("--save-every", type=int, default=1000, help="steps between checkpoints")
    add("--log-every", type=int, default=50, help="steps between log lines")
    add("--device", help="cuda, mps or cpu; default: the best there is")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto: bf16 (or fp16) on CUDA")
    args = p.parse_args(argv)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size < 1 or args.batch_size % ranks:
        p.error(f"--batch-size {args.batch_size} is not divisible by the {ranks} ranks")
    if not 0 <= args.warmup_steps <= args.steps or args.steps < 1:
        p.error(f"--warmup-steps {args.warmup_steps} must lie between 0 and --steps {args.steps} (at least 1)")
    if min(args.save_every, args.log_every) < 1 or args.workers < 0:
        p.error("--save-every and --log-every must be at least 1, --workers at least 0")
    if min(args.seed, args.weight_decay, args.lambda_gcl, args.lambda_area, args.lambda_tv) < 0 or args.clip_grad <= 0:
        p.error("--seed, --weight-decay and the --lambda flags cannot be negative, --clip-grad must be above 0")
    if args.image_size is not None and args.image_size < 1:
        p.error("--image-size must be at least 1")
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        p.error(f"--out {args.out}: is a file, not a folder")
    if not 0 < args.min_lr <= args.lr:
        p.error(f"--min-lr {args.min_lr} must lie between 0 and --lr {args.lr}")
    return args


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
            groups[("scalar", "vector")[parameter.ndim] if parameter.ndim < 2 else "matrix"].append(parameter)
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


def build_loader(args, net, tokenizer, start, rank, ranks, device):
    """Batches of this rank from a step on: images [B, 3, h, w], tokens [B, context], noise [B, 1, H, W], replaced."""
    size = args.image_size or max(net.clip.visual.image_size)
    if size % net.patch:
        raise data.DataError(f"--image-size {size} is not a multiple of this CLIP's patch, {net.patch}")
    mask_size = (4 * size // net.patch,) * 2  # the adapter's grid
    transform = data.train_transform(size, net.recipe.norm, net.recipe.strong_augmentation)
    shards = data.expand_shards(args.data)
    pairs = data.PairDataset(shards, transform, tokenizer, mask_size, args.seed, cache=args.out)
    order = data.GlobalOrder(len(pairs), args.batch_size, args.steps, args.seed, start, rank, ranks)
    return DataLoader(pairs, batch_sampler=order, num_workers=args.workers, pin_memory=device.type == "cuda")


SAME_RUN = ("data", "recipe", "losses", "lambda_gcl", "lambda_area", "lambda_tv", "area_prior", "batch_size", "lr")
SAME_RUN += ("min_lr", "scalar_lr_mult", "weight_decay", "steps", "warmup_steps", "clip_grad", "image_size", "seed")


def restore(net, optimizer, scaler, args):
    """Takes up the checkpoint that --resume names; returns the step to go on from, 0 for a fresh start."""
    path = Path(args.out, "last.pt") if args.resume == "auto" else Path(args.resume)
    if args.resume == "never" or (args.resume == "auto" and not path.is_file()):
        return 0
    checkpoint = gcl.read_checkpoint(path)
    if not {"optimizer", "scaler", "step", "args"} <= checkpoint.keys():
        raise gcl.CheckpointError(f"{path}: has no optimiser state, so training cannot go on from it")
    for name in SAME_RUN:
        if checkpoint["args"].get(name) != getattr(args, name):
            flag = f"--{name.replace('_', '-')} {checkpoint['args'].get(name)}"
            raise gcl.CheckpointError(f"{path}: was trained with {flag}; give the same, or another --out")
    gcl.restore(net, checkpoint, path)
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:  # empty unless the run was in float16
        scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["step"]


def wrap(net, device, ranks):
    """net under DistributedDataParallel where there are several ranks.

    Wrapped again when the release recipe unfreezes its last block, since DDP reduces only what was trainable when it
    was built. Release differs: it unfreezes later than it wraps, so those gradients are never reduced across ranks.
    """
    if ranks == 1:
        return net
    return DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)


def weights_of(args):
    return {"gcl": args.lambda_gcl, "area": args.lambda_area, "tv": args.lambda_tv}


def train_step(model, batch, optimizer, scaler, dtype, args):
    """Forward, backward, clip, update. Returns (loss terms, gradient norm), tensors without a graph.

    A non-finite gradient leaves the weights as they are: float16's scaler skips the update itself.
    """
    device = batch[0].device.type
    # On CPUs the flash kernel's backward pass is slow; the plain one takes about half the time.
    with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext():
        with torch.autocast(device, dtype, enabled=dtype is not None):
            losses = model(*batch)
            loss = gcl.total_loss(losses, weights_of(args))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
    if scaler.is_enabled() or norm.isfinite():
        scaler.step(optimizer)
        scaler.update()
    return {name: value.detach() for name, value in losses.items()}, norm


def over_ranks(losses, ranks):
    """The loss terms of the global batch: each rank holds its share, the mean over ranks is the whole."""
    if ranks > 1:
        values = torch.stack(list(losses.values()))
        dist.all_reduce(values)
        losses = dict(zip(losses, values / ranks, strict=True))
    return {name: value.item() for name, value in sorted(losses.items())}


def report(record, out, bar):
    """One plain line and one line of OUT/log.jsonl."""
    bar.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()), sys.stdout)
    with open(Path(out, "log.jsonl"), "a") as file:
        file.write(json.dumps(record) + "\n")


def log_record(step, losses, norm, net, optimizer, args, speed):
    """What one log line says; plain numbers."""
    record = {"step": step, "loss": gcl.total_loss(losses, weights_of(args))} | losses
    record |= {"w": net.w.item(), "b": net.b.item()}
    record |= {f"tau_{name}": math.exp(-net.log_scale[name].item()) for name in net.losses}
    record |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
    return record | {"images_per_second": speed}


def start_run(args):
    """All that stands before the first step, as a namespace; nothing is written before all of it has succeeded."""
    data.expand_shards(args.data)
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    device = gcl.pick_device(args.device)
    torch.manual_seed(args.seed)
    clip, tokenizer = gcl.load_clip(args.model, args.pretrained, device)
    if tokenizer.vocab_size > clip.vocab_size:
        raise gcl.CheckpointError(f"--model {args.model}: its vocabulary is smaller than CLIP's tokenizer needs")
    net = gcl.GCL(clip, args.recipe, args.losses, args.area_prior).train()
    optimizer = build_optimizer(net, args)
    dtype, scaler = precision_of(args, device)
    start = restore(net, optimizer, scaler, args)
    loader = build_loader(args, net, tokenizer, start, rank, ranks, device)
    net.set_trainable(start)
    if rank == 0:
        begin_logs(args, start, {"ranks": ranks, "torch": torch.__version__, "pairs": len(loader.dataset)})
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        what = f"{len(loader.dataset):,} pairs, {trained:,} trained parameters, {ranks} rank(s) on {device}"
        print(f"{what}, {dtype or torch.float32}, steps {start} to {args.steps}", flush=True)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    parts = {"net": net, "loader": loader, "optimizer": optimizer, "scaler": scaler, "dtype": dtype, "start": start}
    return SimpleNamespace(**parts, device=device, rank=rank, ranks=ranks)


def begin_logs(args, start, facts):
    """config.json, and log.jsonl cut back to the step that the run goes on from."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    old = (out / "log.jsonl").read_text().splitlines() if start and (out / "log.jsonl").is_file() else []
    kept = [line for line in old if line.endswith("}") and json.loads(line)["step"] <= start]
    config = json.dumps(vars(args) | facts, indent=1)
    for name, lines in (("config.json", [config]), ("log.jsonl", kept)):
        (out / (name + ".tmp")).write_text("".join(line + "\n" for line in lines))
        os.replace(out / (name + ".tmp"), out / name)


def main(args):
    """The training loop for a parsed command line."""
    run = start_run(args)
    net, optimizer = run.net, run.optimizer
    model = wrap(net, run.device, run.ranks)
    replaced, failed, clock, logged = 0, 0, time.perf_counter(), run.start
    with tqdm(total=args.steps, initial=run.start, desc="training", disable=run.rank > 0) as bar:
        for step, (*batch, bad) in enumerate(run.loader, run.start):
            if net.set_trainable(step):
                model = wrap(net, run.device, run.ranks)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args) * group["lr_mult"]
            batch = [x.to(run.device, non_blocking=True) for x in batch]
            losses, norm = train_step(model, batch, optimizer, run.scaler, run.dtype, args)
            replaced += int(bad.sum())
            failed = 0 if norm.isfinite() else failed + 1
            if failed == 20:
                raise data.DataError(
                    f"step {step}: 20 non-finite gradients in a row; lower --lr or use --precision fp32"
                )
            bar.update()
            done = step + 1
            if done % args.log_every == 0 or done == args.steps:
                losses = over_ranks(losses, run.ranks)
                speed = (done - logged) * args.batch_size / (time.perf_counter() - clock)
                if run.rank == 0:
                    record = log_record(done, losses, norm.item(), net, optimizer, args, speed)
                    report(record | {"replaced": replaced}, args.out, bar)
                clock, logged = time.perf_counter(), done
            if run.rank == 0 and (done % args.save_every == 0 or done == args.steps):
                state = {"optimizer": optimizer.state_dict(), "scaler": run.scaler.state_dict(), "args": vars(args)}
                net.save(Path(args.out, "last.pt"), step=done, **state)
    if run.rank == 0:
        print(f"{Path(args.out, 'last.pt')}: trained to step {max(run.start, args.steps)}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    arguments = parse_args()
    try:
        main(arguments)
    except (data.DataError, gcl.CheckpointError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # what all ranks of a node find is said once
            # A loader process sends its whole traceback as the message; the last line is what happened.
            print(
                f"error: {(str(error) or repr(error)).splitlines()[-1].removeprefix('data.DataError: ')}",
                file=sys.stderr,
            )
        sys.exit(1)
