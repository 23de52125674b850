# SPDX-License-Identifier: MIT
"""What all scripts share: pictures of every kind, files that are whole or not there, the pool."""

import contextlib
import io
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from tiny import jpeg

import files


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(content):
    return files.read_picture(io.BytesIO(content))


def grey(value, mode="RGB", size=(30, 20)):
    return Image.new("RGB", size, (value,) * 3).convert(mode)


def deep(value=90 * 256 + 200):
    """A grey picture of 16 bits."""
    return Image.fromarray(np.full((20, 30), value, dtype=np.uint16))


def deep_png_without(value):
    """The same as a PNG that calls a grey transparent."""
    content, chunk = encode(deep()), b"tRNS" + struct.pack(">H", value)
    at = content.index(b"IDAT") - 4
    return content[:at] + struct.pack(">I6sI", 2, chunk, zlib.crc32(chunk)) + content[at:]


IMAGES = {  # bytes of an image, and the grey value it is to be shown in
    "cmyk": (encode(grey(90, "CMYK"), "JPEG"), 90),
    "palette": (encode(grey(204, "P")), 204),
    "palette, one colour transparent": (
        encode(grey(204, "P"), transparency=grey(204, "P").getpixel((0, 0))),
        255,
    ),
    "palette, half transparent": (encode(grey(204, "P"), transparency=bytes([128]) * 256), 229),
    "1 bit": (encode(grey(255, "1")), 255),
    "16 bit png": (encode(deep()), 90),
    "16 bit png, its grey transparent": (deep_png_without(90 * 256 + 200), 255),
    "16 bit png, another grey transparent": (deep_png_without(90 * 256), 90),
    "16 bit tiff": (encode(deep(), "TIFF"), 90),
    "16 bit pgm": (b"P5 30 20 65535\n" + b"\x5a\xc8" * 600, 90),
    "16 bit tiff of a Macintosh": (
        struct.pack(">2sHIH", b"MM", 42, 8, 9)
        + b"".join(
            struct.pack(">HHII", tag, 3 + (tag == 273), 1, value << (tag != 273) * 16)
            for tag, value in [(256, 30), (257, 20), (258, 16), (259, 1), (262, 1), (273, 122)]
            + [(277, 1), (278, 20), (339, 1)]
        )
        + bytes(4)
        + b"\x5a\xc8" * 600,
        90,
    ),
    "32 bit whole numbers of 16": (encode(Image.new("I", (30, 20), 90 * 256), "TIFF"), 90),
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
def test_every_kind_of_image_becomes_rgb(name):
    content, value = IMAGES[name]
    image = read(content)
    assert (image.mode, image.size) == ("RGB", (30, 20))
    assert np.abs(np.array(image).astype(int) - value).max() <= 1


TURNS = {  # EXIF orientation: how the stored array becomes the upright one
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
    9: lambda a: a,  # is not defined
}
COLOURS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "16 bit", "alpha"])
def test_every_orientation_is_put_upright(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored, expected = Image.fromarray(COLOURS), COLOURS
    if kind == "16 bit":
        stored = Image.fromarray(COLOURS[..., 0] * np.uint16(257))
        expected = COLOURS[..., :1].repeat(3, 2)
    elif kind == "alpha":
        stored = stored.convert("RGBA")
    options = {"lossless": True} if kind == "WEBP" else {}
    kind = kind if kind.isupper() else "PNG"
    picture = read(encode(stored, kind, exif=exif, **options))
    assert np.array_equal(np.array(picture), TURNS[orientation](expected))


EXIF = b"II*\0\x08\0\0\0"  # the header of a TIFF; a block of EXIF is one
BLOCKS = {  # broken EXIF: bytes, and the picture's size
    "no header": (b"what is this?", (30, 20)),
    "20 zeros": (bytes(20), (30, 20)),
    "cut after the header": (EXIF, (30, 20)),
    "cut after its name": (b"Exif\0\0", (30, 20)),
    "a broken tag behind the orientation": (
        EXIF + struct.pack("<HHHIIHHII", 2, 274, 3, 1, 6, 282, 5, 9, 4000) + bytes(4),
        (20, 30),
    ),
}


@pytest.mark.filterwarnings("ignore:::PIL")  # files.py's own filter ends where a test begins
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_broken_exif_block_does_not_make_a_picture_bad(kind, name):
    block, size = BLOCKS[name]
    start = b"Exif\0\0" if kind == "JPEG" else b""
    assert read(encode(Image.fromarray(COLOURS), kind, exif=start + block)).size == size


def test_no_warning_comes_through_from_threads_and_processes(tmp_path):
    """Even where all warnings are asked for; Pillow has one for each of these pictures."""
    block = EXIF + struct.pack("<HHHII", 2, 274, 3, 1, 6)
    for k in range(40):
        content = encode(Image.fromarray(COLOURS), ("PNG", "WEBP")[k % 2], exif=block)
        (tmp_path / f"{k}.jpg").write_bytes(content)
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import files
if __name__ == "__main__":
    paths = sorted(Path({str(tmp_path)!r}).glob("*.jpg"))
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(files.read_picture, paths * 5))
    pictures += list(files.in_parallel(files.read_picture, paths, 2, "reading"))
    print(len(pictures), {{picture.size for picture in pictures}})
