"""The style in which each arm is drawn on the whole page.

Arms also differ in dash, width, marker and pattern, so that they can be told apart without color. torch.nn is a broad
pale line, because lines that should coincide with it are drawn on top. Colors are names of the style sheet's variables.
"""

from __future__ import annotations

from typing import Any


def _look(color: str, dash: str, symbol: str, pattern: str, width: float = 2.5) -> dict[str, Any]:
    return {"color": color, "dash": dash, "symbol": symbol, "pattern": pattern, "width": width}


LOOKS: dict[str, dict[str, Any]] = {
    "none": _look("none", "dot", "circle-open", "."),
    "torch": _look("torch", "solid", "square", "/", 7),
    "keelnorm": _look("keelnorm", "solid", "diamond", "", 2),
    "bn": _look("keelnorm", "solid", "diamond", "", 2),
    "ln": _look("other-0", "dashdot", "triangle-up", "x"),
    "gn": _look("other-1", "longdash", "cross", "-"),
    "ghost": _look("other-2", "longdashdot", "star", "|"),
    "renorm": _look("other-3", "dash", "x", "+"),
    "cross": _look("other-4", "dashdot", "triangle-down", "\\"),
    "moving": _look("other-0", "dot", "pentagon", "x"),
    "sync": _look("other-5", "longdash", "hexagram", "/"),
    "dropout": _look("other-1", "dash", "square-open", "-"),
    "adapted": _look("other-3", "longdash", "star", "+"),
    "both": _look("other-4", "dashdot", "triangle-up-open", "\\"),
    "other-1": _look("other-0", "dashdot", "triangle-left", "x"),
    "other-2": _look("other-3", "longdash", "triangle-right", "+"),
    "other-3": _look("other-5", "dash", "bowtie", "/"),
}


def look(style: str) -> dict[str, Any]:
    """Color, dash, width, marker and pattern of an arm.

    Raises:
        KeyError: The arm has no style; the message lists those that have.
    """
    try:
        return LOOKS[style]
    except KeyError:
        raise KeyError(f"no arm is drawn as {style!r}; a series' style is one of {', '.join(LOOKS)}") from None
