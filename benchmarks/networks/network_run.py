"""Run the networks' benchmark: check the results, then time steps by turns, each arm in its own process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

from rich.progress import Progress, TaskID

from benchmarks.networks.agreement import agreement
from benchmarks.networks.arm_process import Arm, ArmError, Worker, workers
from keelnorm.bench.results import NetworkRow, Report, Settings
from keelnorm.bench.session import Failure, attempt, progress_bar, threads
from keelnorm.measure import timing
from keelnorm.measure.machine import describe

MODES = ("inference", "training")  # inference first, so that its peak memory is not that of training
WARM_UP = 5  # steps until memory is reused for tensors of all sizes
CHECK_BATCH = 2
Rows = dict[tuple[str, str], NetworkRow]
"""By arm and mode."""


def arms_of(settings: Settings) -> list[Arm]:
    """Every combination of layers, layout and pages, eager first."""
    return [
        Arm(layers, layout, pages)
        for pages in settings.pages
        for layout in settings.layouts
        for layers in ("eager", "keelnorm")
    ]


def run_networks(
    settings: Settings,
    networks: Sequence[str],
    size: int,
    *,
    progress: bool = True,
    check: Callable[..., float] = agreement,
) -> Report:
    """Measure whole steps of the networks.

    Args:
        settings: Batch, layouts, pages, modes, rounds and threads are used.
        networks: Some of `network_cases.NETWORKS`.
        size: Height and width of the images.
        progress: Show a progress bar on the standard error stream.
        check: Gives keelnorm's error as a multiple of eager's, or raises.
    """
    start = perf_counter()
    modes = [mode for mode in MODES if mode in settings.modes]
    arms = arms_of(settings)
    rows: list[NetworkRow] = []
    with threads(settings.threads), progress_bar(progress) as bar:
        machine = describe(with_revision=True)
        task = bar.add_task("", total=len(networks) * len(arms) * len(modes) * (settings.rounds + WARM_UP))
        for network in networks:
            agreed = {}
            for layout in settings.layouts:
                bar.update(task, description=f"{network} {layout}: comparing results with float64")
                agreed[layout] = attempt(partial(check, network, batch=CHECK_BATCH, size=size, layout=layout))
            found = {
                (arm.name, mode): _blank_row(network, arm, mode, settings.batch, size, agreed[arm.layout])
                for arm in arms
                for mode in modes
            }
            _run_network(found, arms, settings, bar, task)
            rows += found.values()
    return Report(machine, settings, [], networks=rows, seconds=perf_counter() - start)


def _blank_row(network: str, arm: Arm, mode: str, batch: int, size: int, agreed: float | Failure) -> NetworkRow:
    """A row without a time; with its error if the results of its layers are wrong."""
    row = NetworkRow(network, arm.name, arm.layers, arm.layout, arm.pages, mode, batch, size)
    if arm.layers == "eager":
        return row
    return replace(row, error=agreed.error) if isinstance(agreed, Failure) else replace(row, agreement=agreed)


def _run_network(rows: Rows, arms: Sequence[Arm], settings: Settings, bar: Progress, task: TaskID) -> None:
    """Time all arms of one network; those with wrong results are not started."""
    first = {name: row for (name, _), row in rows.items()}
    right = [arm for arm in arms if first[arm.name].error is None]
    row = first[arms[0].name]
    bar.update(task, description=f"{row.network}: starting {len(right)} processes")
    config = {"network": row.network, "batch": row.batch, "size": row.size, "threads": settings.threads}
    with workers(right, config) as found:
        for mode in dict.fromkeys(mode for _, mode in rows):
            _take_turns(mode, found, rows, settings.rounds, bar, task)
    for row in rows.values():
        _compare(row, list(rows.values()))


def _take_turns(
    mode: str, found: Mapping[str, Worker | ArmError], rows: Rows, rounds: int, bar: Progress, task: TaskID
) -> None:
    """Every arm takes one step a round, in an order that rotates."""
    alive = {}
    for name, worker in found.items():
        row = rows[name, mode]
        if isinstance(worker, ArmError):
            row.error = str(worker)
        elif row.error is None:
            row.baseline_bytes = worker.baseline_bytes
            alive[name] = worker
    for index, order in enumerate(timing.turns(tuple(alive), WARM_UP + rounds)):
        for name in order:
            row = rows[name, mode]
            if row.error is not None:
                continue
            bar.update(task, description=f"{row.network} {mode}: {name}")
            try:
                seconds, row.peak_bytes = alive[name].step(mode)
            except ArmError as error:
                for each in (one for (arm, _), one in rows.items() if arm == name):
                    each.error = each.error or str(error)
                continue
            if index >= WARM_UP:
                row.samples_ms.append(round(seconds * 1000, 3))
            bar.advance(task)
    for name in alive:
        _summarize(rows[name, mode])


def _summarize(row: NetworkRow) -> None:
    if row.error is not None:
        row.samples_ms, row.peak_bytes, row.baseline_bytes = [], None, None
    elif row.samples_ms:
        row.step_ms = statistics.median(row.samples_ms)
        row.spread = timing.spread(row.samples_ms)


def _compare(row: NetworkRow, others: Sequence[NetworkRow]) -> None:
    for other in others:
        if other.mode == row.mode and other.arm != row.arm and row.step_ms and other.step_ms:
            row.ratios[other.arm] = timing.median_ratio(row.samples_ms, other.samples_ms)
