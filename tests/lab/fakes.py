"""Made-up results for every cell of the demo, so that what is read from results can be tested at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from evenkeel.lab.cell import Cell
from evenkeel.lab.document import document
from evenkeel.lab.experiment import Experiment, Plan, experiments
from evenkeel.lab.runner import Failure, Outcome

SPEED = {"none": 1.0, "torch": 3.0, "evenkeel": 3.0}
"""How fast an arm learns: its accuracy after n steps follows from n times this."""


def result_of(cell: Cell, speed: Mapping[str, float] = SPEED) -> dict[str, Any]:
    """A plausible result of a cell. The arm's speed decides it, with a little noise by seed."""
    rng = random.Random(f"{cell.axes['seed']} {cell.axes.get('arm')}")
    makers: dict[str, Callable[..., dict[str, Any]]] = {
        "curves": _curves,
        "moments": _moments,
        "step_times": _step_times,
    }
    return makers[cell.task.__name__](cell.axes, rng, speed)


def _curves(axes: Mapping[str, Any], rng: random.Random, speed: Mapping[str, float]) -> dict[str, Any]:
    pace = speed[axes["arm"]] * (1 + 0.2 * rng.random())
    replicas = [(scale, rate) for scale in axes["scales"] for rate in axes["rates"]]

    def accuracy(steps: int) -> list[float]:
        good = [0.05 <= rate <= pace and scale * pace >= 0.3 for scale, rate in replicas]
        return [min(10 + 5 * pace * steps, 97.5) if fine else 10.0 for fine in good]

    curve = [accuracy(steps) for steps in axes["evaluate_at"]]
    loss = [[] if steps == 0 else [2.3 / (1 + pace * steps)] * len(replicas) for steps in axes["evaluate_at"]]
    return {
        "steps": list(axes["evaluate_at"]),
        "loss": loss,
        "validation": curve,
        "test": curve,
        "test_batch": curve,
    }


def _moments(axes: Mapping[str, Any], rng: random.Random, speed: Mapping[str, float]) -> dict[str, Any]:
    steps = list(axes["evaluate_at"])
    shift = [(0.01 + 0.001 * n) * (1 + rng.random()) / max(speed[axes["arm"]], 0.1) for n in steps]
    ones = [1.0] * len(steps)
    return {
        "steps": steps,
        "shift": shift,
        "shift_before": shift,
        "spread": ones,
        "unit_mean": shift,
        "unit_deviation": ones,
        "test": [90.0] * len(steps),
    }


def _step_times(axes: Mapping[str, Any], rng: random.Random, speed: Mapping[str, float]) -> dict[str, Any]:
    times = {"none": 1.0, "torch": 1.3 + 0.1 * rng.random(), "evenkeel": 1.1 + 0.1 * rng.random()}
    return {
        "milliseconds": times,
        "to_none": times,
        "to_torch": times["evenkeel"] / times["torch"],
        "disagreement": 1e-6,
        "rounds": 6,
    }


def outcome_of(
    plan: Plan,
    selected: list[Experiment],
    speed: Mapping[str, float] = SPEED,
    fails: Callable[[Cell], bool] = lambda cell: False,
) -> Outcome:
    """Results of all cells, except of those that fail."""
    outcome = Outcome()
    for cell in (cell for experiment in selected for cell in experiment.cells(plan)):
        if fails(cell):
            outcome.failures.append(Failure(cell, "ValueError: made to fail", "Traceback ..."))
        else:
            outcome.results[cell.key] = result_of(cell, speed)
    return outcome


def fake_document(plan: Plan | None = None, **how: Any) -> dict[str, Any]:
    """A whole document of made-up results."""
    plan = plan or Plan.quickly()
    selected = list(experiments().values())
    outcome = outcome_of(plan, selected, **how)
    return document("A title", selected, plan, outcome, command="evenkeel demo", seconds=1.0)
