"""The results of the memory benchmark as tables, for every page and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.console import Console
from rich.table import Table as TerminalTable

from benchmarks.memory.memory_results import (
    CHECKPOINTED,
    CONVERTED,
    EAGER,
    SAVED,
    MemoryReport,
    MemoryRow,
    StepTimes,
)
from benchmarks.memory.memory_targets import mean_bytes, mean_step, targets
from benchmarks.memory.training_peak import ARMS
from keelnorm.bench.cases import PAGES
from keelnorm.bench.result_table import table_console
from keelnorm.measure.page_parts import Table
from keelnorm.measure.timing import MAX_LOST


def architecture_table(report: MemoryReport) -> Table:
    """Bytes and steps of all networks, and the means."""
    columns = ["architecture", "from", "kept by eager, MB", CONVERTED, SAVED, *(f"step, {pages}" for pages in PAGES)]
    rows = [_architecture(row) for row in report.rows if row.was_asked("bytes") or row.was_asked("step")]
    means = [mean_bytes(report, CONVERTED), mean_bytes(report), *(mean_step(report, pages) for pages in PAGES)]
    if rows:
        rows.append([f"geometric mean of {len(rows)}", "", "", *map(_ratio, means)])
    return Table("Bytes kept, relative to eager; steps, relative to the converted model's", columns, rows)


def _architecture(row: MemoryRow) -> list[str]:
    kept = row.bytes_kept
    cells = [f"{kept.kept[EAGER] / 1e6:.1f}", _ratio(kept.ratio(CONVERTED)), _ratio(kept.ratio(SAVED))] if kept else []
    return [row.name, row.package, *(cells or ["", "", ""]), *(_step(row.step, pages) for pages in PAGES)]


def peak_table(report: MemoryReport) -> Table:
    """Peaks of training."""
    rows = [
        [row.name, f"{max(peak.above[EAGER]) / 1e6:.0f}", *(_ratio(peak.ratio(arm)) for arm in ARMS[1:])]
        for row in report.rows
        if (peak := row.peak)
    ]
    columns = ["network", "eager, MB", *ARMS[1:]]
    return Table(f"Peak memory of training, relative to eager, batch {report.settings.peak_samples}", columns, rows)


def largest_table(report: MemoryReport) -> Table:
    """The largest batches."""
    rows = [
        [row.name, *(str(found.batch[arm]) for arm in (EAGER, SAVED)), f"×{found.ratio:.2f}"]
        for row in report.rows
        if (found := row.largest)
    ]
    limit = report.settings.limit_bytes / 2**30
    return Table(f"Largest batch within {limit:g} GiB", ["network", EAGER, SAVED, "ratio"], rows)


def checkpoint_table(report: MemoryReport) -> Table:
    """The comparison with checkpointing."""
    rows = [
        [
            row.name,
            str(found.batch),
            f"{found.checkpointed} of {found.blocks}",
            _ratio(found.kept[CHECKPOINTED] / found.kept[SAVED]),
            *(_step(found.steps, pages) for pages in PAGES),
        ]
        for row in report.rows
        if (found := row.checkpoint)
    ]
    columns = ["network", "batch", "blocks checkpointed", f"kept / {SAVED}", *(f"step, {pages}" for pages in PAGES)]
    return Table("Steps with save_memory, relative to checkpointing that keeps as much", columns, rows)


def target_table(report: MemoryReport) -> Table:
    """What was to be reached, and whether it is."""
    words = {True: "met", False: "not met", None: "not measured"}
    rows = [
        [one.what, _ratio(one.value), f"{'≥' if one.at_least else '≤'} {one.bound:.2f}", words[one.is_met]]
        for one in targets(report)
    ]
    return Table("Targets", ["figure", "measured", "target", ""], rows)


def tables(report: MemoryReport) -> list[Table]:
    """All tables with rows, without the targets."""
    made = [architecture_table(report), peak_table(report), largest_table(report), checkpoint_table(report)]
    return [table for table in made if table.rows]


def failures(report: MemoryReport) -> list[str]:
    """What was not measured, and why."""
    return [f"{row.name}, {part}: {error}" for row in report.rows for part, error in row.errors.items()]


def count_note(report: MemoryReport) -> str:
    """How far the two counts of bytes are apart."""
    kept = {row.name: row.bytes_kept.disagreement for row in report.rows if row.bytes_kept}
    if not kept:
        return ""
    worst = max(kept, key=lambda name: kept[name])
    return (
        "Counted without autograd, as what torch's allocator hands out during a forward and has not got back after it, "
        f"the bytes differ by {median(kept.values()):.1%} in the median and by {kept[worst]:.1%} at most ({worst})."
    )


def print_memory(report: MemoryReport, console: Console | None = None) -> None:
    """Print what is wrong, the tables, and the targets last."""
    console = console or table_console(140)
    for line in failures(report):
        console.print(f"not measured: {line}", style="red", markup=False)
    for table in [*tables(report), target_table(report)]:
        console.print(_for_terminal(table))
    console.print(f"{count_note(report)} {report.seconds:.0f} s; ~ marks times that other programs disturbed.".strip())


def _for_terminal(table: Table) -> TerminalTable:
    made = TerminalTable(title=table.caption, title_style="bold")
    for index, name in enumerate(table.columns):
        made.add_column(name, justify="right" if index else "left")
    for row in table.rows:
        made.add_row(*row)
    return made


def _step(steps: Sequence[StepTimes], pages: str) -> str:
    found = next((one for one in steps if one.pages == pages), None)
    if found is None:
        return ""
    return f"{'~' if found.lost > MAX_LOST else ''}{found.ratio:.2f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
