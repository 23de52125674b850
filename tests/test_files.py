# SPDX-License-Identifier: MIT
"""What all scripts share: pictures of every kind, files that are whole or not there, the pool."""

import io
import os
import signal
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from tiny import jpeg

import files


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(value, mode="RGB", size=(30, 20)):
    return Image.new("RGB", size, (value,) * 3).convert(mode)


IMAGES = {  # bytes of an image, and the grey value it is to be shown in
    "cmyk": (encode(grey(90, "CMYK"), "JPEG"), 90),
    "palette": (encode(grey(204, "P")), 204),
    "palette, one colour transparent": (
        encode(grey(204, "P"), transparency=grey(204, "P").getpixel((0, 0))),
        255,
    ),
    "palette, half transparent": (encode(grey(204, "P"), transparency=bytes([128]) * 256), 229),
    "1 bit": (encode(grey(255, "1")), 255),
    "16 bit": (encode(Image.fromarray(np.full((20, 30), 90 * 256 + 200, dtype=np.uint16))), 90),
    "grey, alpha": (encode(Image.new("LA", (30, 20), (0, 0))), 255),
    "colour, alpha": (encode(Image.new("RGBA", (30, 20), (90, 90, 90, 255))), 90),
    "animated gif": (encode(grey(90), "GIF", save_all=True, append_images=[grey(0)] * 3), 90),
    "animated webp": (
        encode(grey(90), "WEBP", save_all=True, append_images=[grey(0)] * 3, lossless=True),
        90,
    ),
    "animated png": (encode(grey(90), "PNG", save_all=True, append_images=[grey(0)] * 3), 90),
}


@pytest.mark.parametrize("name", IMAGES)
def test_every_kind_of_image_becomes_rgb(name, recwarn):
    content, value = IMAGES[name]
    image = files.read_picture(content)
    assert (image.mode, image.size) == ("RGB", (30, 20)) and not recwarn.list
    assert np.abs(np.array(image).astype(int) - value).max() <= 1


def test_a_photograph_that_lies_on_its_side_is_put_upright():
    """EXIF orientation 6: the camera was turned; what is stored as the left edge belongs on top."""
    stored = Image.fromarray(
        np.repeat(np.uint8([[250] * 8 + [20] * 24]), 16, 0)[..., None].repeat(3, 2)
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.array(files.read_picture(encode(stored, "JPEG", exif=exif)))
    assert upright.shape == (32, 16, 3) and upright[:7].mean() > 230 and upright[9:].mean() < 40
    plain = encode(
        stored, "JPEG", exif=exif.tobytes()[:-9] + b"\xff" * 9
    )  # a broken block is passed over
    assert files.read_picture(plain).size == (32, 16)


BAD_IMAGES = {
    "empty": (b"", "image"),
    "text": (b"<html>404</html>", "image"),
    "zeros": (bytes(1000), "image"),
    "cut jpeg": (jpeg(1, (200, 200))[:-2000], "image"),
    "cut png": (
        encode(Image.fromarray(np.arange(30_000, dtype=np.uint8).reshape(100, 300)))[:-100],
        "image",
    ),
    "postscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "image",
    ),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_says_so(name, recwarn):
    with pytest.raises(files.PictureError) as bad:
        files.read_picture(BAD_IMAGES[name][0])
    assert (
        bad.value.reason == BAD_IMAGES[name][1] and "\n" not in str(bad.value) and not recwarn.list
    )


@pytest.mark.parametrize(
    "side", [9_500, 20_000, 60_000]
)  # just above the limit, above twice the limit, far above
def test_a_giant_image_is_refused_by_its_header(side, recwarn, monkeypatch):
    def ihdr(content):
        return (
            struct.pack(">I", 13)
            + b"IHDR"
            + content
            + struct.pack(">I", zlib.crc32(b"IHDR" + content))
        )

    giant = encode(grey(1))
    giant = giant[:8] + ihdr(struct.pack(">II", side, side) + giant[24:29]) + giant[33:]
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(files.PictureError) as bad:
        files.read_picture(giant)
    assert bad.value.reason == "size" and not recwarn.list


def test_no_damaged_image_brings_anything_but_a_bad_sample():
    rng = np.random.default_rng(0)
    for content in [
        jpeg(3),
        *(encode(Image.open(io.BytesIO(jpeg(3))), kind) for kind in ("PNG", "WEBP", "GIF", "BMP")),
    ]:
        for _ in range(40):
            damaged = np.frombuffer(content, dtype=np.uint8).copy()
            damaged[rng.integers(0, 120, 6)] = rng.integers(0, 256, 6)
            try:
                assert files.read_picture(damaged.tobytes()).mode == "RGB"
            except files.PictureError as bad:
                assert bad.reason in ("image", "size")


def die(item):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_process_is_said(tmp_path):
    with pytest.raises(files.InputError, match="scanning: one of 2 processes was killed"):
        list(files.in_parallel(die, range(4), 2, "scanning"))
