"""What scenarios of several subjects use: a network, its batch, and the words of an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from problems import C
from torch import Tensor, nn

from keelnorm.nn.sync.sync_batch_norm import SyncBatchNorm


def said(action: Callable[[], Any]) -> tuple[str, str]:
    """The type and the words of the error that an action raises; empty where it raises none."""
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


class Network(nn.Module):
    """Calls its synchronized layer in the order and mode that the test asks for."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(4, C, dtype=dtype)
        self.bn = SyncBatchNorm(C, dtype=dtype)
        self.bn2 = SyncBatchNorm(C, dtype=dtype)
        self.head = nn.Linear(C, 2, dtype=dtype)

    def forward(self, x: Tensor, swapped: bool = False) -> Tensor:
        first, second = (self.bn2, self.bn) if swapped else (self.bn, self.bn2)
        return self.head(second(torch.tanh(first(self.inner(x), activation="relu"))))


def network_batch() -> Tensor:
    return torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
