# SPDX-License-Identifier: MIT
"""A toy world: the whole path of the paper, from pairs to mIoU and pictures, on two CPU cores.

    python toy.py                            # MaskCLIP against GCL, some four minutes, in runs/toy
    python toy.py --ablate                   # the rows of the paper's Table 2 as well
    python toy.py --ablate CL GCL_v          # or some of them
    python toy.py --out runs/toy1 --seed 1   # another world, another CLIP, another adapter

1. Draws 16,000 pictures of 12 objects on 6 kinds of stuff with captions that name only some of what
   is seen, and writes them as tar shards; and two held-out sets with labels: "stuff" (every pixel
   has one of the 18 classes) and "background" (the 12 objects; the rest is background).
2. Pretrains a tiny CLIP on those pairs, whole image against whole caption. Nothing ever says where
   anything is.
3. Runs train.py and evaluate.py, the programs that real data uses, through their command lines.
4. Prints a table; writes toy.json and toy.png (image, label, MaskCLIP, GCL).
"""

import argparse
import functools
import io
import itertools
import json
import math
import os
import socket
import subprocess
import sys
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.distributed as dist
from PIL import Image, ImageColor, ImageDraw, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.functional import normalize
from tqdm import tqdm

import data
import files
import report

HERE = Path(__file__).resolve().parent
CORES = min(os.cpu_count() or 1, 2)  # two things at a time, each in one thread: they are small

SIZE = 48  # pixels, both sides of every picture
SHARDS, PER_SHARD, HELD_OUT = 16, 1000, 400
RADIUS = 9, 14  # pixels, of an object
VISIBLE = 30, 100  # pixels of an object, of stuff: a caption names nothing that is all but hidden

