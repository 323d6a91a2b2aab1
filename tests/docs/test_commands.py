"""The commands on each page exist, and take the arguments that the page gives them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from pages import PAGES, ROOT, SHELLS, blocks_of, name_of
from typer.main import get_command

from keelnorm.cli import app

END = re.compile(r"^[|&;<>()]+$")


def lines_of(page: Path) -> list[tuple[int, str]]:
    """The lines that a reader is to type, each with its number. In a console block these begin with a dollar sign."""
    lines = []
    for block in blocks_of(page):
        if block.language not in SHELLS:
            continue
        typed = block.text.replace("\\\n", "  ").splitlines()
        for number, line in enumerate(typed, start=block.line):
            if block.language != "console" or line.startswith("$ "):
                lines.append((number, line.removeprefix("$ ")))
    return lines


def commands_of(line: str) -> list[list[str]]:
    """The words of each command of a line, without variables set before it, redirections and comments."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    words.commenters = "#"
    commands: list[list[str]] = [[]]
    skip = False
    for word in words:
        if skip:
            skip = False
        elif END.match(word):
            skip = word[0] in "<>"
            if not skip:
                commands.append([])
        elif commands[-1] or not re.match(r"^\w+=", word):
            commands[-1].append(word)
    return [command for command in commands if command]


def check(command: list[str]) -> None:
    """Raise for a keelnorm command, a make target or an extra of the package that does not exist."""
    program, *arguments = command
    if program == "keelnorm":
        group: Any = get_command(app)
        try:
            if arguments and not arguments[0].startswith("-"):
                name, *arguments = arguments
                if name not in group.commands:
                    raise ValueError(f"there is no command {name!r}; there are {sorted(group.commands)}")
                group = group.commands[name]
            group.make_context("keelnorm", list(arguments))
        except typer.Exit:
            pass  # --version and --help answer at once
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        unknown = [word for word in arguments if "=" not in word and word not in targets]
        if unknown:
            raise ValueError(f"there is no target {unknown} in the Makefile")
    elif program == "pip":
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        extras = [extra for word in arguments for extra in re.findall(r"\[([\w,-]+)\]", word)]
        for extra in (one for several in extras for one in several.split(",")):
            if not re.search(rf"^{extra} = \[", project, re.MULTILINE):
                raise ValueError(f"there is no extra {extra!r} in pyproject.toml")


PROGRAMS = ("keelnorm", "make", "pip")


def commands_to_check(page: Path) -> list[tuple[int, list[str]]]:
    return [(number, words) for number, line in lines_of(page) for words in commands_of(line) if words[0] in PROGRAMS]


@pytest.mark.parametrize("page", [page for page in PAGES if commands_to_check(page)], ids=name_of)
def test_commands_exist(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = []
    for number, words in commands_to_check(page):
        try:
            check(words)
        except Exception as error:  # the parser raises errors of many types
            wrong.append(f"{name_of(page)}:{number}: {shlex.join(words)}: {getattr(error, 'message', error)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "keelnorm no-such-command",
        "keelnorm demo --no-such-option",
        "keelnorm demo --seeds many",
        "cd somewhere && KEELNORM_KERNELS=avx2 keelnorm demo --out > results.json  # no file is named",
        "make no-such-target",
        "pip install 'keelnorm[no-such-extra]'",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    *_, command = commands_of(line)
    with pytest.raises(Exception, match=r"no[- ]such|No such|valid integer|requires an argument"):
        check(command)
