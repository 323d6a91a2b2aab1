"""Words that are not to come back: a former name, two spellings of one word, and phrases that readers had to solve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import ROOT

#: Each with what to say in its place.
WORDS = {
    "evenkeel": "keelnorm",
    "an keelnorm": "a keelnorm",
    "running moments": "running statistics",
    "the running ones": "the running statistics",
    "centre": "center",
    "centres": "centers",
    "centred": "centered",
    "centring": "centering",
    "is dearest": "costs most",
    "can be had": "is available",
    "can't be had": "is not available",
    "gets past it": "bypasses it",
    "what is left above": "anything above",
    "remains to be won": "is overhead that remains",
    "has no scale of its own": "has no scale",
    "the stand-in is no": "the data that replace it are not",
    "none over batch norm": "steps without batch norm ÷ steps with it",
    "change the former": "say by how much it rises",
    "one value is too few": "one value has no variance",
    "a NaN is none": "NaN is no sample",
    "looks at no data": "reads no data",
    "as they like": "say what is free",
    "what has to be as it was": "conditions under which it is valid",
    "samples of several kinds": "samples of several groups",
    "taken apart by kind": "split by group",
    "what stands behind": "what follows",
    "against the deviation": "compared with the standard deviation",
    "lets one value per channel count": "leaves one value per channel",
}
AREAS = {
    "root": ["README.md", "CONTRIBUTING.md", "Makefile", "setup.py", "pyproject.toml", ".ci/*"],
    "docs": ["docs/*.md", "docs/images/*.svg"],
    "claims": ["docs/claims*/*.md"],
    "examples": ["examples/**/*"],
    "benchmarks": ["bench/**/*", "benchmarks/**/*"],
    "package": ["src/keelnorm/*.py"],
    **{
        path.name: [f"src/keelnorm/{path.name}/**/*"]
        for path in sorted((ROOT / "src/keelnorm").iterdir())
        if path.is_dir() and path.name != "__pycache__"
    },
}
#: Stored results of the laboratory have an axis of this name, from which random numbers follow.
EXEMPT = {"lab": ["centred"], "claims": ["centred"]}
TEXTS = (".py", ".h", ".cpp", ".md", ".svg", ".toml", ".css", ".html", ".js", ".j2", "")
#: Words of a phrase may stand on two lines of a comment.
BETWEEN = r"[\s#/*]+"
PATTERN = re.compile(
    "|".join(rf"\b{BETWEEN.join(re.escape(part) for part in words.split())}\b" for words in WORDS), re.IGNORECASE
)


def texts(patterns: list[str]) -> list[Path]:
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(path for path in paths if path.is_file() and path.suffix in TEXTS and "__pycache__" not in path.parts)


def found(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {' '.join(match[0].split())}"
        for match in PATTERN.finditer(text)
    ]


@pytest.mark.parametrize("area", AREAS)
def test_no_word_has_come_back(area: str) -> None:
    lines = [line for path in texts(AREAS[area]) for line in found(path)]
    lines = [line for line in lines if not line.lower().endswith(tuple(EXEMPT.get(area, ["\n"])))]
    assert not lines, "\n" + "\n".join(lines)


def test_the_former_name_is_gone() -> None:
    """From tests, too; the list of changes says once what the name was."""
    files = texts(["tests/**/*", "*.md", ".ci/*", "requirements/*"])
    named = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").lower().count("evenkeel")
        for path in files
        if path != Path(__file__)
    }
    assert {path: count for path, count in named.items() if count} in ({}, {"CHANGELOG.md": 1})


def test_a_word_is_found_across_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.py"
    page.write_text("# Where it is\n# dearest, and the Centre of it\nx = 1\n", encoding="utf-8")
    assert found(page) == ["page.py:1: is # dearest", "page.py:2: Centre"]