# A line is one object: its layers from the bottom up, each a shape of PIL's ImageDraw, a colour and
# corners x y x y ... in per cent of the radius. Objects share colours (apple and ladybug; bee,
# cheese and star; zebra and chessboard; box and cookie), so colour alone does not tell them apart.
OBJECTS = """
apple ellipse crimson -92 -55 32 95, ellipse crimson -32 -55 92 95, rectangle peru -6 -98 10 -40,
 ellipse forestgreen 6 -90 78 -54
ladybug ellipse black -42 -100 42 -44, ellipse crimson -85 -73 85 97, ellipse black -59 -39 -21 -1,
 ellipse black 21 -39 59 -1, ellipse black -64 16 -26 54, ellipse black 26 16 64 54,
 rectangle black -9 -73 9 97
zebra ellipse white -57 -28 87 44, polygon white -99 -66 -59 -70 -28 20 -68 20,
 ellipse white -99 -86 -52 -50, rectangle white 61 10 77 95, rectangle white 37 10 53 95,
 rectangle white -23 10 -7 95, rectangle white -47 10 -31 95,
 polygon black -90 -48 -66 -58 -60 -46 -84 -36, polygon black -78 -22 -52 -32 -47 -18 -72 -8,
 polygon black -38 -12 -22 -18 -34 36 -48 26, polygon black 2 -27 20 -27 6 43 -12 42,
 polygon black 44 -22 60 -16 46 40 30 42, rectangle black 61 56 77 74, rectangle black 37 56 53 74,
 rectangle black -23 56 -7 74, rectangle black -47 56 -31 74
star polygon gold 0 -100 26 -36 95 -31 43 14 59 81 0 45 -59 81 -43 14 -95 -31 -26 -36
donut ellipse peru -97 -97 97 97, ellipse hotpink -84 -84 84 84, rectangle turquoise -70 -12 -58 8,
 rectangle turquoise -50 -58 -34 -46, rectangle turquoise 0 -72 12 -54,
 rectangle turquoise 42 -56 58 -44, rectangle turquoise 60 2 72 20, rectangle turquoise 40 46 56 58,
 rectangle turquoise -8 58 4 74, rectangle turquoise -54 42 -40 54, ellipse peru -38 -38 38 38,
 ellipse #0000 -30 -30 30 30
box rectangle peru -85 -30 65 85, polygon tan -85 -30 65 -30 92 -75 -58 -75,
 rectangle wheat -25 -30 5 85, polygon wheat -25 -30 5 -30 32 -75 2 -75
bee ellipse lavender -55 -90 5 0, ellipse lavender 5 -90 65 0, ellipse gold -90 -25 90 75,
 rectangle black -65 -12 -34 62, rectangle black 1 -22 32 72, rectangle black 66 0 80 50
cheese polygon gold 95 60 95 -72 -100 45 -100 60, ellipse darkgoldenrod 42 -28 78 8,
 ellipse darkgoldenrod -8 12 28 48, ellipse darkgoldenrod -58 22 -22 58,
 ellipse darkgoldenrod 50 20 86 56
flower ellipse mediumorchid 34 -28 98 28, ellipse mediumorchid 3 26 59 86,
 ellipse mediumorchid -59 26 -3 86, ellipse mediumorchid -98 -28 -34 28,
 ellipse mediumorchid -59 -86 -3 -26, ellipse mediumorchid 3 -86 59 -26,
 ellipse mediumorchid -42 -42 42 42, ellipse darkorange -30 -30 30 30
cookie ellipse peru -92 -92 92 92, ellipse black -57 -57 -23 -23, ellipse black 13 -67 47 -33,
 ellipse black -12 -12 22 22, ellipse black -67 8 -33 42, ellipse black 38 -2 72 32,
 ellipse black -7 43 27 77
chessboard rectangle white -84 -84 84 84, rectangle black -84 -84 -42 -42,
 rectangle black 0 -84 42 -42, rectangle black -42 -42 0 0, rectangle black 42 -42 84 0,
 rectangle black -84 0 -42 42, rectangle black 0 0 42 42, rectangle black -42 42 0 84,
 rectangle black 42 42 84 84
kite polygon royalblue 0 -100 70 -25 0 50 -70 -25, polygon darkorange 0 -25 70 -25 0 50,
 polygon darkorange 0 -25 -70 -25 0 -100,
 polygon royalblue -9 42 9 42 22 60 2 80 15 100 -5 100 -18 80 2 60
"""
OBJECTS = dict(line.split(" ", 1) for line in OBJECTS.replace(",\n", ",").split("\n")[1:-1])
STUFF = dict(
    words.split()
    for words in """grass #509637
sand #dcc38c
water #2869af
sky #73b4f0
bricks #a54b3c
wood #a06e41""".splitlines()
)
CLASSES = [*OBJECTS, *STUFF]
SETS = "stuff", "background"  # held out: every pixel has a class; objects alone
TEMPLATES = """{}
a photo of {}.
a picture of {}.
an image of {}.
a drawing of {}.
a small photo of {}.
there is {}.
here is {}.
a scene with {}.
this shows {}.
look at {}!
my photo of {}.""".splitlines()
# Of label maps: the background first, then one colour a class.
PALETTE = """#2d2d32 #d62728 #ff9896 #646464 #ff7f0e #e34fbe #8c564b #ffdd33 #bca014 #944ddc #502814
#f5f5f5 #143cc8 #46a046 #e1cd9b #2882be #96d2fa #c86e5f #af824b""".split()


@functools.cache
def drawing(name):
    """An object as an RGBA picture [100, 100], transparent outside, its outlines smooth."""
    picture = Image.new("RGBA", (200, 200))
    pen = ImageDraw.Draw(picture)
    for layer in OBJECTS[name].split(","):
        shape, colour, *corners = layer.split()
        getattr(pen, shape)([100 + int(corner) for corner in corners], colour)
    return picture.reduce(2)


