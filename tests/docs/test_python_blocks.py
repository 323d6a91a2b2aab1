"""The Python on each page runs, in the page's order and in one namespace, and prints what the page says it prints."""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, Block, blocks_of, name_of

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# What a reader has after following a page's commands, made here by the shortest run that gives a file of the kind.
FILES = {
    "bench.json": "bench --quick --shape 4x --mode inference --rounds 1 --min-time 0.1 --json",
    "results.json": "lab run gradients --quick --seeds 2 --jobs 1 --json",
}


def run_doctest(block: Block, where: str, namespace: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(block.text, namespace, where, where, block.line - 1)
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=said.append, clear_globs=False)
    namespace.update(test.globs)
    assert not result.failed, "".join(said)


def run_block(block: Block, page: Path, namespace: dict[str, Any]) -> None:
    where = f"{name_of(page)}:{block.line}"
    if block.text.lstrip().startswith(">>>"):
        run_doctest(block, where, namespace)
        return
    tree = ast.increment_lineno(ast.parse(block.text, filename=str(page)), block.line - 1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, str(page), "exec"), namespace)
    if block.output is not None:
        same = doctest.OutputChecker().check_output(block.output, printed.getvalue(), OPTIONS)
        assert same, f"{where} prints\n{printed.getvalue()}\nand the page says\n{block.output}"


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language == "python" and not block.not_run]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(page)
    for name, command in FILES.items():
        if any(name in block.text for block in blocks):
            done = subprocess.run(
                [sys.executable, "-m", "keelnorm", *command.split()], capture_output=True, text=True, cwd=tmp_path
            )
            assert done.returncode == 0, done.stderr
            Path(name).write_text(done.stdout, encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        run_block(block, page, namespace)


def test_a_wrong_output_is_found(tmp_path: Path) -> None:
    page = PAGES[0].parent / "page.md"
    with pytest.raises(AssertionError, match="the page says"):
        run_block(Block("python", "print(1 + 1)\n", 1, output="3\n"), page, {})
    with pytest.raises(AssertionError, match="Expected"):
        run_block(Block("python", ">>> 1 + 1\n3\n", 1), page, {})
