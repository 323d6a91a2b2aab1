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
