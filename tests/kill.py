# SPDX-License-Identifier: MIT
"""Kills a training run at its n-th file operation, starts it again, and compares what it leaves.

    python tests/kill.py    # every file operation of a run; a line for each that differs

An audit hook of Python counts what is opened for writing, renamed, copied and removed below OUT.
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "shutil.copyfile")
TIMES = ("images_per_second", "data_wait", "memory_gb", "eta_seconds", "seconds")


def run(argv, out, kill_at=None):
    """train.py in a forked process; returns (was it killed, number of file operations)."""
    import train

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event, arguments):
            nonlocal seen
            writes = event != "open" or (arguments[1] and set(str(arguments[1])) & set("wax+"))
            if event in EVENTS and writes and str(arguments[0]).startswith(str(out)):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        code = train.command([*argv, "--out", str(out)])
        os.write(write, str(seen).encode())
        os._exit(code)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    if os.WIFSIGNALED(status):
        return True, kill_at
    assert os.waitstatus_to_exitcode(status) == 0, f"exit status {status}"
    return False, int(said)


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


def survive(argv, folder, stride=1, first=1):
    """Kills at every stride-th operation. Returns (points tried, [what differs])."""
    folder = Path(folder)
    _, operations = run(argv, folder / "whole")
    whole, differs, points = left(folder / "whole"), [], 0
    for n in range(first, operations + 1, stride):
        out = folder / str(n)
        if not run(argv, out, kill_at=n)[0]:
            continue
        points += 1
        if n > 1 and not run(argv, out)[0]:
            again = left(out)
            differs += [f"operation {n}: {k}" for k in whole if not same(whole[k], again[k])]
    return points, differs


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).parent)]
    from test_train import kill_command

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tried, wrong = survive(kill_command(Path(folder)), folder)
    print(*wrong, f"{tried} file operations, {len(wrong)} of them leave something else", sep="\n")
    sys.exit(bool(wrong))
