"""What blocks around a layer's calls choose for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Choices(Generic[Value]):
    """The choices of the blocks that are open; they may end in any order. Copies and pickles begin with none."""

    def __init__(self) -> None:
        self._open: list[list[Value]] = []  # of one value each, which is told from others by being itself

    @contextmanager
    def choosing(self, value: Value) -> Iterator[None]:
        """Inside, the value is chosen, unless a later block chooses another."""
        block = [value]
        self._open.append(block)
        try:
            yield
        finally:
            self._open[:] = [other for other in self._open if other is not block]

    def latest(self) -> Value | None:
        """What the last of the open blocks has chosen; None where none is open."""
        return self._open[-1][0] if self._open else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Choices[Value]:
        return Choices()

    def __reduce__(self) -> tuple[Any, ...]:
        return Choices, ()
