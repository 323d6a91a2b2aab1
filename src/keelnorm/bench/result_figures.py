"""The figures of the benchmark's page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from keelnorm.bench.results import NetworkRow, Row
from keelnorm.measure.page_parts import Axis, Figure, Series

#: The modes that are drawn; the tables have them all.
DRAWN = ("both", "inference")


def _bars(
    title: str,
    unit: str,
    description: str,
    names: Sequence[str],
    series: Sequence[Series],
    *,
    reference: tuple[float, str] | None = None,
    overlaid: bool = False,
) -> Figure:
    return Figure(
        title=title,
        x=Axis("", categories=list(names)),
        y=Axis(unit),
        series=series,
        description=description,
        kind="bars",
        reference=reference,
        overlaid=overlaid,
    )


def _series(label: str, style: str, values: Mapping[int, float]) -> Series:
    return Series(label, style, list(values), list(values.values()))


def speed_figure(title: str, named: Mapping[str, float]) -> Figure:
    """Bars of eager's time over keelnorm's; those below 1 have another color and pattern."""
    faster = {i: value for i, value in enumerate(named.values()) if value >= 1}
    slower = {i: value for i, value in enumerate(named.values()) if value < 1}
    series = [_series("keelnorm faster", "keelnorm", faster)] if faster else []
    series += [_series("keelnorm slower", "none", slower)] if slower else []
    return _bars(
        title,
        "times as fast",
        f"Each bar is eager's time over keelnorm's; 1 means equal. {len(slower)} of {len(named)} are below 1.",
        list(named),
        series,
        reference=(1.0, "as fast"),
        overlaid=True,
    )


def ratio_figures(rows: Sequence[Row]) -> list[Figure]:
    """One figure for each variant and mode, one bar for each shape: eager's time over keelnorm's."""
    groups: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.peer == "keelnorm" and "eager" in row.ratios and row.mode in DRAWN:
            groups[f"{row.label}, {row.mode}, against eager"][row.shape] = 1 / row.ratios["eager"]
    return [speed_figure(title, named) for title, named in groups.items()]


def rate_figures(rows: Sequence[Row]) -> list[Figure]:
    """GB/s of keelnorm, eager and the copy, for forward and backward together and for inference."""
    groups: defaultdict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.mode in DRAWN and row.gbps is not None and row.peer in ("keelnorm", "eager"):
            rates = groups[row.label, row.mode][row.shape]
            rates[row.peer] = row.gbps
            if row.copy_fraction:
                rates["copy"] = row.gbps / row.copy_fraction
    figures = []
    for (variant, mode), shapes in groups.items():
        series = []
        for peer, style in (("keelnorm", "keelnorm"), ("eager", "torch"), ("copy", "none")):
            values = {i: rates[peer] for i, rates in enumerate(shapes.values()) if peer in rates}
            if values:
                series.append(_series(peer, style, values))
        description = "The least bytes over the time, and the rate at which a copy moves as many."
        figures.append(_bars(f"{variant}, {mode}: rate", "GB/s", description, list(shapes), series))
    return figures


def network_figures(rows: Sequence[NetworkRow]) -> list[Figure]:
    """Time of a step and peak memory, for both kinds of layers."""
    names = list(dict.fromkeys(map(network_label, rows)))
    figures = []
    for title, unit, scale, field in (
        ("Time of a step", "ms", 1.0, "step_ms"),
        ("Peak memory", "MiB", 2.0**-20, "peak_bytes"),
    ):
        series = []
        for layers, style in (("keelnorm", "keelnorm"), ("eager", "torch")):
            values = {
                names.index(network_label(row)): value * scale
                for row in rows
                if row.layers == layers and (value := getattr(row, field)) is not None
            }
            if values:
                series.append(_series(layers, style, values))
        if series:
            figures.append(_bars(title, unit, f"{title} of both kinds of layers; less is better.", names, series))
    return figures


def network_label(row: NetworkRow) -> str:
    """A network and its setting."""
    return f"{row.network}, {row.layout}, {row.pages} pages"
