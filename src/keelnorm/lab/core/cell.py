"""The cell: the unit of work that is run, stored and reported on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from keelnorm.lab.core.seeds import Axis, canonical

Result = dict[str, Any]
"""Plain data, as JSON can hold it."""


@dataclass(frozen=True)
class Cell:
    """One task at one point of its axes.

    Args:
        task: a function at the top of a module; called with the axes as keywords, returns plain data.
        axes: all that the result depends on. Two experiments that ask for the same task at the same
            axes share one run.
        exclusive: whether nothing else may run beside it, as for a measurement of time.
        cost: about how many seconds it takes; orders the work and weighs the progress bar.
    """

    task: Callable[..., Result]
    axes: Mapping[str, Axis]
    exclusive: bool = False
    cost: float = 1.0
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.name}{canonical(self.axes)}")

    @property
    def module(self) -> str:
        """The module of the task."""
        return self.task.__module__

    @property
    def name(self) -> str:
        """The task's name with its module's last part."""
        return f"{self.module.rpartition('.')[2]}.{self.task.__qualname__}"

    def label(self) -> str:
        """The cell in words, for progress and failures: short axes only."""
        short = [str(value) for value in self.axes.values() if not isinstance(value, tuple)]
        return f"{self.name} ({', '.join(short)})"


class Results:
    """What the cells of a run gave, by cell."""

    def __init__(self, by_key: Mapping[str, Result]) -> None:
        self._by_key = by_key

    def of(self, cells: Iterable[Cell]) -> Iterator[tuple[Mapping[str, Axis], Result]]:
        """(axes, result) of the cells that have one, in the order of the cells."""
        for cell in cells:
            result = self._by_key.get(cell.key)
            if result is not None:
                yield cell.axes, result


@dataclass(frozen=True)
class Failure:
    """A cell that raised: which, why in a line, and the whole traceback."""

    cell: Cell
    reason: str
    traceback: str


Ended = tuple[Cell, Result | Failure, float]
"""A cell that has run: what it gave, or why it failed, and the seconds of processor time it took."""
