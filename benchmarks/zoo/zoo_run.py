"""Check and time published architectures, converted and folded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter

import torch

import keelnorm as kn
from benchmarks.architectures import ARCHITECTURES, Architecture
from benchmarks.training_steps import gradient_step
from benchmarks.zoo.zoo_check import ZooCheck, check_architecture
from keelnorm.bench.session import progress_bar, threads
from keelnorm.measure import timing
from keelnorm.measure.machine import Machine, describe


@dataclass
class ZooRow:
    """One architecture: whether it is right, and how many times faster than the original.

    `converted_inference`, `folded_inference` and `training` are medians over rounds of time / time.
    """

    name: str
    package: str
    check: ZooCheck | None = None
    converted_inference: float | None = None
    folded_inference: float | None = None
    training: float | None = None
    error: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether it could be checked and all errors are rounding errors."""
        return self.error is None and self.check is not None and self.check.is_right


@dataclass
class ZooReport:
    """All architectures, on one machine."""

    machine: Machine
    samples: int
    rounds: int
    rows: list[ZooRow]
    seconds: float

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=1)


def run_zoo(
    names: Sequence[str], *, samples: int, rounds: int, thread_count: int | None, progress: bool = True
) -> ZooReport:
    """Check and time architectures.

    Args:
        names: Keys of `ARCHITECTURES`.
        samples: Samples in a batch that is timed; two are checked.
        rounds: Rounds of timing; 0 times nothing.
        thread_count: Threads; None leaves torch's choice.
        progress: Show a progress bar on the standard error stream.
    """
    start = perf_counter()
    rows = []
    with threads(thread_count), progress_bar(progress) as bar:
        machine = describe(with_revision=True)
        task = bar.add_task("", total=len(names))
        for name in names:
            bar.update(task, description=name)
            rows.append(_run_one(ARCHITECTURES[name], samples, rounds))
            bar.advance(task)
    return ZooReport(machine, samples, rounds, rows, perf_counter() - start)


def _run_one(one: Architecture, samples: int, rounds: int) -> ZooRow:
    row = ZooRow(one.name, one.package)
    try:
        row.check = check_architecture(one, 2)
        if rounds and row.is_right:
            _time(one, row, samples, rounds)
    except Exception as error:  # costs this row, not the run
        row.error = f"{type(error).__name__}: {error}"
    return row


def _time(one: Architecture, row: ZooRow, samples: int, rounds: int) -> None:
    original, x = one.build(), one.batch(samples)
    converted, _ = kn.convert(copy.deepcopy(original))
    folded, _ = kn.fold(one.build().eval(), x[:1], verify=False)
    arms = {"original": original.eval(), "converted": converted.eval(), "folded": folded}
    with torch.no_grad():
        taken = _turns({name: partial(model, x) for name, model in arms.items()}, rounds)
    row.converted_inference = timing.median_ratio(taken["original"], taken["converted"])
    row.folded_inference = timing.median_ratio(taken["original"], taken["folded"])
    taken = _turns({name: gradient_step(arms[name].train(), x) for name in ("original", "converted")}, rounds)
    row.training = timing.median_ratio(taken["original"], taken["converted"])


def _turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    samplers = {name: partial(timing.seconds_per_call, call) for name, call in calls.items()}
    return timing.by_turns(samplers, rounds, discarded=1)
