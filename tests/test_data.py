# SPDX-License-Identifier: MIT
"""Shards, their index and order, training samples, `python data.py check`."""

import io
import multiprocessing
import os
import pickle
import re
import sys
import tarfile
import time
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import jpeg, make_shards, write_tar
from torchvision.transforms.functional import InterpolationMode, resized_crop

import data
import files
import gcl


def words(texts):
    """A tokenizer for tests: the numbers of a caption."""
    return torch.tensor([[int(word) for word in text.split() if word.isdigit()] for text in texts])


def dataset(shards, seed=0, strong=False, cache=None):
    transform = data.train_transform(16, gcl.CLIP_NORM, strong)
    return data.PairDataset(data.expand_shards([shards]), transform, words, (8, 8), seed, cache)


def pair(stem, caption="7", image=None):
    return [(f"{stem}.jpg", jpeg(1) if image is None else image), (f"{stem}.txt", caption.encode())]


# ---- where the pairs lie ----


def test_globs_and_ranges_name_the_same_shards_once(tmp_path):
    pattern = make_shards(tmp_path, shards=3, pairs=1)
    by_range = data.expand_shards([str(tmp_path / "{000..002}.tar"), pattern])
    assert (
        by_range
        == data.expand_shards([pattern])
        == [str(tmp_path / f"{k:03d}.tar") for k in range(3)]
    )


def test_missing_shards_are_named(tmp_path):
    make_shards(tmp_path, shards=2)
    with pytest.raises(files.InputError, match="002.tar is missing"):
        data.expand_shards([str(tmp_path / "{000..002}.tar")])
    with pytest.raises(files.InputError, match="no such shard"):
        data.expand_shards([str(tmp_path / "*.zip")])


def found_in(path):
    """{image bytes: text bytes} of a shard's rows, and its counts."""
    counts, rows, _ = data.scan_shard(path)
    return {
        i.decode(): t.decode() for i, t in (data.read_bytes(path, row) for row in rows)
    }, counts.tolist()


def test_a_scan_finds_the_bytes_of_whole_pairs_alone(tmp_path):
    members = [
        ("a.txt", b"caption a"),
        ("a.JPG", b"image a"),
        ("b.jpg", b"no caption"),
        ("c.txt", b"no image"),
    ]
    members += [
        ("d.png", b"image d"),
        ("d.json", b'{"caption": "d"}'),
        ("sub/a.webp", b"image s"),
        ("sub/a.TXT", b"s"),
    ]
    members += [
        ("._d.jpg", b"mac"),
        ("._d.txt", b"mac"),
        ("e.jpeg", b"image e"),
        ("notes.md", bytes(70_000)),
    ]
    members += [("e.json", b"{}"), ("e.txt", b"caption e"), ("f.txt", b"")]
    found, counts = found_in(write_tar(tmp_path / "x.tar", members))
    assert found == {
        "image a": "caption a",
        "image d": '{"caption": "d"}',
        "image s": "s",
        "image e": "caption e",
    }
    assert counts == [4, 3, 0, 0]  # pairs, half pairs, duplicates, cut


def test_the_first_of_two_equal_names_counts(tmp_path):
    members = [
        ("a.jpg", b"first"),
        ("a.txt", b"1"),
        ("b.jpg", b"b"),
        ("a.jpg", b"second"),
        ("a.txt", b"2"),
    ]
    assert found_in(write_tar(tmp_path / "x.tar", members + [("b.txt", b"3")])) == (
        {"first": "1", "b": "3"},
        [2, 0, 2, 0],
    )


