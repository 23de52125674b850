# SPDX-License-Identifier: MIT
"""Data: image-text pairs from tar shards for training, and labelled sets for evaluation. Sec. 4.1 of the paper.

    python data.py check --data-root data    # are the eight benchmarks there and whole? a table
    python data.py check 'data/gcc3m/*.tar'  # the image-text pairs of tar shards
    python data.py prepare-context           # PASCAL Context's label PNGs and val.txt from its .mat files

    data/gcc3m/{000..331}.tar      image + caption under one stem (.jpg .jpeg .png .webp, with .txt or .json), as
                                   img2dataset writes them; globs and {first..last} ranges both work
    data/VOCdevkit/VOC2012/...     the eight benchmarks in the layout of their downloads (the table BENCHMARKS below)
    mine/SPEC.json                 any labelled set of your own (see read_spec)

Needs torch, torchvision, numpy and pillow; no tar or web-dataset package.
"""

import argparse
import bisect
import contextlib
import difflib
import glob
import hashlib
import io
import json
import os
import re
import secrets
import struct
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision import transforms as T
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # whatever the suffix says; no format that runs other programs
REASONS = ("shard", "image", "size", "caption")  # why a sample is bad
SHOWN = 5  # files of a set that are named when many are wrong or missing
ENOUGH = 1000  # samples, before their share of bad ones can stop a run
JSON = 2**31  # added to the size of a text in the index where it is a .json
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # PIL says SyntaxError for a broken PNG
IGNORE, INVALID = 255, -1  # in a label lookup table: not scored, and not allowed


class DataError(ValueError):
    """Data that cannot be used; the message names the file or value and says what to do."""


