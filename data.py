# SPDX-License-Identifier: MIT
"""Image-text pairs from tar shards for training (Sec. 4.1 of the paper).

    python data.py check 'data/gcc3m/*.tar'  # reads and decodes every pair, names what is wrong

    data/gcc3m/{000..331}.tar      image + caption under one stem (.jpg .jpeg .png .webp, with .txt or .json), as
                                   img2dataset writes them; globs and {first..last} ranges both work

Needs files.py beside it, torch, torchvision, numpy and tqdm; no tar or web-dataset package.
"""

import argparse
import bisect
import contextlib
import glob
import hashlib
import json
import os
import re
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import transforms as T

import files
from files import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


REASONS = ("shard", "image", "size", "caption")  # why a sample is bad


ENOUGH = 1000  # samples, before their share of bad ones can stop a run


JSON = 2**31  # added to the size of a text in the index where it is a .json


def expand_shards(patterns):
    """Sorted shard paths of globs and {000..347} ranges, each once; InputError for a pattern that matches no file."""
    found = []
    for pattern in patterns:
        match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
        if match:
            first, last = match.groups()
            numbers = range(int(first), int(last) + 1)
            names = [pattern.replace(match[0], f"{n:0{len(first)}d}") for n in numbers]
            if missing := [name for name in names if not os.path.isfile(name)]:
                raise InputError(
                    f"--data {pattern}: {missing[0]} is missing ({len(missing)} of {len(names)} shards)"
                )
        else:
            names = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
        if not names:
            raise InputError(
                f"--data {pattern}: no such shard; download CC3M/CC12M with img2dataset or give --data"
            )
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
            size, checksum = (
                int(header[124:136].partition(b"\0")[0], 8),
                int(header[148:156].partition(b"\0")[0], 8),
            )
            if checksum != sum(header[:148]) + sum(header[156:]) + 8 * 32 or at + 512 + size > end:
                raise ValueError("cut or broken")
            kind, start = header[156:157], at + 512
            if kind in (
                b"L",
                b"x",
            ):  # a long name, in GNU's or in POSIX's way, of the member that follows
                extra = file.read(size)
                path_record = re.search(rb"(?:^|\n)\d+ path=(.*)\n", extra)
                if kind == b"x" and re.search(
                    rb"(?:^|\n)\d+ (size|GNU\.sparse\S*|hdrcharset)=", extra
                ):
                    raise ValueError("not a plain member")
                name = (
                    extra.split(b"\0")[0]
                    if kind == b"L"
                    else path_record[1]
                    if path_record
                    else name
                )
            elif kind in (b"0", b"\0"):
                yield os.fsdecode(name or header_name(header)), start, size
                name = None
            elif kind != b"5" or size:  # folders alone are passed over
                raise ValueError("not a plain member")
            at = file.seek(start + -(-size // 512) * 512)


def list_members(path):
    """([(name, offset, size), ...] of the files in a tar, whether it is cut off); InputError for what is no tar."""
    try:
        if found := list(walk_headers(path)):
            return found, False
    except ValueError:
        found = []
    try:
        with tarfile.open(path, "r:") as tar:
            end = os.fstat(tar.fileobj.fileno()).st_size
            for member in tar:
                if (
                    member.isfile()
                    and not member.issparse()
                    and member.offset_data + member.size <= end
                ):
                    found.append((member.name, member.offset_data, member.size))
            tar.fileobj.seek(tar.offset)
            return found, tar.fileobj.read(512).count(0) != 512
    except (tarfile.TarError, OSError) as error:
        if not found:
            raise InputError(f"{path}: not a tar shard that can be read ({error})") from error
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
        if (
            kind not in ("image", ".txt", ".json")
            or os.path.basename(stem).startswith(".")
            or size >= JSON
        ):
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
    scanned = list(
        files.in_parallel(scan_shard, shards, min(len(shards) // 8, 32), "scanning shards")
    )
    counts = np.stack([count for count, _ in scanned])  # [shards, 4]
    for path, count in zip(shards, counts, strict=True):
        if count[3]:
            print(
                f"warning: {path}: cut off; using the {count[0]} pairs before the cut",
                file=sys.stderr,
            )
    if not counts[:, 0].any():
        raise InputError(
            f"{shards[0]}: no image-text pairs in {len(shards)} shard(s); need a.jpg + a.txt (or .json)"
        )
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
    facts = [
        (os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in shards
    ]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    path = Path(folder, f"index-{key}.npy")
    with node_lock(key):
        if (index := open_index(path, len(shards))) is None:
            parts = scan_shards(shards)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(path, lambda temporary: write_parts(temporary, parts))
            index = open_index(path, len(shards))
    return index


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
    neighbours = (
        end - start < 2 * image_size + 65536
    )  # one read is faster than two, over what lies between as well
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
    try:
        picture = files.read_picture(image)
    except files.PictureError as error:
        raise BadSample(error.reason, error) from error
    return picture, decode_caption(text, row[3] >= JSON)


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
        T.RandomResizedCrop(
            image_size, scale=(0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC
        ),
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

    def __getstate__(
        self,
    ):  # a worker that is not forked maps the index too instead of getting a copy
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
        a shard is left at once; bad counts those that were passed over, by REASONS. InputError after 100 of them.
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
            raise InputError(
                f"{pair_name(*self.locate(index))}: unreadable ({last}), and so are {tries - 1} others"
            )
        with torch.random.fork_rng(devices=[]):  # the transforms draw from torch's global generator
            torch.default_generator.manual_seed(
                self.seed * 1_000_003 + position
            )  # torch.manual_seed asks every device
            image, noise = (
                self.transform(image),
                torch.rand(1, *self.noise_size),
            )  # [3, h, w], [1, H, W]
        return image, self.tokenizer([caption])[0], noise, bad

    def fingerprint(self):
        """A digest of where all pairs lie: other shards, or the same with other members, have another."""
        return hashlib.sha256(np.ascontiguousarray(self.index)).hexdigest()

    def locate(self, index):
        """(shard path, row of the index) of a pair."""
        return self.shards[bisect.bisect_right(self.ends, index)], self.index[
            len(self.shards) + index
        ]

    def read(self, index):
        """(RGB PIL image, caption) of a pair; BadSample."""
        return read_pair(*self.locate(index))


def too_many_bad(counts, seen, share):
    """InputError once more than this share of ENOUGH samples was bad. counts: by REASONS; seen: good samples."""
    bad = int(sum(counts))
    if seen + bad >= ENOUGH and bad > share * (seen + bad):
        named = ", ".join(f"{reason} {int(n)}" for reason, n in zip(REASONS, counts, strict=True))
        hint = "see python data.py check SHARD..., or raise --max-bad"
        raise InputError(
            f"{bad} of {seen + bad} samples are bad ({named}), more than a share of {share:g}; {hint}"
        )


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
                step * self.batch_size + self.rank * local,
                step * self.batch_size + (self.rank + 1) * local,
            ):
                if position // self.n != epoch:
                    epoch = position // self.n
                    order = np.arange(
                        self.n, dtype=np.int32 if self.n < 2**31 else np.int64
                    )  # 4 bytes a pair
                    np.random.default_rng((self.seed, epoch)).shuffle(order)
                batch.append((position, int(order[position % self.n])))
            yield batch


def check_shard(path):
    """Decodes all pairs of a shard: its counts [4], sums over good pairs [4], {what is wrong: [n, the first of it]}."""
    sums, wrong = np.zeros(4, dtype=np.int64), {}  # pairs, characters of captions, widths, heights
    try:
        counts, rows = scan_shard(path)
    except InputError as error:
        return np.zeros(4, dtype=np.uint32), sums, {"unreadable shards": [1, str(error)]}
    if counts[3]:
        wrong["cut off shards"] = [1, path]
    for row in rows:
        try:
            image, caption = read_pair(path, row)
            sums += (1, len(caption), *image.size)
        except BadSample as error:
            wrong.setdefault(f"bad: {error.reason}", [0, f"{pair_name(path, row)} ({error})"])[
                0
            ] += 1
    return counts, sums, wrong


def check_shards(patterns, processes=1):
    """Reads and decodes every pair, prints what is there and what is wrong; returns 1 if anything is wrong, else 0."""
    shards, start = expand_shards(patterns), time.perf_counter()
    counts, sums, wrong = np.zeros(4, dtype=np.int64), np.zeros(4, dtype=np.int64), {}
    for count, total, faults in files.in_parallel(
        check_shard, shards, min(len(shards), processes), "checking shards"
    ):
        counts, sums = counts + count, sums + total
        for fault, (n, first) in faults.items():
            wrong.setdefault(fault, [0, first])[0] += n
    lines = [
        ("shards", len(shards), ""),
        ("pairs", counts[0], ""),
        ("half pairs", counts[1], "left out"),
    ]
    lines += [("duplicates", counts[2], "the first of each is used")]
    lines += [(fault, n, f"the first: {first}") for fault, (n, first) in sorted(wrong.items())]
    if sums[0]:
        caption, width, height = (sums[1:] / sums[0]).tolist()
        lines += [
            (
                "good pairs",
                sums[0],
                f"on average {width:.0f} x {height:.0f} pixels, {caption:.0f} characters",
            )
        ]
    for name, n, remark in lines:
        print(f"{name:<18}{n:>12,}  {remark}".rstrip())
    print(f"{counts[0] / (time.perf_counter() - start):,.0f} pairs per second")
    return int(bool(wrong) or counts[1:3].any())


# ---- command line ----

MOVED = ("--datasets", "--data-root", "prepare-context")


def parse_args(argv=None):
    """The command line of check."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    what = "reads and decodes every pair of tar shards. Exit code 1 when anything is wrong"
    check = commands.add_parser("check", help=what, description=what)
    check.add_argument(
        "shards", nargs="+", metavar="SHARD", help="tar shards: files, globs, {000..331} ranges"
    )
    check.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    words = sys.argv[1:] if argv is None else argv
    if any(word.split("=")[0] in MOVED or word.endswith(".json") for word in words):
        p.error(
            "labelled sets have moved: python benchmarks.py check, or python benchmarks.py prepare-context"
        )
    args = p.parse_args(argv)
    if args.workers < 1:
        p.error("--workers must be at least 1")
    return args


def main(args):
    """check; returns the exit code."""
    return check_shards(args.shards, args.workers)


if __name__ == "__main__":
    sys.exit(files.command(main, parse_args()))
