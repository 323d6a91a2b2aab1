"""A report as tables: errors first, then every case, and the means last, where a terminal leaves the reader."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.table import Table

from keelnorm.bench.results import Report, Row


def table_console(width: int) -> Console:
    """A console for tables; in a pipe or a file, which has no width of its own, as wide as asked."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


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
    table = Table(title="Not measured", title_style="bold red")
    for name in ("shape", "layout", "variant", "modes", "peer", "reason"):
        table.add_column(name)
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
    table = Table(
        title="Geometric means of time / time of the other (below 1: faster)",
        title_style="bold",
    )
    for name in ("suite", "pages", "layout", "variant", "mode", "peer"):
        table.add_column(name)
    for name in others:
        table.add_column(f"/ {name}", justify="right")
    table.add_column("copy rate", justify="right")
    previous = None
    for mean in sorted(
        (mean for mean in report.means if mean.peer in subjects),
        key=lambda m: (report.settings.pages.index(m.pages), report.settings.modes.index(m.mode)),
    ):
        section = (mean.suite, mean.pages, mean.mode)
        if previous not in (None, section):
            table.add_section()
        previous = section
        cells = [_number(mean.ratios.get(name)) for name in others]
        table.add_row(
            f"{mean.suite} ({mean.shapes})",
            mean.pages,
            mean.layout,
            mean.label,
            mean.mode,
            mean.peer,
            *cells,
            _percent(mean.copy_fraction),
        )
    return table


def totals_table(report: Report) -> Table:
    """The time of all batch norms of the network."""
    peers = list(dict.fromkeys(total.peer for total in report.totals))
    layers = report.totals[0].layers
    table = Table(
        title=f"All {layers} batch norms of ResNet-50 with what follows them, ms",
        title_style="bold",
    )
    for name in ("pages", "layout", "mode", *peers):
        table.add_column(name, justify="right" if name in peers else "left")
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
    table = Table(title=f"Medians, µs; the last columns are {subject}'s", title_style="bold")
    for name in ("shape", "pages", "layout", "variant", "mode"):
        table.add_column(name, no_wrap=True)
    for name in (*peers, "/ eager", "GB/s", "copy rate", "bytes", "spread"):
        table.add_column(name, justify="right", no_wrap=True)
    lines: defaultdict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in report.rows:
        lines[row.shape, row.pages, row.layout, row.label, row.mode][row.peer] = row
    previous = None
    for key, found in lines.items():
        if previous not in (None, key[:3]):
            table.add_section()
        previous = key[:3]
        row = found.get(subject) or Row("", "", "", "", "", subject)
        table.add_row(
            *key,
            *(_cell(report, found.get(peer)) for peer in peers),
            _number(row.ratios.get("eager")),
            _number(row.gbps, 1),
            _percent(row.copy_fraction),
            _times(row.copied_bytes, row.least_bytes),
            _percent(row.spread),
        )
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
    return _number(value, 1 if value is not None and value < 1000 else 0)


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
