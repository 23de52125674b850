# SPDX-License-Identifier: MIT
"""AUDIT.md: every name and test in its tables exists, nothing of the paper is missing, every figure
is the paper's.
"""

import ast
import json
import re

import pytest
import torch
from conftest import GOLDEN, ROOT

import benchmarks
import evaluate
import train

TEXT = (ROOT / "AUDIT.md").read_text()
README = (ROOT / "README.md").read_text()
BENCHMARKS_PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
CODE = r"`([a-z]+\.py):([\w.]+)`"
TEST = r"`(tests/test_[a-z]+\.py)::(test_\w+)`"


def section(number):
    """The rows of a section's table as lists of cells, without its head."""
    part = re.split(r"^## ", TEXT, flags=re.MULTILINE)[number]
    assert part.startswith(f"{number}. ")
    rows = [line.strip()[1:-1].split("|") for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def scopes(path):
    """{qualified name: (first line, last line)} of all functions, classes, methods, fields and
    constants of a file.
    """
    found = {}

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            names = []
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names = [child.name]
            elif isinstance(child, ast.Assign):
                names = [target.id for target in child.targets if isinstance(target, ast.Name)]
            elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                names = [child.target.id]
            for name in names:
                found[prefix + name] = (child.lineno, child.end_lineno)
            if isinstance(child, ast.ClassDef):
                walk(child, f"{prefix}{names[0]}.")

    walk(ast.parse((ROOT / path).read_text()), "")
    return found


SCOPES = {path.name: scopes(path.name) for path in ROOT.glob("*.py")}
TESTS = {
    f"tests/{path.name}": scopes(f"tests/{path.name}")
    for path in (ROOT / "tests").glob("test_*.py")
}


def test_every_name_and_every_test_of_the_audit_exists():
    names, tests = re.findall(CODE, TEXT), re.findall(TEST, TEXT)
    assert len(names) > 100 and len(tests) > 80
    assert [f"{file}:{name}" for file, name in names if name not in SCOPES.get(file, {})] == []
    assert [f"{file}::{name}" for file, name in tests if name not in TESTS.get(file, {})] == []
    # Nothing that looks like a name or a test is written in a way that the two patterns do not see.
    quoted = re.findall(r"`[^`]*`", TEXT)
    assert [
        q for q in quoted if ".py:" in q and not re.fullmatch(f"{CODE}|{TEST}|`file:name`", q)
    ] == []


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_every_row_names_code_and_a_test(number):
    rows = section(number)
    assert len(rows) >= 14
    for row in rows:
        assert re.search(CODE, row[-2]) and re.search(TEST, row[-1]), row


def test_every_equation_stands_in_the_audit_the_code_and_the_tests():
    """The test that a row names first is the one that holds the equation's mark, and so is the
    code.
    """
    rows = section(1)
    assert [row[0] for row in rows] == [f"({n})" for n in range(1, 15)]
    for number, _, code, test in rows:
        for pattern, where, cell in ((CODE, SCOPES, code), (TEST, TESTS, test)):
            marked = []
            for file, name in re.findall(pattern, cell):
                first, last = where[file][name]
                lines = (ROOT / file).read_text().splitlines()[first - 1 : last]
                marked.append(any(f"Eq. {number}" in line for line in lines))
            assert any(marked), (number, cell)


def test_every_figure_and_every_line_of_the_pseudo_code_stands_in_the_audit():
    names = [row[0] for row in section(2)]
    assert {name.split(",")[0].split()[0] for name in names} == {"1", "2", "3", "4"}
    lines = set()
    for name in names:
        if match := re.fullmatch(r"3, lines? (\d+)(?:-(\d+))?", name):
            lines |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    assert lines == set(range(1, 25)) - {7, 12, 18, 23}  # those are empty


def test_every_row_of_the_papers_tables_stands_in_the_audit_with_its_figures():
    tables = json.loads((GOLDEN / "paper_tables.json").read_text().replace("-dagger", "\\u2020"))
    expected = [
        (n, name, row)
        for n in ("1", "2a", "2b", "3")
        for name, row in tables[f"table{n}"].items()
        if name[0] != "_"
    ]
    found = [(row[0], row[1], [float(v) for v in row[2].split()]) for row in section(5)]
    assert sorted(found) == sorted(expected)


def test_every_choice_that_the_code_calls_silent_or_different_has_its_row():
    """A comment belongs to the innermost function, class or constant around it; section 6 names
    that.
    """
    rows = section(6)
    named = {f"{file}:{name}" for row in rows for file, name in re.findall(CODE, " ".join(row))}
    missing, seen = [], 0
    for file, names in SCOPES.items():
        for number, line in enumerate((ROOT / file).read_text().splitlines(), start=1):
            if re.search(r"Paper silent\b|Release differs\b", line):
                around = [
                    (last - first, name)
                    for name, (first, last) in names.items()
                    if first <= number <= last
                ]
                name = min(around)[1].removesuffix(".__init__") if around else "(the file)"
                owners = {
                    f"{file}:{name}",
                    f"{file}:{name.rsplit('.', 1)[0]}",
                }  # a field may stand under its class
                seen += 1
                if not owners & named:
                    missing.append(f"{file}:{number} in {name}")
    assert seen >= 17 and missing == []
    assert all(len(row) == 5 for row in rows)


def test_the_readme_leads_to_the_audit():
    assert "(AUDIT.md)" in README and "| what | paper | release |" not in README


# ---- statements of the paper that no other test holds ----


def test_the_short_schedule_is_the_papers():
    """Sec. 4.4: batch 512, 40,000 steps, 10,000 of them warm-up, the same peak learning rate."""
    command = re.search(r'TABLE2="torchrun --nproc_per_node=8 train.py (.*)"', BENCHMARKS_PAGE)[1]
    args = train.parse_args(command.split())
    assert (args.batch_size, args.steps, args.warmup_steps, args.lr) == (
        512,
        40_000,
        10_000,
        7.5e-5,
    )
    assert (args.lambda_gcl, args.lambda_area, args.lambda_tv) == (0.1, 0.4, 1.0)


def test_the_benchmarks_have_the_classes_that_the_paper_counts():
    counts = {
        name: (len(set_.classes), set_.background) for name, set_ in benchmarks.BENCHMARKS.items()
    }
    with_background = {"voc": 21, "context": 60, "coco_object": 81}
    without = {"voc20": 20, "context59": 59, "coco_stuff": 171, "cityscapes": 19, "ade20k": 150}
    assert counts == {n: (k, True) for n, k in with_background.items()} | {
        n: (k, False) for n, k in without.items()
    }


def test_table_3_is_the_mean_over_its_classes():
    """From the matrix of the whole set: a pixel of any class that is taken for one of Table 3's
    counts against it.
    """
    classes = benchmarks.BENCHMARKS["voc20"].classes
    among = [classes.index(name) for name in ("pottedplant", "sheep", "sofa", "train", "tvmonitor")]
    matrix = torch.randint(1, 50, (20, 20), generator=torch.Generator().manual_seed(4))
    found = benchmarks.SegmentationSet(
        "voc20", classes, False, [], [], 0, benchmarks.BENCHMARKS["voc20"].partial
    )
    iou = [
        100 * int(matrix[k, k]) / int(matrix[k].sum() + matrix[:, k].sum() - matrix[k, k])
        for k in among
    ]
    result = evaluate.summary(found, matrix[None], False, 0.0)["partial_miou"]
    assert result == pytest.approx(sum(iou) / 5, abs=1e-3)
