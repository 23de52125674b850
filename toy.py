# SPDX-License-Identifier: MIT
"""A toy world: the whole path of the paper, from image-text pairs to mIoU and pictures, on two CPU cores.

    python toy.py                            # MaskCLIP against GCL, about three minutes, results in runs/toy
    python toy.py --ablate                   # the rows of the paper's Table 2 as well
    python toy.py --out runs/toy1 --seed 1   # another world, another CLIP, another adapter
    python toy.py --explain                  # one training step as a picture story, OUT/explain.png; needs no network

1. Draws 16,000 pictures of 12 objects on 6 kinds of stuff with captions that name only some of what is seen, and
   writes them as tar shards; and two held-out sets with labels: "stuff" (every pixel has one of the 18 classes) and
   "background" (the 12 objects; the rest is background).
2. Pretrains a tiny CLIP on those pairs, whole image against whole caption. Nothing ever says where anything is.
3. Runs train.py and evaluate.py, the programs that real data uses, through their command lines.
4. Prints a table; writes toy.json and toy.png (image, label, MaskCLIP, GCL).
"""

import argparse
import io
import json
import math
import multiprocessing
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


SIZE = 48  # pixels, both sides of every picture


SHARDS, PER_SHARD, HELD_OUT = 16, 1000, 400


RADIUS = 9, 14  # pixels, of an object


VISIBLE = 30, 100  # pixels of an object, of stuff: a caption names nothing that is all but hidden


RED, YELLOW, BLACK, WHITE = (205, 35, 40), (245, 205, 45), (25, 25, 25), (240, 240, 240)


BROWN, TAN, CREAM, GREEN, PINK = (
    (175, 120, 65),
    (205, 155, 95),
    (230, 205, 160),
    (60, 140, 50),
    (240, 120, 175),
)


PURPLE, ORANGE, BLUE, CYAN, PALE = (
    (165, 70, 205),
    (250, 125, 30),
    (35, 80, 215),
    (70, 200, 220),
    (205, 220, 235),
)


def oval(u, v, x, y, rx, ry=None):
    """Mask of the ellipse around (x, y); a circle without ry."""
    return ((u - x) / rx) ** 2 + ((v - y) / (ry or rx)) ** 2 < 1


def discs(u, v, radius, *centres):
    """Mask of several circles of one radius."""
    return np.any([oval(u, v, x, y, radius) for x, y in centres], axis=0)


def zebra(u, v):
    """Legs, neck, body and head as one outline, under slanted stripes."""
    legs = (abs(abs(abs(u - 0.15) - 0.42) - 0.12) < 0.08) & (v > 0.1) & (v < 0.95)
    neck = (abs(u + 0.55 - 0.35 * v) < 0.2) & (v > -0.7) & (v < 0.2)
    body = oval(u, v, 0.15, 0.08, 0.72, 0.36) | neck | oval(u, v, -0.78, -0.68, 0.26, 0.18) | legs
    return [(body, WHITE), (body & (np.sin(15 * u + 5 * v) > 0), BLACK)]


