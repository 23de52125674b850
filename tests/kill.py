# SPDX-License-Identifier: MIT
"""Kills a training run at its n-th file operation, starts it again, and compares what it leaves.

    python tests/kill.py      # every file operation of a run; a line for each that differs
    python tests/kill.py 2    # the same on two ranks: the first, which writes, is killed

An audit hook of Python counts what is opened for writing, renamed, copied and removed below OUT.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "shutil.copyfile")
TIMES = ("images_per_second", "data_wait", "memory_gb", "eta_seconds", "seconds")
# Small windows: how well it segments does not matter here.
PROTOCOL = {"short_side": 64, "window": 64, "stride": 32}
PATIENCE = 3  # seconds that another rank has to end by itself, before it is ended as by torchrun


def start(argv, out, environment, kill_at, write, said):
    """train.py in a forked process, which writes its number of file operations and, to said, what
    it says; its process id."""
    import evaluate
    import train

    if child := os.fork():
        return child
    os.environ.update(environment)
    evaluate.PROTOCOL.update(PROTOCOL)
    seen = 0

    def count(event, arguments):
        nonlocal seen
        writes = event != "open" or (arguments[1] and set(str(arguments[1])) & set("wax+"))
        if event in EVENTS and writes and str(arguments[0]).startswith(str(out)):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    for number in (1, 2):
        os.dup2(said.fileno(), number)
    code = 1
    try:
        code = train.command([*argv, "--out", str(out)])
        os.write(write, f"{seen}\n".encode())
    except BaseException:
        traceback.print_exc()
    finally:  # what stands further up, such as a temporary folder, is the parent's to end
        os._exit(code)


def end(child):
    """Waits for a process, no longer than PATIENCE: was it there still?"""
    for _ in range(100 * PATIENCE):
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def run(argv, out, kill_at=None, ranks=1):
    """A run of train.py; returns (was it killed, file operations, ranks that had to be ended)."""
    with socket.create_server(("localhost", 0)) as free:
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    group |= {"WORLD_SIZE": str(ranks)}
    read, write = os.pipe()
    children, said = [], tempfile.TemporaryFile("w+")
    for rank in range(ranks):
        environment = group | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        at = None if rank else kill_at
        children.append(start(argv, out, environment if ranks > 1 else {}, at, write, said))
    os.close(write)
    _, status = os.waitpid(children[0], 0)
    killed = os.WIFSIGNALED(status)
    if killed:
        late = sum(map(end, children[1:]))
    else:
        others = [os.waitpid(child, 0)[1] for child in children[1:]]
    said.seek(0)
    words = said.read()
    assert "Traceback" not in words, words
    if killed:
        os.close(read)
        return True, kill_at, late
    assert not any([status, *others]), f"exit status {status, *others}: {words}"
    with os.fdopen(read) as pipe:
        return False, max(map(int, pipe.read().split())), 0


def left(out):
    """What a run leaves, without its times: log lines, and the contents of its checkpoints."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    found = {"log.jsonl": log, "names": sorted(path.name for path in out.iterdir())}
    for name in ("last.pt", "best.pt"):
        state = torch.load(out / name, weights_only=True)
        state.pop("args", None)  # it holds OUT
        found[name] = state
    return found


def same(a, b):
    """Equality of nested states, tensors to the bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def survive(argv, folder, stride=1, first=1, ranks=1):
    """Kills at every stride-th operation. Returns (points tried, [what differs], ranks ended)."""
    folder = Path(folder)
    _, operations, _ = run(argv, folder / "whole", None, ranks)
    whole, differs, points, ended = left(folder / "whole"), [], 0, 0
    for n in range(first, operations + 1, stride):
        out = folder / str(n)
        killed, _, late = run(argv, out, n, ranks)
        points, ended = points + killed, ended + late
        if (out / "previous.pt").exists() and not (out / "last.pt").exists():
            differs.append(f"operation {n}: no last.pt after the kill")
        if killed:
            run(argv, out, None, ranks)
        again = left(out)
        differs += [f"operation {n}: {k}" for k in whole if not same(whole[k], again[k])]
    return points, differs, ended


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).parent)]
    from test_train import kill_command

    torch.set_num_threads(1)
    asked = int(sys.argv[1]) if sys.argv[1:] else 1
    with tempfile.TemporaryDirectory() as folder:
        tried, wrong, late = survive(kill_command(Path(folder)), folder, ranks=asked)
    print(*wrong, f"{tried} file operations, {len(wrong)} of them leave something else", sep="\n")
    if asked > 1:
        print(f"{late} times the other rank was there after {PATIENCE} s and had to be ended")
    sys.exit(bool(wrong))
