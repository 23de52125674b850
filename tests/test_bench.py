# SPDX-License-Identifier: MIT
"""bench.py as a command on a tiny CLIP: all stages, ratios of its own times, PAMR's usual way."""

import json
import statistics

import pytest
import tiny
import torch
from conftest import assert_close

import bench
import pamr

SMALL = "--window 32 --classes 2 3 --batches 2 --rounds 2 --device cpu --threads 1".split()


def test_bench_measures_all_stages_and_its_ratios_are_of_its_times(tmp_path):
    config, _ = tiny.make_clip(tmp_path)
    done = tiny.run("bench.py", "--model", config, *SMALL, "--json", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "bench.json").read_text())
    stages = ["segment"] * 4 + ["train"] + ["pamr"] * 2 + ["loader", "evaluate"]
    assert [row["stage"] for row in result["rows"]] == stages
    for row in result["rows"]:
        times, floors = row["times"], row["floor_times"]
        assert len(times) == len(floors) == 2 and min(times + floors) > 0
        ratios = [time / floor for time, floor in zip(times, floors, strict=True)]
        assert row["ratio"] == pytest.approx(statistics.median(ratios))
        assert row["seconds"] == pytest.approx(statistics.median(times))
        assert f"| {row['stage']} | {row['what']} | {row['seconds']:.3g} |" in done.stdout


def test_the_usual_way_of_pamr_is_pamr():
    image = torch.rand(2, 3, 30, 26, dtype=torch.float64)
    mask = torch.rand(2, 4, 30, 26, dtype=torch.float64)
    assert_close(bench.yardstick(image, mask), pamr.pamr(image, mask), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flags", (["--rounds", 0], ["--stages", "all"]))
def test_impossible_flags_are_refused(flags):
    tiny.check_refused(tiny.run("bench.py", *flags), 2, flags[0])