def add(tar, name, content, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_every_format_are_found(tmp_path, kind):
    """Long names, names beyond ASCII, folders, in each of the three formats."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        for name in (
            "a.jpg",
            "d" * 60 + "/" + "e" * 70 + ".txt",
            "d" * 96 + ".png",
            "Gemälde/猫.webp",
            "empty.txt",
        ):
            add(
                tar, name, name.encode() * (name != "empty.txt"), mtime=1.5
            )  # a fraction needs a pax header
        add(tar, "folder", b"", type=tarfile.DIRTYPE)
        if kind != tarfile.USTAR_FORMAT:
            add(tar, "f" * 300 + ".jpg", bytes(1024))
        add(tar, "last.jpg", bytes(513))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    assert data.list_members(path) == (expected, {})


def test_links_and_global_headers_are_passed_over(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(
        path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "a global header"}
    ) as tar:
        add(tar, "a.jpg", b"image a")
        add(tar, "a.txt", b"a")
        add(tar, "b.txt", b"", type=tarfile.SYMTYPE, linkname="a.txt")
    assert found_in(path) == ({"image a": "a"}, [1, 0, 0, 0])


@pytest.mark.parametrize(
    "cut", [7 * 1536 + 600, 7 * 1536 + 100, 7 * 1536]
)  # in a member, in its header, before it
def test_a_cut_shard_gives_the_pairs_before_the_cut_with_one_warning(tmp_path, capsys, cut):
    members = [(f"{k}.{s}", bytes(700)) for k in range(5) for s in ("jpg", "txt")]
    content = open(write_tar(tmp_path / "x.tar", members), "rb").read()
    (tmp_path / "cut.tar").write_bytes(
        content[:cut]
    )  # 512 of header and 1024 of content per member
    for _ in range(2):
        assert len(dataset(str(tmp_path / "cut.tar"), cache=tmp_path)) == 3
    assert capsys.readouterr().err == f"warning: 1 cut off shards: {tmp_path}/cut.tar\n"
    rows = [data.scan_shard(str(tmp_path / name))[1] for name in ("cut.tar", "x.tar")]
    assert rows[0].tolist() == rows[1][:3].tolist()


def test_a_broken_header_ends_a_shard_as_a_cut_does(tmp_path):
    content = bytearray(open(write_tar(tmp_path / "x.tar", pair("a") + pair("b")), "rb").read())
    content[content.index(b"b.jpg")] = ord("c")  # the checksum no longer fits
    (tmp_path / "x.tar").write_bytes(content)
    assert data.scan_shard(str(tmp_path / "x.tar"))[0].tolist() == [1, 0, 0, 1]


def test_what_is_no_tar_or_holds_no_pairs_is_named(tmp_path):
    for content in (b"this is not a tar" * 100, b""):
        (tmp_path / "no.tar").write_bytes(content)
        with pytest.raises(files.InputError, match="1 unreadable .*no.tar: not a tar"):
            data.index_shards([str(tmp_path / "no.tar")])
    path = write_tar(tmp_path / "x.tar", [("readme.md", b"hello")])
    with pytest.raises(files.InputError, match="x.tar: no image-text pairs"):
        dataset(path, cache=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_offsets_past_4_gib_are_kept(tmp_path):
    """A sparse file: two pairs, and between them a member of 5 GiB, too large to be read."""
    after = pair("b", "8") + [("hole.txt", b"9")]
    path, hole = str(tmp_path / "x.tar"), 5 << 30
    write_tar(path, pair("a"))
    with open(path, "r+b") as file:
        at = data.list_members(path)[0][-1][1] + 512
        header = tarfile.TarInfo("hole.jpg")
        header.size = hole
        file.seek(at)
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.seek(at + 512 + hole)
        file.write(open(write_tar(tmp_path / "y.tar", after), "rb").read())
    rows = data.scan_shard(path)[1]
    assert (
        len(rows) == 2
        and data.read_bytes(path, rows[1]) == [jpeg(1), b"8"]
        and int(rows[1][0]) * 512 > hole
    )


def header(name, size, kind=b"0", sparse=b""):
    """512 bytes; size is a number, or the 12 bytes of its field; sparse is GNU's map of data."""
    block = bytearray(512)
    block[386 : 386 + len(sparse)] = sparse
    block[: len(name)] = name
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[156:157], block[257:265] = kind, b"ustar\x0000"
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


def member(name, content, kind=b"0"):
    return header(name, len(content), kind) + content + bytes(-len(content) % 512)


def record(key, value):
    """One line of a pax header; the length in front counts itself."""
    rest = b" %s=%s\n" % (key, value)
    return next(
        b"%d%s" % (n, rest) for n in range(len(rest), len(rest) + 9) if n == len(rest) + len(str(n))
    )


def sized(key, value, kind=b"x"):
    """A pax header of one record, and the member that follows it."""
    return member(b"pax", record(key, value), kind) + member(b"b.jpg", b"x")


GOOD = member(b"a.jpg", b"image a") + member(b"a.txt", b"a")
BACK = (256**12 - 2560).to_bytes(12, "big")  # below zero
MAP = b"%011o\0%011o\0" % (0, 5) + bytes(73) + b"%011o\0" % 5
SPARSE = record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0")
HOSTILE = {  # what follows a whole pair, and whether the scan ends there
    "negative size": (header(b"b.jpg", (256**12 - 512).to_bytes(12, "big")), True),
    "size of -1": (header(b"b.jpg", b"\xff" * 12) + member(b"b.txt", b"b"), True),
    "size that leads back to the start": (header(b"b.jpg", BACK), True),
    "size that leads back, of a sparse member": (
        member(b"pax", record(b"GNU.sparse.size", b"5"), b"x") + header(b"b.jpg", BACK),
        True,
    ),
    "size past 2^63": (header(b"b.jpg", b"\x80" + (2**70).to_bytes(11, "big")), True),
    "size of 2^62": (header(b"b.jpg", b"\x80" + (2**62).to_bytes(11, "big")), True),
    "size that is no number": (header(b"b.jpg", b"zzzzzzzzzzz\0"), True),
    "pax size below zero": (sized(b"size", b"-512"), True),
    "pax size of 4,000 digits": (sized(b"size", b"9" * 4000), True),
    "pax record of 60 kB": (sized(b"comment", b"x" * 60_000), True),
    "pax record of 5 MB": (sized(b"comment", b"x" * 5_000_000), True),
    "pax record without an end": (member(b"pax", b"1" * 8000, b"x") + GOOD, False),
    "pax record of length 0": (member(b"pax", b"0 a=b\n", b"x") + GOOD, True),
    "long name of 8 GB": (header(b"name", 2**33, b"L"), True),
    "long name of negative size": (
        header(b"name", (256**12 - 512).to_bytes(12, "big"), b"L"),
        True,
    ),
    "3,000 nested long names": (member(b"name", b"b.jpg\0", b"L") * 3000, True),
    "3,000 nested pax headers": (sized(b"path", b"b.jpg")[:1024] * 3000, True),
    "3,000 global headers": (sized(b"comment", b"c", b"g")[:1024] * 3000, True),
    "sparse, GNU": (
        header(b"b.jpg", 5, b"S", MAP) + b"image".ljust(512, b"\0") + member(b"b.txt", b"b"),
        False,
    ),
    "sparse, pax": (member(b"pax", SPARSE, b"x") + member(b"b.jpg", b"9" * 40 + b"\n"), True),
    "a device": (header(b"b.jpg", 0, b"3"), False),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tar_gives_what_stands_before_in_bounded_memory(tmp_path, name):
    after, ends = HOSTILE[name]
    path = tmp_path / "x.tar"
    path.write_bytes(GOOD + after + member(b"z.jpg", b"image z") + member(b"z.txt", b"z"))
    tracemalloc.start()
    counts, rows, wrong = data.scan_shard(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts[0] == (1 if ends else 2) and peak < 5_000_000
    assert [data.read_bytes(path, row) for row in rows][0] == [b"image a", b"a"]
    assert wrong == {"cut off shards": [str(path)]}  # there are no zeros at its end


@pytest.mark.parametrize("after", [600, 512, 100])
def test_a_shard_cut_inside_its_first_member_counts_as_cut(tmp_path, after):
    path = tmp_path / "x.tar"
    path.write_bytes(member(b"a.jpg", bytes(700))[:after])
    what = "cut off shards" if after >= 512 else "unreadable shards"
    assert list(data.scan_shard(str(path))[2]) == [what]


def odd_shards(folder):
    """Five good pairs, and one of everything else that a glob can meet."""
    make_shards(folder, shards=1, pairs=5)
    (folder / "empty.tar").touch()
    for k in range(4):
        (folder / f"no{k}.tar").write_bytes(b"no tar" * 1000)
    (folder / "cut.tar").write_bytes((folder / "000.tar").read_bytes()[:3000])
    write_tar(folder / "none.tar", [("readme.md", b"hello")])
    (folder / "folder.tar").mkdir()
    (folder / "link.tar").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.tar")
    return str(folder / "*.tar")


def test_all_odd_shards_are_named_at_once(tmp_path, capsys):
    shards = odd_shards(tmp_path)
    with pytest.raises(files.InputError) as error:
        dataset(shards, cache=tmp_path / "out")
    for words in (
        r"8 unreadable shards: .*/empty.tar: .*; .*/folder.tar: .*no file.*; .*/link.tar: ",
        r"1 cut off shards: .*/cut.tar, 1 shards without pairs: .*/none.tar: no image-text pairs, ",
    ):
        assert re.search(words, str(error.value))
    assert data.check_shards([shards], processes=2) == 1
    out = capsys.readouterr().out
    assert re.search(r"unreadable shards +8  .*/empty.tar: .*; .*/link.tar", out)
    assert re.search(r"shards without pairs +1  .*/none.tar: ", out)
    assert re.search(r"^pairs +5$", out, re.M)


def test_a_shard_without_pairs_is_wrong_in_a_check_and_a_warning_in_training(tmp_path, capsys):
    make_shards(tmp_path, shards=1, pairs=5)
    write_tar(tmp_path / "none.tar", [("readme.md", b"hello")])
    assert len(dataset(str(tmp_path / "*.tar"))) == 5
    assert re.fullmatch(
        r"warning: 1 shards without pairs: .*/none.tar.*\n", capsys.readouterr().err
    )
    assert data.check_shards([str(tmp_path / "*.tar")]) == 1


def test_brackets_and_braces_in_a_path_are_taken_as_they_are(tmp_path):
    for name in ("a[1].tar", "{0..1}.tar", "what?.tar", "a b\n.tar"):
        path = write_tar(tmp_path / name, pair("a"))
        assert data.expand_shards([path]) == [path]


def test_a_range_of_any_length_ends_at_the_first_shard_that_is_missing(tmp_path):
    make_shards(tmp_path, shards=2, pairs=1)
    tracemalloc.start()
    with pytest.raises(files.InputError, match="002.tar is missing"):
        data.expand_shards([str(tmp_path / "{000..999999999}.tar")])
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_the_same_shards_under_another_path_are_the_same(tmp_path, monkeypatch):
    pattern = make_shards(tmp_path / "one", shards=2, pairs=3)
    prints = {dataset(pattern, cache=tmp_path / "out").fingerprint()}
    (tmp_path / "one").rename(tmp_path / "two")
    monkeypatch.chdir(tmp_path / "two")
    for pattern in ("*.tar", str(tmp_path / "two/{000..001}.tar"), "../two/00[01].tar"):
        prints.add(dataset(pattern, cache=tmp_path / "out").fingerprint())
    assert len(prints) == 1
    write_tar(tmp_path / "two/001.tar", pair("other"))
    assert dataset("*.tar").fingerprint() not in prints


LONG = "d" * 120 + "/" + "e" * 120


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    ("stem", "shown"),
    [
        ("Gem\u00e4lde/\u732b", "Gem\u00e4lde/\u732b"),
        (LONG, LONG),
        ("\x1b[2Ja\nb\udcff", r"\x1b[2Ja\nb\udcff"),
    ],
    ids=["beyond ASCII", "long", "control characters"],
)
def test_names_in_messages_are_those_of_the_members(tmp_path, capsys, kind, stem, shown):
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
        add(tar, "a.jpg", jpeg(1))
        add(tar, "a.txt", b"a")
        add(tar, f"{stem}.jpg", b"broken")
        add(tar, f"{stem}.txt", b"b")
    assert data.check_shards([str(tmp_path / "x.tar")]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "bad: image" in line)
    assert f"x.tar: {shown}.jpg (not a picture" in line


# ---- the index ----


def test_shards_are_scanned_once_and_again_when_they_change(tmp_path, monkeypatch):
    pattern, scans = make_shards(tmp_path / "data", shards=2, pairs=3), []
    scan = data.scan_shard
    monkeypatch.setattr(data, "scan_shard", lambda path: scans.append(path) or scan(path))
    first, again = (
        dataset(pattern, cache=tmp_path / "out"),
        dataset(pattern, cache=tmp_path / "out"),
    )
    assert len(scans) == 2 and np.array_equal(first.index, again.index) and len(again) == 6
    assert (
        np.array_equal(first.index, dataset(pattern).index) and len(scans) == 4
    )  # without a folder nothing is kept
    write_tar(tmp_path / "data/001.tar", pair("a"))
    assert len(dataset(pattern, cache=tmp_path / "out")) == 4 and len(scans) == 6
    os.utime(tmp_path / "data/001.tar", (1, 1))
    dataset(pattern, cache=tmp_path / "out")
    assert len(scans) == 8 and not list((tmp_path / "out").glob("*.tmp"))
    write_tar(tmp_path / "data/001.tar", pair("a") + pair("b") * 9)
    os.utime(tmp_path / "data/001.tar", (1, 1))  # another size alone
    assert len(dataset(pattern, cache=tmp_path / "out")) == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:-16],
        lambda b: b[:40],
        lambda b: bytes(len(b)),
        lambda b: b[:-1] + bytes([b[-1] ^ 1]),
    ],
    ids=["empty", "cut", "a row and a half", "zeros", "a flipped bit"],
)
def test_a_broken_cache_is_made_anew(tmp_path, damage):
    pattern = make_shards(tmp_path / "data", shards=2, pairs=3)
    expected = np.array(dataset(pattern, cache=tmp_path / "out").index)
    (cache,) = (tmp_path / "out").iterdir()
    cache.write_bytes(damage(cache.read_bytes()))
    assert np.array_equal(dataset(pattern, cache=tmp_path / "out").index, expected)
    assert np.array_equal(data.open_index(cache), expected)


