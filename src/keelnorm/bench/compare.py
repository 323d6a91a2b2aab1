"""Compare two results row by row: what a change of the code has made faster and slower."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from statistics import geometric_mean
from typing import NamedTuple

from rich.console import Console

from keelnorm.bench.result_table import new_table, table_console
from keelnorm.bench.results import Report

#: What has to be equal for two times to be comparable; versions and revisions may differ.
MACHINE = ("cpu", "cores", "threads", "system", "torch", "torch_capability", "allocator", "environment")
SETTINGS = ("batch", "rounds", "min_time_ms", "threads")


class Key(NamedTuple):
    """What is the same in two rows that are compared."""

    suite: str
    shape: str
    layout: str
    variant: str
    mode: str
    gradient: str
    dtype: str
    pages: str


@dataclass(frozen=True)
class Change:
    """One row in both results; `ratio` is time after / time before."""

    key: Key
    before_ms: float
    after_ms: float

    @property
    def ratio(self) -> float:
        """Below 1, it has become faster."""
        return self.after_ms / self.before_ms


@dataclass
class Comparison:
    """All changes, the worst first, and their geometric means by mode, layout and pages."""

    peer: str
    revisions: tuple[str | None, str | None]
    unlike: list[str]
    changes: list[Change]
    means: dict[tuple[str, ...], float] = field(default_factory=dict)
    only_before: list[Key] = field(default_factory=list)
    only_after: list[Key] = field(default_factory=list)

    def to_json(self) -> str:
        """The comparison as JSON text."""
        data = asdict(self)
        data["changes"] = [asdict(change) | {"ratio": change.ratio} for change in self.changes]
        data["means"] = [{"key": key, "ratio": ratio} for key, ratio in self.means.items()]
        return json.dumps(data, indent=1, allow_nan=False)


def differences(before: Report, after: Report) -> list[str]:
    """Why two results are not comparable, a line for each difference; empty if they are."""
    lines = []
    for part, names in (("machine", MACHINE), ("settings", SETTINGS)):
        for name in names:
            first, second = (getattr(getattr(report, part), name) for report in (before, after))
            if first != second:
                lines.append(f"{part}.{name}: {first!r} before, {second!r} after")
    return lines


def compare(before: Report, after: Report, peer: str = "keelnorm") -> Comparison:
    """Compare the rows of one peer (in networks, of the arms with its layers).

    Raises:
        ValueError: no row is in both with a number.
    """
    first, second = _times(before, peer), _times(after, peer)
    shared = [key for key in first if key in second]
    if not shared:
        raise ValueError(f"the results share no row of {peer!r} that has a number in both")
    changes = sorted((Change(key, first[key], second[key]) for key in shared), key=lambda one: -one.ratio)
    groups: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)
    for change in changes:
        key = change.key
        groups[key.suite, key.variant, key.mode, key.layout, key.pages].append(change.ratio)
    return Comparison(
        peer=peer,
        revisions=(before.machine.revision, after.machine.revision),
        unlike=differences(before, after),
        changes=changes,
        means={key: geometric_mean(ratios) for key, ratios in sorted(groups.items())},
        only_before=[key for key in first if key not in second],
        only_after=[key for key in second if key not in first],
    )


def _times(report: Report, peer: str) -> dict[Key, float]:
    times = {
        Key(r.suite, r.shape, r.layout, r.variant, r.mode, r.gradient, r.dtype, r.pages): r.median_us / 1000
        for r in report.rows
        if r.peer == peer and r.median_us is not None
    }
    for n in report.networks:
        if n.layers == peer and n.step_ms is not None:
            size = f"batch {n.batch}, {n.size}²"
            times[Key(n.network, size, n.layout, "network", n.mode, "matching", "float32", n.pages)] = n.step_ms
    for v in report.variants:
        if peer == "keelnorm" and v.median_us is not None:
            key = Key("variants", v.shape, v.layout, v.variant, "both", "matching", v.dtype, v.pages)
            times[key] = v.median_us / 1000
    return times


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print what differs between the two, every row with the slowest first, and the means last."""
    console = console or table_console(150)
    for line in comparison.unlike:
        console.print(f"not the same: {line}", style="yellow", markup=False, highlight=False)
    title = f"{comparison.peer}: time after / time before (above 1: slower)"
    table = new_table(title, Key._fields, ("before, ms", "after, ms", "ratio"), no_wrap=True)
    for change in comparison.changes:
        style = "red" if change.ratio > 1.03 else "green" if change.ratio < 0.97 else ""
        numbers = (f"{change.before_ms:.4g}", f"{change.after_ms:.4g}", f"{change.ratio:.3f}")
        table.add_row(*change.key, *numbers, style=style)
    console.print(table)
    for name, keys in (("before", comparison.only_before), ("after", comparison.only_after)):
        if keys:
            console.print(f"{len(keys)} rows have a number only {name}; the first is {' '.join(keys[0])}", markup=False)
    columns = ("suite", "variant", "mode", "layout", "pages")
    means = new_table("Geometric means of time after / time before", columns, ("ratio",))
    for key, ratio in comparison.means.items():
        means.add_row(*key, f"{ratio:.3f}")
    console.print(means)
    console.print(f"revisions: {comparison.revisions[0]} before, {comparison.revisions[1]} after", markup=False)
