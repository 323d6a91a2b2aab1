"""The learning rate that suits an arm best: chosen on validation data, reported on test data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from keelnorm.lab.core.cell import Result
from keelnorm.lab.reading.results_by_arm import column
from keelnorm.lab.reading.series import band
from keelnorm.lab.training.arms import Arm
from keelnorm.measure.page_parts import Axis, Figure, Table
from keelnorm.measure.statistics import first_crossing, mean

T = TypeVar("T")

CHOSEN_BY_VALIDATION = "for each arm the one with the highest validation accuracy"
"""How a claim's set-up says that a learning rate was chosen."""


@dataclass(frozen=True)
class Tuned:
    """An arm at the learning rate that needs the fewest steps to a target on validation data.

    `steps` are those to the target on test data, by seed; None where a run does not get there.
    """

    index: int
    rate: float
    at_edge: bool
    steps: list[float | None]


def fewest_steps(results: Sequence[Result], tried: Sequence[float], target: float) -> Tuned:
    """Choose the rate with the fewest steps to the target on validation data.

    A run that never gets there counts with twice its length, so that no rate is chosen for its lucky
    seeds; where no run at any rate gets there, the highest final validation accuracy decides.
    """
    scores: list[tuple[float, float]] = []
    for index in range(len(tried)):
        needed = [steps_to(target, result, "validation", index) for result in results]
        horizon = results[0]["steps"][-1]
        logs = [math.log(2 * horizon if each is None else max(each, 1.0)) for each in needed]
        final = math.fsum(result["validation"][-1][index] for result in results)
        scores.append((math.fsum(logs), -final))
    best = min(range(len(tried)), key=lambda index: scores[index])
    needed = [steps_to(target, result, "test", best) for result in results]
    return Tuned(best, tried[best], best in (0, len(tried) - 1), needed)


def steps_to(target: float, result: Result, curve: str, index: int) -> float | None:
    """Steps to the target on a curve of one replica, or None."""
    return first_crossing(result["steps"], column(result[curve], index), target)


@dataclass(frozen=True)
class Best:
    """An arm at the learning rate with the highest validation accuracy, and its test accuracy by seed.

    `row` holds the mean final validation accuracy of every rate that was tried.
    """

    index: int
    rate: float
    at_edge: bool
    row: list[float]
    test: list[float]

    def of(self, results: Sequence[Result], field: str) -> list[float]:
        """A field with a value for each rate, at the chosen one, by seed."""
        return [result[field][self.index] for result in results]


def highest_accuracy(results: Sequence[Result], tried: Sequence[float]) -> Best:
    """Choose the learning rate with the highest final validation accuracy, on average over seeds.

    Args:
        results: histories (`keelnorm.lab.training.train.History`) by seed, a replica for each rate.
        tried: the rates, ascending.
    """
    row = [
        math.fsum(result["validation"][-1][index] for result in results) / len(results) for index in range(len(tried))
    ]
    index = max(range(len(tried)), key=lambda each: row[each])
    test = [result["test"][-1][index] for result in results]
    return Best(index, tried[index], index in (0, len(tried) - 1), row, test)


def best_by_arm(by_arm: Mapping[T, Sequence[Result]], rates: Sequence[float]) -> dict[T, Best]:
    """Each arm at the rate with its highest validation accuracy."""
    return {arm: highest_accuracy(histories, rates) for arm, histories in by_arm.items()}


def accuracies(best: Mapping[T, Best]) -> dict[T, list[float]]:
    """The test accuracies of each arm at its rate, by seed."""
    return {arm: each.test for arm, each in best.items()}


def best_rate(
    by_rate: Mapping[float, Sequence[Result]],
    score: Callable[[Result], float],
    *,
    lower_is_better: bool,
) -> float:
    """The rate with the best mean validation score, where each rate has runs of its own."""
    scores = {rate: mean([score(result) for result in results]).value for rate, results in by_rate.items()}
    return (min if lower_is_better else max)(scores, key=lambda rate: scores[rate])


def edge_notes(where: str, best: Mapping[str, Best] | Mapping[str, Tuned]) -> list[str]:
    """A note for each arm whose best rate lies at the edge of the grid; arms are named as in "of batch norm"."""
    return [
        f"{where}: the best rate {whose}, {each.rate:g}, lies at the edge of the grid."
        for whose, each in best.items()
        if each.at_edge
    ]


def rate_row(where: str, label: str, chosen: Best) -> list[str]:
    """A row of `rate_table`."""
    texts = [f"{value:.1f}{' *' if index == chosen.index else ''}" for index, value in enumerate(chosen.row)]
    return [where, label, *texts, mean(chosen.test).text(1)]


def rate_table(rates: Sequence[float], rows: Sequence[Sequence[str]]) -> Table:
    """Validation accuracy at every rate, * at the one chosen, then the test accuracy there."""
    return Table(
        "Accuracy in percent on validation data by learning rate (* : the one chosen), and on test data there",
        ["where", "arm", *(f"rate {rate:g}" for rate in rates), "test"],
        rows,
    )


def rate_figure(
    where: str,
    arms: Sequence[Arm],
    by_arm: Mapping[str, Sequence[Result]],
    rates: Sequence[float],
    description: str,
    *,
    reference: tuple[float, str] | None = None,
) -> Figure:
    """Test accuracy at the end of training over the learning rate, a curve for each arm."""
    return Figure(
        f"Accuracy by learning rate: {where}",
        Axis("learning rate", scale="log"),
        Axis("test accuracy, %", limits=(0.0, 100.0)),
        [band(arm.label, arm.name, rates, [h["test"][-1] for h in by_arm[arm.name]]) for arm in arms],
        f"Test accuracy at the end of training over the learning rate, {where}{description}",
        reference=reference,
    )
