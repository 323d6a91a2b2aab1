"""How the process of a command ends: interrupts and system errors give one line and an exit status."""

from __future__ import annotations

import codecs
import errno
import os
import signal
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from types import FrameType
from typing import NoReturn, TextIO

STOPPED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""The exit statuses of a process that these signals ended."""

_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
_SUBSTITUTES = {"✓": "+", "✗": "x", "×": "x", "−": "-", "–": "-", "…": "...", "≤": "<=", "≥": ">=", "±": "+-"}


class Terminated(KeyboardInterrupt):
    """SIGTERM was received; handled like Ctrl-C."""


@contextmanager
def ended_in_one_line() -> Iterator[None]:
    """Run a command inside.

    Characters that the terminal cannot show are replaced. SIGTERM ends the command as Ctrl-C does. A system error, such
    as a full disk, is reported in one line with the name of the file.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # not a stream of the caller, and not None
            stream.reconfigure(errors="keelnorm.substitute")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        try:
            yield
            _flush()
        except SystemExit as leave:
            # typer catches interrupts that no command has caught, and prints nothing.
            stop = getattr(leave.__context__, "__cause__", None)
            if isinstance(stop, KeyboardInterrupt):
                _end("stopped", status_of(stop))
            try:
                _flush()
            except OSError:
                if not leave.code:
                    raise
                _give_up(sys.stdout)  # the error was printed already
            raise
    except KeyboardInterrupt as stop:
        _end("stopped", status_of(stop))
    except OSError as error:
        said = None if error.errno == errno.EPIPE else describe_system_error(error)
        _give_up(sys.stdout)
        _end(said, 1)
    finally:
        signal.signal(signal.SIGTERM, before)


def status_of(stop: KeyboardInterrupt) -> int:
    """The exit status of a command that was stopped."""
    return TERMINATED if isinstance(stop, Terminated) else STOPPED


def describe_system_error(error: OSError) -> str:
    """The message of a system error with the name of its file; standard output has no file name."""
    where = error.filename
    if where is None and error.errno in _OF_WRITING:
        where = "standard output"
    return f"{where}: {error.strerror}" if where is not None else str(error.strerror or error)


def _end(said: str | None, status: int) -> NoReturn:
    if said is not None:
        try:
            print(said, file=sys.stderr, flush=True)
        except OSError:
            _give_up(sys.stderr)
    raise SystemExit(status) from None


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _give_up(stream: TextIO | None) -> None:
    """Discard what is left in the buffer of a stream: Python would try to write it again at exit."""
    with suppress(AttributeError, OSError, ValueError):
        assert stream is not None
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _substitute(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that the encoding of the stream lacks by similar ones, else by question marks."""
    assert isinstance(error, UnicodeEncodeError)
    there = error.object[error.start : error.end]
    return "".join(_SUBSTITUTES.get(each) or _plain(each) for each in there), error.end


def _plain(character: str) -> str:
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"


codecs.register_error("keelnorm.substitute", _substitute)
