"""The figures of the benchmark's page, as `keelnorm.measure.page.plots` takes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks.networks.network_table import eager_of
from keelnorm.bench.results import NetworkRow, Row
from keelnorm.bench.result_table import unusual

Plain = dict[str, Any]

#: The modes that are drawn; the tables have them all.
DRAWN = ("both", "inference")


def _bars(title: str, unit: str, description: str, names: Sequence[str], series: list[Plain], **more: Any) -> Plain:
    axis = {"title": unit, "scale": "linear", "limits": None, "categories": None}
    rows = len(names) * (1 if more.get("apart") else max(1, len(series)))
    return {
        "title": title,
        "x": {"title": "", "scale": "linear", "limits": None, "categories": list(names)},
        "y": axis,
        "series": series,
        "description": description,
        "kind": "bars",
        "reference": None,
        "height": max(380, 140 + 20 * rows),
        **more,
    }


def _series(label: str, style: str, values: dict[int, float]) -> Plain:
    x, y = list(values), list(values.values())
    return {"label": label, "style": style, "x": x, "y": y, "low": None, "high": None, "faint": False}


def against(title: str, named: dict[str, float]) -> Plain:
    """Bars of how many times as fast keelnorm is, the losing ones in another colour and pattern."""
    names = list(named)
    won = {i: value for i, value in enumerate(named.values()) if value >= 1}
    lost = {i: value for i, value in enumerate(named.values()) if value < 1}
    series = [_series("keelnorm faster", "keelnorm", won)] if won else []
    series += [_series("keelnorm slower", "none", lost)] if lost else []
    description = f"Each bar is eager's time over keelnorm's; at 1 both take as long. {len(lost)} of {len(named)} lose."
    return _bars(title, "times as fast", description, names, series, reference=(1.0, "as fast"), apart=True)


def ratio_figures(rows: Sequence[Row]) -> list[Plain]:
    """One figure for each variant and mode, one bar for each shape: eager's time over keelnorm's."""
    groups: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.peer == "keelnorm" and "eager" in row.ratios and row.mode in DRAWN:
            title = " ".join([row.variant, *unusual(row)]) + f", {row.mode}, against eager"
            groups[title][row.shape] = 1 / row.ratios["eager"]
    return [against(title, named) for title, named in groups.items()]


def rate_figures(rows: Sequence[Row]) -> list[Plain]:
    """GB/s of keelnorm, eager and the copy, for forward and backward together and for inference."""
    groups: defaultdict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.mode in DRAWN and row.gbps is not None and row.peer in ("keelnorm", "eager"):
            variant = " ".join([row.variant, *unusual(row)])
            groups[variant, row.mode][row.shape][row.peer] = row.gbps
            if row.copy_fraction:
                groups[variant, row.mode][row.shape]["copy"] = row.gbps / row.copy_fraction
    figures = []
    styles = {"keelnorm": "keelnorm", "eager": "torch", "copy": "none"}
    for (variant, mode), shapes in groups.items():
        series = []
        for peer, style in styles.items():
            values = {i: rates[peer] for i, rates in enumerate(shapes.values()) if peer in rates}
            if values:
                series.append(_series(peer, style, values))
        description = "The bytes that cannot be avoided over the time, and the rate at which a copy moves as many."
        figures.append(_bars(f"{variant}, {mode}: rate", "GB/s", description, list(shapes), series))
    return figures


def network_sections(rows: Sequence[NetworkRow]) -> list[Plain]:
    """A section for each mode: times as fast as eager, milliseconds, and peak memory."""
    sections = []
    for mode in dict.fromkeys(row.mode for row in rows):
        group = [row for row in rows if row.mode == mode and row.step_ms is not None]
        ours = [row for row in group if row.layers == "keelnorm" and eager_of(row) in row.ratios]
        named = {f"{row.network}, {row.layout}, {row.pages} pages": 1 / row.ratios[eager_of(row)] for row in ours}
        figures = [against(f"Whole networks, {mode}, against eager", named)] if named else []
        figures += _absolute(group)
        table = [
            [
                row.network,
                row.arm,
                f"{row.step_ms:.1f}",
                f"{row.spread or 0:.0%}",
                "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
                "-" if row.baseline_bytes is None else f"{row.baseline_bytes / 2**20:.0f}",
                "-" if row.agreement is None else f"{row.agreement:.2g}",
            ]
            for row in group
        ]
        columns = ["network", "arm", "ms", "spread", "peak, MiB", "before, MiB", "error / eager's"]
        won = sum(value >= 1 for value in named.values())
        sections.append(
            {
                "name": f"networks-{mode}",
                "title": f"Networks, {mode}",
                "question": f"What is it worth in whole networks, in {mode}?",
                "answer": f"keelnorm's layers make {won} of {len(named)} networks and settings faster.",
                "figures": figures,
                "tables": [{"caption": "Medians of whole steps", "columns": columns, "rows": table}],
                "setup": [
                    ("step", "forward, loss, backward and SGD with momentum; in inference the forward alone"),
                    ("peak memory", "the most that the arm's own process had resident up to then"),
                    ("correct first", "outputs, gradients, statistics against float64, measured by eager's errors"),
                ],
            }
        )
    return sections


def _absolute(group: Sequence[NetworkRow]) -> list[Plain]:
    def series(scale: float, field: str) -> tuple[list[str], list[Plain]]:
        names = list(dict.fromkeys(f"{r.network}, {r.layout}, {r.pages} pages" for r in group))
        made = []
        for layers, style in (("keelnorm", "keelnorm"), ("eager", "torch")):
            values = {
                names.index(f"{r.network}, {r.layout}, {r.pages} pages"): value * scale
                for r in group
                if r.layers == layers and (value := getattr(r, field)) is not None
            }
            if values:
                made.append(_series(layers, style, values))
        return names, made

    figures = []
    for title, unit, scale, field in (
        ("Time of a step", "ms", 1.0, "step_ms"),
        ("Peak memory", "MiB", 2.0**-20, "peak_bytes"),
    ):
        names, made = series(scale, field)
        if made:
            figures.append(_bars(title, unit, f"{title} of both kinds of layers; less is better.", names, made))
    return figures
