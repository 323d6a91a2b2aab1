"""Series and figures, made from intervals and from values by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from keelnorm.measure.page_parts import Axis, Figure, Series
from keelnorm.measure.statistics import Interval, geometric_mean, mean


def band(
    label: str,
    style: str,
    x: Sequence[float],
    by_seed: Sequence[Sequence[float | None]],
    *,
    geometric: bool = False,
    faint: bool = False,
) -> Series:
    """A curve: the mean over seeds at every x, with its interval; a gap where any seed has no number.

    `geometric` for what is drawn on a logarithmic axis: the interval then stays above zero.
    """
    average = geometric_mean if geometric else mean
    intervals: list[Interval | None] = []
    for values in zip(*by_seed, strict=True):
        known = [value for value in values if value is not None]
        drawn = len(known) == len(values) and not (geometric and min(known) <= 0)
        intervals.append(average(known) if drawn else None)
    return with_intervals(label, style, x, intervals, faint=faint)


def bars(label: str, style: str, intervals: Sequence[Interval]) -> Series:
    """A bar with its interval for each category."""
    return with_intervals(label, style, range(len(intervals)), intervals)


def boxes(label: str, style: str, by_category: Sequence[Sequence[float]]) -> Series:
    """A box over the seeds for each category."""
    x = [place for place, values in enumerate(by_category) for _ in values]
    return Series(label, style, x, [value for values in by_category for value in values])


def with_intervals(
    label: str, style: str, x: Sequence[float], intervals: Sequence[Interval | None], *, faint: bool = False
) -> Series:
    """Estimates with their intervals at every x; None leaves a gap."""
    return Series(
        label,
        style,
        list(x),
        [None if each is None else each.value for each in intervals],
        [None if each is None else each.low for each in intervals],
        [None if each is None else each.high for each in intervals],
        faint=faint,
    )


def accuracy_boxes(
    test: Mapping[str, Mapping[str, Sequence[float]]], arms: Mapping[str, tuple[str, str]], description: str
) -> Figure:
    """A box over the seeds for each arm and condition.

    Args:
        test: test accuracies at the best rate by condition, arm and seed.
        arms: label and style of each arm that is drawn, by name.
        description: what is to be seen, after the figure's own first sentence.
    """
    drawn = {arm: [by_arm[arm] for by_arm in test.values()] for arm in arms}
    lowest = min(value for by_condition in drawn.values() for values in by_condition for value in values)
    return Figure(
        "Test accuracy at the best rate",
        Axis("data", categories=list(test)),
        Axis("test accuracy, %", limits=(lowest - 0.5, 100.0)),
        [boxes(*arms[arm], by_condition) for arm, by_condition in drawn.items()],
        f"A box for each arm over the seeds. {description}",
        kind="boxes",
    )
