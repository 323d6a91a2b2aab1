"""Run the layers' benchmark: check every peer, then time those that are right."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

from keelnorm import memory
from keelnorm.bench import summary
from keelnorm.bench.cases import Case, cases, least_bytes, shapes
from keelnorm.bench.correctness import check, expect, gradient_inputs
from keelnorm.bench.peers import PEERS, Built, Peer
from keelnorm.bench.problem import Problem, make_problem
from keelnorm.bench.results import Report, Row, Settings, blank_row
from keelnorm.bench.session import Failure, allocator, attempt, page_settings, progress_bar, threads
from keelnorm.measure import timing
from keelnorm.measure.machine import describe

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
        settings: The cases, the names of the peers, and the effort.
        peers: The peers by name.
        progress: Show a progress bar on the standard error stream.
    """
    start = perf_counter()
    todo = selected(settings)
    chosen = [peers[name] for name in settings.peers]
    rows: list[Row] = []
    with threads(settings.threads), progress_bar(progress) as shown:
        machine = describe(with_revision=True)
        passes = page_settings(settings.pages)
        task = shown.add_task("", total=len(todo) * len(passes))
        for pages in passes:
            with allocator(pages):
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


def _run_phase(
    problem: Problem,
    peers: Sequence[Peer],
    attempts: Mapping[str, Built | Failure],
    phase: str,
    modes: Sequence[str],
    settings: Settings,
) -> list[Row]:
    failures: dict[str, Failure] = {}
    errors_eps: dict[str, float] = {}
    samplers: dict[str, timing.Sampler] = {}
    expected = expect(problem, phase)
    for peer in peers:
        built = attempts[peer.name]
        if isinstance(built, Failure):
            failures[peer.name] = built
            continue
        if peer.is_batch_norm:
            error_eps = attempt(partial(check, problem, built, phase, expected))
            if isinstance(error_eps, Failure):
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
            row = blank_row(problem.case, mode, peer.name)
            if peer.name in samplers:
                row.error_eps = errors_eps.get(peer.name)
                _fill(row, problem, peer, measured)
            else:
                row.error, row.skipped = failures[peer.name].error, failures[peer.name].skipped
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
            row.ratios[name] = timing.median_ratio(times, [sample[mode] for sample in others])
    if "copy" in samples:
        # A copy has only a forward; its rate in the same rounds is the measure for every mode.
        (copy_mode,) = samples["copy"][0]
        copies = [sample[copy_mode] for sample in samples["copy"]]
        copied = least_bytes(x.numel(), x.element_size(), "bn_relu", "inference")
        row.copied_bytes = round(copied * timing.median_ratio(times, copies))
        row.copy_fraction = row.least_bytes / row.copied_bytes
