"""Follows a recipe of docs/architecture.md in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from source_tree import PROJECT, ROOT

PAGE = ROOT / "docs/architecture.md"
EXAMPLES = Path(__file__).with_name("recipe_examples")
COPIED = (*PROJECT, "Makefile", "CONTRIBUTING.md", "CHANGELOG.md", "tests", "docs", "examples", "bench", "benchmarks")

Edit = Callable[[str], str]


def example(name: str) -> str:
    """The text of a file of ``recipe_examples``."""
    return (EXAMPLES / name).read_text(encoding="utf-8")


def new(name: str) -> Edit:
    """A file that is not there yet: this one of ``recipe_examples``."""
    return lambda before: example(name)


def after(*pairs: tuple[str, str]) -> Edit:
    """Texts put right after others, each of which is there once."""

    def edit(text: str) -> str:
        for anchor, added in pairs:
            assert text.count(anchor) == 1, f"{anchor!r} is there {text.count(anchor)} times"
            text = text.replace(anchor, anchor + added)
        return text

    return edit


def changed(*pairs: tuple[str, str]) -> Edit:
    """Texts replaced wherever they are, which is somewhere."""

    def edit(text: str) -> str:
        for before, now in pairs:
            assert before in text, f"{before!r} is not there"
            text = text.replace(before, now)
        return text

    return edit


def both(*edits: Edit) -> Edit:
    """One edit after the other."""

    def edit(text: str) -> str:
        for one in edits:
            text = one(text)
        return text

    return edit


def files_of(recipe: str) -> list[tuple[str, bool]]:
    """The files that a recipe names, and whether each is new."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n### {recipe}\n")[2]
    table = re.match(r"(?:[^|#].*\n|\n)*((?:\|.*\n)+)", text)
    assert table, f"{PAGE.name} has no table for {recipe!r}"
    return [(path, bool(mark)) for path, mark in re.findall(r"^\| `(.+?)`( \(new\))? \|", table[1], re.MULTILINE)]


class Copy:
    """A copy of the project in which a recipe has been followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            elif source.exists():
                shutil.copy(source, path / name)

    def follow(self, recipe: str, name: str, *edits: Edit) -> None:
        """Edit the files of the recipe's rows, one edit a row."""
        files = files_of(recipe)
        assert len(files) == len(edits), f"the recipe names {[path for path, _ in files]}"
        for (path, is_new), edit in zip(files, edits, strict=True):
            file = self.path / path.replace("NAME", name)
            assert file.exists() != is_new, f"{path}: new is {is_new}"
            file.write_text(edit("" if is_new else file.read_text(encoding="utf-8")), encoding="utf-8")

    def test(self, added: str, *paths: str, select: str, **environment: str) -> None:
        """Run, in one process, a test of what was added and those tests of the copy that ``select`` names."""
        file = self.path / "tests/test_added.py"
        file.write_text(added, encoding="utf-8")
        pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
        done = subprocess.run(
            [*pytest, str(file), *paths, "-k", f"test_it_works or {select}"],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(self.path / "src"), str(self.path)]), **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