"""
    command = [sys.executable, "-W", "always", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("240 {(20, 30)}\n", "")


BAD_IMAGES = {
    "empty": (b"", "image"),
    "text": (b"<!DOCTYPE html><html>404</html>", "image"),
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
    "float": (encode(Image.new("F", (30, 20), 0.5), "TIFF"), "image"),
    "32 bit": (encode(Image.new("I", (30, 20), 1 << 20), "TIFF"), "image"),
    "below zero": (encode(Image.new("I", (30, 20), -1), "TIFF"), "image"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_says_so(name):
    content, reason = BAD_IMAGES[name]
    with pytest.raises(files.PictureError) as bad:
        read(content)
    assert bad.value.reason == reason
    assert "\n" not in str(bad.value) and "BytesIO" not in str(bad.value)


@pytest.mark.parametrize(
    "start",
    [b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", BAD_IMAGES["postscript"][0], b"%PDF-1.7"],
)
def test_a_format_that_is_not_taken_starts_no_program_and_is_told_those_that_are(
    tmp_path, start, monkeypatch
):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "a.jpg").write_bytes(start + bytes(500))
    words = (
        r"a.jpg: not a picture that can be read \(cannot identify .*; JPEG, PNG, .*, PPM are taken"
    )
    with pytest.raises(files.PictureError, match=words):
        files.read_picture(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "GIF", "BMP", "WEBP", "PNG"])
def test_a_picture_is_known_by_its_content(tmp_path, kind):
    (tmp_path / "a.jpg").write_bytes(encode(grey(204), kind))
    assert files.read_picture(tmp_path / "a.jpg").getpixel((3, 3)) == (204, 204, 204)


def test_a_file_that_is_not_there_or_no_file_is_a_bad_picture(tmp_path):
    for path in (tmp_path, tmp_path / "no.png"):
        with pytest.raises(files.PictureError, match=f"{path}: not a picture"):
            files.read_picture(path)


def with_sides(kind, side):
    """A picture whose header alone says that it has side x side pixels."""
    content = encode(grey(1), kind, **({"progressive": True} if kind == "JPEG" else {}))
    if kind == "PNG":
        ihdr = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
        return content[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + content[33:]
    at = content.index(b"\xff\xc2") + 5
    return content[:at] + struct.pack(">HH", side, side) + content[at + 4 :]


def scans(content, n):
    """A progressive JPEG with its last scan n times more."""
    at = content.rindex(b"\xff\xda")
    return content[:-2] + content[at:-2] * n + content[-2:]


@pytest.mark.parametrize(
    "content",
    [
        # just above the limit, above twice the limit, far above
        *(with_sides("PNG", side) for side in (9_500, 20_000, 60_000)),
        with_sides("JPEG", 9_500),
        scans(with_sides("JPEG", 2_500), 300),
    ],
    ids=["PNG", "PNG 20", "PNG 60", "JPEG", "300 scans"],
)
@pytest.mark.filterwarnings("ignore:::PIL")  # files.py's own filter ends where a test begins
def test_what_would_take_long_to_decode_is_refused_by_its_header(content, monkeypatch):
    for plugin in (PngImageFile, JpegImageFile):
        monkeypatch.setattr(plugin, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(files.PictureError, match="pixels") as bad:
        read(content)
    assert bad.value.reason == "size"


def test_a_small_picture_may_have_300_scans():
    assert read(scans(with_sides("JPEG", 200), 300)).size == (200, 200)


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_of_many_frames_the_first_alone_is_read(kind, monkeypatch):
    if kind == "GIF":
        options = {"save_all": True, "duration": 100}
        content = encode(grey(204), "GIF", append_images=[grey(0)], **options)
        frame = content[content.rindex(b"\x21\xf9") : -1]
        content = content[:-1] + frame * 100_000 + b";"
    else:
        content = encode(grey(204), "PNG", save_all=True, append_images=[grey(0)])
        at = content.index(b"acTL") + 4
        chunk = b"acTL" + struct.pack(">II", 100_000, 0)
        crc = struct.pack(">I", zlib.crc32(chunk))
        content = content[: at - 4] + chunk + crc + content[at + 12 :]
    seeks = []
    for plugin in (GifImageFile, PngImageFile):
        seek = plugin._seek
        monkeypatch.setattr(
            plugin, "_seek", lambda self, n, *a, seek=seek: seeks.append(n) or seek(self, n, *a)
        )
    assert read(content).getpixel((3, 3)) == (204, 204, 204)
    assert len(seeks) <= 2


def test_no_damaged_image_brings_anything_but_a_picture_error():
    rng = np.random.default_rng(0)
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
    for content in (encode(Image.open(io.BytesIO(jpeg(3))), kind) for kind in kinds):
        for _ in range(40):
            damaged = np.frombuffer(content, dtype=np.uint8).copy()
            damaged[rng.integers(0, min(120, len(damaged)), 6)] = rng.integers(0, 256, 6)
            try:
                assert read(damaged.tobytes()).mode == "RGB"
            except files.PictureError as bad:
                assert bad.reason in ("image", "size")


# ---- many at a time ----


def die(item):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_process_is_said(tmp_path):
    with pytest.raises(files.InputError, match="scanning: one of 2 processes was killed"):
        list(files.in_parallel(die, range(4), 2, "scanning"))


PROGRAM = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import files

def wait(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)

def main(folder):
    what = Path(folder).name
    if what == "pool":
        list(files.in_parallel(wait, [folder] * 4, 2, "hanging"))
    if what == "write":
        files.write_whole(Path(folder, "a.txt"), lambda path: (path.touch(), wait(folder)))
    if what == "words":
        print("caf\\u00e9 \\u732b \\udcff", files.printable("\\x1b[31m\\n\\u732b"))
        raise files.InputError("no \\u732b\\x1b[2J\\udcff here:\\n       one\\n       two")
    if what == "much":
        for _ in range(100_000):
            print("a line of many")

if __name__ == "__main__":
    sys.exit(files.command(main, sys.argv[1]))
"""


