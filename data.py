# SPDX-License-Identifier: MIT
"""Image-text pairs from tar shards for training (Sec. 4.1 of the paper).

    python data.py check 'data/gcc3m/*.tar'  # reads and decodes every pair, names what is wrong

    data/gcc3m/{000..331}.tar      image + caption under one stem (.jpg .jpeg .png .webp, with
                                   .txt or .json), as img2dataset writes them; globs and
                                   {first..last} ranges both work

Needs files.py beside it, torch, torchvision, numpy and tqdm; no tar or web-dataset package.
"""

import argparse
import bisect
import collections
import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import transforms as T

import files
from files import InputError

KINDS = dict.fromkeys(".jpg .jpeg .png .webp".split(), "image") | {".txt": "text", ".json": "json"}
BadSample = files.PictureError  # a pair that cannot be used; its reason is one of these:
REASONS = ("shard", "image", "size", "caption")
ENOUGH = 1000  # samples, before their share of bad ones can stop a run
JSON = 2**31  # added to the size of a text in the index where it is a .json


# ---- where the pairs lie: shards, and an index of 16 bytes a pair ----


def expand_shards(patterns):
    """Sorted shard paths of globs and {000..347} ranges, each once; InputError: what is missing."""
    found = []
    for pattern in patterns:
        names = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
        if not names and (match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)):
            first, last = match.groups()
            for n in range(int(first), int(last) + 1):
                names.append(pattern.replace(match[0], f"{n:0{len(first)}d}"))
                if not os.path.isfile(names[-1]):  # at once: a range may be of any length
                    raise InputError(f"--data {pattern}: {names[-1]} is missing")
        if not names:
            hint = "download CC3M/CC12M with img2dataset or give --data"
            raise InputError(f"--data {pattern}: no such shard; {hint}")
        found += names
    return list(dict.fromkeys(found))


class Headers(io.FileIO):
    """A tar from which tarfile can read headers of up to 8 kB, long names among them, no more."""

    def read(self, size=-1):
        if not 0 <= size <= 2**13:  # what it does with a long one can take minutes
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def list_members(path):
    """([(name, offset, size), ...] of the files in a tar, {what is wrong: [where]}).

    tarfile reads 32,000 headers a second on one core (AMD EPYC): the 45 million of CC3M and CC12M
    take 24 minutes of one core's time, 12 on two cores, 2 on sixteen, once a run.
    """
    found, cut, end = [], {"cut off shards": [path]}, 0
    try:
        if not os.path.isfile(path):  # opening a fifo would wait for ever
            raise tarfile.ReadError("no file: a folder, or a broken link?")
        with Headers(path) as file, tarfile.TarFile(fileobj=file) as tar:
            end = os.path.getsize(path)
            while member := tar.next():
                at, size = member.offset_data, member.size
                if size < 0 or tar.offset < at:
                    raise tarfile.ReadError("a negative size")  # would lead back, for ever
                if member.isfile() and not member.issparse() and at + size <= end:
                    found.append((member.name, at, size))
                tar.members.clear()  # else tarfile keeps a kilobyte a member
            # A tar ends in a block of zeros; at a broken header tarfile just stops.
            file.seek(tar.offset)
            return found, {} if file.read(512) == bytes(512) else cut
    except Exception as error:  # tarfile fails with whatever it stumbles over
        if end:
            return found, cut
        reason = f"{path}: not a tar shard that can be read ({files.first_line(error)})"
        return [], {"unreadable shards": [reason]}  # not even the first header


