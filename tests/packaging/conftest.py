"""A copy of the sources to build from, and programs for its builds to find."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from source_tree import PROJECT, ROOT, Tree


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    pytest.importorskip("setuptools", reason="setuptools builds the package")
    path = tmp_path / "project"
    path.mkdir()
    for name in PROJECT:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("*.so", "not_built.txt", "__pycache__", "*.egg-info", ".*_cache")
            shutil.copytree(ROOT / name, path / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, path / name)
    for folder in ("programs", "out"):
        (tmp_path / folder).mkdir()
    return Tree(path, tmp_path / "programs", tmp_path / "out")


@pytest.fixture
def install_program(tree: Tree) -> Callable[[str, str], None]:
    """Put a shell script where the builds find it."""

    def install(name: str, script: str) -> None:
        program = tree.programs / name
        program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        program.chmod(0o755)

    return install
