"""Run the networks' benchmark: compare results, then steps by turns, every arm in its own process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from rich.progress import Progress

from benchmarks.networks.agreement import agreement
from benchmarks.networks.arm_process import Arm, ArmError, Worker, workers
from keelnorm.bench.machine import describe
from keelnorm.bench.results import NetworkRow, Report, Settings
from keelnorm.bench.layer_run import bar, keep_threads
from keelnorm.measure import timing

MODES = ("inference", "training")  # in this order, so that the peak of inference is not that of training
WARM_UP = 5  # a network has tensors of many sizes: until memory is reused throughout
CHECK_BATCH = 2


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
        settings: batch, layouts, pages, modes, rounds and threads are used.
        networks: keys of `networks.NETWORKS`.
        size: height and width of the images.
        progress: show a bar on stderr.
        check: tells keelnorm's error as a multiple of eager's, or raises.
    """
    start = perf_counter()
    modes = [mode for mode in MODES if mode in settings.modes]
    arms = arms_of(settings)
    rows: list[NetworkRow] = []
    with keep_threads(settings.threads), bar(progress) as shown:
        machine = describe()
        task = shown.add_task("", total=len(networks) * len(arms) * len(modes) * (settings.rounds + WARM_UP))
        for network in networks:
            blank = {"network": network, "batch": settings.batch, "size": size}
            agreed = {}
            for layout in settings.layouts:
                shown.update(task, description=f"{network} {layout}: comparing results with float64")
                agreed[layout] = _agreed(check, network, size, layout)
            rows += _run_network(blank, arms, modes, settings, shown, task, agreed)
    return Report(machine, settings, [], networks=rows, seconds=perf_counter() - start)


def _agreed(check: Callable[..., float], network: str, size: int, layout: str) -> float | str:
    try:
        return check(network, batch=CHECK_BATCH, size=size, layout=layout)
    except Exception as error:  # costs the numbers of this network, not the run
        return f"{type(error).__name__}: {error}"


def _run_network(
    blank: dict[str, Any],
    arms: Sequence[Arm],
    modes: Sequence[str],
    settings: Settings,
    shown: Progress,
    task: Any,
    agreed: dict[str, float | str],
) -> list[NetworkRow]:
    """All arms of one network; the arms of a wrong one are not even started."""
    wrong = {arm.name: str(agreed[arm.layout]) for arm in arms if arm.layers != "eager" and _failed(agreed, arm)}
    right = [arm for arm in arms if arm.name not in wrong]
    config = blank | {"threads": settings.threads}
    rows: dict[tuple[str, str], NetworkRow] = {}
    for arm in arms:
        for mode in modes:
            row = NetworkRow(arm=arm.name, layers=arm.layers, layout=arm.layout, pages=arm.pages, mode=mode, **blank)
            if arm.layers != "eager" and arm.name not in wrong:
                row.agreement = float(agreed[arm.layout])
            row.error = wrong.get(arm.name)
            rows[arm.name, mode] = row
    shown.update(task, description=f"{blank['network']}: starting {len(right)} processes")
    with workers(right, config) as found:
        for mode in modes:
            _take_turns(mode, {name: found[name] for name in found}, rows, settings.rounds, shown, task)
    for row in rows.values():
        _compare(row, list(rows.values()))
    return list(rows.values())


def _failed(agreed: dict[str, float | str], arm: Arm) -> bool:
    return isinstance(agreed[arm.layout], str)


def _take_turns(
    mode: str,
    found: dict[str, Worker | str],
    rows: dict[tuple[str, str], NetworkRow],
    rounds: int,
    shown: Progress,
    task: Any,
) -> None:
    """Every arm takes one step a round, in an order that rotates."""
    alive = {}
    for name, worker in found.items():
        row = rows[name, mode]
        if isinstance(worker, str):
            row.error = worker
        elif row.error is None:
            row.baseline_bytes = worker.baseline_bytes
            alive[name] = worker
    for index, order in enumerate(timing.turns(tuple(alive), WARM_UP + rounds)):
        for name in order:
            row = rows[name, mode]
            if row.error is not None:
                continue
            shown.update(task, description=f"{row.network} {mode}: {name}")
            try:
                seconds, row.peak_bytes = alive[name].step(mode)
            except ArmError as error:
                for each in (one for (arm, _), one in rows.items() if arm == name):
                    each.error = each.error or str(error)
                continue
            if index >= WARM_UP:
                row.samples_ms.append(round(seconds * 1000, 3))
            shown.advance(task)
    for name in alive:
        row = rows[name, mode]
        if row.error is not None:
            row.samples_ms, row.peak_bytes, row.baseline_bytes = [], None, None
        elif row.samples_ms:
            row.step_ms = statistics.median(row.samples_ms)
            row.spread = timing.spread(row.samples_ms)


def _compare(row: NetworkRow, others: Sequence[NetworkRow]) -> None:
    for other in others:
        if other.mode == row.mode and other.arm != row.arm and row.step_ms and other.step_ms:
            row.ratios[other.arm] = timing.ratio(row.samples_ms, other.samples_ms)