def in_parallel(function, items, processes, what):
    """Yields function(item) of all items in their order, from a pool where processes is above 1, under a bar."""
    with tqdm(desc=what, total=len(items), leave=False, delay=1) as bar:
        if processes < 2 or not items:
            for item in items:
                yield function(item)
                bar.update()
            return
        pool = ProcessPoolExecutor(processes)  # unlike multiprocessing.Pool it notices when a process was killed
        try:
            for result in pool.map(function, items, chunksize=1 + len(items) // 1000):
                yield result
                bar.update()
        except BrokenProcessPool as error:
            raise DataError(f"{what}: one of {processes} processes was killed; out of memory?") from error
        finally:
            pool.shutdown(cancel_futures=True)


def write_whole(path, write):
    """write(temporary path), then the final name: a file is whole or not there."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # another node may have the same process id
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- image-text shards: where the pairs lie -------------------------------------------------------------------------


def expand_shards(patterns):
    """Sorted shard paths of globs and {000..347} ranges, each once; DataError for a pattern that matches no file."""
    found = []
    for pattern in patterns:
        match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
        if match:
            first, last = match.groups()
            numbers = range(int(first), int(last) + 1)
            names = [pattern.replace(match[0], f"{n:0{len(first)}d}") for n in numbers]
            if missing := [name for name in names if not os.path.isfile(name)]:
                raise DataError(f"--data {pattern}: {missing[0]} is missing ({len(missing)} of {len(names)} shards)")
        else:
            names = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
        if not names:
            raise DataError(f"--data {pattern}: no such shard; download CC3M/CC12M with img2dataset or give --data")
        found += names
    return list(dict.fromkeys(found))


def header_name(header):
    """The member name in a 512-byte tar header, bytes."""
    name = header[:100].partition(b"\0")[0]
    return header[345:500].partition(b"\0")[0] + b"/" + name if header[345] else name


def walk_headers(path):
    """Yields (name, offset, size) of the files in a tar, from header to header: a quarter of tarfile's CPU time.

    ValueError where tarfile has to look: a cut or broken tar, members past 8 GiB, sparse files, links and the like.
    """
    with open(path, "rb", buffering=0) as file:
        at, end, name = 0, os.fstat(file.fileno()).st_size, None
        while (header := file.read(512)).count(0) != 512:  # a block of zeros ends a tar
            size, checksum = int(header[124:136].partition(b"\0")[0], 8), int(header[148:156].partition(b"\0")[0], 8)
            if checksum != sum(header[:148]) + sum(header[156:]) + 8 * 32 or at + 512 + size > end:
                raise ValueError("cut or broken")
            kind, start = header[156:157], at + 512
            if kind in (b"L", b"x"):  # a long name, in GNU's or in POSIX's way, of the member that follows
                extra = file.read(size)
                path_record = re.search(rb"(?:^|\n)\d+ path=(.*)\n", extra)
                if kind == b"x" and re.search(rb"(?:^|\n)\d+ (size|GNU\.sparse\S*|hdrcharset)=", extra):
                    raise ValueError("not a plain member")
                name = extra.split(b"\0")[0] if kind == b"L" else path_record[1] if path_record else name
            elif kind in (b"0", b"\0"):
                yield os.fsdecode(name or header_name(header)), start, size
                name = None
            elif kind != b"5" or size:  # folders alone are passed over
                raise ValueError("not a plain member")
            at = file.seek(start + -(-size // 512) * 512)


def list_members(path):
    """([(name, offset, size), ...] of the files in a tar, whether it is cut off); DataError for what is no tar."""
    try:
        if found := list(walk_headers(path)):
            return found, False
    except ValueError:
        found = []
    try:
        with tarfile.open(path, "r:") as tar:
            end = os.fstat(tar.fileobj.fileno()).st_size
            for member in tar:
                if member.isfile() and not member.issparse() and member.offset_data + member.size <= end:
                    found.append((member.name, member.offset_data, member.size))
            tar.fileobj.seek(tar.offset)
            return found, tar.fileobj.read(512).count(0) != 512
    except (tarfile.TarError, OSError) as error:
        if not found:
            raise DataError(f"{path}: not a tar shard that can be read ({error})") from error
        return found, True


def scan_shard(path):
    """(counts [4], rows [pairs, 4]) of one tar shard, uint32. Counts: pairs, half pairs, duplicates, 1 if cut off.

    A row is where a pair lies: offset of the image in blocks of 512 bytes, its size, the text's offset and size, to
    which JSON is added where it is a .json. Members of one stem make a pair, in any order and with others in between;
    the first of two equal names counts, a .txt before a .json, and hidden files (._x.jpg) not at all.
    """
    members, cut = list_members(path)
    parts, duplicates = {}, 0
    for name, at, size in members:
        stem, suffix = os.path.splitext(name)
        kind = "image" if suffix.lower() in IMAGE_SUFFIXES else suffix.lower()
        if kind not in ("image", ".txt", ".json") or os.path.basename(stem).startswith(".") or size >= JSON:
            continue
        duplicates += kind in parts.setdefault(stem, {})
        parts[stem].setdefault(kind, (at // 512, size))
    rows = []
    for part in parts.values():
        if "image" in part and len(part) > 1:
            at, size = part.get(".txt") or part[".json"]
            rows.append((*part["image"], at, size if ".txt" in part else size + JSON))
    counts = np.array([len(rows), len(parts) - len(rows), duplicates, cut], dtype=np.uint32)
    return counts, np.array(rows, dtype=np.uint32).reshape(-1, 4)


def scan_shards(shards):
    """The parts of an index, uint32 [.., 4]: the counts of every shard, then the rows of each; warns of cut shards."""
    # More processes than cores: what they wait for is the disk.
    scanned = list(in_parallel(scan_shard, shards, min(len(shards) // 8, 32), "scanning shards"))
    counts = np.stack([count for count, _ in scanned])  # [shards, 4]
    for path, count in zip(shards, counts, strict=True):
        if count[3]:
            print(f"warning: {path}: cut off; using the {count[0]} pairs before the cut", file=sys.stderr)
    if not counts[:, 0].any():
        raise DataError(f"{shards[0]}: no image-text pairs in {len(shards)} shard(s); need a.jpg + a.txt (or .json)")
    return [counts, *(rows for _, rows in scanned)]


def write_parts(path, parts):
    """Empties the list parts into one .npy file [.., 4], so that no second copy of an index is ever held."""
    index = np.lib.format.open_memmap(path, "w+", np.uint32, (sum(map(len, parts)), 4))
    parts.reverse()
    at = 0
    while parts:
        part = parts.pop()
        index[at : at + len(part)] = part
        at += len(part)
    index.flush()


def open_index(path, shards):
    """The index in a file, mapped, so that all processes of a node share its memory; None if it is not there, whole."""
    try:
        index = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    whole = index.dtype == np.uint32 and index.shape[1:] == (4,) and len(index) > shards
    return index if whole and len(index) == shards + index[:shards, 0].sum(dtype=np.int64) else None


@contextlib.contextmanager
def node_lock(key):
    """One process of a node at a time. A killed one loses its lock to the next, so nobody waits for the dead."""
    if fcntl is None:  # Windows: every rank scans for itself
        yield
        return
    path = Path(tempfile.gettempdir(), f"gcl-{os.getuid()}-{key}.lock")
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # unlike flock, not handed down to the scanning processes
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def index_shards(shards, folder=None):
    """The index of shards, uint32 [shards + pairs, 4]: counts first, then rows (see scan_shard); 16 bytes a pair.

    Kept as folder/index-KEY.npy, where KEY hangs on each shard's path, size and time of change. One process of a node
    scans, the others wait for it. Without a folder nothing is kept.
    """
    if folder is None:
        return np.concatenate(scan_shards(shards))
    facts = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in shards]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    path = Path(folder, f"index-{key}.npy")
    with node_lock(key):
        if (index := open_index(path, len(shards))) is None:
            parts = scan_shards(shards)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda temporary: write_parts(temporary, parts))
            index = open_index(path, len(shards))
    return index


# ---- image-text shards: samples and their order ---------------------------------------------------------------------


class BadSample(ValueError):
    """A pair that cannot be used; reason is one of REASONS."""

    def __init__(self, reason, detail):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def read_bytes(path, row):
    """(image, text) of one row of an index as bytes; BadSample where the shard no longer holds them."""
    image_at, image_size, text_at, text_size = row.tolist()
    spans = [(image_at * 512, image_size), (text_at * 512, text_size % JSON)]
    start, end = min(at for at, _ in spans), max(at + size for at, size in spans)
    neighbours = end - start < 2 * image_size + 65536  # one read is faster than two, over what lies between as well
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            block = file.read(end - start) if neighbours else b""
            found = [block[at - start : at - start + size] for at, size in spans]
            if not neighbours:
                found = [file.read(size) for at, size in spans if file.seek(at) == at]
    except OSError as error:
        raise BadSample("shard", error) from error
    if [len(part) for part in found] != [size for _, size in spans]:
        raise BadSample("shard", "shorter than it was when it was scanned")
    return found


def to_rgb(image):
    """A loaded PIL image of any mode as RGB: 16 bit scaled down, what is transparent put on white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_image(content):
    """RGB PIL image of a file's bytes: the first frame, upright, on white where it is transparent; or BadSample.

    The size is known from the header and limited (PIL's own Image.MAX_IMAGE_PIXELS) before anything is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF blocks, palettes, ...
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            image.load()  # a file that is cut off fails here
            with contextlib.suppress(Exception):  # a broken EXIF block does not make the picture bad
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadSample("size", error) from error
    except Exception as error:  # decoders fail with whatever they stumble over: struct.error, KeyError, zlib.error, ...
        raise BadSample("image", repr(error)) from error


def decode_caption(content, from_json):
    """The caption in a .txt or .json; BadSample where there is none, or not in UTF-8."""
    try:
        text = content.decode("utf-8-sig")
        if from_json:
            fields = json.loads(text)
            text = fields.get("caption") if isinstance(fields, dict) else None
        text = text.strip() if isinstance(text, str) else ""
        text.encode()  # half a surrogate pair, which JSON can spell, is no text
    except (ValueError, RecursionError) as error:
        raise BadSample("caption", error) from error
    if not text:
        raise BadSample("caption", "empty")
    return text


def read_pair(path, row):
    """(RGB PIL image, caption) of one row of an index; BadSample."""
    image, text = read_bytes(path, row)
    return decode_image(image), decode_caption(text, row[3] >= JSON)


def pair_name(path, row):
    """Shard and member name of the image of one row of an index, for messages."""
    with open(path, "rb") as file:
        file.seek(int(row[0]) * 512 - 512)
        return f"{path}: {os.fsdecode(header_name(file.read(512)))}"


def train_transform(image_size, norm, strong):
    """PIL image -> normalised float [3, image_size, image_size]. norm: (mean, std). strong: the release's extras.

    Paper silent: augmentation. Random resized crop 0.08-1 and flip; the release adds RandAugment (2 ops, magnitude 9)
    and random erasing (0.25, pixel noise).
    """
    steps = [
        T.RandomResizedCrop(image_size, scale=(0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(),
        *([T.RandAugment(2, 9)] if strong else []),
        T.ToTensor(),
        T.Normalize(*norm, inplace=True),
        *([T.RandomErasing(0.25, value="random")] if strong else []),
    ]
    return T.Compose(steps)


class PairDataset(Dataset):
    """Image-text pairs of tar shards, addressed by (position in the run, index of the pair).

    All randomness of a sample (augmentation, gumbel noise) is seeded by the run's seed and the position, so it does not
    depend on ranks, workers or interruptions. cache: the folder that keeps the index of the shards (index_shards).
    """

    def __init__(self, shards, transform, tokenizer, noise_size, seed=0, cache=None):
        self.shards, self.transform, self.tokenizer = shards, transform, tokenizer
        self.noise_size, self.seed = noise_size, seed
        self.index = index_shards(shards, cache)  # [shards + pairs, 4]
        self.ends = np.cumsum(self.index[: len(shards), 0], dtype=np.int64).tolist()

    def __getstate__(self):  # a worker that is not forked maps the index too instead of getting a copy
        mapped = isinstance(self.index, np.memmap)
        return self.__dict__ | {"index": self.index.filename if mapped else self.index}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if not isinstance(self.index, np.ndarray):
            self.index = np.load(self.index, mmap_mode="r")

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, key):
        """key: (position, index). Returns (image [3, h, w], tokens [context], noise [1, H, W], bad int32 [reasons]).

        A bad sample is replaced by the one that lies a hundredth of all pairs further on, so that a broken stretch of
        a shard is left at once; bad counts those that were passed over, by REASONS. DataError after 100 of them.
        """
        position, index = key
        bad = torch.zeros(len(REASONS), dtype=torch.int32)
        tries, stride = min(len(self), 100), max(len(self) // 100, 1)
        for candidate in range(index, index + tries * stride, stride):
            try:
                image, caption = self.read(candidate % len(self))
                break
            except BadSample as error:
                bad[REASONS.index(error.reason)] += 1
                last = error
        else:
            raise DataError(f"{pair_name(*self.locate(index))}: unreadable ({last}), and so are {tries - 1} others")
        with torch.random.fork_rng(devices=[]):  # the transforms draw from torch's global generator
            torch.default_generator.manual_seed(self.seed * 1_000_003 + position)  # torch.manual_seed asks every device
            image, noise = self.transform(image), torch.rand(1, *self.noise_size)  # [3, h, w], [1, H, W]
        return image, self.tokenizer([caption])[0], noise, bad

    def fingerprint(self):
        """A digest of where all pairs lie: other shards, or the same with other members, have another."""
        return hashlib.sha256(np.ascontiguousarray(self.index)).hexdigest()

    def locate(self, index):
        """(shard path, row of the index) of a pair."""
        return self.shards[bisect.bisect_right(self.ends, index)], self.index[len(self.shards) + index]

    def read(self, index):
        """(RGB PIL image, caption) of a pair; BadSample."""
        return read_pair(*self.locate(index))


def too_many_bad(counts, seen, share):
    """DataError once more than this share of ENOUGH samples was bad. counts: by REASONS; seen: good samples."""
    bad = int(sum(counts))
    if seen + bad >= ENOUGH and bad > share * (seen + bad):
        named = ", ".join(f"{reason} {int(n)}" for reason, n in zip(REASONS, counts, strict=True))
        hint = "see python data.py check SHARD..., or raise --max-bad"
        raise DataError(f"{bad} of {seen + bad} samples are bad ({named}), more than a share of {share:g}; {hint}")


class GlobalOrder:
    """The batches of one rank as lists of (position, index): a batch sampler whose resume is arithmetic.

    Position p of the run (steps x global batch) is entry p mod n of a seeded permutation of epoch p div n. Rank r takes
    the r-th slice of every global batch, so the global batch is the same for any number of ranks.
    """

    def __init__(self, n, batch_size, steps, seed=0, start=0, rank=0, ranks=1):
        self.n, self.batch_size, self.steps, self.seed = n, batch_size, steps, seed
        self.start, self.rank, self.ranks = start, rank, ranks

    def __len__(self):
        return self.steps - self.start

    def __iter__(self):
        local, epoch, order = self.batch_size // self.ranks, -1, None
        for step in range(self.start, self.steps):
            batch = []
            for position in range(
                step * self.batch_size + self.rank * local, step * self.batch_size + (self.rank + 1) * local
            ):
                if position // self.n != epoch:
                    epoch = position // self.n
                    order = np.arange(self.n, dtype=np.int32 if self.n < 2**31 else np.int64)  # 4 bytes a pair
                    np.random.default_rng((self.seed, epoch)).shuffle(order)
                batch.append((position, int(order[position % self.n])))
            yield batch


# ---- image-text shards: python data.py check ------------------------------------------------------------------------


def check_shard(path):
    """Decodes all pairs of a shard: its counts [4], sums over good pairs [4], {what is wrong: [n, the first of it]}."""
    sums, wrong = np.zeros(4, dtype=np.int64), {}  # pairs, characters of captions, widths, heights
    try:
        counts, rows = scan_shard(path)
    except DataError as error:
        return np.zeros(4, dtype=np.uint32), sums, {"unreadable shards": [1, str(error)]}
    if counts[3]:
        wrong["cut off shards"] = [1, path]
    for row in rows:
        try:
            image, caption = read_pair(path, row)
            sums += (1, len(caption), *image.size)
        except BadSample as error:
            wrong.setdefault(f"bad: {error.reason}", [0, f"{pair_name(path, row)} ({error})"])[0] += 1
    return counts, sums, wrong


def check_shards(patterns, processes=1):
    """Reads and decodes every pair, prints what is there and what is wrong; returns 1 if anything is wrong, else 0."""
    shards, start = expand_shards(patterns), time.perf_counter()
    counts, sums, wrong = np.zeros(4, dtype=np.int64), np.zeros(4, dtype=np.int64), {}
    for count, total, faults in in_parallel(check_shard, shards, min(len(shards), processes), "checking shards"):
        counts, sums = counts + count, sums + total
        for fault, (n, first) in faults.items():
            wrong.setdefault(fault, [0, first])[0] += n
    lines = [("shards", len(shards), ""), ("pairs", counts[0], ""), ("half pairs", counts[1], "left out")]
    lines += [("duplicates", counts[2], "the first of each is used")]
    lines += [(fault, n, f"the first: {first}") for fault, (n, first) in sorted(wrong.items())]
    if sums[0]:
        caption, width, height = (sums[1:] / sums[0]).tolist()
        lines += [("good pairs", sums[0], f"on average {width:.0f} x {height:.0f} pixels, {caption:.0f} characters")]
    for name, n, remark in lines:
        print(f"{name:<18}{n:>12,}  {remark}".rstrip())
    print(f"{counts[0] / (time.perf_counter() - start):,.0f} pairs per second")
    return int(bool(wrong) or counts[1:3].any())


# ---- labelled sets --------------------------------------------------------------------------------------------------


@dataclass
class SegmentationSet:
    """A labelled set. items: (image id, image path, label path, lut); lut is int16 [256], stored value -> class index,
    IGNORE or INVALID. Class 0 is the background where there is one. full: how many images the whole benchmark has."""

    name: str
    classes: list
    background: bool
    items: list
    palette: list
    full: int | None = None
    partial: tuple = ()

    def __len__(self):
        return len(self.items)

    def prompts(self):
        """The class names that become texts: "background" never does (Sec. 4.1)."""
        return self.classes[1:] if self.background else self.classes


def lookup_table(values, ignored, rest=INVALID):
    """int16 [256]: values[k] -> k, each of ignored -> IGNORE, everything else -> rest."""
    table = np.full(256, rest, dtype=np.int16)
    table[list(values)] = np.arange(len(values))
    table[list(ignored)] = IGNORE
    return table


def voc_palette(n):
    """The PASCAL VOC colour map: n distinct colours, bits of the index spread over the channels."""
    bits = [[(k >> (3 * j + c) & 1) << (7 - j) for j in range(8)] for k in range(n) for c in range(3)]
    return [[sum(bits[3 * k + c]) for c in range(3)] for k in range(n)]


def read_image(path):
    """uint8 [h, w, 3] RGB; DataError names a file that cannot be read."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except UNREADABLE as error:
        raise DataError(f"{path}: not an image that can be read ({error})") from error


def read_stored(path):
    """The values of a label PNG as stored, integers [h, w]; DataError names a file that is no such PNG."""
    try:
        with Image.open(path) as image:
            packed = str(image.tile[0][3]) if image.tile else ""  # how the pixels lie in the file
            mode, stored = image.mode, np.array(image)
    except UNREADABLE as error:
        raise DataError(f"{path}: not a label that can be read ({error})") from error
    if stored.ndim != 2 or stored.dtype.kind == "f":
        hint = "saved again by an image editor? Take the original file"
        raise DataError(f"{path}: stored as {mode}, not as class indices; a label is a palette or grey PNG ({hint})")
    if spread := {"L;2": 85, "L;4": 17}.get(packed):  # PIL spreads grey of 2 and 4 bits over 0 to 255
        stored = stored // spread
    return stored.astype(np.uint8) if stored.dtype == bool else stored


def values_of(stored):
    """The distinct values of a label, sorted, as a list of int."""
    fast = stored.dtype == np.uint8  # counting beats sorting
    return (np.flatnonzero(np.bincount(stored.ravel())) if fast else np.unique(stored)).tolist()


def misfit(path, values, lut):
    """What to say of the first stored value that the rule does not allow; None when all are allowed."""
    for value in values:
        if not 0 <= value < 256 or lut[value] == INVALID:
            return f"{path}: label value {value} is outside the class list of this set (it allows {allowed(lut)})"


def allowed(lut):
    """The stored values that a rule allows, in short: "0-20 255"."""
    return spans(np.flatnonzero(lut != INVALID).tolist())


def spans(values):
    """Integers in short: [0, 1, 2, 255] is "0-2 255"."""
    starts, ends = ([v for v in values if v + step not in values] for step in (-1, 1))
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def read_label(path, lut):
    """Class indices int64 [h, w], IGNORE where not scored. DataError names the file and the value that does not fit."""
    stored = read_stored(path)
    if wrong := misfit(path, values_of(stored), lut):
        raise DataError(wrong)
    return lut[stored].astype(np.int64)  # [h, w]


def label_values(image_path, label_path):
    """The distinct stored values of an image's label; DataError when a file is broken or their sizes disagree."""
    stored = read_stored(label_path)
    try:
        with Image.open(image_path) as image:  # the header alone
            width, height = image.size
    except UNREADABLE as error:
        raise DataError(f"{image_path}: not an image that can be read ({error})") from error
    if stored.shape != (height, width):
        sizes = f"{width}x{height}, its label {label_path} is {stored.shape[1]}x{stored.shape[0]}"
        raise DataError(f"{image_path}: the image is {sizes}; they must agree")
    return values_of(stored)


def check_labels(dataset):
    """Reads every label and every image's header before any long work: sizes must agree, values must fit."""
    with tqdm(dataset.items, desc=f"checking {dataset.name}", leave=False) as bar:
        for _, image, label, lut in bar:
            if wrong := misfit(label, label_values(image, label), lut):
                raise DataError(wrong)


SPEC_DEFAULTS = {
    "list": None,
    "image_suffix": ".jpg",
    "label_suffix": ".png",
    "background": False,
    "ignore": [255],
    "zero_is_ignored": False,
    "palette": None,
}
SPEC_KINDS = {
    **dict.fromkeys(("name", "images", "labels", "image_suffix", "label_suffix"), str),
    **{"list": str | None, "background": bool, "zero_is_ignored": bool, "ignore": list, "palette": list | None},
}


def read_spec(path):
    """A labelled set of the user's own from a SPEC.json, paths relative to the file. Raises DataError.

    {"name": "mine", "images": "images", "labels": "labels", "list": null, "image_suffix": ".jpg", "label_suffix":
    ".png", "classes": ["background", "cat", ...], "background": true, "ignore": [255], "zero_is_ignored": false,
    "palette": null}. list: a file of image ids, one a line; null takes every image of the folder. With background,
    the first class is "background". zero_is_ignored: 0 is not scored and stored k is class k - 1.
    """
    spec = _spec_fields(path)
    folder, classes = Path(path).parent, spec["classes"]
    images, labels = folder / spec["images"], folder / spec["labels"]
    if spec["list"]:
        ids = read_list(folder / spec["list"])
    else:
        ids = sorted(p.name.removesuffix(spec["image_suffix"]) for p in images.glob("*" + spec["image_suffix"]))
    if not ids:
        raise DataError(f"{path}: no *{spec['image_suffix']} in {images}")
    shift = int(spec["zero_is_ignored"])
    lut = lookup_table(range(shift, len(classes) + shift), [0] * shift + list(spec["ignore"]))
    items = [(i, str(images / (i + spec["image_suffix"])), str(labels / (i + spec["label_suffix"])), lut) for i in ids]
    for _, image, label, _ in items:
        for needed in (image, label):
            if not os.path.isfile(needed):
                raise DataError(f"{path}: {needed} is missing")
    palette = (spec["palette"] or voc_palette(len(classes) + 1)[1 - int(spec["background"]) :])[: len(classes)]
    return SegmentationSet(spec["name"], classes, spec["background"], items, palette)


def _spec_fields(path):
    """The checked fields of a SPEC.json with their defaults."""
    try:
        given = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    needed = {"name", "images", "labels", "classes"}
    if not isinstance(given, dict) or needed - given.keys():
        raise DataError(f"{path}: needs the fields {', '.join(sorted(needed))}")
    if unknown := given.keys() - needed - SPEC_DEFAULTS.keys():
        raise DataError(f"{path}: unknown field {sorted(unknown)[0]!r}")
    spec = SPEC_DEFAULTS | given
    for field, kind in SPEC_KINDS.items():
        if not isinstance(spec[field], kind):
            raise DataError(f"{path}: {field} cannot be {spec[field]!r}")
    classes, palette = spec["classes"], spec["palette"]
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes) or not 0 < len(classes) < 255:
        raise DataError(f"{path}: classes must be a list of 1 to 254 names")
    if spec["background"] and (classes[0] != "background" or len(classes) < 2):
        raise DataError(f'{path}: with "background": true the first class is "background", then at least one more')
    if len(set(classes)) < len(classes) or "background" in classes[int(spec["background"]) :]:
        raise DataError(f'{path}: class names must differ, and "background" is a class only with "background": true')
    if palette and (len(palette) < len(classes) or not all(map(_is_colour, palette))):
        raise DataError(f"{path}: palette needs one [r, g, b] of 0 to 255 per class")
    if not all(isinstance(value, int) and 0 <= value <= 255 for value in spec["ignore"]):
        raise DataError(f"{path}: ignore must be a list of stored values, 0 to 255")
    if spec["name"] in BENCHMARKS:
        raise DataError(f"{path}: {spec['name']} is the name of a benchmark; choose another")
    if not re.fullmatch(r"[\w.-]+", spec["name"]):
        raise DataError(f"{path}: name {spec['name']!r} becomes a file name; use letters, digits, '.', '_' and '-'")
    return spec


