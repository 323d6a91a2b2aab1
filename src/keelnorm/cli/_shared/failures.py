"""How a command fails: it raises a `CommandError`, which becomes one line on the standard error stream."""

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
    """Ends a command; the message says what was asked, what came, and what is legal.

    Args:
        message: One line.
        status: The exit status.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def one_line(error: BaseException) -> str:
    """Name an error's type, its message, and the line of the user's code where it arose."""
    said, place = _words(error), _place(error)
    words = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return f"{words} ({place})" if place else words


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())


def _place(error: BaseException) -> str | None:
    """The innermost line of the user's code, or of an installed package if there is none.

    None where all code is Python's, torch's or keelnorm's.
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
def told_in_one_line() -> Iterator[None]:
    """Turn every error inside into a `CommandError`: the code of a model may raise anything.

    An exit with a status of the command's own passes.
    """
    try:
        yield
    except (CommandError, typer.Exit):
        raise
    except Exception as error:
        from keelnorm.engine.error_messages import RefusedError

        raise CommandError(_words(error) if isinstance(error, RefusedError) else one_line(error)) from error


@contextmanager
def aside() -> Iterator[None]:
    """Send what a model's code prints to the standard error stream; standard output is for the report alone."""
    with redirect_stdout(sys.stderr):
        yield


def need(extra: str, *modules: str) -> None:
    """Raise, with what to install, when a package that the command needs is missing."""
    if words := lacking(extra, *modules):
        raise CommandError(f"this command needs {words}")
