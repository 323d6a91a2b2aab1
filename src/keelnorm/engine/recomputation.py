"""Recomputation: whether this forward repeats an earlier one, so that running statistics are not updated twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from keelnorm.engine.torch_internals import running_backward


class _Here(threading.local):
    repeating = False


_here = _Here()


def is_second_run() -> bool:
    """Return whether this forward repeats an earlier one.

    True inside a backward, where activation checkpointing computes forwards again, and inside :func:`second_run`.
    """
    return _here.repeating or running_backward() != -1


def is_repeating() -> bool:
    """Return whether this is inside :func:`second_run`."""
    return _here.repeating


@contextmanager
def second_run() -> Iterator[None]:
    """Mark calls of layers in this thread as repeated: they compute what they did, and update nothing."""
    before, _here.repeating = _here.repeating, True
    try:
        yield
    finally:
        _here.repeating = before


def is_running(frame: FrameType) -> bool:
    """Return whether a call still runs, by its frame."""
    try:
        frame.clear()  # refuses while it runs
    except RuntimeError:
        return True
    return False