def test_a_pool_scans_as_one_process_does(tmp_path):
    shards = data.expand_shards([make_shards(tmp_path / "data", shards=17, pairs=2)])
    assert min(len(shards) // 8, 32) == 2
    index = data.index_shards(shards, tmp_path / "out")
    assert index[:17, 0].tolist() == [2] * 17
    assert index[17:].tolist() == sum((data.scan_shard(path)[1].tolist() for path in shards), [])


def test_an_index_is_mapped_and_not_sent_to_workers(tmp_path):
    """16 bytes a pair, in the one file for every process; a pickled data set holds its path."""
    pairs = dataset(make_shards(tmp_path / "data", shards=1, pairs=200), cache=tmp_path / "out")
    assert isinstance(pairs.index, np.memmap) and pairs.index[1:].nbytes == 16 * 200
    pickled = pickle.dumps(pairs)
    assert len(pickled) < 1500
    sent = pickle.loads(pickled)
    assert isinstance(sent.index, np.memmap) and sent.read(5)[1] == pairs.read(5)[1]


def slow_scan(shard, folder, seconds):
    """Builds an index in a process of its own, whose id becomes a file of folder once it scans."""

    def slow(path, scan=data.scan_shard):
        (folder / f"scan-{os.getpid()}").touch()
        time.sleep(seconds)
        return scan(path)

    def work():
        data.scan_shard = slow
        sys.exit(0 if len(data.index_shards([shard], folder)) == 2 else 1)

    folder.mkdir(exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def scanning(folder, end=30):
    """The ids of the processes that scan, as soon as there is one."""
    end += time.time()
    while (
        not (found := {int(path.name[5:]) for path in folder.glob("scan-*")}) and time.time() < end
    ):
        time.sleep(0.01)
    return found


def test_one_process_scans_while_the_others_wait(tmp_path):
    shard = write_tar(tmp_path / "x.tar", pair("a"))
    processes = [slow_scan(shard, tmp_path / "out", 0.5) for _ in range(4)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4 and len(
        scanning(tmp_path / "out")
    ) == 1


def test_if_the_scanning_process_is_killed_another_takes_over(tmp_path):
    shard = write_tar(tmp_path / "x.tar", pair("a"))
    hanging = slow_scan(shard, tmp_path / "out", 600)
    assert scanning(tmp_path / "out") == {hanging.pid}
    waiting = slow_scan(shard, tmp_path / "out", 0)
    waiting.join(0.5)
    assert waiting.exitcode is None and scanning(tmp_path / "out") == {hanging.pid}
    hanging.kill()
    waiting.join(30)
    assert waiting.exitcode == 0


# ---- samples ----


def test_a_sample_is_its_own_picture_and_caption(tmp_path):
    pairs = dataset(make_shards(tmp_path, shards=2, pairs=3))
    stored, caption = pairs.read(4)
    reference = Image.open(io.BytesIO(jpeg(101))).convert("RGB")
    assert caption == "picture 1 1" and np.array_equal(np.array(stored), np.array(reference))
    image, tokens, noise, bad = pairs[(0, 4)]
    assert tokens.tolist() == [1, 1] and bad.tolist() == [0] * len(data.REASONS)
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
        # Neither does the next seed's run repeat this one's samples a place earlier.
        assert not torch.equal(dataset(shards, seed=1, strong=strong)[(4, 3)][2], first[2])


def test_noise_is_uniform_between_0_and_1(tmp_path):
    """Of gumbel_sigmoid, which takes its logit: of a normal one, two thirds would be at an end."""
    pairs = dataset(make_shards(tmp_path))
    noise = torch.cat([pairs[(position, 3)][2].flatten() for position in range(20)])  # [1280]
    assert 0 <= noise.min() and noise.max() < 1
    tenths = torch.histc(noise, 10, min=0, max=1) / len(noise)
    assert (tenths - 0.1).abs().max() < 0.05  # six standard deviations of a tenth's share


def test_a_long_caption_is_cut_before_the_tokenizer(tmp_path):
    seen = []
    pairs = dataset(write_tar(tmp_path / "x.tar", pair("a", "7 " + "x" * 16_000)))
    pairs.tokenizer = lambda texts: seen.append(texts[0]) or words(texts)
    assert pairs[(0, 0)][1].tolist() == [7] and seen[0] == "7 " + "x" * 1998
    assert len(pairs.read(0)[1]) == 16_002


def test_noise_and_augmentation_of_a_sample_share_no_numbers(tmp_path):
    drawn = []
    pairs = dataset(make_shards(tmp_path))
    pairs.transform = lambda image: drawn.append(torch.rand(64))
    noise = pairs[(5, 3)][2]
    assert not set(drawn[0].tolist()) & set(noise.flatten().tolist())


@pytest.mark.parametrize(
    ("content", "from_json", "caption"),
    [
        (b" a cat\n", False, "a cat"),
        (b"\xef\xbb\xbfa cat", False, "a cat"),  # a byte order mark is no word
        ("猫".encode(), False, "猫"),
        (b'{"caption": " a cat "}', True, "a cat"),
        (b'{"caption": "a \\ud83d\\ude00"}', True, "a 😀"),
        (b"", False, None),
        (b" \n\t", False, None),
        ("café".encode("latin-1"), False, None),
        (b"", True, None),
        (b"{", True, None),
        (b"{}", True, None),
        (b'{"caption": null}', True, None),
        (b'{"caption": 7}', True, None),
        (b'{"caption": "half a \\ud83d"}', True, None),  # the tokenizer could not spell it
        (b'["caption"]', True, None),
        (b"[" * 100_000, True, None),
    ],
)
def test_captions(content, from_json, caption):
    if caption is not None:
        assert data.decode_caption(content, from_json) == caption
    else:
        with pytest.raises(data.BadSample) as bad:
            data.decode_caption(content, from_json)
        assert bad.value.reason == "caption"


def test_bad_samples_are_replaced_in_a_fixed_way_and_counted_by_reason(tmp_path):
    members = (
        pair(0, image=b"broken")
        + pair(1, "  ")
        + pair(2)
        + pair(3, "33")
        + [("4.jpg", jpeg(4)), ("4.json", b"{}")]
    )
    members[5] = ("2.txt", b"\xff\xfe")
    pairs = dataset(write_tar(tmp_path / "x.tar", members))
    assert data.REASONS == ("shard", "image", "size", "caption")
    for index, bad in enumerate(
        [[0, 1, 0, 2], [0, 0, 0, 2], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 3]]
    ):
        _, tokens, _, counts = pairs[(0, index)]
        assert tokens.tolist() == [33] and counts.tolist() == bad
    batch = next(iter(torch.utils.data.DataLoader(pairs, batch_sampler=[[(0, 0), (1, 4)]])))
    assert batch[3].sum(0).tolist() == [0, 2, 0, 5]


def test_a_broken_stretch_is_left_at_once(tmp_path):
    """150 bad samples in a row out of 400: a replacement lies a hundredth of all, 4, on."""
    members = sum((pair(k, str(k), None if k >= 150 else b"x") for k in range(400)), [])
    pairs = dataset(write_tar(tmp_path / "x.tar", members))
    assert [pairs[(0, k)][1].item() for k in (0, 3, 149, 399)] == [152, 151, 153, 399]
    assert pairs[(0, 0)][3].tolist() == [0, 38, 0, 0]


def test_nothing_but_bad_samples_is_an_error_that_names_one(tmp_path):
    pairs = dataset(write_tar(tmp_path / "x.tar", pair("some/name", image=b"broken")))
    with pytest.raises(files.InputError, match="x.tar: some/name.jpg: unreadable .not a picture"):
        pairs[(0, 0)]


def test_a_shard_that_vanishes_or_shrinks_gives_bad_samples(tmp_path):
    pattern = make_shards(tmp_path, shards=3, pairs=2)
    pairs = dataset(pattern)
    (tmp_path / "000.tar").unlink()
    os.truncate(tmp_path / "001.tar", 600)
    assert pairs[(0, 0)][3].tolist() == [4, 0, 0, 0] and pairs[(0, 0)][1].tolist() == [2, 0]


def test_too_many_bad_samples_stop_with_the_counts():
    data.too_many_bad([0, 100, 0, 0], 899, 0.05)  # too few to judge
    data.too_many_bad(torch.tensor([0, 60, 0, 40]), 900, 0.1)
    with pytest.raises(
        files.InputError, match=r"101 of 1001 .*shard 0, image 60, size 1, caption 40.*--max-bad"
    ):
        data.too_many_bad(torch.tensor([0, 60, 1, 40]), 900, 0.1)
    data.too_many_bad([0, 500, 0, 0], 499, 0.1)
    with pytest.raises(files.InputError):
        data.too_many_bad([0, 500, 0, 0], 500, 0.1)  # bad ones count as seen


def test_the_training_transform_crops_flips_and_normalises():
    white = Image.new("RGB", (50, 40), "white")
    image = data.train_transform(16, gcl.CLIP_NORM, strong=False)(white)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in gcl.CLIP_NORM)
    torch.testing.assert_close(image, ((1 - mean) / std).expand(3, 16, 16))
    ramp = Image.fromarray(
        np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 1, 3))
    )
    torch.manual_seed(0)
    slopes = [
        (v[0, 8, -1] - v[0, 8, 0]).item() > 0
        for v in (data.train_transform(16, gcl.CLIP_NORM, False)(ramp) for _ in range(40))
    ]
    assert 8 < sum(slopes) < 32  # half of them are flipped
    steps = data.train_transform(16, gcl.IMAGENET_NORM, strong=True).transforms
    assert (steps[0].scale, steps[2].num_ops, steps[2].magnitude) == ((0.08, 1.0), 2, 9)
    assert (steps[-1].p, steps[-1].value) == (0.25, "random")


