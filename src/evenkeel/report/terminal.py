"""A document in a terminal: the summary table and one sentence for each experiment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

COMPARISON = "evenkeel against none"


def show(document: Mapping[str, Any], console: Console) -> None:
    """Print the summary table, then each answer with what failed, then where there is more."""
    console.print(Text(document["title"], style="bold"))
    for line, style in _table(document):
        console.print(Text(line, style=style))
    for section in document["sections"]:
        console.print()
        console.print(Text(section["question"], style="bold"))
        console.print(Padding(Text(section["answer"]), (0, 0, 0, 2)))
        for failure in section["failures"]:
            console.print(Padding(Text(f"failed: {failure}", style="red"), (0, 0, 0, 2)))
    run = document["run"]
    stored = f", {run['reused']} of them stored before" if run["reused"] else ""
    console.print()
    console.print(Text(f"{run['cells']} cells in {run['seconds']:.0f} s{stored}; {document['plan']['seeds']} seeds"))
    for name, path in document.get("files", {}).items():
        console.print(Text(f"{name}: {path}"), soft_wrap=True)


def _table(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Lines and their styles. A quantity has a line of its own, so that 80 columns are enough."""
    arms = [arm["name"] for arm in document["arms"]]
    measures = [measure for section in document["sections"] for measure in section["measures"]]
    head = ["", *("none" if arm["name"] == "none" else arm["label"] for arm in document["arms"]), COMPARISON]
    body = {id(measure): _cells(measure, arms) for measure in measures}
    rows = [head, *body.values()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    yield _line(head, widths), "dim"
    for quantity, group in groupby(measures, key=itemgetter("quantity")):
        yield quantity, "bold"
        for measure in group:
            yield _line(body[id(measure)], widths), ""


def _cells(measure: Mapping[str, Any], arms: list[str]) -> list[str]:
    # The arms' own intervals are on the page; here the comparison's is enough.
    values = [measure["texts"].get(arm, "-").partition(" [")[0] for arm in arms]
    return [f"  {measure['where']}", *values, measure["comparison"]]


def _line(cells: list[str], widths: list[int]) -> str:
    first, *others = [
        cell.ljust(width) if index == 0 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join([first, *others])
