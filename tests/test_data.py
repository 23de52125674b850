# SPDX-License-Identifier: MIT
"""Shards, their order, training samples."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import jpeg, make_shards, write_tar

import data
import gcl


def words(texts):
    """A tokenizer for tests: the numbers of a caption."""
    return torch.tensor([[int(word) for word in text.split() if word.isdigit()] for text in texts])


def dataset(shards, seed=0, strong=False):
    transform = data.train_transform(16, gcl.CLIP_NORM, strong)
    return data.PairDataset(data.expand_shards([shards]), transform, words, (8, 8), seed)


# ---- shards ----


def test_globs_and_ranges_name_the_same_shards_once(tmp_path):
    pattern = make_shards(tmp_path, shards=3, pairs=1)
    by_range = data.expand_shards([str(tmp_path / "{000..002}.tar"), pattern])
    assert by_range == data.expand_shards([pattern]) == [str(tmp_path / f"{k:03d}.tar") for k in range(3)]


def test_missing_shards_are_named(tmp_path):
    make_shards(tmp_path, shards=2)
    with pytest.raises(data.DataError, match="002.tar is missing"):
        data.expand_shards([str(tmp_path / "{000..002}.tar")])
    with pytest.raises(data.DataError, match="no such shard"):
        data.expand_shards([str(tmp_path / "*.zip")])


def test_scan_finds_the_bytes_of_whole_pairs_alone(tmp_path):
    members = [("a.txt", b"caption a"), ("a.JPG", b"image a"), ("b.jpg", b"no caption"), ("c.txt", b"no image")]
    members += [("d.png", b"image d"), ("d.json", b'{"caption": "d"}'), ("sub/a.webp", b"image s"), ("sub/a.txt", b"s")]
    path = write_tar(tmp_path / "x.tar", members)
    content = open(path, "rb").read()
    found = {
        content[i : i + m].decode(): content[t : t + abs(n)].decode() for i, m, t, n in data.scan_shard(path).tolist()
    }
    assert found == {"image a": "caption a", "image d": '{"caption": "d"}', "image s": "s"}


def test_a_broken_png_is_a_bad_sample_like_any_other(tmp_path):
    """PIL raises SyntaxError for it."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    broken = bytearray(file.getvalue())
    broken[8:16] = b"brokenpn"
    path = write_tar(
        tmp_path / "x.tar", [("0.png", bytes(broken)), ("0.txt", b"7"), ("1.jpg", jpeg(1)), ("1.txt", b"8")]
    )
    assert dataset(path)[(0, 0)][3] == 1


def test_a_truncated_shard_gives_the_pairs_before_the_cut(tmp_path, capsys):
    members = [(f"{k}.{s}", bytes(700)) for k in range(5) for s in ("jpg", "txt")]
    path = write_tar(tmp_path / "x.tar", members)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(open(path, "rb").read()[: 7 * 1536 + 600])  # 512 of header and 1024 of content per member
    assert data.scan_shard(str(cut)).tolist() == data.scan_shard(path)[:3].tolist()
    assert "cut.tar: cut off inside 3.txt" in capsys.readouterr().err
    (tmp_path / "no.tar").write_bytes(b"this is not a tar" * 100)
    with pytest.raises(data.DataError, match="no.tar: not a tar"):
        data.scan_shard(str(tmp_path / "no.tar"))


def test_a_tar_without_pairs_is_named(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("readme.md", b"hello")])
    with pytest.raises(data.DataError, match="x.tar: no image-text pairs"):
        dataset(path)


def test_a_sample_is_its_own_picture_and_caption(tmp_path):
    pairs = dataset(make_shards(tmp_path, shards=2, pairs=3))
    stored, caption = pairs.read(4)
    reference = Image.open(io.BytesIO(jpeg(101))).convert("RGB")
    assert caption == "picture 1 1" and np.array_equal(np.array(stored), np.array(reference))
    image, tokens, noise, replaced = pairs[(0, 4)]
    assert tokens.tolist() == [1, 1] and replaced == 0
    assert image.shape == (3, 16, 16) and noise.shape == (1, 8, 8)


def test_a_sample_depends_on_seed_and_position_alone(tmp_path):
    shards = make_shards(tmp_path)
    for strong in (False, True):
        first = dataset(shards, strong=strong)[(5, 3)]
        torch.manual_seed(99)
        before = torch.random.get_rng_state()
        again = dataset(shards, strong=strong)[(5, 3)]
        assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert not torch.equal(dataset(shards, strong=strong)[(6, 3)][2], first[2])
        assert not torch.equal(dataset(shards, seed=1, strong=strong)[(5, 3)][0], first[0])


def test_bad_samples_are_replaced_by_the_next_and_counted(tmp_path):
    members = [("0.jpg", b"broken"), ("0.txt", b"7"), ("1.jpg", jpeg(1)), ("1.txt", b"  "), ("2.jpg", jpeg(2))]
    members += [("2.txt", b"\xff\xfe"), ("3.jpg", jpeg(3)), ("3.txt", b"33"), ("4.jpg", jpeg(4)), ("4.json", b"{}")]
    pairs = dataset(write_tar(tmp_path / "x.tar", members))
    assert [(pairs[(0, k)][1].item(), pairs[(0, k)][3]) for k in range(5)] == [
        (33, 3),
        (33, 2),
        (33, 1),
        (33, 0),
        (33, 4),
    ]


def test_nothing_but_bad_samples_is_an_error(tmp_path):
    pairs = dataset(write_tar(tmp_path / "x.tar", [("0.jpg", b"broken"), ("0.txt", b"7")]))
    with pytest.raises(data.DataError, match="x.tar.*unreadable"):
        pairs[(0, 0)]


def test_the_training_transform_crops_flips_and_normalises():
    white = Image.new("RGB", (50, 40), "white")
    image = data.train_transform(16, gcl.CLIP_NORM, strong=False)(white)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in gcl.CLIP_NORM)
    torch.testing.assert_close(image, ((1 - mean) / std).expand(3, 16, 16))
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    torch.manual_seed(0)
    slopes = [
        (v[0, 8, -1] - v[0, 8, 0]).item() > 0
        for v in (data.train_transform(16, gcl.CLIP_NORM, False)(ramp) for _ in range(40))
    ]
    assert 8 < sum(slopes) < 32  # half of them are flipped


# ---- order ----


def positions(order):
    return [[p for p, _ in batch] for batch in order], [[i for _, i in batch] for batch in order]


def test_every_epoch_is_a_permutation():
    where, which = positions(data.GlobalOrder(n=10, batch_size=4, steps=10))
    flat = sum(which, [])
    assert sum(where, []) == list(range(40))
    for epoch in range(4):
        assert sorted(flat[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert flat[:10] != flat[10:20] and flat != sum(positions(data.GlobalOrder(10, 4, 10, seed=1))[1], [])


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(ranks):
    whole = list(data.GlobalOrder(7, 8, 5))
    parts = [list(data.GlobalOrder(7, 8, 5, rank=r, ranks=ranks)) for r in range(ranks)]
    assert [sum((part[k] for part in parts), []) for k in range(5)] == whole


def test_resume_is_arithmetic():
    whole, rest = list(data.GlobalOrder(7, 4, 9, seed=3)), data.GlobalOrder(7, 4, 9, seed=3, start=5)
    assert list(rest) == whole[5:] and len(rest) == 4
