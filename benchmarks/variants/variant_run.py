"""Run the variants' benchmark: a training step of each, interleaved with plain batch norm on the same input."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from time import perf_counter

import torch

from benchmarks.variants.variant_layers import PLAIN, VARIANTS, Factory
from keelnorm import memory
from keelnorm.bench.cases import Case, cases, shapes
from keelnorm.bench.correctness import WrongResultError
from keelnorm.bench.problem import Problem, make_problem
from keelnorm.bench.results import Report, Settings, VariantRow
from keelnorm.bench.session import Failure, allocator, attempt, progress_bar, threads
from keelnorm.engine.error_messages import describe as describe_value
from keelnorm.measure import timing
from keelnorm.measure.machine import describe


def selected(settings: Settings) -> list[Case]:
    """The inputs that `settings` asks for."""
    listed = shapes(settings.batch, quick=settings.quick, contains=tuple(settings.shapes))
    return list(cases(listed, tuple(settings.layouts), ("bn",), dtypes=tuple(settings.dtypes)))


def run_variants(settings: Settings, *, variants: Mapping[str, Factory] = VARIANTS, progress: bool = True) -> Report:
    """Measure forward and backward of each variant.

    Args:
        settings: Batch, shapes, layouts, dtypes, variants, rounds, min_time_ms, threads and the first of pages are
            used. Plain batch norm is always measured.
        variants: The factories by name.
        progress: Show a progress bar on the standard error stream.
    """
    start = perf_counter()
    todo = selected(settings)
    names = [PLAIN, *(name for name in settings.variants if name != PLAIN)]
    rows: list[VariantRow] = []
    with threads(settings.threads), progress_bar(progress) as bar, allocator(settings.pages[0]):
        machine = describe(with_revision=True)
        task = bar.add_task("", total=len(todo))
        for case in todo:
            bar.update(task, description=case.name)
            rows += run_case(case, {name: variants[name] for name in names}, settings)
            bar.advance(task)
    return Report(machine, settings, [], variants=rows, seconds=perf_counter() - start)


def run_case(case: Case, variants: Mapping[str, Factory], settings: Settings) -> list[VariantRow]:
    """All variants on one input: check each first, then time those that passed."""
    problem = make_problem(case)
    rows = []
    samplers: dict[str, timing.Sampler] = {}
    for name, factory in variants.items():
        row = VariantRow(name, case.shape.suite, case.shape.name, case.layout, case.dtype, pages=settings.pages[0])
        found = attempt(partial(checked_sampler, problem, factory))
        if isinstance(found, Failure):
            row.error, row.skipped = found.error, found.skipped
        else:
            samplers[name] = found
        rows.append(row)
    measured = timing.measure(
        samplers,
        rounds=settings.rounds,
        min_seconds=settings.min_time_ms / 1000,
        calls_before=timing.WARM_UP if memory.is_active() else 0,
    )
    for row in rows:
        if row.variant in samplers:
            _fill(row, measured)
    return rows


def checked_sampler(problem: Problem, factory: Factory) -> timing.Sampler:
    """Check a variant, and give what times its training step.

    Raises:
        WrongResultError: y or a gradient is not finite, or not of the right shape.
    """
    made = factory(problem.x)
    inputs = [problem.x, *(p for p in made.layer.parameters() if p.requires_grad)]
    y = made.call(problem.x)
    _check("y", y, problem.x)
    gradients = torch.autograd.grad(y, inputs, problem.dy, allow_unused=True)
    used: list[torch.Tensor] = []
    for given, gradient in zip(inputs, gradients, strict=True):
        if gradient is not None:
            _check("a gradient", gradient, given)
            used.append(given)
    if not used or used[0] is not problem.x:
        raise WrongResultError("y does not depend on x")
    return timing.training_sampler(lambda: made.call(problem.x), used, problem.dy)


def _check(what: str, value: torch.Tensor, given: torch.Tensor) -> None:
    if value.shape != given.shape:
        raise WrongResultError(f"{what} should have the shape {tuple(given.shape)}, and is {describe_value(value)}")
    if not bool(value.isfinite().all()):
        raise WrongResultError(f"{what} is not finite")


def _fill(row: VariantRow, measured: timing.Measured) -> None:
    samples = measured.samples[row.variant]
    times = _times(samples, "both")
    row.samples_us = [round(time * 1e6, 3) for time in times]
    row.median_us = statistics.median(times) * 1e6
    row.forward_us = statistics.median(_times(samples, "forward")) * 1e6
    row.spread = timing.spread(times)
    row.disturbed = measured.disturbed
    if PLAIN in measured.samples:
        plain = measured.samples[PLAIN]
        row.ratio = timing.median_ratio(times, _times(plain, "both"))
        row.forward_ratio = timing.median_ratio(_times(samples, "forward"), _times(plain, "forward"))


def _times(samples: Sequence[timing.Sample], mode: str) -> list[float]:
    return [sample[mode] for sample in samples]
