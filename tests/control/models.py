"""Models with batch norms: torch.nn's, keelnorm's, a variant of keelnorm's, and a subclass from elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.engine.activations import Activation
from keelnorm.nn._shared.normalize import normalize
from keelnorm.nn._shared.variant import Variant


class Plain(Variant):
    """The simplest variant: it normalizes with the moments of its batch."""

    takes_mask = True

    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        moments = kn.Moments.from_tensor(x, mask)
        self.update_running(kn.Moments(moments.count, moments.mean.detach(), moments.m2.detach()))
        var = moments.m2 / moments.count
        return normalize(x, moments.mean, var, self.weight, self.bias, self.eps, residual, act)


class Foreign(nn.BatchNorm2d):
    """A subclass from elsewhere, with a forward of its own that calls the inherited one."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


FLAT = {"torch": nn.BatchNorm1d, "keelnorm": kn.BatchNorm1d, "variant": Plain}
PLANES = {"torch": nn.BatchNorm2d, "keelnorm": kn.BatchNorm2d, "variant": Plain, "foreign": Foreign}
KINDS = [(rank, kind) for rank, kinds in ((1, FLAT), (2, PLANES)) for kind in kinds]


class Block(nn.Module):
    """Two convolutions (or linear layers) with batch norms; inputs are (N, 3) or (N, 3, 6, 5)."""

    def __init__(self, rank: int, kind: str, **keywords: object) -> None:
        super().__init__()
        norm = {1: FLAT, 2: PLANES}[rank][kind]
        self.first = nn.Linear(3, 4) if rank == 1 else nn.Conv2d(3, 4, 3, padding=1)
        self.norm = norm(4, **keywords)
        self.second = nn.Linear(4, 5) if rank == 1 else nn.Conv2d(4, 5, 3, padding=1)
        self.last = nn.Sequential(norm(5, **keywords), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(torch.relu(self.norm(self.first(x)))))


PATHS = ["norm", "last.0"]


def data(rank: int, count: int = 12) -> Tensor:
    return 3 * torch.randn((count, 3) if rank == 1 else (count, 3, 6, 5)) + 2


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of buffers are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
