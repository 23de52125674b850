# SPDX-License-Identifier: MIT
"""The shape of the project: imports, equations, shapes, and that documented commands exist."""

import ast
import doctest
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from tiny import run

import bench
import evaluate
import train

CODE = sorted(ROOT.glob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
OWN = {path.stem for path in CODE}
README = (ROOT / "README.md").read_text()
PAGES = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))


def imported(path):
    tree = ast.parse(path.read_text())
    names = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def test_each_equation_stands_once_in_the_code_and_once_in_the_tests():
    for files in (CODE, TESTS):
        found = re.findall(
            r"Eq\. \((\d+)\)", "".join(path.read_text() for path in files if path != Path(__file__))
        )
        assert sorted(map(int, found)) == list(range(1, 15))


RESHAPES = {"reshape", "view", "permute", "flatten", "unflatten", "einsum", "gather", "scatter_"}


@pytest.mark.parametrize("name", ["adapter", "ops", "pamr", "backbone", "gcl", "winograd"])
def test_every_reshape_einsum_and_gather_carries_its_shape(name):
    text = (ROOT / f"{name}.py").read_text()
    lines, seen = text.splitlines(), 0
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            calls = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
            if RESHAPES & {f.attr for f in calls if isinstance(f, ast.Attribute)}:
                seen += 1
                comments = [
                    line.partition("#")[2] for line in lines[node.lineno - 1 : node.end_lineno]
                ]
                assert any("[" in comment for comment in comments), (
                    f"{name}.py:{node.lineno}: no shape"
                )
    assert seen


STANDARD = set(sys.stdlib_module_names)
LEAVES = {  # these import torch or packages alone, nothing of this project
    "ops": {"torch"},
    "adapter": {"torch"},
    "pamr": {"torch", "warnings"},
    "winograd": {"torch"},
    "release": {"torch"} | STANDARD,
    "files": {"numpy", "PIL", "tqdm"} | STANDARD,
}
FLOORS = [  # import arrows go down only: a file may import what stands on a floor below its own
    {"train", "segment", "explain", "bench"},
    {"toy"},
    {"evaluate"},
    {"gcl", "report"},
    {"backbone", "benchmarks", "data"},
    set(LEAVES),
]


def test_files_import_what_they_may():
    packages = {"torch", "torchvision", "open_clip", "numpy", "PIL", "tqdm"} | STANDARD
    assert set().union(*FLOORS) == OWN
    for floor, names in enumerate(FLOORS):
        below = set().union(*FLOORS[floor + 1 :])
        for name in names:
            found = imported(ROOT / f"{name}.py")
            assert found <= LEAVES.get(name, packages | below), name
    names = {
        re.split(r"[>=<]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()
    }
    assert names == {"torch", "torchvision", "open_clip_torch", "numpy", "pillow", "tqdm", "pytest"}


def test_files_open_with_their_license_and_a_docstring():
    for path in CODE + TESTS:
        text = path.read_text()
        assert text.startswith("# SPDX-License-Identifier: MIT\n"), path.name
        assert ast.get_docstring(ast.parse(text)), path.name
    assert "MIT License" in (ROOT / "LICENSE").read_text()


COPIES = {  # file: what it needs beside it
    "ops": [],
    "adapter": [],
    "pamr": [],
    "backbone": ["ops", "release", "files"],
    "gcl": ["ops", "adapter", "backbone", "release", "files"],
}


@pytest.mark.parametrize("name", COPIES)
def test_copied_alone_a_file_imports_and_runs(tmp_path, name):
    """In a process that has dropped this project's modules, and finds the copies alone."""
    names = [name, *COPIES[name]]
    for each in names:
        shutil.copy(ROOT / f"{each}.py", tmp_path)
    program = f"""
import sys
for own in {sorted(OWN)!r}:
    sys.modules.pop(own, None)
others = [p for p in sys.path if "site-packages" in p or p and not p.startswith({str(ROOT)!r})]
sys.path[:] = [{str(tmp_path)!r}, *others]
import doctest, {name}
own = {{m for m in {sorted(OWN)!r} if m in sys.modules}}
assert own == set({names!r}), own
assert all(sys.modules[m].__file__.startswith({str(tmp_path)!r}) for m in own), own
print(doctest.testmod({name}))
"""
    (tmp_path / "program.py").write_text(program)
    result = run(tmp_path / "program.py")
    assert re.fullmatch(r"TestResults\(failed=0, attempted=[1-9]\d*\)\n", result.stdout), (
        result.stderr + result.stdout
    )


def test_every_file_with_a_docstring_example_has_it_run():
    with_example = {
        path.stem for path in CODE if re.search(r"^\s*>>> ", path.read_text(), re.MULTILINE)
    }
    assert with_example >= set(COPIES)
    for name in with_example - set(COPIES):
        assert doctest.testmod(importlib.import_module(name)).failed == 0, name


def test_importing_does_nothing(tmp_path):
    """No output, no file, no random number drawn, no thread setting changed."""
    names = ", ".join(sorted(OWN))
    program = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
sys.dont_write_bytecode = True
before, threads = torch.random.get_rng_state(), torch.get_num_threads()
import {names}
assert torch.equal(torch.random.get_rng_state(), before) and torch.get_num_threads() == threads
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_the_first_lines_of_the_readme_hold_the_commands():
    assert "@@" not in README  # a figure that was not filled in
    head = "\n".join(README.splitlines()[:15])
    for command in (
        "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt",
        ".venv/bin/python -m pytest",
        "torchrun --nproc_per_node=8 train.py",
        "python evaluate.py --all",
    ):
        assert command in head


def commands(script):
    """Argument lists of every call of a script in the README and in the script's own docstring."""
    text = PAGES.replace("\\\n", " ") + ast.get_docstring(ast.parse((ROOT / script).read_text()))
    for line in re.findall(rf"{re.escape(script)}((?: +[^#`\n]+)?)", text):
        yield [word.strip("'\"") for word in line.split()]


def test_every_command_of_the_readme_is_accepted():
    """The flags exist and go together; nothing is run."""
    seen = 0
    for line in commands("train.py"):
        if line and line[0].startswith("--"):
            train.parse_args(line)
            seen += 1
    for line in commands("evaluate.py"):
        if line and line[0].startswith("--"):
            evaluate.parse_args(line)
            seen += 1
    for line in commands("bench.py"):
        if line and line[0].startswith("--"):
            bench.parse_args(line)
            seen += 1
    for row in re.findall(r"`\$TABLE2 ([^`]*)`", PAGES):
        train.parse_args(row.split())
        seen += 1
    assert seen >= 21


HELPS = {  # how many flags there are at least, --help included
    "train.py": 30,
    "evaluate.py": 20,
    "bench.py": 10,
    "segment.py": 16,
    "toy.py": 4,
    "report.py": 1,
    "explain.py": 2,
    "data.py check": 2,
    "benchmarks.py check": 4,
    "benchmarks.py prepare-context": 4,
}


@pytest.mark.parametrize("command", HELPS)
def test_every_flag_is_in_the_help_with_a_text(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # help texts on one line
    result = run(*command.split(), "--help")
    assert result.returncode == 0 and not result.stderr
    blocks = re.split(r"\n  (?=-)", result.stdout.split("options:")[1])[1:]
    assert len(blocks) >= HELPS[command]
    for block in blocks:
        assert len(re.sub(r"^(\S+ ?)+", "", block).split()) >= 2, block


def test_links_of_the_pages_exist():
    for page in (ROOT / "README.md", ROOT / "AUDIT.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)
