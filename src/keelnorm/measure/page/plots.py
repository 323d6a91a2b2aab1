"""Figures for Plotly, without colors: the page adds these by its light or dark theme."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

from keelnorm.measure.page.heatmaps import heatmap, heatmap_axis
from keelnorm.measure.page.looks import look

Plain = Mapping[str, Any]

MARKED = 20
"""The points of a curve are marked if there are at most this many."""


def plotly_figure(figure: Plain) -> dict[str, Any]:
    """The traces and the layout of a figure. The `meta` of a trace names its color."""
    if figure["kind"] == "heatmap":
        return {"data": [heatmap(figure)], "layout": _layout(figure)}
    draw = {"bars": _bars, "boxes": _boxes, "dots": _dots, "lines": _lines}[figure["kind"]]
    traces: list[dict[str, Any]] = []
    for series in figure["series"]:
        traces += draw(figure, series, look(series["style"]))
    if figure["kind"] == "dots" and figure["reference"] is not None:
        traces.append(_unseen(figure))
    return {"data": traces, "layout": _layout(figure)}


def _text(text: str) -> str:
    """Escape a text, because Plotly reads a subset of HTML in every text."""
    return html.escape(text, quote=False)


def _lines(figure: Plain, series: Plain, style: Plain) -> list[dict[str, Any]]:
    color = style["color"]
    faint = bool(series["faint"])
    traces: list[dict[str, Any]] = []
    if series["low"] is not None:
        for part in _whole_parts(series):
            x, low, high = part
            traces.append(
                {
                    "type": "scatter",
                    "x": [*x, *reversed(x)],
                    "y": [*high, *reversed(low)],
                    "fill": "toself",
                    "mode": "lines",
                    "line": {"width": 0},
                    "hoverinfo": "skip",
                    "showlegend": False,
                    "legendgroup": _text(series["label"]),
                    "meta": {"color": color, "role": "band"},
                }
            )
    mode = "lines+markers" if len(series["x"]) <= MARKED and not faint else "lines"
    traces.append(
        {
            "type": "scatter",
            "name": _text(series["label"]),
            "legendgroup": _text(series["label"]),
            "x": list(series["x"]),
            "y": list(series["y"]),
            "mode": mode,
            "line": {
                "dash": "dash" if faint else style["dash"],
                "width": 1.5 if faint else style["width"],
            },
            "marker": {"symbol": style["symbol"], "size": 9 if style["width"] > 5 else 7},
            "customdata": _hover(series),
            "hovertemplate": "%{customdata}",
            "meta": {"color": color, "role": "line"},
        }
    )
    return traces


def _whole_parts(
    series: Plain,
) -> list[tuple[list[float], list[float], list[float]]]:
    """The parts of a band between gaps, as (x, low, high)."""
    parts: list[tuple[list[float], list[float], list[float]]] = []
    open_part = False
    for x, low, high in zip(series["x"], series["low"], series["high"], strict=True):
        if low is None or high is None:
            open_part = False
            continue
        if not open_part:
            parts.append(([], [], []))
            open_part = True
        for values, value in zip(parts[-1], (x, low, high), strict=True):
            values.append(value)
    return parts


def _hover(series: Plain) -> list[str]:
    count = len(series["y"])
    lows = series["low"] or [None] * count
    highs = series["high"] or [None] * count
    texts = []
    for y, low, high in zip(series["y"], lows, highs, strict=True):
        if y is None:
            texts.append("-")
        elif low is None or high is None:
            texts.append(f"{y:.4g}")
        else:
            texts.append(f"{y:.4g} [{low:.4g}, {high:.4g}]")
    return texts


def _bars(figure: Plain, series: Plain, style: Plain) -> list[dict[str, Any]]:
    """Horizontal bars: names are long, and phones are narrow."""
    names = [_broken(figure["x"]["categories"][int(x)]) for x in series["x"]]
    trace: dict[str, Any] = {
        "type": "bar",
        "orientation": "h",
        "name": _text(series["label"]),
        "x": list(series["y"]),
        "y": names,
        "marker": {"pattern": {"shape": style["pattern"], "fillmode": "overlay", "size": 6}},
        "customdata": _hover(series),
        "hovertemplate": "%{customdata}",
        "meta": {"color": style["color"], "role": "bar"},
    }
    if series["low"] is not None:
        ends = list(zip(series["y"], series["low"], series["high"], strict=True))
        trace["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [_gap(high, y) for y, _, high in ends],
            "arrayminus": [_gap(y, low) for y, low, _ in ends],
        }
    return [trace]


def _dots(figure: Plain, series: Plain, style: Plain) -> list[dict[str, Any]]:
    """An estimate with its interval for each category: where the axis begins says nothing."""
    ends = [
        (y, y if low is None else low, y if high is None else high)
        for y, low, high in zip(series["y"], series["low"] or series["y"], series["high"] or series["y"], strict=True)
    ]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": _text(series["label"]),
            "offsetgroup": _text(series["label"]),
            "x": list(series["y"]),
            "y": [_broken(figure["x"]["categories"][int(x)]) for x in series["x"]],
            "marker": {"symbol": style["symbol"], "size": 9},
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [_gap(high, y) for y, _, high in ends],
                "arrayminus": [_gap(y, low) for y, low, _ in ends],
            },
            "customdata": _hover(series),
            "hovertemplate": "%{customdata}",
            "meta": {"color": style["color"], "role": "dots"},
        }
    ]


def _unseen(figure: Plain) -> dict[str, Any]:
    """A point that nobody sees, at the reference: the axis then reaches that far."""
    return {
        "type": "scatter",
        "x": [figure["reference"][0]],
        "y": [_broken(figure["x"]["categories"][0])],
        "mode": "markers",
        "opacity": 0,
        "hoverinfo": "skip",
        "showlegend": False,
        "marker": {"symbol": "circle", "size": 1},
        "meta": {"color": "muted", "role": "unseen"},
    }


def _boxes(figure: Plain, series: Plain, style: Plain) -> list[dict[str, Any]]:
    """Horizontal boxes, one per category, with every seed as a point."""
    return [
        {
            "type": "box",
            "orientation": "h",
            "name": _text(series["label"]),
            "x": list(series["y"]),
            "y": [_broken(figure["x"]["categories"][int(x)]) for x in series["x"]],
            "boxpoints": "all",
            "jitter": 0.5,
            "pointpos": 0,
            "marker": {"symbol": style["symbol"], "size": 5},
            "line": {"width": 1.5},
            "hovertemplate": "%{x:.4g}",
            "meta": {"color": style["color"], "role": "box"},
        }
    ]


def _gap(upper: float | None, lower: float | None) -> float:
    return 0.0 if upper is None or lower is None else upper - lower


def _broken(name: str) -> str:
    return "<br>".join(_text(part) for part in name.split(", "))


def _layout(figure: Plain) -> dict[str, Any]:
    lying = figure["kind"] in ("bars", "boxes", "dots")
    value_axis, other_axis = ("xaxis", "yaxis") if lying else ("yaxis", "xaxis")
    layout: dict[str, Any] = {
        "margin": {"l": 56, "r": 12, "t": 30, "b": 44},
        "legend": {
            "orientation": "h",
            "y": -0.25,
            "x": 0,
            "yanchor": "top",
            "traceorder": "normal",
        },
        "hovermode": "y unified" if lying else "x unified",
        value_axis: _axis(figure["y"]),
        other_axis: _axis(figure["x"]),
        "height": 380,
    }
    if not lying:
        layout[value_axis]["automargin"] = True
    if figure["kind"] == "heatmap":
        layout |= {"yaxis": heatmap_axis([_text(each["label"]) for each in figure["series"]], figure["y"]["title"])}
        layout["xaxis"] |= {"type": "category"}
        layout |= {"hovermode": "closest"}
    if lying:
        # Series that have no category in common need no room beside each other.
        mode = "overlay" if figure["overlaid"] else "group"
        layout |= {
            "boxes": {"boxmode": "group", "boxgap": 0.2},
            "bars": {"barmode": mode, "bargap": 0.3},
            "dots": {"scattermode": "group", "scattergap": 0.4},
        }[figure["kind"]]
        layout[other_axis] |= {"automargin": True, "autorange": "reversed", "type": "category"}
        layout[other_axis] |= {
            "categoryorder": "array",
            "categoryarray": [_broken(name) for name in figure["x"]["categories"]],
        }
        if figure["kind"] == "bars" and figure["y"]["scale"] == "linear" and figure["y"]["limits"] is None:
            layout[value_axis]["rangemode"] = "tozero"
        layout["height"] = max(layout["height"], 150 + 14 * _rows(figure))
    if figure["reference"] is not None:
        value, name = figure["reference"]
        layout |= _reference(value, name, "x" if lying else "y", log=figure["y"]["scale"] == "log")
    return layout


def _rows(figure: Plain) -> int:
    """The number of bars or boxes that are drawn below each other."""
    return len(figure["x"]["categories"]) * (1 if figure["overlaid"] else len(figure["series"]))


def _axis(axis: Plain) -> dict[str, Any]:
    made: dict[str, Any] = {"title": {"text": _text(axis["title"]), "standoff": 4}, "zeroline": False}
    if axis["scale"] == "log":
        made |= {"type": "log", "exponentformat": "none", "minor": {"showgrid": False}}
    if axis["limits"] is not None:
        low, high = axis["limits"]
        if axis["scale"] == "log":
            low, high = math.log10(low), math.log10(high)
        made["range"] = [low, high + 0.02 * (high - low)]
    return made


def _reference(value: float, name: str, axis: str, *, log: bool) -> dict[str, Any]:
    along = "y" if axis == "x" else "x"
    # Plotly places a shape by the value, an annotation by its logarithm where the axis is logarithmic.
    at = math.log10(value) if log else value
    return {
        "shapes": [
            {
                "type": "line",
                axis + "0": value,
                axis + "1": value,
                axis + "ref": axis,
                along + "0": 0,
                along + "1": 1,
                along + "ref": "paper",
                "line": {"width": 1, "dash": "dash"},
            }
        ],
        "annotations": [
            {
                "text": _text(name),
                axis: at,
                axis + "ref": axis,
                along: 1 if axis == "x" else 0,
                along + "ref": "paper",
                "showarrow": False,
                axis + "anchor": "center" if axis == "x" else "bottom",
                along + "anchor": "bottom" if axis == "x" else "left",
            }
        ],
    }
