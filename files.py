# SPDX-License-Identifier: MIT
"""What all scripts share: one-line errors, one reader of pictures, whole writes, a pool with a bar.

Whatever a user can mend is an InputError, and command() turns it into one line on stderr and an
exit code. Needs numpy, pillow and tqdm.
"""

import contextlib
import io
import os
import secrets
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

# Whatever the suffix says; none of them starts another program, as EPS starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class InputError(ValueError):
    """Something that the user can mend; its message says which file or value, and what to do."""


class PictureError(InputError):
    """A picture that cannot be used; reason "image" (broken, or of no format taken), "size"."""

    def __init__(self, reason, detail):
        super().__init__(detail)
        self.reason = reason


def first_line(error):
    """What another library's error says, in one line."""
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def printable(text):
    """A text for a terminal: control characters, and what is no text at all, as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def command(main, args):
    """Runs main(args) as a program; returns its status: one line for a mistake, no traceback."""
    try:
        return main(args) or 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


# ---- pictures and texts in ----


def rgb(image):
    """A loaded PIL image of any mode as RGB: upright, 16 bits scaled to 8, on white."""
    with contextlib.suppress(Exception):  # a broken EXIF block does not make the picture bad
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        high = np.asarray(image).clip(0, 65535) // 256
        image = Image.fromarray(high.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def read_picture(source):
    """RGB PIL image, rgb() of the first frame of a file (its path, or bytes); PictureError.

    The size is known from the header and limited (PIL's Image.MAX_IMAGE_PIXELS) before anything is
    decoded.
    """
    name = "" if isinstance(source, bytes) else f"{source}: "
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF blocks, palettes, ...
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=FORMATS) as image:
                image.load()  # a file that is cut off fails here
                return rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise PictureError("size", f"{name}{first_line(error)}") from error
    except Exception as error:  # decoders fail with whatever they stumble over: KeyError, ...
        reason = f"{name}not a picture that can be read ({first_line(error)})"
        raise PictureError("image", reason) from error


def read_text(path):
    """A UTF-8 text file; InputError when it is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a text file that can be read ({error})") from error


# ---- files out ----


def write_whole(path, write):
    """write(temporary path), then the final name: a file is whole, or not there. Makes folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that write the same file have two names.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """UTF-8, whole or not at all."""
    content = text.encode(errors="backslashreplace")
    write_whole(path, lambda file: file.write_bytes(content))


def save_png(path, picture):
    """A PIL picture as PNG, whole or not at all."""
    write_whole(path, lambda file: picture.save(file, format="PNG"))


# ---- many at a time ----


def in_parallel(function, items, processes, what):
    """Yields function(item) of all items in order, from a pool if processes > 1, under a bar."""
    with tqdm(desc=what, total=len(items), leave=False, delay=1) as bar:
        if processes < 2 or not items:
            for item in items:
                yield function(item)
                bar.update()
            return
        # Unlike multiprocessing.Pool it notices when a process was killed.
        pool = ProcessPoolExecutor(processes)
        try:
            for result in pool.map(function, items, chunksize=1 + len(items) // 1000):
                yield result
                bar.update()
        except BrokenProcessPool as error:
            killed = f"{what}: one of {processes} processes was killed; out of memory?"
            raise InputError(killed) from error
        finally:
            pool.shutdown(cancel_futures=True)
