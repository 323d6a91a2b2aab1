"""The results of the variants' benchmark as tables."""

from __future__ import annotations

from collections import defaultdict
from statistics import geometric_mean

from rich.console import Console
from rich.table import Table

from benchmarks.variants.variant_layers import PLAIN
from keelnorm.bench.result_table import add_groups, new_table, number, percent, table_console
from keelnorm.bench.results import Report, VariantRow


def print_variants(report: Report, console: Console | None = None) -> None:
    """Print what is wrong, then every step against plain batch norm, and the means last."""
    console = console or table_console(150)
    for row in report.variants:
        why = row.error or row.skipped
        if why is not None:
            style = "red" if row.error else ""
            console.print(f"not measured: {row.variant}, {_case(row)}: {why}", style=style, markup=False)
    console.print(_steps(report))
    console.print(_means(report))


def _steps(report: Report) -> Table:
    title = f"Forward and backward in training; ratios are time / time of {PLAIN}"
    numbers = ("ms", "spread", "ratio", "ratio, forward")
    table = new_table(title, ("shape", "layout", "dtype", "variant"), numbers, no_wrap=True)
    rows = []
    for row in report.variants:
        cells = [row.shape, row.layout, row.dtype, row.variant]
        if row.median_us is not None:
            mark = "~" if (row.disturbed or 0) > 0.5 else ""
            cells += [f"{mark}{row.median_us / 1000:.4g}", percent(row.spread or 0)]
            cells += [number(row.ratio), number(row.forward_ratio)]
        rows.append((_case(row), cells))
    add_groups(table, rows)
    return table


def _means(report: Report) -> Table:
    """Geometric means over the shapes of a suite; no mean where a shape has no number."""
    groups: defaultdict[str, defaultdict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    for row in report.variants:
        groups[row.variant][f"{row.suite}, {row.layout}, {row.dtype}"].append(row.ratio)
    columns = list(dict.fromkeys(column for found in groups.values() for column in found))
    table = new_table("Geometric means of the ratios", ("variant",), columns, no_wrap=True)
    for variant, found in groups.items():
        cells = []
        for column in columns:
            known = [ratio for ratio in found[column] if ratio is not None]
            cells.append(number(geometric_mean(known) if len(known) == len(found[column]) > 0 else None))
        table.add_row(variant, *cells)
    return table


def _case(row: VariantRow) -> str:
    return f"{row.shape} {row.layout} {row.dtype}"
