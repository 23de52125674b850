# SPDX-License-Identifier: MIT
"""What all scripts share: one-line errors, one reader of pictures, whole writes, a pool with a bar.

Whatever a user can mend is an InputError, and command() turns it into one line on stderr and an
exit code. Needs numpy, pillow and tqdm.
"""

import argparse
import contextlib
import functools
import io
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

# Whatever the suffix says; none of them starts another program, as EPS starts Ghostscript.
FORMATS = "JPEG PNG WEBP GIF BMP TIFF PPM".split()
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # of a picture; a JPEG of more than 16 scans may have fewer
STOP = (signal.SIGINT, signal.SIGTERM)


class InputError(ValueError):
    """Something that the user can mend; its message says which file or value, and what to do."""


class PictureError(InputError):
    """A picture that cannot be used; reason "image" (broken, or of no format taken), "size"."""

    def __init__(self, reason, detail):
        super().__init__(detail)
        self.reason = reason


def first_line(error):
    """What another library's error says, in one line."""
    return (str(error) or repr(error)).splitlines()[0][:120]


def printable(text):
    """A text in one line for any terminal: control characters, and halves of others, as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def interrupt(number, frame):
    """Handler of a signal that ends a program: raises KeyboardInterrupt(its number)."""
    raise KeyboardInterrupt(number)


def command(main, args):
    """Runs main(args) as a program; returns its status: one line for a mistake, no traceback.

    130 after Ctrl-C, 143 after SIGTERM; nothing is said where who reads the output has enough.
    """
    signal.signal(signal.SIGTERM, interrupt)
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: what a terminal cannot show
    try:
        status = main(args) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # python data.py check ... | head
        os._exit(141)
    except (InputError, OSError, MemoryError) as error:
        # Lists in a message go on in lines that are indented.
        print(printable(f"error: {error}").replace("\\n   ", "\n   "), file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        return 128 + (stop.args or STOP)[0]  # Ctrl-C comes without its number


# ---- flags and signals ----


def number(text, words="lie between 0 and 1e12", kind=float, least=0, most=1e12):
    """A type of flag for argparse: a finite number within bounds; words name them."""
    try:
        value = kind(text)
        if least <= value <= most:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must {words}, not {text!r}")


weight = number
positive = partial(number, least=sys.float_info.min)
share = partial(number, words="lie between 0 and 1", most=1)
count_or_zero = partial(number, words="be a whole number, at least 0", kind=int, most=2**31 - 1)
count = partial(count_or_zero, words="be a whole number, at least 1", least=1)


def rank_of():
    """(rank, number of ranks) of this process, as torchrun says it; InputError."""
    with contextlib.suppress(ValueError):
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if rank in range(ranks):
            return rank, ranks
    raise InputError("RANK and WORLD_SIZE do not go together; start several ranks by torchrun")


def ignore_signals(_=None):
    """For processes of a loader: a signal to the whole group stops the run, which ends them."""
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def held_signals():
    """Ctrl-C and SIGTERM wait for the end: Python drops what a handler raises during a fork."""
    caught = []
    before = {n: signal.signal(n, lambda number, _: caught.append(number)) for n in STOP}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


# ---- pictures and texts in ----


def rgb(image):
    """A PIL image of any mode as RGB: upright, 16 bits scaled to 8, on white."""
    flat = image.copy()  # the caller's stays as it is
    # The orientation (274) alone is read. Where other fields are broken this fails after the turn.
    with contextlib.suppress(Exception):
        flat.getexif()[274] = image.getexif()[274]
        ImageOps.exif_transpose(flat, in_place=True)
    if flat.mode[0] in "IF":  # PIL's names of grey in 16 or 32 bits
        grey = np.array(flat)  # [h, w]
        if (grey.astype(np.uint16) != grey).any():
            raise PictureError("image", "has float or 32-bit pixels; convert it to 8 or 16 bits")
        grey[grey == flat.info.get("transparency")] = 65535
        flat = Image.fromarray((grey // 256).astype(np.uint8))
    if flat.has_transparency_data:
        flat = flat.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", flat.size, "white"), flat)
    return flat.convert("RGB")


@functools.cache  # once for all threads: catch_warnings() is not safe in them
def silence_pil():
    """What PIL warns of, it can still read."""
    warnings.filterwarnings("ignore", module="PIL")


def read_picture(source):
    """RGB PIL image, rgb() of the first frame in a path or an io.BytesIO; PictureError.

    Pixels are counted from the header, and scans of a JPEG by their marks, before any is decoded.
    """
    silence_pil()
    try:
        with Image.open(source, formats=FORMATS) as image:
            image.fp.seek(0)
            scans = (
                image.fp.read(1_000_000_000).count(b"\xff\xda")
                if image.format in ("JPEG", "MPO")
                else 1
            )
            if image.width * image.height * max(scans / 16, 1) > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.size} pixels, {scans} scans")
            return rgb(image)
    except Exception as error:  # decoders fail with whatever they stumble over: KeyError, ...
        kind = "size" if isinstance(error, Image.DecompressionBombError) else "image"
        name = "" if isinstance(source, io.BytesIO) else f"{source}: "
        why = first_line(error).partition("<")[0]  # <_io.BytesIO ...> says nothing
        words = f"{name}not a picture that can be read ({why}; {', '.join(FORMATS)} are taken)"
        raise PictureError(kind, words) from error


def read_text(path):
    """A UTF-8 text file; InputError when it is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a text file that can be read ({error})") from error


# ---- files out ----


def write_whole(path, write):
    """write(temporary path), then the final name: a file is whole, or not there. Makes folders.

    OSError names what cannot be written: torch and numpy have words of their own for a full disk.
    """
    # Two processes or threads that write the same file have two names.
    temporary = Path(f"{path}.{secrets.token_hex(4)}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or f"is the disk full? {first_line(error)}"
        raise OSError(f"{path}: cannot be written ({why})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path, content):
    """Whole or not at all."""
    write_whole(path, lambda file: file.write_bytes(content))


def write_text(path, text):
    """UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def png_bytes(picture):
    """A PIL picture as the bytes of a PNG."""
    picture.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def save_png(path, picture):
    """A PIL picture as PNG, whole or not at all."""
    write_bytes(path, png_bytes(picture))


# ---- many at a time ----


def start_worker():
    """In a pool's new process: it ends with the one that started it, however that ended."""
    ignore_signals()  # they may reach all; the first process ends the others
    wait = multiprocessing.parent_process().join
    threading.Thread(target=lambda: (wait(), os._exit(1)), daemon=True).start()


def in_parallel(function, items, processes, what):
    """Yields function(item) of all items in order, from a pool if processes > 1, under a bar.

    function writes no file: it may be killed at any line.
    """
    # Unlike multiprocessing.Pool it notices when a process was killed; it starts them in map().
    pool = ProcessPoolExecutor(processes or 1, initializer=start_worker)
    try:
        with held_signals():
            results = (pool.map if processes > 1 else map)(function, items)
        yield from tqdm(results, what, len(items), leave=False, delay=1)
    except BrokenExecutor as error:
        killed = f"{what}: one of {processes} processes was killed; out of memory?"
        raise InputError(killed) from error
    finally:
        # Shut down first: to a pool that is not, killed processes are an error of its own thread.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()  # at once, as an item may take minutes; a program has one pool at a time