@pytest.mark.parametrize("strong", [False, True])
def test_crops_are_bicubic_and_bilinear_in_the_release_recipe(strong):
    """The same random crop of noise by another function of torchvision: only one kernel fits."""
    noise = Image.open(io.BytesIO(jpeg(1, (90, 70))))
    crop = data.train_transform(32, gcl.CLIP_NORM, strong).transforms[0]
    torch.manual_seed(3)
    found = crop(noise)
    torch.manual_seed(3)
    box = crop.get_params(noise, (0.08, 1.0), (3 / 4, 4 / 3))
    kernel = InterpolationMode.BILINEAR if strong else InterpolationMode.BICUBIC
    expected = resized_crop(noise, *box, (32, 32), kernel)
    assert np.array_equal(np.array(found), np.array(expected))


# ---- python data.py check ----


def test_a_check_decodes_everything_and_says_what_is_wrong(tmp_path, capsys):
    good = make_shards(tmp_path / "good", shards=2, pairs=3)
    assert data.check_shards([good]) == 0
    assert re.search(r"^pairs +6$", capsys.readouterr().out, re.M)
    members = pair("a") + pair("b", image=b"x") + pair("c", " ") + pair("d", image=b"y") + pair("a")
    content = open(
        write_tar(tmp_path / "good/bad.tar", members + [("e.txt", b"half")]), "rb"
    ).read()
    (tmp_path / "good/cut.tar").write_bytes(content[:4000])
    (tmp_path / "good/no.tar").write_bytes(b"no tar" * 1000)
    assert data.check_shards([good]) == 1
    out = capsys.readouterr().out
    for line in (
        r"shards +5\n",
        r"half pairs +1 ",
        r"duplicates +2 ",
        r"bad: image +2 .*good/bad.tar: b.jpg \(not a pic",
        r"bad: caption +1 .*good/bad.tar: c.jpg \(an empty",
        r"cut off shards +1 .*cut.tar",
        r"unreadable shards +1 .*no.tar: not a tar",
    ):
        assert re.search("^" + line, out, re.M), (line, out)


