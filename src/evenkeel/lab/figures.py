"""What an experiment says, as plain data: figures, tables, measures, and the sentence they support.

Nothing here knows how a page is drawn. `dataclasses.asdict` of a `Section` is what `--json` prints and
what the page is drawn from, so that whoever reads the one can check the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from evenkeel.lab.statistics import Interval


@dataclass(frozen=True)
class Axis:
    """An axis of a figure. `categories` for bars: the names along it."""

    title: str
    scale: Literal["linear", "log"] = "linear"
    limits: tuple[float, float] | None = None
    categories: Sequence[str] | None = None


@dataclass(frozen=True)
class Series:
    """One curve, or one colour of bars.

    Args:
        label: its name in the legend.
        style: an arm's name, which fixes colour, dash and marker all over the page.
        x: positions; for bars, indices into the axis' categories.
        y: values; None leaves a gap.
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

    `description` is its text alternative: what is drawn against what, and what is to be seen.
    `reference` is a value of y at which a line is drawn, with its name.
    """

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    description: str
    kind: Literal["lines", "bars"] = "lines"
    reference: tuple[float, str] | None = None


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first cell of a row names it."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Measure:
    """A headline figure: one line of the summary.

    Args:
        quantity: what was measured; the lines of a section that share it stand under it.
        where: on what, as on which network.
        values: by arm, the number with its interval; None: it has none.
        texts: by arm, how it is printed.
        comparison: evenkeel against no normalization, in a few words.
        numbers: the comparison in numbers, by name, for a program that reads them.
    """

    quantity: str
    where: str
    values: Mapping[str, Interval | None]
    texts: Mapping[str, str]
    comparison: str
    numbers: Mapping[str, Interval | float | str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """All that an experiment has to say. `answer` is made from the figures, never written before."""

    name: str
    title: str
    question: str
    answer: str
    setup: Sequence[tuple[str, str]]
    measures: Sequence[Measure] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    failures: Sequence[str] = ()