def _is_colour(value):
    whole = isinstance(value, list) and all(isinstance(v, int) and 0 <= v <= 255 for v in value)
    return whole and len(value) == 3


def read_list(path):
    """Image ids, one a line; DataError when the file is missing or empty."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: the list of image ids is missing")
    ids = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not ids:
        raise DataError(f"{path}: holds no image ids")
    if len(set(ids)) < len(ids):
        raise DataError(f"{path}: holds {max(ids, key=ids.count)} twice")
    return ids


def read_text(path):
    """A UTF-8 text file; DataError when it is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a text file that can be read ({error})") from error


# ---- the eight benchmarks: class names exactly as MMSegmentation's defaults, none expanded or rephrased (Sec. 4.1) --
# One line per fact, to be checked by eye. Names are separated by commas; ADE20K's "bed " has a blank at its end there.
VOC_CLASSES = (
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,pottedplant,"
    "sheep,sofa,train,tvmonitor"
).split(",")
CONTEXT_CLASSES = (
    "aeroplane,bag,bed,bedclothes,bench,bicycle,bird,boat,book,bottle,building,bus,cabinet,car,cat,ceiling,chair,"
    "cloth,computer,cow,cup,curtain,dog,door,fence,floor,flower,food,grass,ground,horse,keyboard,light,motorbike,"
    "mountain,mouse,person,plate,platform,pottedplant,road,rock,sheep,shelves,sidewalk,sign,sky,snow,sofa,table,"
    "track,train,tree,truck,tvmonitor,wall,water,window,wood"
).split(",")
# The ids of PASCAL Context's 459-class maps: the k-th is class k, so 0 is the background and 2 is aeroplane, class 1.
CONTEXT_IDS = (
    [0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159]
    + [162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368]
    + [397, 415, 416, 420, 424, 427, 440, 445, 454, 458]
)
# The first 80 are COCO-Object's.
COCO_CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,"
    "wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,"
    "chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,"
    "toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush,banner,blanket,branch,"
    "bridge,building-other,bush,cabinet,cage,cardboard,carpet,ceiling-other,ceiling-tile,cloth,clothes,clouds,"
    "counter,cupboard,curtain,desk-stuff,dirt,door-stuff,fence,floor-marble,floor-other,floor-stone,floor-tile,"
    "floor-wood,flower,fog,food-other,fruit,furniture-other,grass,gravel,ground-other,hill,house,leaves,light,mat,"
    "metal,mirror-stuff,moss,mountain,mud,napkin,net,paper,pavement,pillow,plant-other,plastic,platform,playingfield,"
    "railing,railroad,river,road,rock,roof,rug,salad,sand,sea,shelf,sky-other,skyscraper,snow,solid-other,stairs,"
    "stone,straw,structural-other,table,tent,textile-other,towel,tree,vegetable,wall-brick,wall-concrete,wall-other,"
    "wall-panel,wall-stone,wall-tile,wall-wood,water-other,waterdrops,window-blind,window-other,wood"
).split(",")
CITYSCAPES_CLASSES = (
    "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider,car,truck,"
    "bus,train,motorcycle,bicycle"
).split(",")
ADE_CLASSES = (
    "wall,building,sky,floor,tree,ceiling,road,bed ,windowpane,grass,cabinet,sidewalk,person,earth,door,table,"
    "mountain,plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,rug,field,armchair,seat,fence,desk,"
    "rock,wardrobe,lamp,bathtub,railing,cushion,base,box,column,signboard,chest of drawers,counter,sand,sink,"
    "skyscraper,fireplace,refrigerator,grandstand,path,stairs,runway,case,pool table,pillow,screen door,stairway,"
    "river,bridge,bookcase,blind,coffee table,toilet,flower,book,hill,bench,countertop,stove,palm,kitchen island,"
    "computer,swivel chair,boat,bar,arcade machine,hovel,bus,towel,light,truck,tower,chandelier,awning,streetlight,"
    "booth,television receiver,airplane,dirt track,apparel,pole,land,bannister,escalator,ottoman,bottle,buffet,"
    "poster,stage,van,ship,fountain,conveyer belt,canopy,washer,plaything,swimming pool,stool,barrel,basket,"
    "waterfall,tent,bag,minibike,cradle,oven,ball,food,step,tank,trade name,microwave,pot,animal,bicycle,lake,"
    "dishwasher,screen,blanket,sculpture,hood,sconce,vase,traffic light,tray,ashcan,fan,pier,crt screen,plate,"
    "monitor,bulletin board,shower,radiator,glass,clock,flag"
).split(",")
# Stored values of the original maps: the k-th id is class k.
COCO_IDS = [i for i in range(182) if i not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]
CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def colours(text):
    """[[r, g, b], ...] of a string of six hexadecimal digits per colour."""
    return [list(bytes.fromhex(text[i : i + 6])) for i in range(0, len(text), 6)]


