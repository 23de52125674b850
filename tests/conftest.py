# SPDX-License-Identifier: MIT
"""Helpers of the tests: the golden tensors, the tiny CLIP they belong to, and several ranks on one
machine.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
CLIP_JSON, CLIP_WEIGHTS = str(GOLDEN / "clip_tiny_A.json"), str(GOLDEN / "clip_tiny_A.pt")
RELEASE, RELEASE_STRIPPED = str(GOLDEN / "tcl_tiny_A.pth"), str(GOLDEN / "tcl_tiny_A_stripped.pth")

sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
tqdm.monitor_interval = 0  # no thread: the tests fork


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def golden(name):
    """The arrays of tests/golden/<name>.npz as tensors, names as lists of str."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {
            k: v.tolist() if v.dtype.kind == "U" else torch.from_numpy(v) for k, v in arrays.items()
        }


def assert_close(actual, expected, rtol=1e-4, atol=1e-5):
    """Same shape and values; the golden tensors' tolerance by default."""
    if not torch.is_tensor(expected):
        expected = torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(
        actual.detach(), expected.detach(), rtol=rtol, atol=atol, check_dtype=False
    )


def run_ranks(function, *args, ranks=2):
    """[function(0, *args), function(1, *args), ...], each from its own process of one gloo group.

    function stands at the top level of a test module; results are tensors or containers of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Forked: a new interpreter for each rank would import for seconds.
        how = "fork" if sys.platform == "linux" else "spawn"
        given = ranks, folder, function, args
        torch.multiprocessing.start_processes(_rank, given, ranks, start_method=how)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(ranks)]


def _rank(rank, ranks, folder, function, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
    )
    torch.save(function(rank, *args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
