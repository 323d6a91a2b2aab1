"""Figures of the claim about internal covariate shift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from keelnorm.lab.claims._covariate_shift_training import ARMS
from keelnorm.lab.core.cell import Result
from keelnorm.lab.reading.results_by_arm import column
from keelnorm.lab.reading.series import band
from keelnorm.lab.reading.wording import listed
from keelnorm.lab.training.arms import BN, NONE
from keelnorm.measure.page_parts import Axis, Figure, Series

STYLES = {"none": "none", "bn": "bn", "noisy": "other-3"}
Drawn = Mapping[str, tuple[Sequence[Result], int]]
"""By arm its histories, and which replica is drawn."""


def drift_figure(where: str, drawn: Drawn) -> Figure:
    """The drift over training, with intervals."""
    series = []
    for arm in ARMS:
        histories, index = drawn[arm.name]
        curves = [column(each["shift"], index) for each in histories]
        series.append(band(arm.label, STYLES[arm.name], histories[0]["steps"], curves))
    ends = listed([f"{each.label} {each.y[-1]:.2f}" for each in series if each.y[-1] is not None])
    return Figure(
        f"Drift of a hidden layer's input: {where}, sigmoid",
        Axis("steps"),
        Axis("drift since the start, deviations"),
        series,
        f"Distance of the units' means from their start, in deviations, over training. At the end: {ends}.",
    )


def unit_figure(where: str, drawn: Drawn) -> Figure:
    """Percentiles of one unit's input: figure 1 of Ioffe and Szegedy (2015)."""
    series = []
    for arm in (NONE, BN):
        histories, index = drawn[arm.name]
        low, middle, high = zip(*column(histories[0]["percentiles"], index), strict=True)
        series.append(Series(arm.label, STYLES[arm.name], histories[0]["steps"], list(middle), list(low), list(high)))
    travels = listed(
        [f"{each.label} from {each.y[0]:.2f} to {each.y[-1]:.2f}" for each in series if each.y[0] is not None]
    )
    return Figure(
        f"One unit's input, 15th, 50th and 85th percentile: {where}, sigmoid",
        Axis("steps"),
        Axis("input of the activation"),
        series,
        "Percentiles of what one unit of the last hidden layer receives over training, first seed; the band lies "
        f"between the 15th and the 85th, and is no interval. The median goes, for {travels}.",
    )


def cosine_figure(where: str, name: str, index: int, rate: float, by_arm: Mapping[str, Sequence[Result]]) -> Figure:
    """The cosine between a layer's gradient before and after earlier layers move, over training."""
    series = []
    for arm in (NONE, BN):
        found = by_arm[arm.name]
        curves = [column(each["cosine"], index) for each in found]
        series.append(band(arm.label, STYLES[arm.name], found[0]["steps"], curves))
    said = listed(
        [
            f"{each.label} {each.y[0]:.2f} at the start and {each.y[-1]:.2f} at the end"
            for each in series
            if each.y[0] is not None and each.y[-1] is not None
        ]
    )
    return Figure(
        f"Gradient before and after earlier layers move: {where}, {name}, rate {rate:g}",
        Axis("steps"),
        Axis("cosine", limits=(-0.2, 1.0)),
        series,
        f"Cosine of a layer's gradient before and after the layers ahead of it make their step, over training: {said}.",
    )
