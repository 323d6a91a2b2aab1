"""Figures and tables as plain data.

Nothing here knows how a page is drawn. `dataclasses.asdict` is what `--json` prints and what the page is drawn from, so
that whoever reads the one can check the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Axis:
    """An axis of a figure. `categories` for bars: the names along it."""

    title: str
    scale: Literal["linear", "log"] = "linear"
    limits: tuple[float, float] | None = None
    categories: Sequence[str] | None = None


@dataclass(frozen=True)
class Series:
    """One curve, one colour of bars, one row of boxes, or one row of a heat map.

    Args:
        label: its name in the legend.
        style: an arm's name (`keelnorm.lab.training.arms`), which fixes colour, dash and marker all over the page.
        x: positions; for bars and boxes, indices into the axis' categories.
        y: values; None leaves a gap. For boxes one value a seed, and `x` repeats its category.
        low, high: the 95 % interval, drawn as a band or as error bars; None: none is drawn.
        faint: whether it only accompanies another one of the same style.
    """

    label: str
    style: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    faint: bool = False


@dataclass(frozen=True)
class Figure:
    """A plot.

    Args:
        title: what is drawn, and for what.
        x, y: the axes.
        series: what is drawn; for a heat map a row each, from the bottom up, whose `label` names the row.
        description: the text alternative: what is drawn against what, and what is to be seen, with numbers.
        kind: "lines"; "bars", which lie down; "boxes", one a series and category over the seeds; "heatmap", where
            `y.title` names what the rows are and `value` what the colour is.
        reference: a value of y at which a line is drawn, with its name.
        value: of a heat map, the axis of the colour.
    """

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    description: str
    kind: Literal["lines", "bars", "boxes", "heatmap"] = "lines"
    reference: tuple[float, str] | None = None
    value: Axis | None = None


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first cell of a row names it."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
