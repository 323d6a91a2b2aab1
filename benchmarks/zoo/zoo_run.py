"""Published architectures: whether converting and folding them is right, and what it brings."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.bench.machine import describe
from benchmarks.zoo.zoo_check import check
from benchmarks.architectures import ARCHITECTURES, Architecture
from keelnorm.bench.results import Machine
from keelnorm.bench.layer_run import bar, keep_threads
from keelnorm.measure import timing
from keelnorm.surgery.observation.nested_tensors import tensors_in

#: The largest error of a right result; or several times what rounding the input does to the original.
MOST_ERROR = 1e-10
TIMES_ROUNDING = 10.0


@dataclass
class ModelRow:
    """One architecture: counts and errors of `model_check.check`, and how many times faster than the original.

    `converted_inference`, `folded_inference` and `training` are medians over rounds of time / time.
    """

    name: str
    package: str
    counts: dict[str, Any] = field(default_factory=dict)
    converted_inference: float | None = None
    folded_inference: float | None = None
    training: float | None = None
    error: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether all errors are roundings."""
        if self.error or not self.counts:
            return False
        allowed = max(MOST_ERROR, TIMES_ROUNDING * self.counts["rounding"])
        return bool(
            self.counts["same_state"]
            and self.counts["converted_error"] <= allowed
            and self.counts["folded_error"] <= MOST_ERROR
        )


@dataclass
class ModelReport:
    """All of them, on one machine."""

    machine: Machine
    samples: int
    rounds: int
    rows: list[ModelRow]
    seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def run_models(
    names: Sequence[str], *, samples: int, rounds: int, threads: int | None, progress: bool = True
) -> ModelReport:
    """Check and time architectures.

    Args:
        names: keys of `model_zoo.ARCHITECTURES`.
        samples: in a batch that is timed; two are checked.
        rounds: of timing; 0 times nothing.
    """
    start = perf_counter()
    rows = []
    with keep_threads(threads), bar(progress) as shown:
        machine = describe()
        task = shown.add_task("", total=len(names))
        for name in names:
            shown.update(task, description=name)
            rows.append(_run_one(ARCHITECTURES[name], samples, rounds))
            shown.advance(task)
    return ModelReport(machine, samples, rounds, rows, perf_counter() - start)


def _run_one(one: Architecture, samples: int, rounds: int) -> ModelRow:
    row = ModelRow(one.name, one.package)
    if not one.is_there:
        row.error = f"the package {one.package} is missing"
        return row
    try:
        row.counts = check(one, 2)
        if rounds and row.is_right:
            _time(one, row, samples, rounds)
    except Exception as error:  # costs this row, not the run
        row.error = f"{type(error).__name__}: {error}"
    return row


def _time(one: Architecture, row: ModelRow, samples: int, rounds: int) -> None:
    original, x = one.build(), one.batch(samples)
    converted, _ = kn.convert(copy.deepcopy(original))
    folded, _ = kn.fold(one.build().eval(), x[:1], verify=False)
    arms = {"original": original.eval(), "converted": converted.eval(), "folded": folded}
    with torch.no_grad():
        taken = _turns({name: lambda m=model: m(x) for name, model in arms.items()}, rounds)  # type: ignore[misc]
    row.converted_inference = _times_faster(taken, "converted")
    row.folded_inference = _times_faster(taken, "folded")
    steps = {name: _step(arms[name].train(), x) for name in ("original", "converted")}
    row.training = _times_faster(_turns(steps, rounds), "converted")


def _step(model: nn.Module, x: Tensor) -> Any:
    parameters = list(model.parameters())

    def step() -> None:
        outputs = [y for y in tensors_in(model(x)) if y.requires_grad]
        loss = sum((y.square().mean() for y in outputs), torch.zeros(()))
        torch.autograd.grad(loss, parameters, allow_unused=True)

    return step


def _turns(calls: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; a first call of each is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for order in timing.turns(tuple(calls), rounds):
        for name in order:
            start = perf_counter()
            calls[name]()
            taken[name].append(perf_counter() - start)
    return taken


def _times_faster(taken: dict[str, list[float]], name: str) -> float:
    return statistics.median(a / b for a, b in zip(taken["original"], taken[name], strict=True))
