"""Heat maps with numbers in their cells, so that they can be read without color."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

#: With more cells there is no room for a number in each; the pointer shows it.
_NUMBERED = 150


def heatmap(figure: Mapping[str, Any]) -> dict[str, Any]:
    """The trace of a heat map: one row per series, from the bottom up."""
    value = figure["value"] or {"title": "", "scale": "linear", "limits": None}
    rows = [list(series["y"]) for series in figure["series"]]
    logarithmic = value["scale"] == "log"
    colored = [[_colored(cell, logarithmic) for cell in row] for row in rows]
    has_room = sum(map(len, rows)) <= _NUMBERED
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": _columns(figure),
        "y": list(range(len(rows))),
        "z": colored,
        "text": [["-" if cell is None else f"{cell:.3g}" for cell in row] for row in rows],
        "texttemplate": "%{text}" if has_room else "",
        "hovertemplate": "%{text}<extra></extra>" if has_room else "%{x}, %{y}: %{text}<extra></extra>",
        "xgap": 2 if has_room else 1,
        "ygap": 2 if has_room else 1,
        "colorbar": {"title": {"text": html.escape(value["title"], quote=False), "side": "right"}, "thickness": 12},
        "showscale": not logarithmic,
        "meta": {"color": "keelnorm", "role": "heatmap"},
    }
    if value.get("middle") is not None:
        trace |= {"zmid": _colored(value["middle"], logarithmic), "meta": {"color": "keelnorm", "role": "diverging"}}
    if value["limits"] is not None:
        low, high = value["limits"]
        trace |= {"zmin": _colored(low, logarithmic), "zmax": _colored(high, logarithmic)}
    return trace


def _columns(figure: Mapping[str, Any]) -> list[str]:
    """The names along x: the categories of the axis, or the numbers of the first row."""
    categories = figure["x"]["categories"]
    positions = figure["series"][0]["x"]
    names = [f"{x:g}" for x in positions] if categories is None else [categories[int(x)] for x in positions]
    return [html.escape(name, quote=False) for name in names]


def _colored(cell: float | None, logarithmic: bool) -> float | None:
    if cell is None or (logarithmic and cell <= 0):
        return None
    return math.log10(cell) if logarithmic else cell


def heatmap_axis(labels: Sequence[str], title: str) -> dict[str, Any]:
    """The axis along which the rows are named."""
    return {
        "title": {"text": html.escape(title, quote=False), "standoff": 4},
        "tickvals": list(range(len(labels))),
        "ticktext": list(labels),
        "automargin": True,
        "zeroline": False,
        "showgrid": False,
    }
