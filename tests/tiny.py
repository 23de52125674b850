# SPDX-License-Identifier: MIT
"""A tiny world for the tests of data, training and evaluation: CLIP, shards, a labelled set."""

import io
import json
import os
import runpy
import socket
import subprocess
import sys
import tarfile
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import gcl

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def make_clip(folder, seed=0, **vision):
    """(config path, weights path) of a random CLIP with its own sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "clip.json"
    config.write_text(json.dumps(CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | vision}))
    torch.manual_seed(seed)
    clip, _ = gcl.load_clip(str(config), None)
    torch.save(clip.state_dict(), folder / "clip.pt")
    return str(config), str(folder / "clip.pt")


def jpeg(seed, size=(40, 36)):
    """Bytes of a random JPEG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_tar(path, members):
    """A tar of (name, bytes) members, in order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def make_shards(folder, shards=2, pairs=10):
    """A glob of tar shards of random images and captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for s in range(shards):
        members = []
        for k in range(pairs):
            members += [
                (f"{s}{k:03d}.jpg", jpeg(100 * s + k)),
                (f"{s}{k:03d}.txt", f"picture {s} {k}".encode()),
            ]
        write_tar(folder / f"{s:03d}.tar", members)
    return str(folder / "*.tar")


def make_set(folder, n=5, background=False, sizes=((40, 32), (32, 48)), **spec):
    """SPEC.json of a random labelled set; sizes are (width, height), taken in turn."""
    rng = np.random.default_rng(7)
    classes = (["background"] if background else []) + ["cat", "dog", "tree"]
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for k in range(n):
        width, height = sizes[k % len(sizes)]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            folder / f"images/{k}.png"
        )
        label = rng.integers(0, len(classes), (height, width), dtype=np.uint8)
        label[:2] = 255
        Image.fromarray(label).save(folder / f"labels/{k}.png")
    fields = {
        "name": folder.name,
        "images": "images",
        "labels": "labels",
        "image_suffix": ".png",
        "classes": classes,
    }
    (folder / "SPEC.json").write_text(json.dumps(fields | {"background": background} | spec))
    return str(folder / "SPEC.json")


def run(script, *args, ranks=1, **environment):
    """A script of the project as a process of its own, or several as torchrun would start them.

    Forked, so that what it imports is there already, which saves seconds; a new interpreter where
    the environment matters to one that starts, and where a system does not fork.
    """
    argv = [str(ROOT / script), *map(str, args)]
    if environment or sys.platform != "linux":
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
        return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env)
    with socket.create_server(("localhost", 0)) as free:
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    group |= {"WORLD_SIZE": str(ranks)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        variables = [group | dict.fromkeys(("RANK", "LOCAL_RANK"), str(r)) for r in range(ranks)]
        children = [fork(argv, out, err, v if ranks > 1 else {}) for v in variables]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        said = [(file.seek(0), file.read())[1] for file in (out, err)]
    return subprocess.CompletedProcess(argv, max(codes, key=abs), *said)


def fork(argv, out, err, variables):
    """Starts argv's script in a forked process whose output goes to two files; its process id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        os.environ.update(variables)
        sys.argv = argv
        for number, file in (1, out), (2, err):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def check_refused(result, code, *words):
    """One clear line on stderr with these words, this exit code, no traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in line, (word, line)
