"""The fenced blocks of a Markdown page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.md")])
SHELLS = ("", "bash", "console", "sh", "shell")

_FENCE = re.compile(r"^ *(?P<fence>`{3,}|~{3,}) *(?P<language>[\w+-]*)")
_NOT_RUN = re.compile(r"^ *<!-- not run: (?P<reason>.+) -->$")


@dataclass
class Block:
    """One fenced block.

    Args:
        language: what stands after the fence; empty when nothing does
        text: its lines, each with its end
        line: the number of its first line in the page
        output: the text block that follows at once, which is what it is to print, if there is one
        not_run: the reason that a comment above it gives for not running it, if there is one
    """

    language: str
    text: str
    line: int
    output: str | None = None
    not_run: str | None = None


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page in their order."""
    found: list[Block] = []
    fence = language = comment = ""
    taken: list[str] = []
    start = 0
    follows: Block | None = None  # the Python block that ended last, while nothing but empty lines came after it
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        match = _FENCE.match(line)
        if fence:
            if match and match["fence"].startswith(fence) and not match["language"]:
                not_run = _NOT_RUN.match(comment)
                block = Block(language, "".join(taken), start, None, not_run["reason"] if not_run else None)
                if language == "text" and follows:
                    follows.output = block.text
                found.append(block)
                follows = block if language == "python" else None
                fence = comment = ""
            else:
                taken.append(line)
        elif match:
            fence, language, taken, start = match["fence"], match["language"], [], number + 1
        elif line.strip():
            follows, comment = None, line.rstrip("\n")
    if fence:
        raise ValueError(f"{name_of(page)}: the block that begins in line {start - 1} never ends")
    return found