def scan_shard(path):
    """(counts [4], rows [pairs, 4], {what is wrong: [where]}) of a shard; both uint32.

    Counts: pairs, half pairs, duplicates, 1 if it is cut off or worse.

    A row is where a pair lies: offset of the image in blocks of 512 bytes, its size, the text's
    offset and size, to which JSON is added where it is a .json. Members of one stem make a pair, in
    any order and with others in between; the first of two equal names counts, a .txt before a
    .json, and hidden files (._x.jpg) not at all.
    """
    members, wrong = list_members(path)
    parts, duplicates, rows = {}, 0, []
    for name, at, size in members:
        stem, suffix = os.path.splitext(name)
        kind = KINDS.get(suffix.lower())
        hidden = os.path.basename(stem).startswith(".")
        if kind and not hidden and size < JSON and at < 2**41:  # what an index can hold
            part = parts.setdefault(stem, {})
            duplicates += kind in part
            part.setdefault(kind, (at // 512, size + JSON * (kind == "json")))
    for part in parts.values():
        if "image" in part and len(part) > 1:
            rows.append(part["image"] + (part.get("text") or part["json"]))
    counts = [len(rows), len(parts) - len(rows), duplicates, bool(wrong)]
    if not rows and not wrong:
        wrong["shards without pairs"] = [f"{path}: no image-text pairs"]
    table = np.array([counts, *rows], dtype=np.uint32)
    return table[0], table[1:], wrong


def summed(faults):
    """{what is wrong: (how often, "where; where; where")} of many such dicts, for people."""
    wrong = collections.defaultdict(list)
    for fault in faults:
        for what, where in fault.items():
            wrong[what] += where
    return {
        what: (len(where), files.printable("; ".join(where[:3])))
        for what, where in sorted(wrong.items())
    }


def scan_shards(shards):
    """The index of shards, uint32 [shards + pairs, 4]: the counts of each, then the rows of each.

    InputError names the shards that cannot be read; a warning those that are cut or hold no pair.
    """
    # More processes than cores: what they wait for is the disk.
    processes = min(len(shards) // 8, 32)
    scanned = files.in_parallel(scan_shard, shards, processes, "scanning shards")
    counts, rows, faults = zip(*scanned, strict=True)
    wrong = summed(faults)
    words = ", ".join(f"{n} {what}: {where}" for what, (n, where) in wrong.items())
    if "unreadable shards" in wrong or not any(map(len, rows)):
        raise InputError(f"{words}; a pair is a.jpg + a.txt (or .json) in a tar")
    if wrong:
        print(f"warning: {words}", file=sys.stderr)
    return np.concatenate([counts, *rows])  # [shards + pairs, 4]


def open_index(path):
    """The rows in an index's file, uint32 [.., 4], mapped: the processes of a node share them.

    They stand after their SHA-256; None where the file is not there, whole.
    """
    try:
        index = np.memmap(path, np.uint32, "r", offset=32).reshape(-1, 4)  # [shards + pairs, 4]
        with open(path, "rb") as file:
            return index if file.read(32) == hashlib.sha256(index).digest() else None
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def node_lock(key):
    """One process of a node at a time; a killed one loses its lock: nobody waits for the dead."""
    path = Path(tempfile.gettempdir(), f"gcl-{os.getuid()}-{key}.lock")
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # unlike flock, not handed down to the scanning processes
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def index_shards(shards, folder=None):
    """The index of shards, uint32 [shards + pairs, 4]: counts first, then rows (see scan_shard).

    Kept as folder/index-KEY, where KEY hangs on each shard's path, size and time of change. One
    process of a node scans, the others wait for it. Without a folder nothing is kept.
    """
    if folder is None:
        return scan_shards(shards)
    facts = [os.path.abspath(path) for path in shards]
    stats = map(os.stat, filter(os.path.exists, shards))  # of a broken link there is none
    facts += [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    path = Path(folder, f"index-{key}")
    with node_lock(key):
        if (index := open_index(path)) is None:
            index = scan_shards(shards)
            content = hashlib.sha256(index).digest() + index.tobytes()
            files.write_bytes(path, content)
            index = open_index(path)
    return index


# ---- one pair ----


def read_bytes(path, row):
    """[image, text] of a row of an index as bytes; BadSample where the shard has them no longer."""
    found = []
    try:
        with open(path, "rb", buffering=0) as file:
            for at, size in row.reshape(2, 2).tolist():  # [2, 2]
                file.seek(at * 512)
                found.append(file.read(size % JSON))
                if len(found[-1]) < size % JSON:
                    raise BadSample("shard", "shorter than it was when it was scanned")
    except OSError as error:
        raise BadSample("shard", error) from error
    return found


def decode_caption(content, from_json):
    """The caption in a .txt or .json; BadSample where there is none, or not in UTF-8."""
    try:
        text = content.decode("utf-8-sig")
        text = (json.loads(text)["caption"] if from_json else text).strip()
        text.encode()  # half a surrogate pair, which JSON can spell, is no text
    except Exception as error:  # JSON can hold anything, nested to any depth
        raise BadSample("caption", f"no caption ({files.first_line(error)})") from error
    if not text:
        raise BadSample("caption", "an empty caption")
    return text


def read_pair(path, row):
    """(RGB PIL image, caption) of one row of an index; BadSample."""
    image, text = read_bytes(path, row)
    return files.read_picture(io.BytesIO(image)), decode_caption(text, row[3] >= JSON)


def pair_name(path, row):
    """Shard and member name of the image of one row of an index, for messages."""
    names = {at // 512: name for name, at, _ in list_members(path)[0]}
    return f"{path}: {names.get(int(row[0]), 'a member that is gone')}"


def train_transform(image_size, norm, strong):
    """PIL image -> normalised float [3, image_size, image_size]. norm: (mean, std).

    Paper silent: augmentation. Random resized crop 0.08-1, bicubic as CLIP's, and flip. strong, as
    the release: bilinear crops, RandAugment, random erasing (0.25, pixel noise).
    Release differs: its RandAugment is timm's rand-m9-mstd0.5-inc1, other operations with noise on
    their magnitude; here it is torchvision's, 2 operations of magnitude 9.
    """
    kernel = T.InterpolationMode.BILINEAR if strong else T.InterpolationMode.BICUBIC
    steps = [
        T.RandomResizedCrop(image_size, interpolation=kernel),  # of 0.08 to 1, as is usual
        T.RandomHorizontalFlip(),
        *([T.RandAugment()] if strong else []),
        T.ToTensor(),
        T.Normalize(*norm, inplace=True),
        *([T.RandomErasing(0.25, value="random")] if strong else []),
    ]
    return T.Compose(steps)


class PairDataset(Dataset):
    """Image-text pairs of tar shards, addressed by (position in the run, index of the pair).

    All randomness of a sample (augmentation, gumbel noise) is seeded by the run's seed and the
    position, so it does not depend on ranks, workers or interruptions. cache: the folder that keeps
    the index of the shards (index_shards).
    """

    def __init__(self, shards, transform, tokenizer, noise_size, seed=0, cache=None):
        self.shards, self.transform, self.tokenizer = shards, transform, tokenizer
        self.noise_size, self.seed = noise_size, seed
        self.index = index_shards(shards, cache)  # [shards + pairs, 4]
        self.ends = np.cumsum(self.index[: len(shards), 0], dtype=np.int64).tolist()

    def __getstate__(self):
        """A worker that is not forked gets the name of the mapped index, not a copy."""
        mapped = isinstance(self.index, np.memmap)
        return self.__dict__ | {"index": self.index.filename if mapped else self.index}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if not isinstance(self.index, np.ndarray):
            self.index = open_index(self.index)

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, key):
        """key: (position, index). Returns (image [3, h, w], tokens [context], noise [1, H, W],
        bad int32 [reasons]).

        A bad sample is replaced by the one that lies a hundredth of all pairs further on, so that a
        broken stretch of a shard is left at once; bad counts those that were passed over, by
        REASONS. InputError after 100 of them.
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
            name = pair_name(*self.locate(index))
            raise InputError(f"{name}: unreadable ({last}), and so are {tries - 1} others")
        with torch.random.fork_rng(devices=[]):  # the transforms draw from torch's global generator
            # torch.manual_seed would ask every device.
            torch.default_generator.manual_seed(self.seed * 1_000_003 + position)
            image = self.transform(image)  # [3, h, w]
            noise = torch.rand(1, *self.noise_size)  # [1, H, W]
        # A tokenizer's time grows with the square of a word; 77 tokens end long before.
        return image, self.tokenizer([caption[:2000]])[0], noise, bad

    def fingerprint(self):
        """A digest of where all pairs lie: other shards, or the same with other members, differ."""
        return hashlib.sha256(np.ascontiguousarray(self.index)).hexdigest()

    def locate(self, index):
        """(shard path, row of the index) of a pair."""
        shard = bisect.bisect_right(self.ends, index)
        return self.shards[shard], self.index[len(self.shards) + index]

    def read(self, index):
        """(RGB PIL image, caption) of a pair; BadSample."""
        return read_pair(*self.locate(index))


def too_many_bad(counts, seen, share):
    """InputError once more than this share of ENOUGH samples was bad.

    counts: of bad samples by REASONS; seen: how many were good.
    """
    bad = int(sum(counts))
    if seen + bad >= ENOUGH and bad > share * (seen + bad):
        named = ", ".join(f"{reason} {int(n)}" for reason, n in zip(REASONS, counts, strict=True))
        hint = "see python data.py check SHARD..., or raise --max-bad"
        words = f"{bad} of {seen + bad} samples are bad ({named})"
        raise InputError(f"{words}, more than a share of {share:g}; {hint}")


@dataclasses.dataclass
class GlobalOrder:
    """The batches of one rank as lists of (position, index): a batch sampler that resumes anywhere.

    Position p of the run (steps x global batch) is entry p mod n of a seeded permutation of epoch p
    div n. Rank r takes the r-th slice of every global batch, so the global batch is the same for
    any number of ranks.
    """

    n: int  # pairs
    batch_size: int  # of all ranks
    steps: int
    seed: int = 0
    start: int = 0
    rank: int = 0
    ranks: int = 1

    def __len__(self):
        return self.steps - self.start

    def __iter__(self):
        local, epoch, order = self.batch_size // self.ranks, -1, None
        for step in range(self.start, self.steps):
            batch, first = [], step * self.batch_size + self.rank * local
            for position in range(first, first + local):
                if position // self.n != epoch:
                    epoch = position // self.n
                    order = np.arange(self.n, dtype=np.uint32)  # 4 bytes a pair
                    np.random.default_rng((self.seed, epoch)).shuffle(order)
                batch.append((position, int(order[position % self.n])))
            yield batch


# ---- python data.py check ----


def check_shard(path):
    """Decodes all pairs of a shard: (its counts [4], {what is wrong: [where]})."""
    counts, rows, wrong = scan_shard(path)
    for row in rows:
        try:
            read_pair(path, row)
        except BadSample as error:
            where = wrong.setdefault(f"bad: {error.reason}", [])
            where.append(f"{pair_name(path, row)} ({error})" if len(where) < 3 else "")
    return counts, wrong


def check_shards(patterns, processes=1):
    """Reads and decodes every pair, prints what is there and what is wrong; 1 if anything is."""
    shards = expand_shards(patterns)
    checked = files.in_parallel(check_shard, shards, min(len(shards), processes), "checking shards")
    counts, faults = zip(*checked, strict=True)
    pairs, half, double, _ = np.sum(counts, axis=0, dtype=np.int64)
    wrong = summed(faults)
    lines = {
        "shards": (len(shards), ""),
        "pairs": (pairs, ""),
        "half pairs": (half, "left out"),
        "duplicates": (double, "the first of each is used"),
        **wrong,
    }
    for what, (n, remark) in lines.items():
        print(f"{what:<20}{n:>12,}  {remark}".rstrip())
    return int(bool(wrong) or half + double > 0)


# ---- command line ----


def parse_args(argv=None):
    """The command line of check."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # What check did for labelled sets is elsewhere now; each mistake shows these lines.
    p.usage = """data.py check SHARD... [--workers N]
       (labelled sets have moved: python benchmarks.py check, or prepare-context)"""
    p.add_argument("command", choices=["check"], help="exit code 1 when anything is wrong")
    p.add_argument("shards", nargs="+", metavar="SHARD", help="files, globs, {000..331} ranges")
    p.add_argument("--workers", type=files.count, default=os.cpu_count(), help="default: all cores")
    return p.parse_args(argv)


def main(args):
    """check; returns the exit code."""
    return check_shards(args.shards, args.workers)


if __name__ == "__main__":
    sys.exit(files.command(main, parse_args()))
