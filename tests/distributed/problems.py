"""Batches that are shared out to ranks, and what one process with the whole batch makes of them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

C = 5
ACTIVATIONS = {None: lambda v: v, "relu": F.relu, "silu": F.silu}


@dataclass(frozen=True)
class Case:
    """One batch.

    Args:
        shares: Samples of each rank.
        size: Positions, *S.
        masks: Whether values are masked, with NaN in their places; on which ranks.
        kernels: Which keelnorm kernels run.
    """

    name: str
    shares: tuple[int, ...]
    size: tuple[int, ...] = (4, 3)
    dtype: torch.dtype = torch.float64
    channels_last: bool = False
    activation: str | None = None
    residual: bool = False
    masks: tuple[bool, ...] = ()
    kernels: str = "auto"
    momentum: float | None = 0.1
    affine: bool = True
    offset: float = 3.0

    def whole(self) -> dict[str, Any]:
        """The whole batch, by a seed of its own."""
        random = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        n = sum(self.shares)
        shape = (n, C, *self.size)
        # Means differ between samples, and so between ranks.
        x = normal(*shape) * 2 + self.offset + 4 * normal(n, C, *[1] * len(self.size))
        batch: dict[str, Any] = {
            "x": x,
            "dy": normal(*shape),
            "residual": normal(*shape) if self.residual else None,
            "weight": normal(C) if self.affine else None,
            "bias": normal(C) if self.affine else None,
            "mask": None,
        }
        batch = {k: None if v is None else v.to(self.dtype) for k, v in batch.items()}
        if self.channels_last:
            for key in ("x", "dy", "residual"):
                if batch[key] is not None:
                    batch[key] = batch[key].contiguous(memory_format=torch.channels_last)
        if self.masks:
            mask = torch.rand(n, *self.size, generator=random) < 0.7
            for rank, masked in enumerate(self.masks):
                if not masked:
                    mask[slice(*self.bounds(rank))] = True
            batch["mask"] = mask
            batch["x"] = torch.where(mask.unsqueeze(1), batch["x"], torch.nan)
        return batch

    def bounds(self, rank: int) -> tuple[int, int]:
        start = sum(self.shares[:rank])
        return start, start + self.shares[rank]

    def part(self, rank: int) -> dict[str, Any]:
        """A rank's share of the batch."""
        batch, own = self.whole(), slice(*self.bounds(rank))
        for key in ("x", "dy", "residual", "mask"):
            if batch[key] is not None:
                batch[key] = batch[key][own]
        if self.masks and not self.masks[rank]:
            batch["mask"] = None
        return batch


TWO = (
    Case("5 and 11, float32", (5, 11), dtype=torch.float32),
    Case("16 and 0, float32", (16, 0), dtype=torch.float32),
    Case("5 and 11", (5, 11)),
    Case("16 and 0", (16, 0)),
    Case("0 and 16", (0, 16)),
    Case("15 and 1, without positions", (15, 1), size=()),
    Case("5 and 11, sequences", (5, 11), size=(7,), activation="relu"),
    Case("relu", (5, 11), activation="relu", dtype=torch.float32),
    Case("relu after a residual", (5, 11), activation="relu", residual=True),
    Case("silu after a residual", (5, 11), activation="silu", residual=True),
    Case("residual alone, one empty", (0, 16), residual=True),
    Case("silu after a residual, one empty", (16, 0), activation="silu", residual=True, dtype=torch.float32),
    Case("channels-last", (5, 11), channels_last=True, activation="relu", residual=True),
    Case("channels-last, float32", (5, 11), channels_last=True, dtype=torch.float32),
    Case("masks", (5, 11), masks=(True, True), activation="relu", residual=True),
    Case("masks, channels-last", (5, 11), masks=(True, True), channels_last=True),
    Case("a mask on one rank", (5, 11), masks=(False, True), activation="silu"),
    Case("reference", (5, 11), kernels="reference", activation="silu", residual=True),
    Case("reference, float32, one empty", (16, 0), kernels="reference", dtype=torch.float32),
    Case("reference, masks, channels-last", (5, 11), kernels="reference", masks=(True, True), channels_last=True),
    Case("bfloat16", (5, 11), dtype=torch.bfloat16, activation="relu", residual=True),
    Case("averaging", (5, 11), momentum=None),
    Case("without weight and bias", (5, 11), affine=False),
    Case("far from zero, float32", (5, 11), offset=1e4, dtype=torch.float32),
)
FOUR = (
    Case("four uneven", (7, 1, 0, 8), activation="relu", residual=True),
    Case("four uneven, float32", (2, 9, 4, 1), dtype=torch.float32),
    Case("four, masks", (3, 0, 9, 4), masks=(True, False, False, True), activation="silu"),
)


def one_process(case: Case, eps: float = 1e-5) -> dict[str, Tensor]:
    """y, gradients, and the moments for the running statistics, of the whole batch in float64, by the definition."""
    batch = case.whole()
    mask = batch["mask"]
    counts = torch.ones_like(batch["x"], dtype=torch.bool) if mask is None else mask.unsqueeze(1).expand_as(batch["x"])
    leaves = {
        key: batch[key].double().requires_grad_()
        for key in ("x", "residual", "weight", "bias")
        if batch[key] is not None
    }
    with torch.no_grad():
        leaves["x"].masked_fill_(~counts, 0)
    x, rank = leaves["x"], batch["x"].dim()
    dims = [d for d in range(rank) if d != 1]

    def spread(v: Tensor) -> Tensor:
        return v.view(1, -1, *[1] * (rank - 2))

    n = counts.sum(dims)
    mean = (x * counts).sum(dims) / n
    var = ((x - spread(mean)).square() * counts).sum(dims) / n
    v = (x - spread(mean)) / (spread(var) + eps).sqrt()
    if case.affine:
        v = v * spread(leaves["weight"]) + spread(leaves["bias"])
    if case.residual:
        v = v + leaves["residual"]
    y = torch.where(counts, ACTIVATIONS[case.activation](v), 0)
    y.backward(batch["dy"].double())
    found = {"y": y.detach(), "mean": mean.detach(), "var_unbiased": (var * n / (n - 1)).detach()}
    return found | {f"d{key}": leaf.grad for key, leaf in leaves.items()}
