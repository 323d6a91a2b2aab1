"""docs/architecture.md names every folder, every file of the folders that it lists, and nothing that does not exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import ROOT

PAGE = ROOT / "docs/architecture.md"
PACKAGE, PROJECT = ROOT / "src/keelnorm", ROOT / "pyproject.toml"
#: Folders that a reader of the page has in mind when it says `csrc/loops.h`, `nn/ghost.py` or `README.md`.
STARTS = (
    ROOT,
    PACKAGE,
    PACKAGE / "engine/kernels/cpu",
    PACKAGE / "engine/kernels/cpu/csrc",
    PACKAGE / "engine",
    PAGE.parent,
)
#: Folders of the project whose subfolders have a line of their own; of the others the folder alone has.
DETAILED = ("src/keelnorm", "docs", "benchmarks")
#: What tools leave behind.
LEFT_BEHIND = re.compile(r"^(\..*|__pycache__|build|dist|.*\.egg-info|bench-results)$")


def section(title: str) -> str:
    """The text under a heading, up to the next one."""
    text = PAGE.read_text(encoding="utf-8")
    [body] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return body


def first_cells(table: str) -> list[str]:
    """What stands in code in the first cell of each row."""
    rows = re.findall(r"^\| (`.+?) \| .+ \|$", table, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def real_folders() -> Iterator[str]:
    """The project's folders that the page has to name."""
    for top in ROOT.iterdir():
        name = top.relative_to(ROOT).as_posix()
        if top.is_dir() and name != "src" and (name == ".ci" or not LEFT_BEHIND.match(name)):
            yield name
    for start in DETAILED:
        for path in [ROOT / start, *(ROOT / start).rglob("*")]:
            inside = path.relative_to(ROOT)
            if path.is_dir() and not any(LEFT_BEHIND.match(part) for part in inside.parts) and any(path.iterdir()):
                yield inside.as_posix()


def check(named: set[str], real: set[str], what: str) -> None:
    missing, gone = sorted(real - named), sorted(named - real)
    assert not missing, f"docs/architecture.md has no line for these {what}: {missing}"
    assert not gone, f"docs/architecture.md names these {what}, which do not exist: {gone}"


def test_every_folder_has_a_line() -> None:
    named, real = first_cells(section("The tree")), set(real_folders())
    assert len(named) == len(set(named))
    check(set(named), real, "folders")


def test_the_levels_are_those_of_the_imports() -> None:
    [layers] = re.findall(
        r'containers = \["keelnorm"\].*?layers = \[(.*?)\]', PROJECT.read_text(encoding="utf-8"), re.DOTALL
    )
    held = [set(re.findall(r"\w+", level)) for level in re.findall(r'"(.+?)"', layers)]
    [line] = re.findall(r"^cli.* →.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [set(re.findall(r"\w+", level)) for level in line.split("→")] == [
        level for level in held if level != {"__main__"}
    ]


def file_tables() -> list[tuple[str, str]]:
    """Each folder that the page lists the files of, and the table."""
    found = re.findall(r"^`(\S+)`(?: and its folders)?:\n\n((?:\|.*\n)+)", section("Files"), re.MULTILINE)
    assert len(found) > 5
    return found


@pytest.mark.parametrize(("folder", "table"), file_tables(), ids=lambda value: value if "\n" not in value else "")
def test_every_file_of_a_listed_folder_has_a_line(folder: str, table: str) -> None:
    named = first_cells(table)
    nested = any("/" in name for name in named)
    real = {
        path.relative_to(ROOT / folder).as_posix()
        for path in (ROOT / folder).glob("**/*.py" if nested else "*.py")
        if not path.name.startswith("__")
    }
    assert len(named) == len(set(named))
    check(set(named), real, f"files of {folder}")


def found(path: str) -> Path | None:
    """The file or folder that a path on the page means."""
    return next((start / path for start in STARTS if (start / path).exists()), None)


def test_what_looks_like_a_path_exists() -> None:
    text = re.sub(r"^```.*?^```", "", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^.*NAME.*\(new\).*$", "", text, flags=re.MULTILINE)
    paths = {
        word for word in re.findall(r"`([\w./-]+)`", text) if re.search(r"^[a-z_]+/\w|\.(py|h|cpp|md|svg|toml)$", word)
    }
    in_tables = {name for _, table in file_tables() for name in first_cells(table)}
    assert len(paths) > 60
    assert not sorted(path for path in paths - in_tables if found(path) is None)


def test_names_that_stand_behind_a_file_are_defined_there() -> None:
    """As in `engine/dispatch.py` (`batch_norm`), or with a comma between them."""
    text = PAGE.read_text(encoding="utf-8")
    pairs = re.findall(r"`([\w./]+\.(?:py|h|cpp))`(?: \(|,\s+)`((?![\w./]+\.(?:py|h|cpp)`)[\w.]+)`", text)
    assert len(pairs) >= 10
    missing = []
    for path, name in pairs:
        file = found(path)
        code = file.read_text(encoding="utf-8") if file else ""
        if not all(re.search(rf"^\s*(?:def|class|void) {part}\b", code, re.MULTILINE) for part in name.split(".")):
            missing.append(f"{path}: {name}")
    assert not missing
