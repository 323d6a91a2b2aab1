"""Reading results: from cells to numbers by arm and seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from evenkeel.lab.cell import Cell, Result, Results
from evenkeel.lab.figures import Series
from evenkeel.lab.seeds import Axis
from evenkeel.lab.statistics import Interval, geometric_mean, mean

T = TypeVar("T")
BySeed = list[T]
"""A value for each seed, in the same order of seeds for every arm."""


class Runs:
    """Results of cells with the axes network, arm and seed.

    Only seeds for which every arm has a result count: a comparison is paired or it is none.
    """

    def __init__(self, cells: Iterable[Cell], results: Results) -> None:
        cells = list(cells)
        self._arms = {cell.axes["arm"] for cell in cells}
        self._results: dict[tuple[Axis, Axis, Axis], Result] = {
            (axes["network"], axes["arm"], axes["seed"]): result for axes, result in results.of(cells)
        }

    def seeds(self, network: str) -> list[Axis]:
        """The seeds that are complete for this network.

        Raises:
            ValueError: when there is none.
        """
        found = dict.fromkeys(seed for name, _, seed in self._results if name == network)
        complete = [seed for seed in found if all((network, arm, seed) in self._results for arm in self._arms)]
        if not complete:
            raise ValueError(f"no seed of the network {network!r} has a result for every arm")
        return complete

    def of(self, network: str, arm: str) -> BySeed[Result]:
        """The results of an arm, by seed."""
        return [self._results[network, arm, seed] for seed in self.seeds(network)]


def column(rows: Sequence[Sequence[T]], index: int) -> list[T]:
    """One replica's values over the evaluations."""
    return [row[index] for row in rows]


def band(
    label: str,
    style: str,
    x: Sequence[float],
    by_seed: Sequence[Sequence[float | None]],
    *,
    geometric: bool = False,
    faint: bool = False,
) -> Series:
    """The mean over seeds at every x, with its interval; a gap where any seed has no number.

    `geometric` for what is drawn on a logarithmic axis: the interval then stays above zero.
    """
    average = geometric_mean if geometric else mean
    intervals: list[Interval | None] = []
    for values in zip(*by_seed, strict=True):
        known = [value for value in values if value is not None]
        drawn = len(known) == len(values) and not (geometric and min(known) <= 0)
        intervals.append(average(known) if drawn else None)
    return Series(
        label,
        style,
        list(x),
        [None if each is None else each.value for each in intervals],
        [None if each is None else each.low for each in intervals],
        [None if each is None else each.high for each in intervals],
        faint=faint,
    )
