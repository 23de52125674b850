# SPDX-License-Identifier: MIT
"""bench.py as a command on a tiny CLIP: all stages, ratios of its own times, a yardstick that is PAMR."""

import json
import statistics

import pytest
import tiny
import torch
from conftest import assert_close

import bench
import pamr

SMALL = [
    "--window",
    32,
    "--classes",
    2,
    3,
    "--batches",
    2,
    "--pamr-size",
    24,
    "--images",
    1,
    "--pairs",
    20,
    "--rounds",
    2,
]


def test_bench_measures_all_stages_and_its_ratios_are_of_its_times(tmp_path):
    config, _ = tiny.make_clip(tmp_path)
    small = [*SMALL, "--device", "cpu", "--threads", 1]
    done = tiny.run("bench.py", "--model", config, *small, "--json", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "bench.json").read_text())
    rows = result["rows"]
    stages = ["segment"] * 4 + ["train"] + ["pamr"] * 2 + ["loader"] + ["shards"] * 2 + ["evaluate"]
    assert [row["stage"] for row in rows] == stages
    assert result["threads"] == 1 and "1 CPU thread" in done.stdout
    for row in rows:
        assert (
            len(row["times"]) == len(row["floor_times"]) == 2
            and min(row["times"] + row["floor_times"]) > 0
        )
        ratios = [t / f for t, f in zip(row["times"], row["floor_times"], strict=True)]
        assert row["ratio"] == pytest.approx(statistics.median(ratios))
        assert row["seconds"] == pytest.approx(statistics.median(row["times"]))
        assert f"| {row['stage']} | {row['what']} | {row['seconds']:.3g} |" in done.stdout
    assert all(row["largest_difference"] < 1e-5 for row in rows if row["stage"] == "pamr")
    assert all(row["bytes"] > 0 for row in rows if row["stage"] == "train")
    assert sum(rows[-1]["split"].values()) == pytest.approx(1)


def test_the_yardstick_is_pamr():
    image, mask = (
        torch.rand(2, 3, 30, 26, dtype=torch.float64),
        torch.rand(2, 4, 30, 26, dtype=torch.float64),
    )
    assert_close(bench.yardstick(image, mask), pamr.pamr(image, mask), rtol=1e-9, atol=1e-9)


def test_impossible_flags_are_refused(tmp_path):
    for flags in (
        ["--rounds", 0],
        ["--stages", "all"],
        ["--json", tmp_path / "missing" / "x.json"],
    ):
        tiny.check_refused(tiny.run("bench.py", *flags), 2, flags[0])
