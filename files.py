# SPDX-License-Identifier: MIT
"""What all scripts share: one-line errors, one reader of pictures, whole writes, a pool with a bar.

Whatever a user can mend is an InputError, and command() turns it into one line on stderr and an
exit code. Needs numpy, pillow and tqdm.
"""

import argparse
import contextlib
import io
import math
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

# Whatever the suffix says; none of them starts another program, as EPS starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Others, by what is in their first bytes, so that a message can name them.
OTHERS = {b"ftypavif": "AVIF", b"ftyphei": "HEIC", b"%!PS": "EPS", b"%PDF": "PDF", b"<!DOC": "HTML"}
MAX_PIXELS = 89_478_485  # of a picture, as in PIL; a JPEG of more than 16 scans may have fewer


class InputError(ValueError):
    """Something that the user can mend; its message says which file or value, and what to do."""


class PictureError(InputError):
    """A picture that cannot be used; reason "image" (broken, or of no format taken), "size"."""

    def __init__(self, reason, detail):
        super().__init__(detail)
        self.reason = reason


def first_line(error):
    """What another library's error says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0][:120]


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
    except (InputError, OSError) as error:
        # Lists in a message go on in lines that are indented.
        words = printable(f"error: {error}").replace("\\n   ", "\n   ")
        print(words, file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        return 128 + (stop.args or (signal.SIGINT,))[0]


# ---- flags and signals ----


def count(text, least=1):
    """A whole number for argparse, from 1 to 2^31."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not least <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}, not {text!r}")
    return value


def count_or_zero(text):
    """A whole number for argparse, from 0 to 2^31."""
    return count(text, least=0)


def number(text, least, most=math.inf, open_end=False):
    """A finite number for argparse within bounds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (least <= value <= most and math.isfinite(value)) or (open_end and value == least):
        raise argparse.ArgumentTypeError(f"must lie between {least} and {most:g}, not {text!r}")
    return value


weight = partial(number, least=0)
share = partial(number, least=0, most=1)
positive = partial(number, least=0, open_end=True)


STOP = (signal.SIGINT, signal.SIGTERM)


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
        for number in caught[:1]:
            signal.raise_signal(number)


# ---- pictures and texts in ----


def rgb(image):
    """A loaded PIL image of any mode as RGB: upright, 16 bits scaled to 8, on white."""
    flat = image
    if image.mode[0] in "IF":  # PIL's names of grey in 16 or 32 bits
        grey = np.asarray(image)  # [h, w]
        if image.mode == "F" or grey.astype(np.uint32).max() > 65535:
            raise PictureError("image", "has float or 32-bit pixels; convert it to 8 or 16 bits")
        flat = Image.fromarray((grey // 256).astype(np.uint8))
    if flat.has_transparency_data:
        flat = flat.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", flat.size, "white"), flat)
    flat = flat.convert("RGB")
    flat.info.clear()  # of an EXIF block the orientation (274) alone is read; others may be broken
    with contextlib.suppress(Exception):
        flat.getexif()[274] = image.getexif()[274]
    return ImageOps.exif_transpose(flat)


def read_picture(source):
    """RGB PIL image, rgb() of the first frame of a file (its path, or bytes); PictureError.

    Pixels are counted from the header, and scans of a JPEG by their marks, before any is decoded.
    """
    name, content = "" if isinstance(source, bytes) else f"{source}: ", b""
    if "compile('PIL')" not in str(warnings.filters):  # catch_warnings() is not for threads
        warnings.filterwarnings("ignore", module="PIL")
    try:
        with open(source, "rb") if name else io.BytesIO(source) as file:
            content = file.read(2**30)
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            scans = content.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
            if image.width * image.height * max(scans / 16, 1) > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.size} pixels, {scans} scans")
            image.load()  # a file that is cut off fails here
            return rgb(image)
    except Exception as error:  # decoders fail with whatever they stumble over: KeyError, ...
        kind = "size" if isinstance(error, Image.DecompressionBombError) else "image"
        found = " ".join(other for magic, other in OTHERS.items() if magic in content[:16])
        why = found or first_line(error).partition("<")[0]  # <_io.BytesIO ...> says nothing
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
    path = Path(path)
    # Two processes that write the same file have two names.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or f"is the disk full? {first_line(error)}"
        raise OSError(f"{path}: cannot be written ({reason})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """UTF-8, whole or not at all."""
    write_whole(path, lambda file: file.write_text(text, "utf-8", "backslashreplace"))


def save_png(path, picture):
    """A PIL picture as PNG, whole or not at all."""
    write_whole(path, lambda file: picture.save(file, "PNG"))


# ---- many at a time ----


def start_worker():
    """In a pool's new process: it ends with the one that started it, however that ended."""
    ignore_signals()  # they reach all; the first process ends the others
    wait = multiprocessing.parent_process().join
    threading.Thread(target=lambda: (wait(), os._exit(1)), daemon=True).start()


def in_parallel(function, items, processes, what):
    """Yields function(item) of all items in order, from a pool if processes > 1, under a bar."""
    others = multiprocessing.active_children()
    # Unlike multiprocessing.Pool it notices when a process was killed; it starts them in map().
    pool = ProcessPoolExecutor(max(processes, 1), initializer=start_worker)
    try:
        with held_signals():
            results = (pool.map if processes > 1 else map)(function, items)
        yield from tqdm(results, what, len(items), leave=False, delay=1)
    except BrokenProcessPool as error:
        killed = f"{what}: one of {processes} processes was killed; out of memory?"
        raise InputError(killed) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()).difference(others):
            process.kill()  # at once: what it works on may take minutes
