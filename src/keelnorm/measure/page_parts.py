"""The parts of a results page as plain data: figures, tables and sections.

Nothing here knows how a page is drawn. `dataclasses.asdict` gives what `--json` prints and what the page is drawn from,
so that both show the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Axis:
    """An axis of a figure.

    Args:
        title: What is along it, with the unit.
        scale: How values are spread.
        limits: The least and the largest value that is shown.
        categories: The names along the axis of bars, dots and boxes; each once, since equal ones share a place.
        middle: For the colors of a heat map: the value in the middle, where there are two directions.

    Raises:
        ValueError: Two categories have one name.
    """

    title: str
    scale: Literal["linear", "log"] = "linear"
    limits: tuple[float, float] | None = None
    categories: Sequence[str] | None = None
    middle: float | None = None

    def __post_init__(self) -> None:
        names = list(self.categories or ())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"an axis has each category once; {', '.join(twice)} stand there twice")


@dataclass(frozen=True)
class Series:
    """One curve, one color of bars, one row of boxes, or one row of a heat map.

    Args:
        label: Its name in the legend.
        style: A key of `keelnorm.measure.page.looks.LOOKS`, which fixes color, dash and marker on the whole page.
        x: Positions; for bars and boxes, indices into the axis' categories.
        y: Values; None leaves a gap. For boxes one value per seed, and `x` repeats its category.
        low: The lower end of the 95 % interval, drawn as a band or as error bars; None draws no interval.
        high: The upper end of the interval.
        faint: Whether it only accompanies another series of the same style.
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
        title: What is drawn, and for what.
        x: The horizontal axis.
        y: The vertical axis.
        series: What is drawn; a heat map has one series per row, from the bottom up, and `label` names the row.
        description: The text alternative: what is drawn against what, and what it shows, with numbers.
        kind: "lines"; "bars" (horizontal, from 0 on); "dots" (estimates with intervals, one row per category);
            "boxes" (one per series and category, over the seeds); or "heatmap", where `y.title` says what the
            rows are and `value` what the color is.
        reference: A value of y at which a line is drawn, with its name.
        value: The axis of the color, for a heat map.
        overlaid: Whether bars of different series share one place, because each category has only one of them.

    Raises:
        ValueError: Bars that would not begin at 0: their lengths would say nothing.
    """

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    description: str
    kind: Literal["lines", "bars", "dots", "boxes", "heatmap"] = "lines"
    reference: tuple[float, str] | None = None
    value: Axis | None = None
    overlaid: bool = False

    def __post_init__(self) -> None:
        low, high = self.y.limits or (0.0, 0.0)
        if self.kind == "bars" and (self.y.scale == "log" or not low <= 0 <= high):
            raise ValueError(f"bars begin at 0, and the axis of {self.title!r} has no 0; kind='dots' shows estimates")


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first cell of a row names it."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of a page. The laboratory adds its verdicts and sources to these fields.

    Args:
        name: The anchor on the page.
        title: A few words.
        question: The heading.
        answer: One or two sentences made from the numbers.
        command: The command that measures it again.
        figures: The plots.
        tables: The numbers.
        setup: (term, text) pairs that say how it was measured.
        notes: What a reader has to know to read it right.
        failures: What was not measured, and why.
        open: Whether the tables are unfolded.
    """

    name: str
    title: str
    question: str
    answer: str
    command: str
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    setup: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    failures: Sequence[str] = ()
    open: bool = False
