"""The results of the networks' benchmark as a table."""

from __future__ import annotations

from rich.console import Console

from keelnorm.bench.result_table import add_groups, new_table, number, percent, table_console
from keelnorm.bench.results import DEFAULT_ARM, Report


def print_networks(report: Report, console: Console | None = None) -> None:
    """Print the steps of every arm, against the same arm with eager layers and against plain torch."""
    console = console or table_console(150)
    for row in report.networks:
        if row.error is not None:
            console.print(f"not measured: {row.network} {row.mode}, {row.arm}: {row.error}", style="red", markup=False)
    title = "Whole steps; ratios are time / time of the other (below 1: faster)"
    words = ("network", "mode", "layers", "layout", "pages")
    table = new_table(title, words, ("ms", "spread", "/ eager", f"/ {DEFAULT_ARM}", "peak, MiB"), no_wrap=True)
    rows = []
    for row in sorted(report.networks, key=lambda one: (one.network, one.mode)):
        cells = [f"{row.network}, {row.batch}×{row.size}²", row.mode, row.layers, row.layout, row.pages]
        cells += ["[red]error[/red]", ""] if row.step_ms is None else [number(row.step_ms, 1), percent(row.spread or 0)]
        cells += [number(row.ratios.get(row.eager_arm)), number(row.ratios.get(DEFAULT_ARM))]
        cells.append("" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}")
        rows.append(((row.network, row.mode), cells))
    add_groups(table, rows)
    console.print(table)
    console.print("Peak is the most memory that the process of the arm had resident, with interpreter and torch.")
