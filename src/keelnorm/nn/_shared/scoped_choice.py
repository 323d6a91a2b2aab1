"""Choices that ``with`` blocks make for a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Choices(Generic[Value]):
    """The choices of the open blocks, which may end in any order. Copies and pickles start with none."""

    def __init__(self) -> None:
        self._open: list[list[Value]] = []  # each a list of one value, so that equal values are told apart

    @contextmanager
    def choosing(self, value: Value) -> Iterator[None]:
        """Choose a value inside the block, unless a later block chooses another."""
        block = [value]
        self._open.append(block)
        try:
            yield
        finally:
            self._open[:] = [other for other in self._open if other is not block]

    def latest(self) -> Value | None:
        """The choice of the block that was opened last; None if none is open."""
        return self._open[-1][0] if self._open else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Choices[Value]:
        return Choices()

    def __reduce__(self) -> tuple[Any, ...]:
        return Choices, ()
