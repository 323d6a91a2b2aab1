"""The learning rate that suits an arm best: chosen on validation data, reported on test data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from keelnorm.lab.core.cell import Result
from keelnorm.lab.reading.results_by_arm import column
from keelnorm.measure.statistics import first_crossing


@dataclass(frozen=True)
class Tuned:
    """An arm at the learning rate that suits it best on validation data.

    `row` holds, for every rate tried, the geometric mean of the steps to the target on validation data
    over the seeds that reach it, and how many do.
    """

    index: int
    rate: float
    at_edge: bool
    row: list[tuple[float | None, int]]
    steps: list[float | None]
    steps_batch: list[float | None]


def tune(results: Sequence[Result], tried: Sequence[float], target: float) -> Tuned:
    """Choose the rate with the fewest steps to the target on validation data.

    A run that never gets there counts with twice its length, so that no rate is chosen for its lucky
    seeds; where no run at any rate gets there, the highest final validation accuracy decides.
    """
    scores: list[tuple[float, float]] = []
    row: list[tuple[float | None, int]] = []
    for index in range(len(tried)):
        needed = [steps_to(target, result, "validation", index) for result in results]
        horizon = results[0]["steps"][-1]
        logs = [math.log(2 * horizon if each is None else max(each, 1.0)) for each in needed]
        final = math.fsum(result["validation"][-1][index] for result in results)
        scores.append((math.fsum(logs), -final))
        reached = [math.log(max(each, 1.0)) for each in needed if each is not None]
        typical = math.exp(math.fsum(reached) / len(reached)) if reached else None
        row.append((typical, len(reached)))
    best = min(range(len(tried)), key=lambda index: scores[index])
    return Tuned(
        best,
        tried[best],
        best in (0, len(tried) - 1),
        row,
        [steps_to(target, result, "test", best) for result in results],
        [steps_to(target, result, "test_batch", best) for result in results],
    )


def steps_to(target: float, result: Result, curve: str, index: int) -> float | None:
    """Steps to the target on a curve of one replica, or None."""
    return first_crossing(result["steps"], column(result[curve], index), target)


@dataclass(frozen=True)
class Best:
    """The setting that suits an arm best by its validation accuracy, and its test accuracy by seed.

    `row` holds the mean final validation accuracy of every setting that was tried.
    """

    index: int
    rate: float
    at_edge: bool
    row: list[float]
    test: list[float]


def best(results: Sequence[Result], tried: Sequence[float], curve: str = "test") -> Best:
    """Choose the learning rate with the highest final validation accuracy, on average over seeds.

    Args:
        results: histories (`keelnorm.lab.training.train.History`) by seed, a replica for each rate.
        tried: the rates, ascending.
        curve: what is reported at the chosen rate.
    """
    row = [
        math.fsum(result["validation"][-1][index] for result in results) / len(results) for index in range(len(tried))
    ]
    index = max(range(len(tried)), key=lambda each: row[each])
    test = [result[curve][-1][index] for result in results]
    return Best(index, tried[index], index in (0, len(tried) - 1), row, test)
