"""How a command ends when something is wrong: one line on the standard error stream, and exit status 1."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec

import typer


class CommandError(Exception):
    """What was asked, what came, and what is legal."""


def one_line(error: BaseException) -> str:
    """The kind of an error, and what it says."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextmanager
def told_in_one_line(command: str) -> Iterator[None]:
    """Whatever goes wrong inside is said in one line, and ends the command."""
    try:
        yield
    except Exception as error:  # a model's own code raises anything
        said = " ".join(str(error).split())
        plain = isinstance(error, CommandError) or said.startswith(f"{command}: ")
        typer.echo(said if plain else one_line(error), err=True)
        raise typer.Exit(1) from None


@contextmanager
def aside() -> Iterator[None]:
    """What a model's code prints goes to the standard error stream: the other one is for the report alone."""
    with redirect_stdout(sys.stderr):
        yield


def need(extra: str, *modules: str) -> None:
    """Raise, saying what to install, when a package that is needed is missing."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise CommandError(
            f"this needs {', '.join(missing)}, which the extra [{extra}] brings: pip install 'evenkeel[{extra}]'"
        )
