"""Fair times of training steps: arms take turns, and each round gives one ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOT_SECONDS = 0.004
"""An arm's turn takes at least this long: far above the clock's resolution and a call's jitter."""
ROUNDS = (6, 90)
"""At least and at most; multiples of the number of arms, so that each has had every place."""


def stepper(model: nn.Module, images: Tensor, labels: Tensor, rate: float) -> Callable[[], Tensor]:
    """One training step of a model on fixed data, as a user would write it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def disagreement(first: Callable[[], Tensor], second: Callable[[], Tensor], steps: int) -> float:
    """The largest relative difference of two arms' losses over their first steps."""
    pairs = [(first().item(), second().item()) for _ in range(steps)]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def take_turns(steps: Mapping[str, Callable[[], Tensor]], budget: float) -> dict[str, list[float]]:
    """Seconds a step of each arm, a round at a time, until the budget is spent."""
    for step in steps.values():
        _seconds(step, 2)
    quickest = min(_seconds(step, 3) for step in steps.values())
    repeats = max(1, round(SLOT_SECONDS / quickest))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    end = time.perf_counter() + budget
    for turn in range(ROUNDS[1]):
        first = turn % len(names)
        if turn >= ROUNDS[0] and first == 0 and time.perf_counter() > end:
            break
        for name in names[first:] + names[:first]:
            taken[name].append(_seconds(steps[name], repeats))
    return taken


def _seconds(step: Callable[[], Tensor], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """The median over rounds of one arm's time over the other's."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))
