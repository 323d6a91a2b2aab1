"""Print a laboratory's document in a terminal: verdicts first, then where the files are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Plain = Mapping[str, Any]

STYLES = {
    "holds": "green",
    "depends": "yellow",
    "does not hold": "red",
    "not resolved": "dim",
    "no answer": "dim",
}
SIGNS = {"supports": "✓", "contradicts": "✗", "not resolved": "?"}


def show(document: Plain, console: Console) -> None:
    """Print each claim's verdict, the effects that decide it and its failures, then the run and its files."""
    console.print(Text(document["title"], style="bold"))
    for section in document["sections"]:
        console.print()
        _head(section, console)
        for finding in section["findings"]:
            if finding["decisive"]:
                console.print(Padding(_finding(finding), (0, 0, 0, 5)))
        if not section["findings"]:
            console.print(Padding(Text(section["answer"]), (0, 0, 0, 5)))
        _failures(section, console)
    run = document["run"]
    console.print()
    missing = f", {run['missing']} not run" if run["missing"] else ""
    console.print(Text(f"{run['cells']} cells{missing}, {run['core_seconds']:.0f} core-seconds"))
    for name, path in document.get("files", {}).items():
        console.print(Text(f"{name}: {path}"), soft_wrap=True)


def show_section(section: Plain, console: Console) -> None:
    """Print a claim without its plots."""
    _head(section, console)
    console.print(Padding(Text(section["answer"]), (0, 0, 0, 5)))
    _failures(section, console)
    for finding in section["findings"]:
        console.print(Padding(_finding(finding), (0, 0, 0, 5)))
    for table in section["tables"]:
        console.print()
        console.print(_table(table))
    for note in section["notes"]:
        console.print(Text(f"Note: {note}"))
    console.print()
    for term, text in section["setup"]:
        console.print(Text.assemble((f"{term}: ", "bold"), text))
    console.print(Text.assemble(("Criterion: ", "bold"), section["criterion"]))
    for one in section["earlier"]:
        changed = f"Changed on {one['changed']}, after results had been seen: "
        console.print(Text.assemble((changed, "bold"), f"{one['why']} It was: {one['text']}"))
    console.print(Text.assemble(("Literature: ", "bold"), section["literature"]))
    for source in section["sources"]:
        console.print(Text(f"  {source['text']}  {source['url']}"), soft_wrap=True)
    console.print(Text.assemble(("Run it: ", "bold"), section["command"]), soft_wrap=True)
    console.print()


def show_claims(rows: Sequence[Plain], console: Console) -> None:
    """Print the list of claims."""
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("", justify="right", style="dim")
    table.add_column("name", no_wrap=True, style="bold")
    table.add_column("what is said", ratio=1)
    table.add_column("data")
    for row in rows:
        table.add_row(str(row["number"]), row["name"], Text(row["statement"]), ", ".join(row["data"]))
    console.print(table)


def _head(section: Plain, console: Console) -> None:
    verdict = section["verdict"]
    console.print(
        Text.assemble(
            (f"{section['number']:>3}  ", "dim"), f"{section['statement']}  ", (verdict, f"bold {STYLES[verdict]}")
        )
    )


def _finding(finding: Plain) -> Text:
    aside = "" if finding["decisive"] else " (aside)"
    return Text.assemble(
        f"{SIGNS[finding['outcome']]} ",
        (finding["text"], "bold"),
        (f"  {finding['quantity']}; {finding['where']}{aside}", "dim"),
    )


def _failures(section: Plain, console: Console) -> None:
    for failure in section["failures"]:
        console.print(Padding(Text(f"failed: {failure}", style="red"), (0, 0, 0, 5)))


def _table(plain: Plain) -> Table:
    table = Table(title=Text(plain["caption"], style="dim"), title_justify="left", box=box.SIMPLE, show_edge=False)
    for name in plain["columns"]:
        table.add_column(Text(name))
    for row in plain["rows"]:
        table.add_row(*(Text(cell) for cell in row))
    return table