@pytest.mark.parametrize("members", [pair("a") + pair("a"), pair("a") + [("b.txt", b"half")]])
def test_a_check_fails_on_half_pairs_and_duplicates_alone(tmp_path, members):
    assert data.check_shards([write_tar(tmp_path / "x.tar", members)]) == 1


# ---- order ----


def positions(order):
    return [[p for p, _ in batch] for batch in order], [[i for _, i in batch] for batch in order]


def test_every_epoch_is_a_permutation():
    where, which = positions(data.GlobalOrder(n=10, batch_size=4, steps=10))
    flat = sum(which, [])
    assert sum(where, []) == list(range(40))
    for epoch in range(4):
        assert sorted(flat[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert flat[:10] != flat[10:20] and flat != sum(
        positions(data.GlobalOrder(10, 4, 10, seed=1))[1], []
    )


def test_the_next_seeds_first_epoch_is_not_this_ones_second():
    first, second = (sum(positions(data.GlobalOrder(20, 4, 10, seed=s))[1], []) for s in (0, 1))
    assert first[20:40] != second[:20]


def test_an_epochs_order_takes_four_bytes_a_pair():
    n = 1_000_000
    order = iter(data.GlobalOrder(n, batch_size=1, steps=1))
    tracemalloc.start()
    next(order)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4.1 * n


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(ranks):
    whole = list(data.GlobalOrder(7, 8, 5))
    parts = [list(data.GlobalOrder(7, 8, 5, rank=r, ranks=ranks)) for r in range(ranks)]
    assert [sum((part[k] for part in parts), []) for k in range(5)] == whole


def test_resume_is_arithmetic():
    whole, rest = (
        list(data.GlobalOrder(7, 4, 9, seed=3)),
        data.GlobalOrder(7, 4, 9, seed=3, start=5),
    )
    assert list(rest) == whole[5:] and len(rest) == 4


OLD = ["check --datasets voc --data-root d", "prepare-context --data-root d"]


@pytest.mark.parametrize("line", [*OLD, "check", ""])
def test_who_types_an_old_command_is_told_where_it_is(line, capsys):
    with pytest.raises(SystemExit) as end:
        data.parse_args(line.split())
    assert end.value.code == 2 and "python benchmarks.py check" in capsys.readouterr().err