def star(u, v):
    """Five tips."""
    # The angle to the nearest of the five tips: each edge is then one straight line.
    angle = abs((np.arctan2(u, -v) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    return [(np.hypot(u, v) * (np.cos(angle) + 2.4 * np.sin(angle)) < 1, YELLOW)]


def donut(u, v):
    """A ring, so what lies behind shows through the middle."""
    r, sprinkles = np.hypot(u, v), np.sin(11 * u + 3 * v) * np.sin(11 * v - 3 * u) > 0.6
    icing = (r > 0.38) & (r < 0.82 + 0.06 * np.sin(7 * np.arctan2(v, u)))
    return [((r > 0.3) & (r < 0.97), BROWN), (icing, PINK), (icing & sprinkles, CYAN)]


def box(u, v):
    """A front, a leaning lid, and tape across both."""
    front, lid = (abs(u + 0.1) < 0.75) & (v > -0.3) & (v < 0.85), (v > -0.75) & (v <= -0.3)
    lean = u + 0.1 + 0.6 * np.minimum(v + 0.3, 0)
    lid = lid & (abs(lean) < 0.75)
    return [(front, BROWN), (lid, TAN), ((front | lid) & (abs(lean) < 0.15), CREAM)]


# Apple and ladybug share their red; bee, cheese and star their yellow; zebra and chessboard black and white; box and
# cookie their brown: colour alone does not tell them apart. Laid out by hand, as are the tables below.
# fmt: off
OBJECTS = {
    "apple": lambda u, v: [
        (oval(u, v, -0.3, 0.2, 0.62, 0.75) | oval(u, v, 0.3, 0.2, 0.62, 0.75), RED),
        ((abs(u - 0.1 * v) < 0.09) & (abs(v + 0.7) < 0.3), BROWN), (oval(u, v, 0.42, -0.72, 0.36, 0.18), GREEN)],
    "ladybug": lambda u, v: [
        (oval(u, v, 0, -0.72, 0.42, 0.28), BLACK), (oval(u, v, 0, 0.12, 0.85), RED),
        (discs(u, v, 0.19, (-0.4, -0.2), (0.4, -0.2), (-0.45, 0.35), (0.45, 0.35)), BLACK),
        ((abs(u) < 0.09) & (abs(v - 0.12) < 0.85), BLACK)],
    "zebra": zebra, "star": star, "donut": donut, "box": box,
    "bee": lambda u, v: [
        (oval(u, v, -0.25, -0.45, 0.3, 0.45) | oval(u, v, 0.35, -0.45, 0.3, 0.45), PALE),
        (oval(u, v, 0, 0.25, 0.9, 0.5), YELLOW), (oval(u, v, 0, 0.25, 0.9, 0.5) & (np.sin(9.5 * u) > 0.1), BLACK)],
    "cheese": lambda u, v: [
        ((v < 0.6) & (u < 0.95) & (v > -0.6 * u - 0.15), YELLOW),
        (discs(u, v, 0.18, (0.6, -0.1), (0.1, 0.3), (-0.4, 0.4), (0.68, 0.38)), (190, 140, 20))],
    "flower": lambda u, v: [
        (np.hypot(u, v) < 0.66 + 0.32 * np.cos(6 * np.arctan2(v, u)), PURPLE), (oval(u, v, 0, 0, 0.3), ORANGE)],
    "cookie": lambda u, v: [
        (oval(u, v, 0, 0, 0.92), BROWN),
        (discs(u, v, 0.17, (-0.4, -0.4), (0.3, -0.5), (0.05, 0.05), (-0.5, 0.25), (0.55, 0.15), (0.1, 0.6)), BLACK)],
    "chessboard": lambda u, v: [
        (np.maximum(abs(u), abs(v)) < 0.84, WHITE),
        ((np.maximum(abs(u), abs(v)) < 0.84) & ((u // 0.42 + v // 0.42) % 2 == 0), BLACK)],
    "kite": lambda u, v: [
        (abs(u) / 0.7 + abs(v + 0.25) / 0.75 < 1, BLUE),
        ((abs(u) / 0.7 + abs(v + 0.25) / 0.75 < 1) & (u * (v + 0.25) > 0), ORANGE),
        ((abs(u - 0.15 * np.sin(9 * v)) < 0.09) & (v >= 0.4) & (v < 1), BLUE)],
}


# fmt: on
def tint(colour, shade):
    """Colour [3] with a brightness offset [48, 48] -> [48, 48, 3]."""
    return np.asarray(colour, np.float32) + shade[..., None]


def sky(x, y, rng):
    """Blue with soft white clouds."""
    small = Image.fromarray(rng.uniform(0, 255, (6, 6)).astype(np.uint8))
    clouds = np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32)
    return tint((115, 180, 240), 0.4 * y) + np.clip((clouds - 130) / 60, 0, 1)[
        ..., None
    ] * np.float32((110, 60, 10))


def bricks(x, y, rng):
    """Rows of bricks, each second row shifted."""
    row = (y + rng.integers(8)) // 7
    column = (x + 6 * (row % 2) + rng.integers(12)) // 12
    edge = (np.diff(row, axis=0, prepend=-1) != 0) | (np.diff(column, axis=1, prepend=-1) != 0)
    shade = rng.normal(0, 12, (12, 12))[row, column] + rng.normal(0, 5, x.shape)
    return np.where(edge[..., None], np.float32((205, 195, 185)), tint((165, 75, 60), shade))


def wood(x, y, rng):
    """Planks with a wavy grain."""
    plank = (y + rng.integers(12)) // 12
    grain = 13 * np.sin(1.7 * y + 2.5 * np.sin(0.12 * x + 2 * plank + rng.uniform(0, 6)))
    seam = np.diff(plank, axis=0, prepend=-1) != 0
    return tint((160, 110, 65), np.where(seam, -60, grain + rng.normal(0, 12, 8)[plank]))


# fmt: off
STUFF = {
    "grass": lambda x, y, rng: tint((80, 150, 55), rng.normal(0, 27, (SIZE // 4, SIZE)).repeat(4, 0)),
    "sand": lambda x, y, rng: tint((220, 195, 140), rng.normal(0, 15, x.shape)),
    "water": lambda x, y, rng: tint(
        (40, 105, 175), 28 * np.sin(1.1 * y + 1.6 * np.sin(0.3 * x + rng.uniform(0, 6)) + rng.uniform(0, 6))),
    "sky": sky, "bricks": bricks, "wood": wood,
}


CLASSES = [*OBJECTS, *STUFF]


PALETTE = [(214, 39, 40), (255, 152, 150), (100, 100, 100), (255, 127, 14), (227, 79, 190), (140, 86, 75),
           (255, 221, 51), (188, 160, 20), (148, 77, 220), (80, 40, 20), (245, 245, 245), (20, 60, 200),
           (70, 160, 70), (225, 205, 155), (40, 130, 190), (150, 210, 250), (200, 110, 95), (175, 130, 75)]


BACKGROUND = (45, 45, 50)


TEMPLATES = ["{}", "a photo of {}.", "a picture of {}.", "an image of {}.", "a drawing of {}.", "a small photo of {}.",
             "there is {}.", "here is {}.", "a scene with {}.", "this shows {}.", "look at {}!", "my photo of {}."]


# fmt: on
def paint(image, label, name, rng):
    """Paint one object of random place, size, tilt and shade into image [48, 48, 3] and label [48, 48], in place."""
    radius, tilt, mirror = rng.uniform(*RADIUS), rng.uniform(-0.4, 0.4), rng.choice((-1, 1))
    cx, cy = rng.uniform(7, SIZE - 7, 2)
    left, top = max(int(cx - 1.5 * radius), 0), max(int(cy - 1.5 * radius), 0)
    right, bottom = min(int(cx + 1.5 * radius) + 1, SIZE), min(int(cy + 1.5 * radius) + 1, SIZE)
    # Two samples per pixel and side, averaged below: outlines are as smooth as in a photograph.
    x = (np.arange(2 * left, 2 * right, dtype=np.float32) / 2 + 0.25 - cx)[None] / radius
    y = (np.arange(2 * top, 2 * bottom, dtype=np.float32) / 2 + 0.25 - cy)[:, None] / radius
    u, v = (
        mirror * (x * math.cos(tilt) + y * math.sin(tilt)),
        y * math.cos(tilt) - x * math.sin(tilt),
    )
    rgba = np.zeros((*u.shape, 4), np.float32)
    for mask, colour in OBJECTS[name](u, v):
        rgba[mask] = (*colour, 1)
    rgba[..., :3] *= rng.uniform(0.85, 1.12) * rng.uniform(0.95, 1.05, 3)
    rgba = rgba.reshape(bottom - top, 2, right - left, 2, 4).mean((1, 3))  # [h, w, 4]
    alpha = rgba[..., 3:]
    image[top:bottom, left:right] = image[top:bottom, left:right] * (1 - alpha) + rgba[..., :3]
    label[top:bottom, left:right][alpha[..., 0] >= 0.5] = CLASSES.index(name)


def scene(rng):
    """One picture -> image uint8 [48, 48, 3], label uint8 [48, 48] with the class of every pixel."""
    y, x = np.mgrid[:SIZE, :SIZE]
    first, second = rng.choice(list(STUFF), 2, replace=False)
    image = STUFF[first](x, y, rng)
    label = np.full((SIZE, SIZE), CLASSES.index(first), np.uint8)
    if rng.random() < 0.6:
        angle, wave = rng.uniform(0, 2 * math.pi), 2 * np.sin(0.3 * (x - y) + rng.uniform(0, 6))
        cx, cy = rng.uniform(16, SIZE - 16, 2)
        half = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle) + wave > 0
        image[half] = STUFF[second](x, y, rng)[half]
        label[half] = CLASSES.index(second)
    image *= rng.uniform(0.88, 1.1)
    for name in rng.choice(list(OBJECTS), rng.choice(4, p=(0.1, 0.3, 0.35, 0.25)), replace=False):
        paint(image, label, name, rng)
    image += rng.normal(0, 4, image.shape)
    return image.clip(0, 255).astype(np.uint8), label


def caption(label, rng):
    """A sentence about the label map [48, 48]; each visible object is named with p = 0.75, each stuff with 0.45."""
    area = np.bincount(label.ravel(), minlength=len(CLASSES))
    seen = [n for n, a in zip(CLASSES, area, strict=True) if a >= VISIBLE[n in STUFF]]
    named = [n for n in seen if rng.random() < (0.75, 0.45)[n in STUFF]] or [rng.choice(seen)]
    rng.shuffle(named)
    phrases = [n if n in STUFF else f"{'an' if n == 'apple' else 'a'} {n}" for n in named]
    return rng.choice(TEMPLATES).format(rng.choice((", ", " and ", " with ")).join(phrases))


def write(path, save):
    """Call save(temporary path), then rename: a reader never meets half a file, and a second run replaces the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save(part)
    part.replace(path)


def write_json(path, value):
    """Write one JSON file."""
    write(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


def png(array):
    """uint8 [h, w] or [h, w, 3] -> the bytes of a PNG; compressed little, since files this small gain nothing."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def write_tar(path, files):
    """Write {member name: bytes} as one tar, with no dates in it: the same seed gives the same bytes."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def draw_shard(job):
    """(path, seed, first index) -> images uint8 [1000, 48, 48, 3] and captions, also written as an img2dataset tar."""
    path, seed, first = job
    images, captions, files = [], [], {}
    for i in range(first, first + PER_SHARD):
        rng = np.random.default_rng(
            (seed, 0, i)
        )  # by index: the world does not depend on who draws what
        image, label = scene(rng)
        images.append(image)
        captions.append(caption(label, rng))
        files |= {f"{i:09d}.png": png(image), f"{i:09d}.txt": captions[-1].encode()}
    write(path, lambda p: write_tar(p, files))
    return np.stack(images), captions


def draw_held_out(job):
    """(folder, seed, set number) -> images [400, 48, 48, 3] and labels of all 18 classes; written with a SPEC.json."""
    folder, seed, number = job
    spec = {"name": folder.name, "images": "images", "labels": "labels", "list": None}
    spec |= {
        "image_suffix": ".png",
        "label_suffix": ".png",
        "ignore": [255],
        "zero_is_ignored": False,
    }
    spec |= {"classes": CLASSES, "background": False, "palette": PALETTE}
    table = np.arange(len(CLASSES), dtype=np.uint8)
    if folder.name == "background":
        spec |= {
            "classes": ["background", *OBJECTS],
            "background": True,
            "palette": [BACKGROUND, *PALETTE[:12]],
        }
        table = np.where(table < len(OBJECTS), table + 1, 0).astype(np.uint8)
    pairs = [scene(np.random.default_rng((seed, number, i))) for i in range(HELD_OUT)]
    for i, (image, label) in enumerate(pairs):
        for kind, array in (("images", image), ("labels", table[label])):
            write(folder / kind / f"{i:03d}.png", lambda p, a=array: p.write_bytes(png(a)))
    write_json(folder / "SPEC.json", spec)
    return tuple(np.stack(a) for a in zip(*pairs, strict=True))


def draw_world(folder, seed):
    """Write all data below folder -> images [16000, 48, 48, 3], captions, and both held-out sets (images, labels)."""
    shards = [(folder / f"train-{n:03d}.tar", seed, n * PER_SHARD) for n in range(SHARDS)]
    sets = [(folder / name, seed, number) for number, name in enumerate(("stuff", "background"), 1)]
    with multiprocessing.Pool() as pool:
        held_out = pool.map_async(draw_held_out, sets)
        parts = list(
            tqdm(pool.imap(draw_shard, shards), "drawing", SHARDS, unit="shard", mininterval=1)
        )
        held_out = held_out.get()
    return np.concatenate([p[0] for p in parts]), [c for p in parts for c in p[1]], held_out


CONFIG = {  # open_clip's own model-config format
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": SIZE,
        "layers": 3,
        "width": 128,
        "head_width": 32,
        "patch_size": 8,
    },
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}


STEPS, WARMUP, BATCH, LR = 600, 60, 128, 2e-3


START_SCALE = 5  # 1 / temperature; softer than open_clip's 14: cosines spread, and masks have to learn their area


def fast_bf16():
    """True where the processor multiplies in bfloat16; elsewhere autocast would be slower than float32."""
    abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))


def normalised(images):
    """uint8 [B, 48, 48, 3] -> float [B, 3, 48, 48] with CLIP's mean and standard deviation."""
    mean, std = (
        torch.tensor(open_clip.OPENAI_DATASET_MEAN),
        torch.tensor(open_clip.OPENAI_DATASET_STD),
    )
    return (
        ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    )  # [N, 3, h, w]


def pretrain(images, captions, tokenizer, seed):
    """Train CLIP on images uint8 [N, 48, 48, 3] and N captions, whole image against whole caption -> the model."""
    torch.manual_seed(seed)
    rng, loss_of = np.random.default_rng((seed, 3)), open_clip.ClipLoss()
    model = open_clip.CLIP(**CONFIG, init_logit_scale=math.log(START_SCALE))
    tokens = tokenizer(captions)  # [N, 20]
    optimiser = torch.optim.AdamW(
        model.parameters(), LR, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    for step in (bar := tqdm(range(STEPS), "pretraining CLIP", mininterval=1)):
        optimiser.param_groups[0]["lr"] = LR * min(
            (step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS)
        )
        pick = rng.choice(len(images), BATCH, replace=False)
        batch = normalised(images[pick])
        batch = torch.where(
            torch.from_numpy(rng.random((BATCH, 1, 1, 1)) < 0.5), batch.flip(3), batch
        )
        # The fused attention kernel has a slow backward pass on CPUs; at 37 tokens the plain one takes half the time.
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()),
        ):
            image, text, scale = model(batch, tokens[pick])  # [B, 128], [B, 128], scalar
            loss = loss_of(image.float(), text.float(), scale)
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


@torch.no_grad()
def zero_shot(model, tokenizer, images, labels):
    """Per cent right by "a photo of a ..." -> [objects in pictures with one object, stuff in pictures with one stuff].

    images uint8 [N, 48, 48, 3], labels [N, 48, 48] with the class of every pixel.
    """
    text = model.encode_text(
        tokenizer([f"a photo of a {n}." for n in CLASSES]), normalize=True
    )  # [18, 128]
    scores = (model.encode_image(normalised(images), normalize=True) @ text.T).numpy()  # [N, 18]
    seen = np.stack([(labels == k).sum((1, 2)) for k in range(len(CLASSES))], 1)  # [N, 18], pixels
    seen *= seen >= VISIBLE[0]
    right = []
    for part in (slice(0, len(OBJECTS)), slice(len(OBJECTS), None)):
        one = (seen[:, part] > 0).sum(1) == 1
        right.append(100 * (scores[one, part].argmax(1) == seen[one, part].argmax(1)).mean())
    return right


ROWS = {
    "MaskCLIP": None,
    "GCL": (["gcl_v", "gcl_f"], 0.4, 1.0),
}  # losses, lambda area, lambda tv; None: no training


ABLATION = {  # Table 2; the paper does not say whether its row CL has the priors
    "CL": (["cl"], 0.0, 0.0),
    "CL with priors": (["cl"], 0.4, 1.0),
    "GCL_v": (["gcl_v"], 0.4, 1.0),
    "GCL_f": (["gcl_f"], 0.4, 1.0),
    "CL+GCL": (["cl", "gcl_v", "gcl_f"], 0.4, 1.0),
    "without tv": (["gcl_v", "gcl_f"], 0.4, 0.0),
    "without area": (["gcl_v", "gcl_f"], 0.0, 1.0),
    "without both": (["gcl_v", "gcl_f"], 0.0, 0.0),
}


SCHEDULE = "--batch-size 64 --lr 6e-3 --scalar-lr-mult 10 --steps 80 --warmup-steps 12 --log-every 20".split()


def folder_of(out, row):
    """Where a row of the table lives."""
    return out / row.lower().replace("+", "-").replace(" ", "-")


def call(script, *arguments):
    """Run a program beside this one; when it fails, end with its exit code, its own message being on the screen."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    print("$ python", script, *command[2:], flush=True)
    code = subprocess.run(command).returncode
    if code:
        print(f"toy.py: {script} ended with code {code}, see above", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)


def clip_of(out):
    """The arguments that name the toy CLIP."""
    return "--model", out / "clip/toy-clip.json", "--pretrained", out / "clip/toy-clip.pt"


def train_row(row, out, seed):
    """Train the adapter of one row -> OUT/ROW/last.pt."""
    losses, area, tv = (ROWS | ABLATION)[row]
    shards = out / "data" / f"train-{{000..{SHARDS - 1:03d}}}.tar"
    weights = ("--losses", *losses, "--lambda-area", area, "--lambda-tv", tv)
    machine = ("--device", "cpu", "--workers", 0, "--precision", "bf16" if fast_bf16() else "fp32")
    run = ("--seed", seed, "--resume", "never", "--out", folder_of(out, row))
    call(
        "train.py",
        "--data",
        shards,
        *clip_of(out),
        "--image-size",
        SIZE,
        *weights,
        *SCHEDULE,
        *machine,
        *run,
    )


def evaluate_row(row, out):
    """Evaluate one row -> mIoU {"stuff", "background": at the threshold 0.5, "background_best": of the sweep}."""
    specs = (out / "data" / name / "SPEC.json" for name in ("stuff", "background"))
    model, results = ("--checkpoint", folder_of(out, row) / "last.pt"), folder_of(out, row) / "eval"
    if row == "MaskCLIP":
        model = ("--method", "maskclip", *clip_of(out))
    geometry = ("--no-pamr", "--short-side", SIZE, "--window", SIZE, "--stride", SIZE // 2)
    output = (
        "--sweep-threshold",
        "--save-predictions",
        "--device",
        "cpu",
        "--workers",
        0,
        "--out",
        results,
    )
    call("evaluate.py", "--datasets", *specs, *model, *geometry, *output)
    sets = json.loads((results / "results.json").read_text())["datasets"]
    best = max(sets["background"]["sweep"].values())
    return {
        "stuff": sets["stuff"]["miou"],
        "background": sets["background"]["miou"],
        "background_best": best,
    }


def print_table(miou):
    """Print {row: mIoU of each set} as a table."""
    print(f"\n{'mIoU':18}{'stuff':>8}{'background':>12}{'at its best threshold':>24}")
    for row, m in miou.items():
        print(f"{row:18}{m['stuff']:8.1f}{m['background']:12.1f}{m['background_best']:24.1f}")


def examples(labels, count):
    """Indices of the first pictures with at least two objects, none of them mostly hidden; not picked by hand."""
    area = np.stack([(labels == k).sum((1, 2)) for k in range(len(OBJECTS))], 1)  # [400, 12]
    return np.flatnonzero(
        ((area > 0).sum(1) >= 2) & ((area == 0) | (area >= 3 * VISIBLE[0])).all(1)
    )[:count]


def draw_block(picture, left, name, palette, out, chosen, side, gap):
    """Paste the chosen images of one held-out set, their labels and both predictions, under a heading."""
    pen, what = (
        ImageDraw.Draw(picture),
        {"stuff": "every pixel has a class", "background": "objects alone"}[name],
    )
    pen.text((left, 8), f"{name}: {what}", "black", ImageFont.load_default(20))
    folders = {"image": out / "data" / name / "images", "label": out / "data" / name / "labels"}
    folders |= {row: folder_of(out, row) / "eval" / "predictions" / name for row in ROWS}
    for c, (column, folder) in enumerate(folders.items()):
        x = left + c * (side + gap)
        pen.text((x + side // 2, 52), column, "black", ImageFont.load_default(17), anchor="mm")
        for r, i in enumerate(chosen):
            cell = np.array(Image.open(folder / f"{i:03d}.png"))  # RGB, or class indices
            cell = Image.fromarray(cell if column == "image" else np.array(palette, np.uint8)[cell])
            picture.paste(
                cell.resize((side, side), Image.Resampling.NEAREST), (x, 68 + r * (side + gap))
            )


def draw_grid(out, held_out, rows=5, side=144, gap=6):
    """Write OUT/toy.png: image, label, MaskCLIP and GCL for some pictures of both held-out sets, and a legend."""
    block, bottom = 4 * (side + gap) + 30, 68 + rows * (side + gap) + 8
    picture = Image.new("RGB", (2 * block - 30 + gap, bottom + 64), "white")
    palettes = {"stuff": PALETTE, "background": [BACKGROUND, *PALETTE]}
    for b, (name, palette) in enumerate(palettes.items()):
        draw_block(
            picture, gap + b * block, name, palette, out, examples(held_out[b][1], rows), side, gap
        )
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(17)
    for k, (name, colour) in enumerate(
        zip(("background", *CLASSES), palettes["background"], strict=True)
    ):
        x, y = gap + (k % 10) * (picture.width // 10), bottom + 30 * (k // 10)
        pen.rectangle((x, y, x + 18, y + 18), colour, "black")
        pen.text((x + 24, y + 9), name, "black", font, anchor="lm")
    write(out / "toy.png", lambda p: picture.save(p, "PNG", optimize=True))


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/toy"), help="folder for all that is written"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the world, of CLIP and of the adapter's training"
    )
    parser.add_argument(
        "--ablate", action="store_true", help="also the rows of Table 2: eight more trainings"
    )
    text = "write OUT/explain.png, one training step in pictures; where OUT has no trained toy, the toy is run first"
    parser.add_argument("--explain", action="store_true", help=text)
    args = parser.parse_args()
    if args.out.is_file() or args.seed < 0:
        parser.error(f"--out {args.out} must not be a file, --seed {args.seed} not negative")
    return args


def main(args):
    """All four parts in order; args: out, seed, ablate."""
    out, seconds, clock = args.out, {}, time.perf_counter()

    def done(stage, text):
        nonlocal clock
        seconds[stage], clock = round(time.perf_counter() - clock, 1), time.perf_counter()
        print(f"[{seconds[stage]:.0f} s] {text}", flush=True)

    images, captions, held_out = draw_world(out / "data", args.seed)
    done(
        "draw",
        f"drew {len(images):,} pairs and two held-out sets of {HELD_OUT} pictures into {out / 'data'}",
    )
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    model = pretrain(images, captions, tokenizer, args.seed)
    write_json(out / "clip/toy-clip.json", CONFIG)
    write(out / "clip/toy-clip.pt", lambda p: torch.save(model.state_dict(), p))
    right = zero_shot(model, tokenizer, *(np.concatenate(a) for a in zip(*held_out, strict=True)))
    done(
        "clip",
        "pretrained CLIP; zero-shot it tells {:.0f} % of objects and {:.0f} % of stuff".format(
            *right
        ),
    )
    miou = {}
    for row in ROWS | (ABLATION if args.ablate else {}):
        if row != "MaskCLIP":
            train_row(row, out, args.seed)
            done(f"train {row}", f"trained {row}")
        miou[row] = evaluate_row(row, out)
        done(f"evaluate {row}", f"evaluated {row}")
    draw_grid(out, held_out)
    print_table(miou)
    seconds["total"] = round(sum(seconds.values()), 1)
    write_json(out / "toy.json", {"miou": miou, "seconds": seconds, "seed": args.seed})
    print(f"\n{seconds['total']:.0f} s in all; {out / 'toy.json'}, {out / 'toy.png'}")


if __name__ == "__main__":
    main(parse_args())
