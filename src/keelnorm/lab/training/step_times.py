"""Fair times of training steps: arms take turns, and each round gives one ratio."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keelnorm.measure import timing

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
        loss.backward()
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
        timing.seconds_per_call(step, 2)
    quickest = min(timing.seconds_per_call(step, 3) for step in steps.values())
    repeats = max(1, round(SLOT_SECONDS / quickest))
    samplers = {name: partial(timing.seconds_per_call, step, repeats) for name, step in steps.items()}
    return timing.by_turns(samplers, ROUNDS[1], at_least=ROUNDS[0], budget=budget)
