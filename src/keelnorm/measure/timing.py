"""Interleaved timing: in each round every peer takes its turn, and ratios are taken within a round.

The speed of a shared machine drifts by more than the differences that matter. Peers therefore
alternate, and two are compared only by samples of the same round.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor

from keelnorm.measure.disturbance import page_faults, run_delay

T = TypeVar("T")

#: Seconds per call, by mode.
Sample = dict[str, float]
#: Runs a number of calls.
Sampler = Callable[[int], Sample]

MAX_REPEATS = 10_000
#: An allocator that reuses memory needs some allocations of each size first, see keelnorm.reuse_memory.
WARM_UP = 10
FEW_PAGES = 64
MAX_LOST = 0.02  # the part of a round's time that may be spent without a core


def training_sampler(call: Callable[[], Tensor], inputs: Sequence[Tensor], dy: Tensor | None) -> Sampler:
    """Time training steps: forward, backward, and both from the same calls.

    Each part includes the time to release what it allocated, so that `both` is the sum of the two.

    Args:
        call: The forward.
        inputs: The tensors whose gradients the backward computes.
        dy: The gradient of the output; None times the forward only.
    """

    def run(repeats: int) -> Sample:
        forward = backward = 0.0
        for _ in range(repeats):
            start = perf_counter()
            y = call()
            called = perf_counter()
            if dy is None:
                del y
                forward += perf_counter() - start
                continue
            gradients = torch.autograd.grad(y, inputs, dy)
            del gradients
            returned = perf_counter()
            del y
            forward += called - start + perf_counter() - returned
            backward += returned - called
        sample = {"forward": forward / repeats}
        if dy is not None:
            sample |= {"backward": backward / repeats, "both": (forward + backward) / repeats}
        return sample

    return run


def inference_sampler(call: Callable[[], Tensor]) -> Sampler:
    """Time calls without gradients."""

    def run(repeats: int) -> Sample:
        with torch.no_grad():
            start = perf_counter()
            for _ in range(repeats):
                call()
            return {"inference": (perf_counter() - start) / repeats}

    return run


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[str, ...]]:
    """The order of each round, rotated so that no peer always runs after the same one."""
    for index in range(rounds):
        first = index % len(names) if names else 0
        yield (*names[first:], *names[:first])


def by_turns(
    samplers: Mapping[str, Callable[[], T]],
    rounds: int,
    *,
    discarded: int = 0,
    at_least: int = 0,
    budget: float = math.inf,
) -> dict[str, list[T]]:
    """Call every sampler once a round, in an order that rotates, and keep what each returned.

    Args:
        samplers: By name, what takes one sample.
        rounds: How many rounds are kept, at most.
        discarded: Rounds before them that are run and not kept.
        at_least: Rounds that are kept however long they take.
        budget: Seconds after which no new cycle of rounds begins. In a cycle every name has every place once.
    """
    found: dict[str, list[T]] = {name: [] for name in samplers}
    end = perf_counter() + budget
    for index, order in enumerate(turns(tuple(samplers), discarded + rounds)):
        kept = index - discarded
        if kept >= at_least and kept % max(1, len(samplers)) == 0 and perf_counter() > end:
            break
        for name in order:
            sample = samplers[name]()
            if kept >= 0:
                found[name].append(sample)
    return found


def seconds_per_call(call: Callable[[], object], repeats: int = 1) -> float:
    """Time some calls in a row; seconds of one."""
    start = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - start) / repeats


def warm_up(sampler: Sampler, calls: int) -> None:
    """Call until a call needs no new memory pages, at most `calls` times."""
    for _ in range(calls):
        pages = page_faults()
        sampler(1)
        if page_faults() - pages < FEW_PAGES:
            break


def calibrate(sampler: Sampler, min_seconds: float) -> int:
    """Warm up, and find how many calls make a sample of at least `min_seconds`."""
    sampler(1)
    repeats = 1
    while True:
        # The best of three: one interruption would otherwise look like a long call.
        elapsed = min(max(sampler(repeats).values()) for _ in range(3)) * repeats
        if elapsed >= min_seconds or repeats >= MAX_REPEATS:
            return repeats
        # Aim a little beyond the target, and grow at most tenfold on the evidence of one short sample.
        growth = min(10.0, 1.1 * min_seconds / max(elapsed, 1e-9))
        repeats = min(MAX_REPEATS, max(repeats + 1, math.ceil(repeats * growth)))


@dataclass
class Measured:
    """The samples of each peer, one per round, and the page faults of a call in each.

    `disturbed` is the share of rounds in which other programs interfered.
    """

    samples: dict[str, list[Sample]]
    faults: dict[str, list[float]]
    disturbed: float


def measure(samplers: Mapping[str, Sampler], *, rounds: int, min_seconds: float, calls_before: int = 0) -> Measured:
    """Measure every peer once a round.

    Rounds during which other programs held a core are repeated, up to as many again. If there are
    still too few, those that lost least are taken. A round is judged as a whole and only by the
    time spent waiting for a core, so the choice favours no peer.

    Args:
        samplers: By peer, what runs a number of calls and gives the seconds of one.
        rounds: Samples of each peer.
        min_seconds: How long a sample takes at least.
        calls_before: Calls to warm up with, at most; see `warm_up`.
    """
    with _collector_off():
        for run in samplers.values():
            warm_up(run, calls_before)
        repeats = {name: calibrate(run, min_seconds) for name, run in samplers.items()}
        done: list[_Round] = []
        for order in turns(tuple(samplers), 2 * rounds):
            if sum(one.lost <= MAX_LOST for one in done) >= rounds:
                break
            done.append(_round(order, samplers, repeats))
    kept = sorted(done, key=lambda one: max(one.lost, MAX_LOST))[:rounds]
    return Measured(
        samples={name: [one.samples[name] for one in kept] for name in samplers},
        faults={name: [one.faults[name] for one in kept] for name in samplers},
        disturbed=sum(one.lost > MAX_LOST for one in kept) / max(1, len(kept)),
    )


@dataclass
class _Round:
    samples: dict[str, Sample]
    faults: dict[str, float]
    lost: float  # time of all threads without a core, as a part of the round's time


def _round(order: Sequence[str], samplers: Mapping[str, Sampler], repeats: Mapping[str, int]) -> _Round:
    samples: dict[str, Sample] = {}
    faults: dict[str, float] = {}
    waited, start = run_delay(), perf_counter()
    for name in order:
        pages = page_faults()
        samples[name] = samplers[name](repeats[name])
        faults[name] = (page_faults() - pages) / repeats[name]
    elapsed, waited_now = perf_counter() - start, run_delay()
    if waited is None or waited_now is None:
        return _Round(samples, faults, lost=0.0)
    return _Round(samples, faults, lost=(waited_now - waited) / elapsed)


def spread(values: Sequence[float]) -> float:
    """The interquartile range as a part of the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of value / other, both of the same round."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


@contextmanager
def _collector_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
