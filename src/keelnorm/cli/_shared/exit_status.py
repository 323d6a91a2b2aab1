"""How every command ends, whatever stands in its way: one line on the error stream, and an exit status."""

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
"""Exit statuses as those of a process that the signal has ended."""

_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
_SUBSTITUTES = {"✓": "+", "✗": "x", "×": "x", "−": "-", "–": "-", "…": "...", "≤": "<=", "≥": ">=", "±": "+-"}


class Terminated(KeyboardInterrupt):
    """SIGTERM came; all is as after Ctrl-C."""


@contextmanager
def ended_in_one_line() -> Iterator[None]:
    """Run a command inside.

    Characters that the terminal lacks are replaced; SIGTERM ends the command as Ctrl-C does; an error of the system,
    such as a full disk, is one line that says where it arose.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # neither a caller's, nor none
            stream.reconfigure(errors="keelnorm.substitute")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        try:
            yield
            _flush()
        except SystemExit as leave:
            # typer takes the interrupts that no command has taken, and says nothing.
            stop = getattr(leave.__context__, "__cause__", None)
            if isinstance(stop, KeyboardInterrupt):
                _end("stopped", status_of(stop))
            try:
                _flush()
            except OSError:
                if not leave.code:
                    raise
                _give_up(sys.stdout)  # what is wrong has been said
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
    """What an error of the system says, and of which file. Whoever writes a file names it; a stream has no name."""
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
    """What is left in the stream's buffer can't be written; Python would try again at its end."""
    with suppress(AttributeError, OSError, ValueError):
        assert stream is not None
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _substitute(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that the stream's encoding lacks: a like one, else a question mark."""
    assert isinstance(error, UnicodeEncodeError)
    there = error.object[error.start : error.end]
    return "".join(_SUBSTITUTES.get(each) or _plain(each) for each in there), error.end


def _plain(character: str) -> str:
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"


codecs.register_error("keelnorm.substitute", _substitute)
