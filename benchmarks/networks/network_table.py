"""The results of the networks' benchmark as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from keelnorm.bench.result_table import table_console
from keelnorm.bench.results import DEFAULT_ARM, Report


def print_networks(report: Report, console: Console | None = None) -> None:
    """Print the steps of every arm, against the same arm with eager layers and against plain torch."""
    console = console or table_console(150)
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
            _ratio(row.ratios.get(row.eager_arm)),
            _ratio(row.ratios.get(DEFAULT_ARM)),
            peak,
        )
    console.print(table)
    console.print("Peak is the most memory that the process of the arm had resident, with interpreter and torch.")


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
