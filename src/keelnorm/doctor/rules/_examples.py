"""Parts of the examples with which rules are tested."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def at(model: nn.Module, path: str) -> Any:
    """The layer at a path, as one whose attributes can be set."""
    return model.get_submodule(path)


def batches_of(*shape: int) -> list[Tensor]:
    """Two batches of normal numbers, equal at every call."""
    values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return list(values)


def trained(layer: nn.Module, *, batches: int = 100) -> None:
    """Give a batch norm statistics and a counter as after some training."""
    statistics: Any = layer
    statistics.running_mean.fill_(0.5)
    statistics.num_batches_tracked.fill_(batches)


def network(*, scale: float = 1.0) -> nn.Sequential:
    """Two convolutions with batch norms, equal at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3),
        )  # fmt: skip
    with torch.no_grad():
        at(model, "0").weight.mul_(scale)
    return model


def data_of(*, seed: int = 0, batches: int = 6, size: int = 32, shift: float = 0.5) -> list[Tensor]:
    """Batches of images (N, 3, 8, 8), each of a brightness of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches, size, 3, 8, 8, generator=generator)
    return list(x + torch.randn(batches, size, 3, 1, 1, generator=generator) + shift)


def settled(model: nn.Module, batches: list[Tensor], *, rounds: int = 1) -> None:
    """Let a model see batches in training, as many times."""
    model.train()
    with torch.no_grad():
        for _ in range(rounds):
            for batch in batches:
                model(batch)
