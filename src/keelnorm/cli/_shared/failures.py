"""How a command ends when something is wrong: one line on the standard error stream, and exit status 1."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import typer

from keelnorm.engine.optional_imports import lacking


class CommandError(Exception):
    """What was asked, what came, and what is legal."""


def one_line(error: BaseException) -> str:
    """The kind of an error, what it says, and where in the user's code it arose."""
    said, place = " ".join(str(error).split()), _place(error)
    words = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return f"{words} ({place})" if place else words


def _place(error: BaseException) -> str | None:
    """The innermost line that is neither Python's, torch's nor keelnorm's, for want of others an installed package's.

    None for a model that is made of torch's layers alone.
    """
    import torch

    frameworks = Path(torch.__file__).parent, Path(__file__).parents[2]
    standard = sysconfig.get_path("stdlib")
    own, installed = None, None
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if not path.is_file() or any(path.is_relative_to(folder) for folder in frameworks):
            continue
        if not {"site-packages", "dist-packages"}.isdisjoint(path.parts):
            installed = path, frame.lineno
        elif not path.is_relative_to(standard):
            own = path, frame.lineno
    if found := own or installed:
        path, line = found
        return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{line}"
    return None


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
    if words := lacking(extra, *modules):
        raise CommandError(f"this needs {words}")
