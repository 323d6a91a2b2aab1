"""A report as tables: errors first, then every case, and the means last, where a terminal leaves the reader."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import groupby
from operator import itemgetter

from rich.console import Console
from rich.table import Table

from keelnorm.bench.results import Report, Row


def table_console(width: int) -> Console:
    """A console for tables; in a pipe or a file, which has no width of its own, as wide as asked."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def new_table(title: str, left: Sequence[str], right: Sequence[str], *, no_wrap: bool = False) -> Table:
    """A table without rows.

    Args:
        title: Printed above it.
        left: The columns of words.
        right: The columns of numbers, after those.
        no_wrap: Whether what stands in a column stays in one line.
    """
    table = Table(title=title, title_style="bold")
    for name in left:
        table.add_column(name, no_wrap=no_wrap)
    for name in right:
        table.add_column(name, justify="right", no_wrap=no_wrap)
    return table


def add_groups(table: Table, rows: Iterable[tuple[Hashable, Sequence[str]]]) -> None:
    """Add the cells of rows, each given with its group, and a line between groups that follow each other."""
    for _, group in groupby(rows, itemgetter(0)):
        for _, cells in group:
            table.add_row(*cells)
        table.add_section()


def print_report(report: Report, console: Console | None = None) -> None:
    """Print a report: errors first, the means last."""
    console = console or table_console(190)
    machine = report.machine
    console.print(
        f"{machine.cpu}, {machine.threads} threads of {machine.cores} cores; "
        f"torch {machine.torch} ({machine.torch_capability}), keelnorm {machine.keelnorm} "
        f"({machine.keelnorm_kernels}); {report.seconds:.0f} s",
        highlight=False,
    )
    if report.disturbed > 0.05:
        console.print(
            f"[yellow]Other programs interfered in {report.disturbed:.0%} of the rounds; ~ marks rows where "
            "it was most of them. Set --threads below the number of free cores.[/yellow]"
        )
    if report.errors:
        console.print(errors_table(report))
    if report.rows:
        console.print(rows_table(report))
    if any(report.is_fresh(row) for row in report.rows):
        console.print("* includes the cost of fresh pages: the allocator took the tensors from the system")
    for peer, reason in dict.fromkeys((row.peer, row.skipped) for row in report.rows if row.skipped):
        console.print(f"empty for {peer}: {reason}", markup=False, highlight=False)
    if report.totals:
        console.print(totals_table(report))
    if report.means:
        console.print(means_table(report))


def errors_table(report: Report) -> Table:
    """The peers that were wrong or failed, and where."""
    table = new_table("Not measured", ("shape", "layout", "variant", "modes", "peer", "reason"), ())
    table.title_style = "bold red"
    merged: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in report.errors:
        merged[row.shape, row.layout, row.variant, row.peer, row.error or ""].append(row.mode)
    for (shape, layout, variant, peer, reason), modes in merged.items():
        table.add_row(shape, layout, variant, ", ".join(modes), peer, reason)
    return table


def _subjects(report: Report) -> list[str]:
    """The peers whose means are shown: keelnorm if it was measured, else all but eager."""
    names = list(dict.fromkeys(mean.peer for mean in report.means))
    return ["keelnorm"] if "keelnorm" in names else [n for n in names if n != "eager"] or names


def means_table(report: Report) -> Table:
    """Geometric means over the shapes of each suite."""
    subjects = _subjects(report)
    others = [name for name in report.settings.peers if subjects != [name]]
    table = new_table(
        "Geometric means of time / time of the other (below 1: faster)",
        ("suite", "pages", "layout", "variant", "mode", "peer"),
        (*(f"/ {name}" for name in others), "copy rate"),
    )
    means = sorted(
        (mean for mean in report.means if mean.peer in subjects),
        key=lambda m: (report.settings.pages.index(m.pages), report.settings.modes.index(m.mode)),
    )
    add_groups(
        table,
        (
            (
                (mean.suite, mean.pages, mean.mode),
                (
                    f"{mean.suite} ({mean.shapes})", mean.pages, mean.layout, mean.label, mean.mode, mean.peer,
                    *(number(mean.ratios.get(name)) for name in others), percent(mean.copy_fraction),
                ),
            )
            for mean in means
        ),
    )  # fmt: skip
    return table


def totals_table(report: Report) -> Table:
    """The time of all batch norms of the network."""
    peers = list(dict.fromkeys(total.peer for total in report.totals))
    layers = report.totals[0].layers
    title = f"All {layers} batch norms of ResNet-50 with what follows them, ms"
    table = new_table(title, ("pages", "layout", "mode"), peers)
    lines: defaultdict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for total in report.totals:
        lines[total.pages, total.layout, total.mode][total.peer] = total.total_ms
    for (pages, layout, mode), times in lines.items():
        table.add_row(pages, layout, mode, *(_time(times.get(peer)) for peer in peers))
    return table


def rows_table(report: Report) -> Table:
    """Every case: the medians of all peers, then ratio, rate and spread of keelnorm or the first peer."""
    peers = report.settings.peers
    subject = "keelnorm" if "keelnorm" in peers else peers[0]
    title = f"Medians, µs; the last columns are {subject}'s"
    numbers = (*peers, "/ eager", "GB/s", "copy rate", "bytes", "spread")
    table = new_table(title, ("shape", "pages", "layout", "variant", "mode"), numbers, no_wrap=True)
    lines: defaultdict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in report.rows:
        lines[row.shape, row.pages, row.layout, row.label, row.mode][row.peer] = row
    rows = []
    for key, found in lines.items():
        row = found.get(subject) or Row("", "", "", "", "", subject)
        cells = [*key, *(_cell(report, found.get(peer)) for peer in peers)]
        cells += [number(row.ratios.get("eager")), number(row.gbps, 1), percent(row.copy_fraction)]
        rows.append((key[:3], [*cells, _times(row.copied_bytes, row.least_bytes), percent(row.spread)]))
    add_groups(table, rows)
    return table


def _cell(report: Report, row: Row | None) -> str:
    if row is None or row.skipped is not None:
        return ""
    if row.error is not None:
        return "[red]error[/red]"
    rough = "~" if row.disturbed and row.disturbed > 0.5 else ""
    return rough + _time(row.median_us) + ("*" if report.is_fresh(row) else " ")


def _times(value: int | None, least: int | None) -> str:
    return f"{value / least:.1f}×" if value and least else ""


def _time(value: float | None) -> str:
    return number(value, 1 if value is not None and value < 1000 else 0)


def number(value: float | None, digits: int = 2) -> str:
    """A number of a table; nothing where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A part of the whole, in percent; nothing where there is none."""
    return "" if value is None else f"{value:.0%}"
