# SPDX-License-Identifier: MIT
"""explain.py tells the step that training takes, with every equation, from files of the toy."""

import argparse
import re

import numpy as np
import pytest
import torch
from PIL import Image

import backbone
import explain
import files
import gcl
import toy


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    """(OUT, net) of a stand-in for the trained toy: random CLIP, an adapter with open gates."""
    out = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "PER_SHARD", 60)
        toy.write(toy.draw_shard((out / "data/train-000.tar", 5, 0)))
    files.write_text(out / "clip/toy-clip.json", toy.CONFIG)
    torch.manual_seed(1)
    clip, _ = gcl.load_clip(str(out / "clip/toy-clip.json"), None)
    torch.save(clip.state_dict(), out / "clip/toy-clip.pt")
    net = gcl.GCL(gcl.load_clip(*map(str, toy.clip_of(out)[1::2]))[0])
    for name, parameter in net.adapter.named_parameters():
        parameter.data += 0.5 * name.endswith("gate")
    (out / "gcl").mkdir()
    net.save(out / "gcl/last.pt")
    return out, net


def test_the_story_tells_the_step_that_training_takes(explained):
    """Its matrices give the losses of the model itself, its masks are those that the losses see."""
    out, net = explained
    images, texts = explain.story_pairs(out / "data/train-000.tar", 4)
    tokens = backbone.tokenizer_of(net.clip)(texts)
    noise = torch.rand(4, 1, 24, 24)
    step = explain.one_step(net, toy.normalised(np.stack(images)), tokens, noise)
    scale, losses = 1 / 0.07, step["losses"]
    for matrix, name in (("s_m", "gcl_v"), ("s_f", "gcl_f")):
        rows = torch.log_softmax(scale * step[matrix], 1).diagonal().mean()
        columns = torch.log_softmax(scale * step[matrix], 0).diagonal().mean()
        assert losses[name].item() == pytest.approx(-(rows + columns).item() / 2, abs=1e-5)
    areas = step["mask"].mean((2, 3)).diagonal()
    assert losses["area_pos"].item() == pytest.approx(abs(0.4 - areas.mean().item()), abs=1e-6)
    # A place is in where the noise is below the mask's odds.
    own = step["mask"][torch.arange(4), torch.arange(4)]
    assert torch.equal(step["sample"][:, 0] > 0.5, own > 1 - noise[:, 0])
    larger = step["sample"].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert not step["masked"][larger.expand(-1, 3, -1, -1) < 0.5].any()


def test_the_pairs_of_the_story_name_one_object_each(explained):
    images, texts = explain.story_pairs(explained[0] / "data/train-000.tar")
    named = [[name for name in toy.CLASSES if name in text] for text in texts]
    assert len(images) == len(texts) >= 4
    assert all(len(names) == 1 and names[0] in toy.OBJECTS for names in named)
    assert len({names[0] for names in named}) == len(texts)


def test_every_step_is_drawn_with_its_equation(explained, monkeypatch):
    """The page holds the cells that it says it does, and equations (2) to (12) in its titles."""
    out, _ = explained
    said, drawn = [], []
    text, cell_of = explain.put_text, explain.draw_cell

    def put_text(draw, xy, words, *rest, **options):
        said.append(words)
        text(draw, xy, words, *rest, **options)

    def draw_cell(page, x, y, cell, side):
        drawn.append((x, y, cell, side))
        cell_of(page, x, y, cell, side)

    monkeypatch.setattr(explain, "put_text", put_text)
    monkeypatch.setattr(explain, "draw_cell", draw_cell)
    explain.explain(out)
    titles = [words for words in said if re.match(r"[1-9]\. ", words)]
    numbers = {int(n) for title in titles for n in re.findall(r"\((\d+)\)", title)}
    assert sorted(numbers) == list(range(2, 13))
    story = [item for item in drawn if item[3] == 250]
    assert len(story) == 9 * 2 - 1
    page = np.array(Image.open(out / "explain.png"))
    for x, y, cell, side in story:
        if isinstance(cell, np.ndarray) and cell.dtype == np.uint8:
            shown = page[y + 125, x : x + side][[2, 130, 247]]  # the middle row of the cell
            row = cell[len(cell) // 2][[0, int(130.5 * len(cell) / side), -1]]
            assert np.array_equal(shown, row if cell.ndim == 3 else row[:, None].repeat(3, 1))
    assert {"before", "after", "sum", "|0.4 - true area|"} <= set(said)


def test_the_toy_runs_only_where_it_is_missing(explained, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(toy, "main", lambda args: calls.append(args.out))
    monkeypatch.setattr(explain, "explain", lambda out: calls.append("story"))
    for out in (explained[0], tmp_path):
        explain.main(argparse.Namespace(out=out))
    assert calls == ["story", tmp_path, "story"]
