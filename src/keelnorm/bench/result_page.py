"""Results as a document that `keelnorm.measure.page` draws: the summary, what wins, what loses, the machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from keelnorm.bench.result_figures import network_sections, rate_figures, ratio_figures
from benchmarks.networks.network_table import DEFAULT_ARM, eager_of
from keelnorm.bench.results import NetworkRow, Report, Row
from keelnorm.bench.result_table import unusual

SUBJECT = "keelnorm"
AGAINST = ("eager", "compile", "onednn", "relu", "copy")
Plain = dict[str, Any]


def bench_document(reports: Sequence[Report]) -> Plain:
    """The document of one or more results of one machine.

    Raises:
        ValueError: there is nothing to show, or the results are of different machines or revisions.
    """
    if not reports:
        raise ValueError("there are no results to draw")
    first = reports[0].machine
    for report in reports[1:]:
        for name in ("cpu", "threads", "torch", "keelnorm", "revision", "environment"):
            one, other = getattr(first, name), getattr(report.machine, name)
            if one != other:
                raise ValueError(f"the results are of different {name}: {one!r} and {other!r}; draw a page for each")
    rows = [row for report in reports for row in report.rows]
    networks = [row for report in reports for row in report.networks]
    if not rows and not networks:
        raise ValueError("the results have no rows to draw")
    sections = [*_kernel_sections(rows), *network_sections(networks)]
    losing = losses(rows, networks)
    sections.insert(0, _loss_section(losing, rows, networks))
    command = "keelnorm bench page RESULTS.json"
    for section in sections:
        section.setdefault("failures", [])
        section.setdefault("notes", [])
        section.setdefault("figures", [])
        section.setdefault("tables", [])
        section["command"] = "keelnorm bench networks" if section["name"].startswith("net") else "keelnorm bench run"
    return {
        "title": "keelnorm: benchmarks",
        "environment": _machine(reports),
        "seconds": round(sum(report.seconds for report in reports)),
        "failures": _failures(rows, networks),
        "summary": _summary(reports, networks),
        "notes": [
            "Times as many times as fast: above 1, keelnorm is faster than what the column names. Geometric means over "
            "ResNet-50's shapes; a mean over which a shape is missing is not shown.",
            "Copy rate: the bytes that cannot be avoided, over the time they take, against the rate of a copy.",
        ],
        "sections": sections,
        "command": command,
    }


def _machine(reports: Sequence[Report]) -> dict[str, str]:
    facts = asdict(reports[0].machine)
    facts["environment"] = " ".join(f"{key}={value}" for key, value in facts["environment"].items()) or "nothing set"
    facts["caches"] = ", ".join(f"{level} {size >> 10} KiB" for level, size in facts["caches"].items()) or "unknown"
    if facts["memory_bytes"]:
        facts["memory"] = f"{facts['memory_bytes'] / 2**30:.1f} GiB"
    del facts["memory_bytes"]
    for report in reports:
        kind = "networks" if report.networks else "kernels"
        asked = {key: value for key, value in asdict(report.settings).items() if value not in (None, [], False)}
        facts[f"settings of the {kind}"] = ", ".join(f"{key} {value}" for key, value in asked.items())
    return {key.replace("_", " "): "unknown" if value is None else str(value) for key, value in facts.items()}


def _failures(rows: Iterable[Row], networks: Iterable[NetworkRow]) -> list[str]:
    said = [f"{r.peer}, {r.shape} {r.layout} {r.variant} {r.mode}: {r.error}" for r in rows if r.error]
    return said + [f"{n.network} {n.mode}, {n.arm}: {n.error}" for n in networks if n.error]


def _summary(reports: Sequence[Report], networks: Sequence[NetworkRow]) -> list[Plain]:
    means = [m for r in reports for m in r.means if m.peer == SUBJECT and m.suite == "resnet50"]
    tables = []
    if means:
        others = [name for name in AGAINST if any(name in mean.ratios for mean in means)]
        body = [
            [
                " ".join([mean.variant, *unusual(mean)]),
                mean.mode,
                mean.layout,
                mean.pages,
                *(f"{1 / mean.ratios[name]:.2f}" if name in mean.ratios else "-" for name in others),
                "-" if mean.copy_fraction is None else f"{mean.copy_fraction:.0%}",
            ]
            for mean in sorted(means, key=lambda m: (m.pages, m.variant, m.mode, m.layout))
        ]
        columns = ["variant", "mode", "layout", "pages", *(f"vs {name}" for name in others), "copy rate"]
        tables.append({"caption": "Kernels: times as fast as", "columns": columns, "rows": body})
    steps = [n for n in networks if n.layers == SUBJECT and n.step_ms]
    if steps:
        body = [
            [
                f"{n.network}, batch {n.batch}",
                n.mode,
                n.layout,
                n.pages,
                f"{n.step_ms:.0f} ms",
                *(f"{1 / n.ratios[arm]:.2f}" if arm in n.ratios else "-" for arm in (eager_of(n), DEFAULT_ARM)),
                "-" if n.peak_bytes is None else f"{n.peak_bytes / 2**20:.0f} MiB",
            ]
            for n in steps
        ]
        columns = ["network", "mode", "layout", "pages", "step", "vs eager", f"vs {DEFAULT_ARM}", "peak memory"]
        tables.append({"caption": "Whole networks: times as fast as", "columns": columns, "rows": body})
    return tables


def losses(rows: Iterable[Row], networks: Iterable[NetworkRow]) -> list[list[str]]:
    """Where keelnorm is slower than another batch norm, the worst first: case, against, times as fast."""
    found: list[tuple[float, list[str]]] = []
    for row in rows:
        for name in ("eager", "compile", "onednn"):
            if row.peer == SUBJECT and row.ratios.get(name, 0.0) > 1:
                case = " ".join([row.shape, row.layout, row.variant, *unusual(row), row.mode, f"({row.pages} pages)"])
                found.append((row.ratios[name], [case, name, f"{1 / row.ratios[name]:.2f}"]))
    for n in networks:
        ratio = n.ratios.get(eager_of(n), 0.0)
        if n.layers == SUBJECT and ratio > 1:
            case = f"{n.network} {n.mode} {n.layout} ({n.pages} pages)"
            found.append((ratio, [case, "eager", f"{1 / ratio:.2f}"]))
    return [cells for _, cells in sorted(found, key=lambda one: -one[0])]


def _loss_section(losing: list[list[str]], rows: Sequence[Row], networks: Sequence[NetworkRow]) -> Plain:
    compared = sum(
        name in row.ratios for row in rows if row.peer == SUBJECT for name in ("eager", "compile", "onednn")
    ) + sum(eager_of(n) in n.ratios for n in networks if n.layers == SUBJECT)
    answer = f"keelnorm is slower in {len(losing)} of {compared} comparisons with another batch norm."
    table = {"caption": "The worst first", "columns": ["case", "against", "times as fast"], "rows": losing}
    worst = f" The worst: {losing[0][0]}, {losing[0][2]} times as fast as {losing[0][1]}." if losing else ""
    return {
        "name": "losses",
        "open": True,
        "title": "Losses",
        "question": "Where keelnorm loses",
        "answer": answer + worst,
        "tables": [table] if losing else [],
        "setup": [("what counts", "a median ratio of the same rounds that is above 1, however little")],
    }


def _kernel_sections(rows: Sequence[Row]) -> list[Plain]:
    groups: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.pages, row.layout].append(row)
    sections = []
    for (pages, layout), group in groups.items():
        table = [
            [
                row.shape,
                " ".join([row.variant, *unusual(row)]),
                row.mode,
                row.peer,
                f"{row.median_us / 1000:.4g}",
                f"{row.gbps or 0:.1f}",
                "-" if row.copy_fraction is None else f"{row.copy_fraction:.0%}",
                f"{row.copied_bytes / row.least_bytes:.2f}" if row.copied_bytes and row.least_bytes else "-",
            ]
            for row in group
            if row.median_us is not None
        ]
        columns = ["shape", "variant", "mode", "peer", "ms", "GB/s", "copy rate", "bytes / least"]
        skipped = dict.fromkeys(f"{row.peer} is missing: {row.skipped}." for row in group if row.skipped)
        ours = [row for row in group if row.peer == SUBJECT and "eager" in row.ratios]
        faster = sum(row.ratios["eager"] < 1 for row in ours)
        sections.append(
            {
                "name": f"kernels-{pages}-{layout}",
                "title": f"{layout.replace('_', '-')}, {pages} pages",
                "question": f"How fast is each shape, {layout.replace('_', '-')}, with {pages} pages?",
                "answer": f"keelnorm is faster than eager in {faster} of {len(ours)} cases.",
                "figures": [*ratio_figures(group), *rate_figures(group)],
                "tables": [{"caption": "Medians", "columns": columns, "rows": table}],
                "notes": list(skipped),
                "setup": [
                    ("correct first", "every result is compared with a float64 definition; a wrong one has no number"),
                    ("time", "medians over rounds in which all peers take turns; ratios within a round"),
                ],
            }
        )
    return sections
