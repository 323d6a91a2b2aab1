"""The page of a monitor: what was measured of each layer over the steps, and what rules have found, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any

from keelnorm.doctor.evidence.layers import counted
from keelnorm.doctor.pages.findings_part import curves, page_findings
from keelnorm.engine.error_messages import RefusedValueError
from keelnorm.measure.machine import describe, facts_of
from keelnorm.measure.page_parts import Axis, Figure, Section, Series, Table

if TYPE_CHECKING:
    from keelnorm.doctor.monitor.monitor import Monitor
    from keelnorm.doctor.monitor.observation import Observation

_CALL = "monitor.write_page('monitor.html')"
#: Columns of a heat map: more can't be told apart on a screen.
_COLUMNS = 40
#: Name, heading, unit, and what it is.
_NUMBERS = (
    (
        "drift", "How far are running statistics from the batch's?", "standard deviations",
        "how far the running statistics change normalized values from those with the batch's moments: the root of the "
        "mean square; what chance explains is subtracted",
    ),
    (
        "noise", "How much does a batch say?", "standard deviations",
        "how far the statistics of such a batch change normalized values from those with the moments of all data",
    ),
    (
        "gradient", "Do gradients reach every layer?", "norm",
        "the norm of the loss's gradient with respect to the layer's input",
    ),
    (
        "weights", "Do weights grow?", "norm",
        "the norm of the weights in front; its length has no effect, and the effective learning rate falls as the "
        "inverse of its square",
    ),
    ("gamma", "Which layers does γ turn down?", "root of the mean square", "the root of the mean square of γ"),
)  # fmt: skip


def record_document(monitor: Monitor) -> dict[str, Any]:
    """What the page of a monitor shows, as plain values.

    Raises:
        ValueError: Nothing has been observed.
    """
    seen = monitor.observations
    if not seen:
        raise RefusedValueError(
            f"Monitor.write_page: nothing has been observed in {monitor.steps} steps; every= says after how many steps "
            "one is, and stop() writes the last one"
        )
    layers = list(dict.fromkeys(path for one in seen for path in one.layers))
    began = [
        page_findings([finding for _, finding in together], monitor.rules, step)
        for step, together in groupby(monitor.findings, key=lambda one: one[0])
    ]
    sections = [_section(number, seen, layers) for number in _NUMBERS]
    return {
        "title": "Batch norms while a model trains",
        "answer": f"{counted(len(layers)).capitalize()} over {monitor.steps} steps, {len(seen)} of which are shown; "
        f"rules of the doctor began to find something {len(monitor.findings)} times.",
        "environment": facts_of(describe()),
        "findings": [one for step in began for one in step],
        "notes": [],
        "sections": [asdict(one) for one in sections if one is not None],
        "command": _CALL,
    }


def _section(number: tuple[str, str, str, str], seen: Sequence[Observation], layers: Sequence[str]) -> Section | None:
    name, question, unit, what = number
    values = {path: [_value(one, path, name) for one in seen] for path in layers}
    values = {path: row for path, row in values.items() if any(value is not None for value in row)}
    if not values:
        return None
    last = {path: next(value for value in reversed(row) if value is not None) for path, row in values.items()}
    most = max(last, key=lambda path: last[path])
    least = min(last, key=lambda path: last[path])
    return Section(
        name=name,
        title=name.capitalize(),
        question=question,
        answer=f"In the end {last[most]:.3g} in {most or 'the model'}, the most, {median(last.values()):.3g} in the "
        f"median, and {last[least]:.3g} in {least or 'the model'}."
        if last[most]
        else "In the end 0 in every layer: no more than chance explains.",
        command=_CALL,
        figures=[_over_steps(name, unit, seen, values), _by_layer(name, unit, seen, values)],
        tables=[
            Table(
                f"{name}: at the first and at the last step, by layer",
                ["layer", "first", "last"],
                [[path or "the model", _said(row), f"{last[path]:.3g}"] for path, row in values.items()],
            )
        ],
        setup=[(name, what)],
    )


def _said(row: Sequence[float | None]) -> str:
    return f"{next(value for value in row if value is not None):.3g}"


def _value(one: Observation, path: str, name: str) -> float | None:
    numbers = one.layers.get(path)
    return None if numbers is None else numbers.known().get(name)


def _over_steps(name: str, unit: str, seen: Sequence[Observation], values: dict[str, list[float | None]]) -> Figure:
    """Median and range of the layers in each step."""
    steps, middle, low, high = [], [], [], []
    for index, one in enumerate(seen):
        there = [row[index] for row in values.values()]
        known = [value for value in there if value]
        steps.append(float(one.step))
        middle.append(median(known) if known else None)
        low.append(min(known, default=None))
        high.append(max(known, default=None))
    return curves(
        f"{name.capitalize()} in the course of training",
        "step",
        unit,
        "The median over the layers, and the range from the least to the greatest.",
        [Series("median of the layers", "keelnorm", steps, middle, low, high)],
    )


def _by_layer(name: str, unit: str, seen: Sequence[Observation], values: dict[str, list[float | None]]) -> Figure:
    """A row for each layer, the first one at the top; columns are some of the steps."""
    shared = _shared_beginning(list(values))
    count = min(len(seen), _COLUMNS)
    columns = [round(index * (len(seen) - 1) / max(count - 1, 1)) for index in range(count)]
    return Figure(
        f"{name.capitalize()} by layer and step",
        Axis("step", categories=[str(seen[column].step) for column in columns]),
        Axis("layer"),
        [
            Series(
                path[len(shared) :] or "the model",
                "keelnorm",
                list(map(float, range(count))),
                [row[column] for column in columns],
            )
            for path, row in reversed(values.items())
        ],
        "A row for each layer in the order of the model, the first at the top; darker is more, on a logarithmic scale."
        + (f" All names begin with {shared}" if shared else ""),
        kind="heatmap",
        value=Axis(unit, "log"),
    )


def _shared_beginning(paths: Sequence[str]) -> str:
    """The parents that all paths have in common, with a dot behind; "" if there are none."""
    shared: list[str] = []
    for names in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(paths) == 1 or len(set(names)) > 1:
            break
        shared.append(f"{names[0]}.")
    return "".join(shared)
