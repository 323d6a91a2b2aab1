"""The networks' results as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from keelnorm.bench.results import NetworkRow, Report

DEFAULT_ARM = "eager contiguous fresh"


def print_networks(report: Report, console: Console | None = None) -> None:
    """Print the steps of every arm, against the same with eager layers and against plain torch."""
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=150)
    for row in report.networks:
        if row.error is not None:
            console.print(f"not measured: {row.network} {row.mode}, {row.arm}: {row.error}", style="red", markup=False)
    table = Table(title="Whole steps; ratios are time / time of the other (below 1: faster)", title_style="bold")
    for name in ("network", "mode", "layers", "layout", "pages"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "spread", "/ eager", f"/ {DEFAULT_ARM}", "peak, MiB"):
        table.add_column(name, justify="right")
    previous = None
    for row in sorted(report.networks, key=lambda one: (one.network, one.mode)):
        if previous not in (None, (row.network, row.mode)):
            table.add_section()
        previous = (row.network, row.mode)
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        table.add_row(
            f"{row.network}, {row.batch}×{row.size}²",
            row.mode,
            row.layers,
            row.layout,
            row.pages,
            *(["[red]error[/red]", ""] if row.step_ms is None else [f"{row.step_ms:.1f}", f"{row.spread or 0:.0%}"]),
            _ratio(row, row.ratios.get(eager_of(row))),
            _ratio(row, row.ratios.get(DEFAULT_ARM)),
            peak,
        )
    console.print(table)
    console.print("Peak is the most that the arm's own process had resident, interpreter and torch included.")


def eager_of(row: NetworkRow) -> str:
    """The arm that differs from a row's in the layers only."""
    return f"eager {row.layout} {row.pages}"


def _ratio(row: NetworkRow, value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
