"""Figures of the claim about robustness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from keelnorm.lab.data import CORRUPTIONS
from keelnorm.lab.reading.series import bars
from keelnorm.measure.page_parts import Axis, Figure, Series
from keelnorm.measure.statistics import mean

Percents = dict[str, list[float]]
"""By corruption, the accuracy at every severity."""
STYLES = {"none": "none", "bn": "bn", "gn": "gn", "adapted": "adapted", "sorted": "other-1"}
"""Of the arms and kinds of adaptation that are drawn."""


def by_corruption(where: str, by_way: Mapping[str, Sequence[Percents]], labels: Mapping[str, str]) -> Figure:
    """Bars: the accuracy of each way by corruption, the mean over severities, with its interval over seeds."""
    means = {
        way: [mean([sum(each[name]) / len(each[name]) for each in by_way[way]]) for name in CORRUPTIONS]
        for way in STYLES
    }
    described = [
        f"{labels[way]}: "
        + ", ".join(f"{name} {each.value:.0f}" for name, each in zip(CORRUPTIONS, by_name, strict=True))
        for way, by_name in means.items()
    ]
    return Figure(
        f"Accuracy by corruption: {where}",
        Axis("corruption", categories=list(CORRUPTIONS)),
        Axis("accuracy, mean over severities, %", limits=(0.0, 100.0)),
        [bars(labels[way], STYLES[way], by_name) for way, by_name in means.items()],
        f"Accuracy in percent by corruption, {where}, the mean over severities. {'; '.join(described)}.",
        kind="bars",
    )


def by_severity(where: str, severities: Sequence[int], by_way: Mapping[str, Sequence[Percents]]) -> Figure:
    """A heat map: batch norm minus none by corruption and severity, the mean over seeds."""
    pairs = list(zip(by_way["bn"], by_way["none"], strict=True))
    rows = {
        name: [sum(bn[name][at] - none[name][at] for bn, none in pairs) / len(pairs) for at in range(len(severities))]
        for name in CORRUPTIONS
    }
    every = [
        (value, name, severity) for name, row in rows.items() for severity, value in zip(severities, row, strict=True)
    ]
    (low, least, at_least), (high, most, at_most) = min(every), max(every)
    return Figure(
        f"Accuracy, batch norm − none, by corruption and severity: {where}",
        Axis("severity", categories=[str(each) for each in severities]),
        Axis("corruption"),
        [Series(name, "bn", list(range(len(severities))), row) for name, row in rows.items()],
        "Accuracy with batch norm minus that without, in points, by corruption (rows) and severity (columns), "
        f"{where}: from {low:+.0f} ({least}, severity {at_least}) to {high:+.0f} ({most}, severity {at_most}).",
        kind="heatmap",
        value=Axis("points", middle=0.0),
    )
