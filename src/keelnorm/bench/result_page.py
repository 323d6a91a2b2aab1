"""The benchmark's page as a document that `keelnorm.measure.page` draws."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from keelnorm.bench.result_figures import network_figures, network_label, rate_figures, ratio_figures, speed_figure
from keelnorm.bench.results import DEFAULT_ARM, NetworkRow, Report, Row
from keelnorm.measure.machine import facts_of
from keelnorm.measure.page_parts import Section, Table

SUBJECT = "keelnorm"
AGAINST = ("eager", "compile", "onednn", "relu", "copy")
#: The peers that compute batch normalization too.
RIVALS = ("eager", "compile", "onednn")
#: What has to be equal in results that are drawn on one page.
SAME = ("cpu", "threads", "torch", "keelnorm", "revision", "environment")


def bench_document(reports: Sequence[Report]) -> dict[str, Any]:
    """The document of one or more results of one machine.

    Raises:
        ValueError: There is nothing to show, or the results are of different machines or revisions.
    """
    if not reports:
        raise ValueError("there are no results to draw")
    first = reports[0].machine
    for report in reports[1:]:
        for name in SAME:
            one, other = getattr(first, name), getattr(report.machine, name)
            if one != other:
                raise ValueError(f"the results are of different {name}: {one!r} and {other!r}; draw a page for each")
    rows = [row for report in reports for row in report.rows]
    networks = [row for report in reports for row in report.networks]
    if not rows and not networks:
        raise ValueError("the results have no rows to draw")
    sections = [_loss_section(rows, networks), *_layer_sections(rows), *_network_sections(networks)]
    return {
        "title": "keelnorm: benchmarks",
        "environment": _machine(reports),
        "seconds": round(sum(report.seconds for report in reports)),
        "failures": _failures(rows, networks),
        "summary": [asdict(table) for table in _summary(reports, networks)],
        "notes": [
            "Times as fast: above 1, keelnorm is faster than what the column names. Geometric means over ResNet-50's "
            "shapes; a mean is not shown when one of its shapes has no number.",
            "Copy rate: the least bytes over the time, as a part of the rate of a copy.",
        ],
        "sections": [asdict(section) for section in sections],
        "command": "keelnorm bench page RESULTS.json",
    }


def _machine(reports: Sequence[Report]) -> dict[str, str]:
    facts = facts_of(reports[0].machine)
    for report in reports:
        kind = "networks" if report.networks else "layers"
        asked = {key: value for key, value in asdict(report.settings).items() if value not in (None, [], False)}
        facts[f"settings of the {kind}"] = ", ".join(f"{key} {value}" for key, value in asked.items())
    return facts


def _failures(rows: Iterable[Row], networks: Iterable[NetworkRow]) -> list[str]:
    said = [f"{r.peer}, {r.shape} {r.layout} {r.variant} {r.mode}: {r.error}" for r in rows if r.error]
    return said + [f"{n.network} {n.mode}, {n.arm}: {n.error}" for n in networks if n.error]


def _summary(reports: Sequence[Report], networks: Sequence[NetworkRow]) -> list[Table]:
    means = [m for r in reports for m in r.means if m.peer == SUBJECT and m.suite == "resnet50"]
    tables = []
    if means:
        others = [name for name in AGAINST if any(name in mean.ratios for mean in means)]
        body = [
            [
                mean.label,
                mean.mode,
                mean.layout,
                mean.pages,
                *(f"{1 / mean.ratios[name]:.2f}" if name in mean.ratios else "-" for name in others),
                "-" if mean.copy_fraction is None else f"{mean.copy_fraction:.0%}",
            ]
            for mean in sorted(means, key=lambda m: (m.pages, m.variant, m.mode, m.layout))
        ]
        columns = ["variant", "mode", "layout", "pages", *(f"vs {name}" for name in others), "copy rate"]
        tables.append(Table("Layers: times as fast as", columns, body))
    steps = [n for n in networks if n.layers == SUBJECT and n.step_ms]
    if steps:
        body = [
            [
                f"{n.network}, batch {n.batch}",
                n.mode,
                n.layout,
                n.pages,
                f"{n.step_ms:.0f} ms",
                *(f"{1 / n.ratios[arm]:.2f}" if arm in n.ratios else "-" for arm in (n.eager_arm, DEFAULT_ARM)),
                "-" if n.peak_bytes is None else f"{n.peak_bytes / 2**20:.0f} MiB",
            ]
            for n in steps
        ]
        columns = ["network", "mode", "layout", "pages", "step", "vs eager", f"vs {DEFAULT_ARM}", "peak memory"]
        tables.append(Table("Whole networks: times as fast as", columns, body))
    return tables


def losses(rows: Iterable[Row], networks: Iterable[NetworkRow]) -> list[list[str]]:
    """Where keelnorm is slower than another batch norm, the worst first: case, rival, times as fast."""
    found: list[tuple[float, list[str]]] = []
    for row in rows:
        for name in RIVALS:
            if row.peer == SUBJECT and row.ratios.get(name, 0.0) > 1:
                case = f"{row.shape} {row.layout} {row.label} {row.mode} ({row.pages} pages)"
                found.append((row.ratios[name], [case, name, f"{1 / row.ratios[name]:.2f}"]))
    for n in networks:
        ratio = n.ratios.get(n.eager_arm, 0.0)
        if n.layers == SUBJECT and ratio > 1:
            case = f"{n.network} {n.mode} {n.layout} ({n.pages} pages)"
            found.append((ratio, [case, "eager", f"{1 / ratio:.2f}"]))
    return [cells for _, cells in sorted(found, key=lambda one: -one[0])]


def _loss_section(rows: Sequence[Row], networks: Sequence[NetworkRow]) -> Section:
    slower = losses(rows, networks)
    compared = sum(name in row.ratios for row in rows if row.peer == SUBJECT for name in RIVALS)
    compared += sum(n.eager_arm in n.ratios for n in networks if n.layers == SUBJECT)
    answer = f"keelnorm is slower in {len(slower)} of {compared} comparisons with another batch norm."
    if slower:
        case, rival, speed = slower[0]
        answer += f" The worst: {case}, {speed} times as fast as {rival}."
    return Section(
        name="losses",
        title="Losses",
        question="Where keelnorm is slower",
        answer=answer,
        command="keelnorm bench run",
        tables=[Table("The worst first", ["case", "against", "times as fast"], slower)] if slower else [],
        setup=[("what counts", "a median ratio of the same rounds that is above 1, however little")],
        open=True,
    )


def _layer_sections(rows: Sequence[Row]) -> list[Section]:
    groups: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.pages, row.layout].append(row)
    return [_layer_section(pages, layout, group) for (pages, layout), group in groups.items()]


def _layer_section(pages: str, layout: str, rows: Sequence[Row]) -> Section:
    body = [
        [
            row.shape,
            row.label,
            row.mode,
            row.peer,
            f"{row.median_us / 1000:.4g}",
            f"{row.gbps or 0:.1f}",
            "-" if row.copy_fraction is None else f"{row.copy_fraction:.0%}",
            f"{row.copied_bytes / row.least_bytes:.2f}" if row.copied_bytes and row.least_bytes else "-",
        ]
        for row in rows
        if row.median_us is not None
    ]
    columns = ["shape", "variant", "mode", "peer", "ms", "GB/s", "copy rate", "bytes / least"]
    ours = [row for row in rows if row.peer == SUBJECT and "eager" in row.ratios]
    faster = sum(row.ratios["eager"] < 1 for row in ours)
    spoken = layout.replace("_", "-")
    return Section(
        name=f"layers-{pages}-{layout}",
        title=f"{spoken}, {pages} pages",
        question=f"How fast is each shape, {spoken}, with {pages} pages?",
        answer=f"keelnorm is faster than eager in {faster} of {len(ours)} cases.",
        command="keelnorm bench run",
        figures=[*ratio_figures(rows), *rate_figures(rows)],
        tables=[Table("Medians", columns, body)],
        notes=list(dict.fromkeys(f"{row.peer} is missing: {row.skipped}." for row in rows if row.skipped)),
        setup=[
            ("correct first", "every result is compared with a float64 definition; a wrong one has no number"),
            ("time", "medians over rounds in which all peers take turns; ratios within a round"),
        ],
    )


def _network_sections(rows: Sequence[NetworkRow]) -> list[Section]:
    modes = dict.fromkeys(row.mode for row in rows)
    return [_network_section(mode, [row for row in rows if row.mode == mode and row.step_ms]) for mode in modes]


def _network_section(mode: str, rows: Sequence[NetworkRow]) -> Section:
    ours = [row for row in rows if row.layers == SUBJECT and row.eager_arm in row.ratios]
    named = {network_label(row): 1 / row.ratios[row.eager_arm] for row in ours}
    body = [
        [
            row.network,
            row.arm,
            f"{row.step_ms:.1f}",
            f"{row.spread or 0:.0%}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
            "-" if row.baseline_bytes is None else f"{row.baseline_bytes / 2**20:.0f}",
            "-" if row.agreement is None else f"{row.agreement:.2g}",
        ]
        for row in rows
    ]
    columns = ["network", "arm", "ms", "spread", "peak, MiB", "before, MiB", "error / eager's"]
    return Section(
        name=f"networks-{mode}",
        title=f"Networks, {mode}",
        question=f"How much faster are whole networks, in {mode}?",
        answer=f"keelnorm is faster in {sum(value >= 1 for value in named.values())} of {len(named)} networks and "
        "settings.",
        command="python -m benchmarks.networks",
        figures=[
            *([speed_figure(f"Whole networks, {mode}, against eager", named)] if named else []),
            *network_figures(rows),
        ],
        tables=[Table("Medians of whole steps", columns, body)],
        setup=[
            ("step", "forward, loss, backward and SGD with momentum; in inference the forward alone"),
            ("peak memory", "the most that the process of the arm had resident up to then"),
            (
                "correct first",
                "outputs, gradients and statistics against float64, relative to the errors of eager",
            ),
        ],
    )