COCO_PALETTE = colours(
    "00c04000c04000406080c0c000404000c0e000c0c080c04000c06080c0408020c00000e000004000a0c08000608000c00020c08080e0"
    "0000c080a0c080800080002080200080008040802000a000000000c080a00020000080804080a080a000008000c08020806080000080"
    "40002000e080800000c000a00060808080804000a080e080808040c000208060008000c000802040e0000000408080a04060000080c0"
    "0080a0c0e000008040808020c020800040c000002040a0808040408000a040208080c0c00000a0c0a08080c000800060c02000804080"
    "40806040a000004000c080e040200000c0804080e0c0a00000c000c08060c0608000408040006040e080804000c000e040608080c080"
    "4000e0c0e08080c040c00060c060008040c000806000e0004040408080e000600040c0c00080e080e00040c0408080608020804000c0"
    "00406000a080c000408040e0002080c080c00040e080a080c08000804020802040c0008040c02000a040400000c0c0a0002040408080"
    "40c0a080a040408000c0c0208060c040008040402000e0c0c00000c040a00060c0c080804040a080e0c0c08040c04020806040c000c0"
    "00c02040e04040004080c0a04060404080c000c0a0c0e04040804080c020c020c04040c000402040a0c0c040408040a04020c0c0c0c0"
    "0040a0c0a0c0c0c000804060c02040c0408040c06040a040404000"
)
CITYSCAPES_PALETTE = colours(
    "804080f423e846464666669cbe9999999999faaa1edcdc006b8e2398fb984682b4dc143cff000000008e000046003c640050640000e6770b20"
)
# PASCAL Context uses the first 60.
ADE_PALETTE = colours(
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04"
    "ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffff"
    "e0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe000"
    "99ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff00"
    "0052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ffff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc2"
    "00ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ff"
    "ff001f00b8ff00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ff"
    "ff007afff5000abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff"
    "b8ff000085ffffd60019c2c266ff005c00ff"
)


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies under --data-root and how its stored labels become classes.

    labels: (path, lookup table) pairs; the first path that exists is taken. {id} comes from the list file, or from the
    images that are there ({id} with its folder, as in Cityscapes' city/name). partial: the classes of Table 3.
    """

    title: str
    full: int
    root: str
    images: str
    labels: tuple
    list: str | None
    classes: list
    palette: list
    background: bool = False
    partial: tuple = ()


def _from_zero(n):
    return lookup_table(range(n), [255])


def _from_one(n):
    return lookup_table(range(1, n + 1), [0, 255])


def _things():
    """stuffthingmaps -> COCO-Object: the 80 things become 1..80; stuff and 255 are background, 0."""
    table = np.zeros(256, dtype=np.int16)
    table[COCO_IDS[:80]] = np.arange(1, 81)
    return table


_VOC = {"root": "VOCdevkit/VOC2012", "images": "JPEGImages/{id}.jpg", "list": "ImageSets/Segmentation/val.txt"}
_CONTEXT = {"root": "VOCdevkit/VOC2010", "images": "JPEGImages/{id}.jpg"}
_CONTEXT["list"] = "ImageSets/SegmentationContext/val.txt"
_COCO = {"root": "coco_stuff164k", "images": "images/val2017/{id}.jpg", "list": None}
_VOC_LABEL, _CONTEXT_LABEL = "SegmentationClass/{id}.png", "SegmentationClassContext/{id}.png"
_COCO_LABEL, _CITY_LABEL = "annotations/val2017/{id}", "gtFine/val/{id}_gtFine"

BENCHMARKS = {  # in the order of Table 1
    "voc": Benchmark(
        title="PASCAL VOC",
        full=1449,
        labels=((_VOC_LABEL, _from_zero(21)),),
        classes=["background", *VOC_CLASSES],
        palette=voc_palette(21),
        background=True,
        **_VOC,
    ),
    "context": Benchmark(
        title="PASCAL Context",
        full=5104,
        labels=((_CONTEXT_LABEL, _from_zero(60)),),
        classes=["background", *CONTEXT_CLASSES],
        palette=ADE_PALETTE[:60],
        background=True,
        **_CONTEXT,
    ),
    "coco_object": Benchmark(
        title="COCO-Object",
        full=5000,
        labels=((_COCO_LABEL + "_instanceTrainIds.png", _from_zero(81)), (_COCO_LABEL + ".png", _things())),
        classes=["background", *COCO_CLASSES[:80]],
        palette=[[0, 0, 0], *COCO_PALETTE[:80]],
        background=True,
        **_COCO,
    ),
    "voc20": Benchmark(
        title="PASCAL VOC20",
        full=1449,
        labels=((_VOC_LABEL, _from_one(20)),),
        classes=VOC_CLASSES,
        palette=voc_palette(21)[1:],
        partial=("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
        **_VOC,
    ),
    "context59": Benchmark(
        title="PASCAL Context59",
        full=5104,
        labels=((_CONTEXT_LABEL, _from_one(59)),),
        classes=CONTEXT_CLASSES,
        palette=ADE_PALETTE[1:60],
        partial=("cow", "motorbike", "sofa", "cat"),
        **_CONTEXT,
    ),
    "coco_stuff": Benchmark(
        title="COCO-Stuff",
        full=5000,
        labels=(
            (_COCO_LABEL + "_labelTrainIds.png", _from_zero(171)),
            (_COCO_LABEL + ".png", lookup_table(COCO_IDS, [255], rest=IGNORE)),
        ),
        classes=COCO_CLASSES,
        palette=COCO_PALETTE,
        partial=("frisbee", "skateboard", "cardboard", "carrot", "scissors", "suitcase", "giraffe", "cow", "road")
        + ("wall-concrete", "tree", "grass", "river", "clouds", "playingfield"),
        **_COCO,
    ),
    "cityscapes": Benchmark(
        title="Cityscapes",
        full=500,
        root="cityscapes",
        images="leftImg8bit/val/{id}_leftImg8bit.png",
        labels=(
            (_CITY_LABEL + "_labelTrainIds.png", _from_zero(19)),
            (_CITY_LABEL + "_labelIds.png", lookup_table(CITYSCAPES_IDS, [255], rest=IGNORE)),
        ),
        list=None,
        classes=CITYSCAPES_CLASSES,
        palette=CITYSCAPES_PALETTE,
    ),
    "ade20k": Benchmark(
        title="ADE20K",
        full=2000,
        root="ade/ADEChallengeData2016",
        images="images/validation/{id}.jpg",
        labels=(("annotations/validation/{id}.png", _from_one(150)),),
        list=None,
        classes=ADE_CLASSES,
        palette=ADE_PALETTE,
    ),
}


def read_benchmark(name, data_root):
    """A benchmark under data_root as a SegmentationSet; DataError says in one line what is missing of it."""
    bench = BENCHMARKS[name]
    root = Path(data_root) / bench.root
    folders = [root / pattern.split("{id}")[0] for pattern in (bench.images, bench.labels[-1][0])]
    listed = [root / bench.list] if bench.list else []
    if missing := [p for p in folders + listed if not p.exists()] if root.is_dir() else [root]:
        prepared = name.startswith("context") and root.is_dir()
        hint = " (python data.py prepare-context makes labels and list)" if prepared else ""
        raise DataError(f"{name}: {', '.join(map(str, missing))} missing{hint}")
    if bench.list:
        ids = read_list(root / bench.list)
    else:
        after = bench.images.split("{id}")[1]
        found = [p for p in folders[0].glob("**/*" + after) if p.name[0] != "."]  # some archives bring ._ files along
        ids = sorted(p.relative_to(folders[0]).as_posix().removesuffix(after) for p in found)
        if not ids:
            raise DataError(f"{name}: no *{after} under {folders[0]}")
    items, missing = [], []
    for i in ids:
        image = root / bench.images.format(id=i)
        choices = [(root / path.format(id=i), lut) for path, lut in bench.labels]
        label, lut = next(((path, lut) for path, lut in choices if path.is_file()), (choices[-1][0], None))
        missing += [path for path, there in ((image, image.is_file()), (label, lut is not None)) if not there]
        items.append((i, str(image), str(label), lut))
    if missing:
        more = f" and {len(missing) - SHOWN} more images or labels" if len(missing) > SHOWN else ""
        raise DataError(f"{name}: {', '.join(map(str, missing[:SHOWN]))}{more} missing")
    return SegmentationSet(name, bench.classes, bench.background, items, bench.palette, bench.full, bench.partial)


def read_set(name_or_spec, data_root):
    """A SegmentationSet from a benchmark's name or a SPEC.json; DataError for an unknown name, with the close ones."""
    if name_or_spec in BENCHMARKS:
        return read_benchmark(name_or_spec, data_root)
    if name_or_spec.endswith(".json"):
        return read_spec(name_or_spec)
    close = difflib.get_close_matches(name_or_spec.lower(), BENCHMARKS) or list(BENCHMARKS)
    raise DataError(f"--datasets {name_or_spec}: unknown; did you mean {', '.join(close)}, or a SPEC.json?")


# ---- python data.py check -------------------------------------------------------------------------------------------

TABLE = "{:<13}{:<9}{:<14}{:<24}{}"  # a line of the table


def pair_or_error(paths):
    """label_values, for a pool: the text of its DataError instead of the error."""
    try:
        return label_values(*paths)
    except DataError as error:
        return str(error)


def check_sets(names, data_root, workers=1):
    """Prints a table of the sets, then what is wrong with them; returns the exit code, 0 only when all are whole."""
    seen, report = {}, []
    print(TABLE.format("set", "state", "images", "label values", "allowed by the rule"))
    for name in names:
        try:
            dataset = read_set(name, data_root)
        except DataError as error:
            report.append(str(error))
            print(TABLE.format(name, "missing", "", "", "").rstrip())
            continue
        todo = [item[1:3] for item in dataset.items if item[1:3] not in seen]  # voc and voc20 share their files
        seen.update(zip(todo, in_parallel(pair_or_error, todo, workers, f"checking {name}"), strict=True))
        row, wrong = check_set(dataset, seen)
        print(TABLE.format(dataset.name, "wrong" if wrong else "ok", *row))
        report += [f"{dataset.name}: {line}" for line in wrong]
    print("".join(f"\n{line}" for line in report), end="\n" if report else "")
    return int(bool(report))


def check_set(dataset, seen):
    """One set, of the values or errors that were seen: (columns of the table, lines of what is wrong)."""
    found = [(label, seen[image, label], lut) for _, image, label, lut in dataset.items]
    wrong = [v if isinstance(v, str) else misfit(label, v, lut) for label, v, lut in found]
    wrong = [line for line in wrong if line]
    if len(wrong) > SHOWN:
        wrong[SHOWN:] = [f"and {len(wrong) - SHOWN} more files"]
    full = dataset.full or len(dataset)
    if len(dataset) != full:
        wrong.append(f"{len(dataset)} images, the benchmark has {full}: results will be marked partial")
    values = sorted({value for _, v, _ in found if not isinstance(v, str) for value in v})
    rules = " or ".join({allowed(lut): None for *_, lut in found})  # more than one where some files are converted
    return (f"{len(dataset)} of {full}", spans(values), rules), wrong


# ---- python data.py prepare-context ---------------------------------------------------------------------------------

MAT_FOLDER = "trainval"  # as trainval.tar.gz unpacks
MAT_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
MAT_MATRIX, MAT_COMPRESSED = 14, 15


def mat_elements(content, order):
    """(type, bytes) of the data elements in the body of a MATLAB 5 MAT-file; compressed ones are unpacked."""
    at = 0
    while at < len(content):
        kind, size = struct.unpack_from(order + "II", content, at)
        start, at = at + 8, at + 8 + size + (-size % 8 if kind != MAT_COMPRESSED else 0)
        if kind >> 16:  # a small element: size, type and up to 4 bytes in the place of a tag
            kind, size, start, at = kind & 0xFFFF, kind >> 16, start - 4, start
        body = content[start : start + size]
        yield from mat_elements(zlib.decompress(body), order) if kind == MAT_COMPRESSED else [(kind, body)]


def read_mat(path, name):
    """The real matrix [h, w] of this name in a MATLAB 5 MAT-file; DataError names a file that has none."""
    try:
        content = Path(path).read_bytes()
        order = {b"\0\1IM": "<", b"\1\0MI": ">"}.get(content[124:128])  # version 1, in the file's own byte order
        if not order:
            raise ValueError("no such header")
        for kind, body in mat_elements(content[128:], order):
            flags, shape, called, values = [*mat_elements(body, order)][:4] if kind == MAT_MATRIX else [(0, b"")] * 4
            if called[1] == name.encode():
                height, width = struct.unpack(order + "2i", shape[1])
                return np.frombuffer(values[1], order + MAT_TYPES[values[0]]).reshape(width, height).T  # [h, w]
    except (OSError, ValueError, KeyError, struct.error, zlib.error) as error:
        raise DataError(f"{path}: cut off, or not a MATLAB 5 MAT-file ({error})") from error
    raise DataError(f"{path}: holds no matrix {name}")


def context_label(paths):
    """One (.mat, .png): the 459 classes become 60; every id that is not one of CONTEXT_IDS is background, 0."""
    mat, png = paths
    stored = read_mat(mat, "LabelMap")  # [h, w]
    if not np.isfinite(stored).all() or (stored != np.floor(stored)).any():
        raise DataError(f"{mat}: LabelMap holds values that are not whole; PASCAL Context's ids are 0 to 459")
    ids = stored.astype(np.int64)
    values = np.unique(ids)
    if not values.size or values[0] < 0 or values[-1] > 459:
        raise DataError(f"{mat}: LabelMap holds {spans(values.tolist())}; PASCAL Context's ids are 0 to 459")
    table = np.zeros(460, dtype=np.uint8)
    table[CONTEXT_IDS] = np.arange(60)
    label = Image.fromarray(table[ids])
    label.putpalette([v for colour in ADE_PALETTE[:60] for v in colour])
    write_whole(png, lambda temporary: label.save(temporary, "PNG"))


def context_val_ids(root, mats):
    """The ids of PASCAL Context's validation images.

    Paper silent: which. The benchmark's 5,104 (MMSegmentation's) are those that trainval_merged.json calls val; where
    neither it nor a val.txt is there, VOC2010's val images, one more, and the result is marked.
    """
    own, merged = root / BENCHMARKS["context"].list, root / "trainval_merged.json"
    if own.is_file():
        return read_list(own)
    if not merged.is_file():
        return [i for i in read_list(root / "ImageSets/Main/val.txt") if (mats / f"{i}.mat").is_file()]
    try:
        images = json.loads(read_text(merged))["images"]
        return sorted(Path(image["file_name"]).stem for image in images if image["phase"] == "val")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{merged}: has no images with file_name and phase ({error!r})") from error


def prepare_context(data_root, mats=None, workers=1):
    """SegmentationClassContext/*.png, then val.txt, from the 459-class .mat files; files that are there are kept."""
    bench = BENCHMARKS["context"]
    root = Path(data_root) / bench.root
    mats, listed = Path(mats or root / MAT_FOLDER), root / bench.list
    if not mats.is_dir():
        raise DataError(f"{mats}: no such folder; unpack PASCAL Context's trainval.tar.gz there, or give --mat")
    ids = context_val_ids(root, mats)
    pairs = [(mats / f"{i}.mat", root / bench.labels[0][0].format(id=i)) for i in ids]
    todo = [(mat, png) for mat, png in pairs if not png.is_file()]
    missing = [mat for mat, _ in todo if not mat.is_file()]
    if missing or not ids:
        raise DataError(f"{(missing or [mats])[0]}: {len(missing) or 'all'} of the val images' .mat files are missing")
    pairs[0][1].parent.mkdir(exist_ok=True)
    list(in_parallel(context_label, todo, workers, "PASCAL Context"))
    if not listed.is_file():  # last: what it lists is there
        listed.parent.mkdir(parents=True, exist_ok=True)
        write_whole(listed, lambda temporary: temporary.write_text("".join(f"{i}\n" for i in ids)))
    print(f"{listed}: {len(ids)} images; {len(todo)} label PNGs written, {len(ids) - len(todo)} were there")
    if len(ids) != bench.full:
        hint = f"for its own list put trainval_merged.json into {root}, delete {listed.name} and run again"
        print(f"warning: the benchmark has {bench.full} images, so results are marked partial; {hint}", file=sys.stderr)
    return 0


# ---- command line ---------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    """The command line of check and prepare-context."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    what = "are labelled sets there and whole? Exit code 1 when one is missing, partial or wrong"
    check = commands.add_parser("check", help=what, description=what)
    of = check.add_mutually_exclusive_group()
    of.add_argument("shards", nargs="*", default=[], metavar="SHARD", help="tar shards of image-text pairs instead")
    of.add_argument("--datasets", nargs="+", metavar="NAME|SPEC.json", help="default: the eight benchmarks")
    what = "PASCAL Context's label PNGs and val.txt from its 459-class .mat files; what is there is kept"
    prepare = commands.add_parser("prepare-context", help=what, description=what)
    prepare.add_argument("--mat", help=f"folder of the .mat files; default: {MAT_FOLDER} in VOCdevkit/VOC2010")
    for command in (check, prepare):
        command.add_argument("--data-root", default="data", help="folder of the benchmarks (default: data)")
        command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    args = p.parse_args(argv)
    if args.workers < 1:
        p.error("--workers must be at least 1")
    sets = [name for name in getattr(args, "shards", []) if name.endswith(".json") or name in BENCHMARKS]
    if sets:
        p.error(f"{sets[0]} is no tar shard; labelled sets go to --datasets")
    return args


def main(args):
    """One command; returns the exit code."""
    if args.command == "prepare-context":
        return prepare_context(args.data_root, args.mat, args.workers)
    if args.shards:
        return check_shards(args.shards, args.workers)
    return check_sets(args.datasets or list(BENCHMARKS), args.data_root, args.workers)


if __name__ == "__main__":
    arguments = parse_args()
    try:
        sys.exit(main(arguments))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
