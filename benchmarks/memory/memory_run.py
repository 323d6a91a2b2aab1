"""Run the memory benchmark: each network in processes of its own, and what was measured is stored after each part."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from rich.progress import Progress, TaskID

from benchmarks.architectures import ARCHITECTURES
from benchmarks.memory.job_process import JobError, TooLargeError, run_job
from benchmarks.memory.largest_batch import largest_batch
from benchmarks.memory.memory_results import (
    CHECK,
    CONVERTED,
    EAGER,
    NETWORKS_OF,
    SAVED,
    Checkpointing,
    KeptBytes,
    Largest,
    MemoryReport,
    MemoryRow,
    Peaks,
    Settings,
    StepTimes,
)
from benchmarks.memory.training_peak import ARMS, TrainingRun
from keelnorm.bench.correctness import WrongResultError
from keelnorm.bench.peers import CannotError
from keelnorm.bench.session import progress_bar
from keelnorm.measure.disturbance import peak_bytes
from keelnorm.measure.machine import available_bytes
from keelnorm.measure.plain_data import read

#: The kinds that a task's value is read as, and the fields of a row that they fill.
FIELDS: dict[str, tuple[Any, str]] = {
    CHECK: (bool, "is_right"),
    "bytes": (KeptBytes, "bytes_kept"),
    "step": (list[StepTimes], "step"),
    "checkpoint": (Checkpointing, "checkpoint"),
}
#: Steps of a training run: of the one whose peak is compared, and of those that look for the largest batch.
PEAK_STEPS, LARGEST_STEPS = 3, 2
#: Memory that is left to other programs.
MARGIN_BYTES = 1 << 30


def run_memory(
    report: MemoryReport,
    names: Sequence[str],
    parts: Sequence[str],
    *,
    store: Callable[[MemoryReport], None] = lambda report: None,
    progress: bool = True,
) -> None:
    """Measure what the report lacks.

    Args:
        report: Its settings are used; rows are added to it and filled.
        names: Keys of `ARCHITECTURES`.
        parts: Some of `PARTS`.
        store: Called with the report after each part of a network.
        progress: Show a progress bar on the standard error stream.
    """
    begun, before = perf_counter(), report.seconds

    def stored() -> None:
        report.seconds = before + perf_counter() - begun
        store(report)

    with progress_bar(progress) as bar:
        task = bar.add_task("", total=len(names))
        for name in names:
            row = report.row(name) or MemoryRow(name, ARCHITECTURES[name].package)
            if lacking := missing(row, parts):
                if report.row(name) is None:
                    report.rows.append(row)
                _Network(row, report.settings, bar, task, stored).measure(lacking)
            bar.advance(task)
    order = {name: index for index, name in enumerate(ARCHITECTURES)}
    report.rows.sort(key=lambda row: order.get(row.name, len(order)))


def missing(row: MemoryRow, parts: Sequence[str]) -> list[str]:
    """The parts that a network has not been measured in yet, of those that are about it."""
    return [part for part in parts if not row.has(part) and row.name in NETWORKS_OF.get(part, (row.name,))]


@dataclass
class _Network:
    """The measurement of one network."""

    row: MemoryRow
    settings: Settings
    bar: Progress
    task: TaskID
    store: Callable[[], None]

    def measure(self, parts: Sequence[str]) -> None:
        """Measure some parts, after the check. A wrong network gets no number."""
        for part in (CHECK, *parts):
            self.row.errors.pop(part, None)
        # Bytes and steps need no process for each arm, and starting one takes seconds.
        first = [] if self.row.is_right else [CHECK]
        first += [part for part in ("bytes", "step") if part in parts]
        if first:
            self._one_process(first)
        if not self.row.is_right:
            return
        if "checkpoint" in parts:
            self._one_process(["checkpoint"])
        for part, measured in (("peak", self._peak), ("largest", self._largest)):
            if part in parts:
                self._attempt(part, measured)

    def _attempt(self, part: str, measured: Callable[[], None]) -> None:
        try:
            measured()
        except (JobError, CannotError, WrongResultError) as error:
            self.row.errors[part] = str(error)
        self.store()

    def _one_process(self, tasks: Sequence[str]) -> None:
        """Do tasks in one process, and put their values into the row."""
        self._say(", ".join(tasks))
        job = self._job(tasks, samples=self.settings.samples, seconds=self.settings.seconds)
        try:
            answer = run_job(job | {"rounds": self.settings.rounds})
        except JobError as error:
            answer = {tasks[0]: {"error": str(error)}}
        for task, found in answer.items():
            if "error" in found:
                self.row.errors[task] = found["error"]
            else:
                kind, name = FIELDS[task]
                setattr(self.row, name, read(kind, found["value"], task))
        self.store()

    def _peak(self) -> None:
        before, above, digests = {}, {}, {}
        most = _room() - MARGIN_BYTES
        for arm in ARMS:
            run = self._train(arm, self.settings.peak_samples, PEAK_STEPS, most)
            before[arm], above[arm] = run.before, [peak - run.before for peak in run.peaks]
            digests[arm] = run.digest
        if digests[CONVERTED] != digests[SAVED]:
            raise WrongResultError(f"after {PEAK_STEPS} steps with save_memory parameters or buffers differ")
        self.row.peak = Peaks(self.settings.peak_samples, before, above)

    def _largest(self) -> None:
        limit = self.settings.limit_bytes
        if (room := _room()) < limit + MARGIN_BYTES:
            raise CannotError(
                f"runs of up to {limit / 2**30:.1f} GiB need {(limit + MARGIN_BYTES) / 2**30:.1f} GiB of free memory, "
                f"and {room / 2**30:.1f} are free"
            )
        batch, peaks = {}, {}
        for arm in (EAGER, SAVED):

            def peak_of(samples: int, arm: str = arm) -> int | None:
                try:
                    return max(self._train(arm, samples, LARGEST_STEPS, limit).peaks)
                except TooLargeError:
                    return None

            batch[arm], found = largest_batch(peak_of, limit)
            peaks[arm] = {str(samples): peak for samples, peak in sorted(found.items())}
        self.row.largest = Largest(limit, batch, peaks)

    def _train(self, arm: str, batch: int, steps: int, limit: int) -> TrainingRun:
        self._say(f"{arm}, training with batch {batch}")
        job = self._job(["train"], arm=arm, batch=batch, size=self.settings.size, steps=steps)
        found = run_job(job, limit=limit)["train"]
        if "error" in found:
            raise JobError(f"{arm}, batch {batch}: {found['error']}")
        run: TrainingRun = read(TrainingRun, found["value"], "train")
        return run

    def _job(self, tasks: Sequence[str], **given: object) -> dict[str, Any]:
        return {"network": self.row.name, "tasks": list(tasks), "threads": self.settings.threads, **given}

    def _say(self, what: str) -> None:
        self.bar.update(self.task, description=f"{self.row.name}: {what}")


def _room() -> int:
    """Bytes that are free on this machine.

    Raises:
        CannotError: The system does not tell them, or not what a process takes: a run could then exhaust the machine.
    """
    found = available_bytes()
    if found is None or peak_bytes(os.getpid()) is None:
        raise CannotError("the system does not tell its free memory or that of a process")
    return found
