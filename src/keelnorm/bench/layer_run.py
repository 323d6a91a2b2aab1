"""Run the benchmark: check, time, collect."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from keelnorm import memory
from keelnorm.bench import summary
from keelnorm.bench.cases import PAGES, Case, cases, least_bytes, shapes
from keelnorm.bench.correctness import check, expect, gradient_inputs
from keelnorm.bench.machine import describe
from keelnorm.bench.peers import PEERS, Built, CannotError, Peer
from keelnorm.bench.problem import Problem, make_problem
from keelnorm.bench.results import Report, Row, Settings
from keelnorm.measure import timing

T = TypeVar("T")
PHASES = {"training": ("forward", "backward", "both"), "inference": ("inference",)}


def selected(settings: Settings) -> list[Case]:
    """The cases that `settings` asks for."""
    listed = shapes(settings.batch, quick=settings.quick, contains=tuple(settings.shapes))
    found = cases(
        listed,
        tuple(settings.layouts),
        tuple(settings.variants),
        tuple(settings.gradients),
        tuple(settings.dtypes),
    )
    return [case for case in found if set(case.modes) & set(settings.modes)]


def run_bench(settings: Settings, *, peers: Mapping[str, Peer] = PEERS, progress: bool = True) -> Report:
    """Measure what `settings` asks for.

    Args:
        settings: the cases, the names of the peers, and the effort.
        peers: the peers that the names stand for.
        progress: show a bar on stderr.
    """
    start = perf_counter()
    todo = selected(settings)
    chosen = [peers[name] for name in settings.peers]
    rows: list[Row] = []
    with keep_threads(settings.threads), bar(progress) as shown:
        machine = describe()
        passes = page_settings(settings.pages)
        task = shown.add_task("", total=len(todo) * len(passes))
        for pages in passes:
            with _allocator(pages):
                for case in todo:
                    shown.update(task, description=f"{pages} pages: {case.name}")
                    rows += [replace(row, pages=pages) for row in run_case(case, chosen, settings)]
                    shown.advance(task)
    norms = [peer.name for peer in chosen if peer.is_batch_norm]
    return Report(
        machine=machine,
        settings=settings,
        rows=rows,
        means=summary.means(rows, norms),
        totals=summary.totals(rows, norms),
        seconds=perf_counter() - start,
    )


def run_case(case: Case, peers: Sequence[Peer], settings: Settings) -> list[Row]:
    """Measure one case: check every peer first, then time those that are right."""
    problem = make_problem(case)
    rows: list[Row] = []
    attempts = {peer.name: attempt(partial(peer.build, problem)) for peer in peers}
    for phase, all_modes in PHASES.items():
        modes = [mode for mode in all_modes if mode in settings.modes and mode in case.modes]
        if modes:
            rows += _run_phase(problem, peers, attempts, phase, modes, settings)
    return rows


def page_settings(asked: Sequence[str]) -> list[str]:
    """What can be had of the asked settings, fresh first; see `cases.PAGES`.

    Raises:
        RuntimeError: nothing is left.
    """
    possible = [pages for pages in PAGES if pages in asked and (pages == "fresh" or memory.obstacle() is None)]
    if not possible:
        raise RuntimeError(f"memory cannot be reused here: {memory.obstacle()}")
    return possible


@contextmanager
def _allocator(pages: str) -> Iterator[None]:
    if pages == "reused":
        with memory.reuse_memory():
            yield
    else:
        yield


def attempt(action: Callable[[], T]) -> T | str | CannotError:
    """The action's result, or why there is none: a peer that fails costs its rows, not the run."""
    try:
        return action()
    except CannotError as error:
        return error
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _run_phase(
    problem: Problem,
    peers: Sequence[Peer],
    attempts: Mapping[str, Built | str | CannotError],
    phase: str,
    modes: Sequence[str],
    settings: Settings,
) -> list[Row]:
    failures: dict[str, str | CannotError] = {}
    errors_eps: dict[str, float] = {}
    samplers: dict[str, timing.Sampler] = {}
    expected = expect(problem, phase)
    for peer in peers:
        built = attempts[peer.name]
        if isinstance(built, (str, CannotError)):
            failures[peer.name] = built
            continue
        if peer.is_batch_norm:
            error_eps = attempt(partial(check, problem, built, phase, expected))
            if isinstance(error_eps, (str, CannotError)):
                failures[peer.name] = error_eps
                continue
            errors_eps[peer.name] = error_eps
        samplers[peer.name] = _sampler(problem, peer, built, phase)
    del expected
    measured = timing.measure(
        samplers,
        rounds=settings.rounds,
        min_seconds=settings.min_time_ms / 1000,
        calls_before=timing.WARM_UP if memory.is_active() else 0,
    )
    rows = []
    for mode in modes:
        for peer in peers:
            if mode in ("backward", "both") and not peer.has_backward:
                continue
            row = _blank_row(problem.case, mode, peer)
            failure = failures.get(peer.name)
            if isinstance(failure, CannotError):
                row.skipped = str(failure)
            elif failure is not None:
                row.error = failure
            else:
                row.error_eps = errors_eps.get(peer.name)
                _fill(row, problem, peer, measured)
            rows.append(row)
    return rows


def _sampler(problem: Problem, peer: Peer, built: Built, phase: str) -> timing.Sampler:
    call = built.call
    if built.norm is not None:
        built.norm.train(phase == "training")
    x, residual, dy = built.given or (problem.x, problem.residual, problem.dy)
    if phase == "inference":
        x, residual = x.detach(), None if residual is None else residual.detach()
        return timing.inference_sampler(lambda: call(x, residual))
    inputs = gradient_inputs(problem, built)[1]
    return timing.training_sampler(lambda: call(x, residual), inputs, dy if peer.has_backward else None)


def _blank_row(case: Case, mode: str, peer: Peer) -> Row:
    shape = case.shape
    return Row(
        shape.suite, shape.name, case.layout, case.variant, mode, peer.name, gradient=case.gradient, dtype=case.dtype
    )


def _fill(row: Row, problem: Problem, peer: Peer, measured: timing.Measured) -> None:
    mode, x, samples = row.mode, problem.x, measured.samples
    times = [sample[mode] for sample in samples[peer.name]]
    median = statistics.median(times)
    row.samples_us = [round(time * 1e6, 3) for time in times]
    row.median_us = median * 1e6
    row.spread = timing.spread(times)
    row.disturbed = measured.disturbed
    row.page_faults = statistics.median(measured.faults[row.peer])
    row.tensor_bytes = x.numel() * x.element_size()
    row.least_bytes = least_bytes(x.numel(), x.element_size(), peer.limit_of or row.variant, mode, row.gradient)
    row.gbps = row.least_bytes / median / 1e9
    for name, others in samples.items():
        if name != peer.name and mode in others[0]:
            row.ratios[name] = timing.ratio(times, [sample[mode] for sample in others])
    if "copy" in samples:
        # A copy has a forward only; its rate in the same rounds is the measure for every mode.
        (copy_mode,) = samples["copy"][0]
        copies = [sample[copy_mode] for sample in samples["copy"]]
        copied = least_bytes(x.numel(), x.element_size(), "bn_relu", "inference")
        row.copied_bytes = round(copied * timing.ratio(times, copies))
        row.copy_fraction = row.least_bytes / row.copied_bytes


@contextmanager
def keep_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def bar(enabled: bool) -> Progress:
    return Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
        disable=not enabled,
    )