def paint(image, label, name, rng):
    """Paints one object of random place, size, tilt and light into image and label, in place."""
    radius, cell = round(rng.uniform(*RADIUS)), drawing(name)
    cell = ImageOps.mirror(cell) if rng.random() < 0.5 else cell
    cell = cell.rotate(rng.uniform(-23, 23), Image.Resampling.BILINEAR)
    layer = Image.new("RGBA", (SIZE, SIZE))
    x, y = rng.integers(7, SIZE - 7, 2) - radius
    layer.paste(cell.resize((2 * radius, 2 * radius)), (x, y))
    rgba = np.asarray(layer, np.float32)  # [48, 48, 4]
    alpha = rgba[..., 3:] / 255
    image += alpha * (rng.uniform(0.85, 1.12, 3) * rgba[..., :3] - image)
    label[alpha[..., 0] >= 0.5] = CLASSES.index(name)


def textures(rng):
    """What is light and dark in each kind of stuff, [48, 48], added to its colour."""
    y, x = np.mgrid[:SIZE, :SIZE] + rng.integers(SIZE, size=(2, 1, 1))
    mortar = (y % 7 == 0) | ((x + y // 7 * 6) % 12 == 0)  # each second row of bricks is shifted
    grain = 13 * np.sin(1.7 * y + 2.5 * np.sin(0.12 * x + y // 12))
    clouds = Image.fromarray(rng.integers(256, size=(6, 6), dtype=np.uint8))
    clouds = np.asarray(clouds.resize((SIZE, SIZE)), np.float32)
    return {
        "grass": rng.normal(0, 27, (SIZE // 4, SIZE)).repeat(4, 0),
        "sand": rng.normal(0, 15, x.shape),
        "water": 28 * np.sin(1.1 * y + 1.6 * np.sin(0.3 * x)),
        "sky": np.clip(clouds - 130, 0, 60),
        "bricks": np.where(mortar, 90, rng.normal(0, 9, x.shape)),
        "wood": np.where(y % 12 == 0, -60, grain),
    }


def scene(rng):
    """One picture -> image uint8 [48, 48, 3], label uint8 [48, 48], the class of every pixel."""
    y, x = np.mgrid[:SIZE, :SIZE]
    label, image = np.empty((SIZE, SIZE), np.uint8), np.empty((SIZE, SIZE, 3), np.float32)
    # Two kinds of stuff with a wavy border between them, or in 4 of 10 pictures the first alone.
    (right, down), (cx, cy) = rng.normal(size=2), rng.uniform(16, SIZE - 16, 2)
    half = right * (x - cx) + down * (y - cy) + 2 * np.sin(0.3 * (x - y)) > 0
    half &= rng.random() < 0.6
    shades = textures(rng)
    for name, part in zip(rng.choice(list(STUFF), 2, replace=False), (~half, half), strict=True):
        image[part] = ImageColor.getrgb(STUFF[name]) + shades[name][part][:, None]
        label[part] = CLASSES.index(name)
    for name in rng.choice(list(OBJECTS), rng.choice(4, p=(0.1, 0.3, 0.35, 0.25)), replace=False):
        paint(image, label, name, rng)
    image = rng.uniform(0.88, 1.1) * image + rng.normal(0, 4, image.shape)
    return image.clip(0, 255).astype(np.uint8), label


def caption(label, rng):
    """A sentence that names each visible object of a label with p = 0.75, stuff with 0.45."""
    area = np.bincount(label.ravel(), minlength=len(CLASSES))
    seen = [n for n, a in zip(CLASSES, area, strict=True) if a >= VISIBLE[n in STUFF]]
    named = [n for n in seen if rng.random() < (0.75, 0.45)[n in STUFF]] or [rng.choice(seen)]
    rng.shuffle(named)
    phrases = [n if n in STUFF else f"{'an' if n == 'apple' else 'a'} {n}" for n in named]
    return rng.choice(TEMPLATES).format(rng.choice((", ", " and ", " with ")).join(phrases))


def draw_shard(job):
    """(path, seed, first index) -> {path: 1,000 pairs as img2dataset writes them}, always the same
    bytes."""
    path, seed, first = job
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar:
        for i in range(first, first + PER_SHARD):
            rng = np.random.default_rng((seed, 0, i))  # by index: whoever draws it
            image, label = scene(rng)
            picture = files.png_bytes(Image.fromarray(image))
            contents = {"png": picture, "txt": caption(label, rng).encode()}
            for suffix, content in contents.items():
                member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return {path: shard.getvalue()}


def draw_set(job):
    """(folder, seed, number of the set) -> {path: content} of 400 pictures, their labels and a
    SPEC.json."""
    (folder, seed, number), found = job, {}
    background = folder.name == "background"
    classes = ["background", *OBJECTS] if background else CLASSES
    palette = [ImageColor.getrgb(colour) for colour in PALETTE[not background :][: len(classes)]]
    for i in range(HELD_OUT):
        image, label = scene(np.random.default_rng((seed, number, i)))
        if background:
            label = np.where(label < len(OBJECTS), label + 1, 0).astype(np.uint8)
        label = Image.fromarray(label)
        label.putpalette(np.ravel(palette).tolist())
        found[folder / f"images/{i:03d}.png"] = files.png_bytes(Image.fromarray(image))
        found[folder / f"labels/{i:03d}.png"] = files.png_bytes(label)
    spec = dict(
        name=folder.name,
        images="images",
        labels="labels",
        image_suffix=".png",
        classes=classes,
        background=background,
        palette=palette,
    )
    return found | {folder / "SPEC.json": json.dumps(spec).encode()}


def shards_of(out):
    """The training shards."""
    return [out / f"data/train-{n:03d}.tar" for n in range(SHARDS)]


def draw_world(out, seed):
    """Writes the shards and both held-out sets below OUT/data."""
    sets = [(out / "data" / name, seed, k) for k, name in enumerate(SETS, 1)]
    shards = [(path, seed, n * PER_SHARD) for n, path in enumerate(shards_of(out))]
    for function, jobs in (draw_set, sets), (draw_shard, shards):
        for drawn in files.in_parallel(function, jobs, CORES, "drawing"):
            write(drawn)


def write(drawn):
    """{path: content} to the disk; a pool's process, which may be killed, writes nothing."""
    for path, content in drawn.items():
        files.write_bytes(path, content)


CONFIG = """{"embed_dim": 128, "quick_gelu": true,
"vision_cfg": {"image_size": 48, "layers": 2, "width": 128, "head_width": 32, "patch_size": 8},
"text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 1}}
"""  # open_clip's own model-config format
STEPS, BATCH, LR = 300, 128, 2e-3
# 1 / temperature; softer than open_clip's 14, so that masks have to learn their area.
START_SCALE = 5


def normalised(images):
    """uint8 [B, 48, 48, 3] -> float [B, 3, 48, 48] with CLIP's mean and standard deviation."""
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()  # [B, 3, 48, 48]
    return normalize(images / 255, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def pretrain(out, seed):
    """One rank of the training of CLIP on the shards, whole image against whole caption."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 3))
    pairs = data.PairDataset(list(map(str, shards_of(out))), None, None, (1, 1))
    clip = open_clip.CLIP(**json.loads(CONFIG), init_logit_scale=math.log(START_SCALE))
    clip.token_embedding.requires_grad_(False)  # of 49,408 tokens captions have about 40
    model = DistributedDataParallel(clip)
    tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)
    loss_of = open_clip.ClipLoss(gather_with_grad=True, rank=rank, world_size=ranks)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LR, STEPS, pct_start=0.1, cycle_momentum=False
    )
    for _ in tqdm(range(STEPS), "pretraining CLIP", mininterval=1, disable=rank > 0):
        picks = rng.choice(len(pairs), BATCH, replace=False)[rank::ranks]
        images, texts = zip(*map(pairs.read, picks), strict=True)
        # The fused attention kernel is slow backwards on CPUs: with 37 tokens the plain one takes
        # half the time.
        with sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(*model(normalised(np.stack(images)), tokenizer(texts)))
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        rate.step()
    if rank == 0:
        files.write_text(out / "clip/toy-clip.json", CONFIG)
        files.write_whole(
            out / "clip/toy-clip.pt", lambda file: torch.save(clip.state_dict(), file)
        )
    dist.destroy_process_group()


# The rows of the table, as train.py's flags. MaskCLIP is not trained; the others are Table 2, where
# the paper does not say whether its row CL has the priors.
ROWS = {"MaskCLIP": "", "GCL": "--losses gcl_v gcl_f"}
ABLATION = {
    "CL": "--losses cl --lambda-area 0 --lambda-tv 0",
    "CL with priors": "--losses cl",
    "GCL_v": "--losses gcl_v",
    "GCL_f": "--losses gcl_f",
    "CL+GCL": "--losses cl gcl_v gcl_f",
    "without tv": "--lambda-tv 0",
    "without area": "--lambda-area 0",
    "without both": "--lambda-area 0 --lambda-tv 0",
}
TRAIN = """--image-size 48 --batch-size 64 --lr 6e-3 --scalar-lr-mult 10 --steps 120
 --warmup-steps 12 --log-every 4 --device cpu --precision fp32 --workers 0"""
EVALUATE = """--no-pamr --short-side 48 --window 48 --stride 24 --sweep-threshold --save-predictions
 --device cpu --workers 0"""
RUNNING = []  # the programs that were started


def folder_of(out, row):
    """Where a row of the table lives."""
    return out / row.lower().replace("+", "-").replace(" ", "-")


def clip_of(out):
    """The arguments that name the toy CLIP."""
    return "--model", out / "clip/toy-clip.json", "--pretrained", out / "clip/toy-clip.pt"


def call(script, *arguments, ranks=1):
    """Runs a program beside this one; InputError where it fails, its message is on the screen."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    print(" ".join(["$ python", script, *command[2:]]), flush=True)  # one write: two are at work
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    env = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    programs = [
        # In a session of its own: what stops this program reaches it once, through main().
        subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    RUNNING.extend(programs)
    if code := max(abs(program.wait()) for program in programs):
        raise files.InputError(f"{script} ended with code {code}, see above")


def train_row(row, out, seed, resume="never"):
    """Trains the adapter of one row -> OUT/ROW/last.pt."""
    flags = *TRAIN.split(), *(ROWS | ABLATION)[row].split(), "--seed", seed, "--resume", resume
    paths = "--data", *shards_of(out), *clip_of(out), "--out", folder_of(out, row)
    call("train.py", *paths, *flags, ranks=CORES)


def evaluate_row(row, out):
    """Evaluates one row -> OUT/ROW/eval."""
    model = "--checkpoint", folder_of(out, row) / "last.pt"
    if row == "MaskCLIP":
        model = "--method", "maskclip", *clip_of(out)
    sets = (out / "data" / name / "SPEC.json" for name in SETS)
    flags = *EVALUATE.split(), "--out", folder_of(out, row) / "eval"
    call("evaluate.py", "--datasets", *sets, *model, *flags)


def miou_of(row, out):
    """mIoU {"stuff", "background": at the threshold 0.5, "background_best": of the sweep}."""
    sets = json.loads((folder_of(out, row) / "eval/results.json").read_text())["datasets"]
    best = max(sets["background"]["sweep"].values())
    return {name: sets[name]["miou"] for name in SETS} | {"background_best": best}


def once(what, mark, key, work):
    """Runs work() unless the file mark says that it has ended for this key: same seed, same code.

    work gets train.py's --resume: it goes on where it was stopped, if that was for this key too.
    """
    state = files.read_text(mark) if mark.is_file() else ""
    if state != f"{key} done":
        files.write_text(mark, f"{key} begun")
        work("auto" if state == f"{key} begun" else "never")
        files.write_text(mark, f"{key} done")
    print(f"done: {what}", flush=True)


def run_row(row, out, seed, key):
    """Trains and evaluates one row -> its mIoU."""
    folder = folder_of(out, row)
    if row != "MaskCLIP":
        once(f"trained {row}", folder / "trained", key, lambda r: train_row(row, out, seed, r))
    once(f"evaluated {row}", folder / "evaluated", key, lambda _: evaluate_row(row, out))
    draw_sheet(out)
    return miou_of(row, out)


def examples(folder, count):
    """Names of the first labels with four classes or more, none all but hidden; not hand-picked."""
    names = []
    for path in sorted(folder.glob("*.png")):
        area = np.unique(Image.open(path), return_counts=True)[1]
        if len(area) > 3 and min(area) >= 3 * VISIBLE[0]:
            names.append(path.name)
    return names[:count]


def draw_sheet(out):
    """OUT/toy.png: image, label and what is known of MaskCLIP and GCL, for both held-out sets."""
    columns, titles, blank = [], [], Image.new("RGB", (SIZE, SIZE), "white")
    for name, title in itertools.product(SETS, ("image", "label", *ROWS)):
        data_folder = out / "data" / name
        folder = data_folder / f"{title}s"
        if title in ROWS:
            folder = folder_of(out, title) / "eval/predictions" / name
        paths = [folder / file for file in examples(data_folder / "labels", 5)]
        cells = [Image.open(p).convert("RGB") if p.is_file() else blank for p in paths]
        columns.append([report.fit(cell, 3 * SIZE) for cell in cells])
        titles.append(f"{name}: image" if title == "image" else title)
    legend = list(zip(("background", *CLASSES), PALETTE, strict=True))
    sheet = report.sheet(list(zip(*columns, strict=True)), titles, legend)
    files.save_png(out / "toy.png", sheet)


def run(out, seed, rows):
    """All four parts in order; what an earlier call has finished is kept."""
    key = [seed, *(zlib.crc32(path.read_bytes()) for path in sorted(HERE.glob("*.py")))]
    once("drew the world", out / "data/done", key, lambda _: draw_world(out, seed))
    draw_sheet(out)
    print(f"first pictures: {out / 'toy.png'}")
    flags = "--pretrain", "--out", out, "--seed", seed
    once("pretrained CLIP", out / "clip/done", key, lambda _: call("toy.py", *flags, ranks=CORES))
    found = ThreadPoolExecutor(CORES).map(lambda row: run_row(row, out, seed, key), rows)
    miou = dict(zip(rows, found, strict=True))
    print(f"\n{'mIoU':18}{'stuff':>8}{'background':>12}{'at its best threshold':>24}")
    for row, m in miou.items():
        print(f"{row:18}{m['stuff']:8.1f}{m['background']:12.1f}{m['background_best']:24.1f}")
    files.write_text(out / "toy.json", json.dumps({"miou": miou, "seed": seed}, indent=1))
    print(f"\n{out / 'toy.json'}, {out / 'toy.png'}")


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default="runs/toy", help="folder for all that is written")
    add("--seed", type=files.count_or_zero, default=0, help="of world, CLIP and training")
    add("--ablate", nargs="*", choices=ABLATION, help="rows of Table 2 as well; no name: all eight")
    for hidden in "--explain", "--pretrain":
        add(hidden, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.explain:
        parser.error(f"--explain is a program of its own now: python explain.py --out {args.out}")
    return args


def main(args):
    """args: out, seed, ablate; or one rank of the pretraining."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that are called
    if args.pretrain:
        return pretrain(args.out, args.seed)
    try:
        more = ABLATION if args.ablate == [] else dict.fromkeys(args.ablate or ())
        run(args.out, args.seed, [*ROWS, *more])
    finally:  # interrupted, or one of two has failed
        for program in RUNNING:
            program.terminate()


if __name__ == "__main__":
    sys.exit(files.command(main, parse_args()))