def start(folder, **environment):
    """The program in a process group of its own; the folder's name says what it does."""
    folder.mkdir()
    (folder.parent / "program.py").write_text(PROGRAM)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, str(folder.parent / "program.py"), str(folder)]
    # A shell that starts the tests in the background ignores SIGINT, and its children with it.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=os.environ | environment, start_new_session=True, **pipes)


def running(process, folder, n):
    """The ids of the n processes that hang in folder, once they do."""
    while len(found := [int(p.name) for p in folder.iterdir() if p.name.isdigit()]) < n:
        assert process.poll() is None
        time.sleep(0.02)
    return found


def alive(pids):
    """Those of these processes that are there and no zombies."""
    states = []
    for pid in pids:
        with contextlib.suppress(OSError):
            states.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
    return [state for state in states if state not in "ZX"]


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("group", [False, True], ids=["the process", "its group"])
def test_an_interrupted_pool_leaves_no_process(tmp_path, number, group):
    process = start(tmp_path / "pool")
    workers = running(process, tmp_path / "pool", 2)
    (os.killpg if group else os.kill)(process.pid, number)
    out, err = process.communicate()
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 128 + number)
    assert (out, err) == (b"", b"" if killed else b"interrupted\n")
    while alive(workers):  # without an end where one of them stays
        time.sleep(0.02)


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_write_leaves_no_file(tmp_path, number):
    process = start(tmp_path / "write")
    running(process, tmp_path / "write", 1)
    process.send_signal(number)
    assert process.communicate() == (b"", b"interrupted\n")
    assert process.returncode == 128 + number
    assert [path.name for path in (tmp_path / "write").iterdir()] == [str(process.pid)]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_words_reach_any_terminal_without_control_characters(tmp_path, encoding):
    process = start(tmp_path / "words", PYTHONIOENCODING=encoding)
    out, err = (text.decode(encoding) for text in process.communicate())
    cat, cafe = "\u732b", "caf\u00e9"
    if encoding != "utf-8":
        cat = r"\u732b"
    if encoding == "ascii":
        cafe = r"caf\xe9"
    assert out == rf"{cafe} {cat} \udcff \x1b[31m\n{cat}" + "\n"
    assert err == rf"error: no {cat}\x1b[2J\udcff here:" + "\n       one\n       two\n"
    assert process.returncode == 1


def test_a_pipe_that_is_closed_ends_a_program_silently(tmp_path):
    process = start(tmp_path / "much")
    assert process.stdout.readline() == b"a line of many\n"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


# ---- files out ----


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new/folder/a.txt"
    files.write_text(path, "one\n\udcff")
    assert path.read_text() == "one\n\\udcff"

    def fail(temporary, error):
        temporary.write_text("half")
        raise error

    errors = {
        "is the disk full. unexpected pos 64 vs 0": RuntimeError("unexpected pos 64 vs 0\nTrace:"),
        "No space left on device": OSError(28, "No space left on device"),
    }
    for words, error in errors.items():
        with pytest.raises(OSError, match=rf"a.txt: cannot be written \({words}\)"):
            files.write_whole(path, lambda temporary, error=error: fail(temporary, error))
    with pytest.raises(OSError, match="a.txt"):
        files.write_text(path / "b", "under a file")
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"] and path.read_text()[:3] == "one"


AT_FORK = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import files
os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGTERM))
sys.exit(files.command(lambda _: list(files.in_parallel(abs, range(4), 2, "what")), None))
"""


@linux
def test_a_signal_that_arrives_while_a_process_is_forked_is_not_lost():
    command = [sys.executable, "-c", AT_FORK, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "interrupted\n")


def test_more_memory_than_there_is_is_one_line(capsys):
    """A flag that is within its bounds may still be too much: --image-size 2147483640."""
    assert files.command(np.empty, 2**50) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: Unable to allocate") and error.count("\n") == 1
