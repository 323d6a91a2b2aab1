"""Layers and calls whose outputs ``kn.save_memory`` meets, by name, and a network of two of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import keelnorm as kn

N, C, SIZE = 6, 4, 5


class Kind(NamedTuple):
    """A layer, what its calls are given, and whether its outputs are recomputed in training."""

    layer: Callable[[], nn.Module]
    given: Callable[[], dict[str, Any]] = dict
    recomputed: bool = True


def mask() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(N, SIZE, SIZE, generator=generator) > 0.3


def weights() -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.rand(N, SIZE, SIZE, generator=generator) * 3


def numbers() -> torch.Tensor:
    return torch.tensor([0, 2, 1, 1, 0, 2])


#: On fused kernels: nothing but x is kept.
FUSED = {
    "plain": Kind(lambda: kn.BatchNorm2d(C)),
    "mask": Kind(lambda: kn.BatchNorm2d(C), lambda: {"mask": mask()}),
    "mask, keep": Kind(lambda: kn.BatchNorm2d(C), lambda: {"mask": mask(), "padding": "keep"}),
    "samples masked": Kind(lambda: kn.BatchNorm2d(C), lambda: {"mask": torch.arange(N) != 2}),
    "ghost": Kind(lambda: kn.GhostBatchNorm(C, 2)),
    "ghost, uneven": Kind(lambda: kn.GhostBatchNorm(C, 4, update="sequential")),
    "sync": Kind(lambda: kn.SyncBatchNorm(C)),
    "renorm": Kind(lambda: kn.BatchRenorm(C, r_max=2.0, d_max=1.0)),
    "split": Kind(lambda: kn.SplitBatchNorm(C)),
    "domain": Kind(lambda: kn.DomainBatchNorm(C, 3), lambda: {"domain": 1}),
    "domains": Kind(lambda: kn.DomainBatchNorm(C, 3), lambda: {"domain": numbers()}),
}
#: In torch's operators.
PLAIN_TORCH = {
    "weights": Kind(lambda: kn.BatchNorm2d(C), lambda: {"sample_weight": weights()}),
    "importance": Kind(lambda: kn.BatchNorm2d(C), lambda: {"sample_weight": weights(), "weighting": "importance"}),
    "weights, mask": Kind(lambda: kn.BatchNorm2d(C), lambda: {"sample_weight": weights(), "mask": mask()}),
    "weights, keep": Kind(
        lambda: kn.BatchNorm2d(C),
        lambda: {"sample_weight": weights(), "mask": mask(), "padding": "keep"},
        recomputed=False,
    ),
    "sync, mask": Kind(lambda: kn.SyncBatchNorm(C), lambda: {"mask": mask()}),
    "sync, keep": Kind(lambda: kn.SyncBatchNorm(C), lambda: {"mask": mask(), "padding": "keep"}, recomputed=False),
    "L1": Kind(lambda: kn.L1BatchNorm(C)),
    "L1, mask": Kind(lambda: kn.L1BatchNorm(C), lambda: {"mask": mask()}),
    "range": Kind(lambda: kn.RangeBatchNorm(C)),
    "moving": Kind(lambda: kn.MovingAverageBatchNorm(C, burn_in=0)),
    "cross": Kind(lambda: kn.CrossIterationBatchNorm(C, compensate=False)),
    "conditional": Kind(lambda: kn.ConditionalBatchNorm(C, 3), lambda: {"condition": numbers()}),
    "conditional, mask": Kind(lambda: kn.ConditionalBatchNorm(C, 3), lambda: {"condition": numbers(), "mask": mask()}),
    "domains, mask": Kind(lambda: kn.DomainBatchNorm(C, 3), lambda: {"domain": numbers(), "mask": mask()}),
    "whitening": Kind(lambda: kn.WhiteningBatchNorm(C), recomputed=False),
}
KINDS = FUSED | PLAIN_TORCH


class Two(nn.Module):
    """Two layers of a kind; the second one's residual, if there is one, is the first one's output."""

    def __init__(self, kind: Kind, activation: str | None, residual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.middle, self.last = nn.Conv2d(3, C, 1), nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, 2, 1)
        self.bn1, self.bn2 = kind.layer(), kind.layer()
        self.given, self.activation, self.residual = kind.given(), activation, residual
        self.between = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.first(x), activation=self.activation, **self.given)
        y = self.between(y)
        z = self.bn2(self.middle(y), y if self.residual else None, activation=self.activation, **self.given)
        out: torch.Tensor = self.last(z)
        return out


def batch(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(N, 3, SIZE, SIZE, generator=generator).to(dtype)
