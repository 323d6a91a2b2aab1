"""How the moments of a module's input move while a network trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def received_by(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of a module inside the block."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


def unit_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each unit, (C,), of an input (1, C, n) or (n, C, H, W)."""
    by_unit = x.double().transpose(0, 1).flatten(1)
    return by_unit.mean(dim=1), by_unit.var(dim=1, correction=0).sqrt()


class MeanDrift:
    """How far the means of units move: collects their moments at each evaluation."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []
        self.deviations: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Collect the moments of an input."""
        mean_, deviation = unit_moments(x)
        self.means.append(mean_)
        self.deviations.append(deviation)

    def shift(self) -> Tensor:
        """(T,): |mean - mean at the start| over the unit's standard deviation, averaged over units.

        The standard deviation is the root mean square over the evaluations; a unit that never varies is left out.
        """
        means, deviations = torch.stack(self.means), torch.stack(self.deviations)
        width = deviations.square().mean(dim=0).sqrt()
        alive = width > 0
        moved = (means - means[0]).abs()
        return (moved[:, alive] / width[alive]).mean(dim=1)
