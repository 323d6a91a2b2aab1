"""Times of training steps of two arms that take turns, with fresh and with reused pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from time import perf_counter

import keelnorm as kn
from benchmarks.architectures import Architecture
from benchmarks.memory.kept_bytes import learned
from benchmarks.memory.memory_results import CONVERTED, SAVED, StepTimes
from benchmarks.training_steps import gradient_step
from keelnorm.bench.cases import PAGES
from keelnorm.bench.session import allocator, page_settings
from keelnorm.measure import timing
from keelnorm.measure.disturbance import run_delay

#: Seconds that a step is to take: far above the jitter of the system, and short enough for many rounds.
TARGET_SECONDS = 0.3
#: The largest batch that is tried.
MOST_SAMPLES = 64
#: Rounds that are not kept: memory is reused after some allocations of each size.
DISCARDED = {"fresh": 2, "reused": 4}
LEAST_ROUNDS = 3


def step_times(one: Architecture, seconds: float, rounds: int) -> list[StepTimes]:
    """Time training steps of a converted model with and without `kn.save_memory`.

    It is one model, because the same model built twice differs in speed by where its weights are in memory.

    Args:
        one: The architecture.
        seconds: Time for all page settings together.
        rounds: The most rounds of a page setting.
    """
    model = learned(one.build().train(), one.batch(2))
    batch = choose_batch(lambda samples: timing.seconds_per_call(gradient_step(model, one.batch(samples))))
    step = gradient_step(model, one.batch(batch))
    arms = {CONVERTED: sampler(step), SAVED: sampler(step, partial(kn.save_memory, model))}
    return interleaved(arms, batch, seconds, rounds)


def sampler(
    step: Callable[[], object], around: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Callable[[], float]:
    """What takes the seconds of one step inside of a block, which is entered and left untimed."""

    def sample() -> float:
        with around():
            return timing.seconds_per_call(step)

    return sample


def choose_batch(seconds_of: Callable[[int], float], target: float = TARGET_SECONDS) -> int:
    """The batch at which a step takes about the target; 2 where it takes longer even so.

    Args:
        seconds_of: Runs a step with so many samples and gives its time. The first step of a size is not counted.
        target: Seconds.
    """
    batch = 2
    for _ in range(3):
        seconds_of(batch)
        wanted = min(MOST_SAMPLES, max(2, round(batch * target / seconds_of(batch))))
        if 2 * batch / 3 <= wanted <= 3 * batch / 2:
            break
        batch = wanted
    return batch


def interleaved(arms: Mapping[str, Callable[[], float]], batch: int, seconds: float, rounds: int) -> list[StepTimes]:
    """Time the arms by turns, in each page setting that is possible here, fresh pages first.

    Args:
        arms: By name, what takes the seconds of one step; one of them is save_memory.
        batch: Samples in the steps' batch.
        seconds: Time for all page settings together.
        rounds: The most rounds of a page setting.
    """
    settings = page_settings(PAGES)
    return [_take_turns(arms, pages, batch, seconds / len(settings), rounds) for pages in settings]


def _take_turns(
    arms: Mapping[str, Callable[[], float]], pages: str, batch: int, seconds: float, rounds: int
) -> StepTimes:
    with allocator(pages):
        waited, start = run_delay(), perf_counter()
        taken = timing.by_turns(
            arms, rounds, discarded=DISCARDED[pages], at_least=min(rounds, LEAST_ROUNDS), budget=seconds
        )
        elapsed, waited_now = perf_counter() - start, run_delay()
    lost = 0.0 if waited is None or waited_now is None else (waited_now - waited) / elapsed
    [other] = [name for name in arms if name != SAVED]
    return StepTimes(
        pages=pages,
        batch=batch,
        ratio=timing.median_ratio(taken[SAVED], taken[other]),
        lost=lost,
        samples_ms={name: [round(each * 1000, 3) for each in times] for name, times in taken.items()},
    )
