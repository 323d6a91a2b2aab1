"""Results by condition, arm and seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.seeds import Axis

T = TypeVar("T")
BySeed = list[T]
"""A value for each seed, in the same order of seeds for every arm."""


class Runs:
    """Results by condition, arm and seed.

    Args:
        cells: cells that all have the axis "seed" and the axes below.
        results: what they gave.
        arms: the axes that name what is compared; only seeds for which every arm has a result count, since comparisons
            are paired.
        where: the axes that name the conditions, each of which has a comparison of its own.
    """

    def __init__(
        self, cells: Iterable[Cell], results: Results, arms: Sequence[str] = ("arm",), where: Sequence[str] = ()
    ) -> None:
        cells = list(cells)
        self._arms: dict[Key, set[Key]] = {}
        for cell in cells:
            self._arms.setdefault(_key(cell.axes, where), set()).add(_key(cell.axes, arms))
        self._results = {
            (_key(axes, where), _key(axes, arms), axes["seed"]): result for axes, result in results.of(cells)
        }

    def seeds(self, *where: Axis) -> list[Axis]:
        """The seeds that are complete under this condition.

        Raises:
            ValueError: when there is none.
        """
        found = dict.fromkeys(seed for place, _, seed in self._results if place == where)
        complete = [
            seed for seed in found if all((where, arm, seed) in self._results for arm in self._arms.get(where, ()))
        ]
        if not complete:
            under = f" under {', '.join(map(str, where))}" if where else ""
            raise ValueError(f"no seed has a result for every arm{under}")
        return complete

    def of(self, arm: Axis | Key, *where: Axis) -> BySeed[Result]:
        """The results of an arm under a condition, by seed; several arm axes are given as a tuple."""
        key = arm if isinstance(arm, tuple) else (arm,)
        return [self._results[where, key, seed] for seed in self.seeds(*where)]


Key = tuple[Axis, ...]


def _key(axes: Mapping[str, Axis], names: Sequence[str]) -> Key:
    return tuple(axes[name] for name in names)


def column(rows: Sequence[Sequence[T]], index: int) -> list[T]:
    """One replica's values over the evaluations."""
    return [row[index] for row in rows]


def shares_reaching(target: float, histories: Sequence[Result]) -> BySeed[float]:
    """The share of the replicas whose test accuracy reaches a target at the end, in percent, by seed."""
    by_seed = [history["test"][-1] for history in histories]
    return [100.0 * sum(each >= target for each in accuracies) / len(accuracies) for accuracies in by_seed]
