"""The variants whose cost is measured, one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import keelnorm as kn

#: The variant that every other one is compared with.
PLAIN = "BatchNorm"


class Made(NamedTuple):
    """A layer and the call of it that is timed."""

    layer: nn.Module
    call: Callable[[Tensor], Tensor]


#: Makes a layer for an input, in training.
Factory = Callable[[Tensor], Made]


def layer(
    kind: Callable[..., nn.Module], arguments: Callable[[Tensor], dict[str, Any]] = lambda x: {}, **keywords: Any
) -> Factory:
    """The factory of ``kind(channels, **keywords)``, called as ``layer(x, **arguments(x))``.

    Args:
        kind: The layer's class.
        arguments: Makes what a call takes besides x; called once, so that it is not timed.
        **keywords: Arguments of the layer.
    """

    def make(x: Tensor) -> Made:
        module = kind(x.shape[1], **keywords).to(x.device).train()
        given = arguments(x)
        return Made(module, lambda x: module(x, **given))

    return make


def _mask_of_most(x: Tensor) -> dict[str, Any]:
    """A mask that leaves out the last eighth of each sample's positions; without positions, of the samples."""
    counts = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool, device=x.device)
    rows = counts.view(x.shape[0], -1) if x.dim() > 2 else counts.view(1, -1)
    rows[:, rows.shape[1] - rows.shape[1] // 8 :] = False
    return {"mask": counts}


def _virtual(x: Tensor) -> Made:
    module = kn.VirtualBatchNorm(x.shape[1]).to(x.device).train()
    module.set_reference(x)
    return Made(module, module)


VARIANTS: dict[str, Factory] = {
    PLAIN: layer(kn.BatchNorm),
    "BatchNorm without running statistics": layer(kn.BatchNorm, track_running_stats=False),
    "BatchNorm with a mask": layer(kn.BatchNorm, _mask_of_most),
    "BatchNorm with weights": layer(kn.BatchNorm, lambda x: {"sample_weight": torch.ones(x.shape[0])}),
    "SyncBatchNorm alone": layer(kn.SyncBatchNorm),
    "GhostBatchNorm of 16": layer(kn.GhostBatchNorm, ghost_size=16),
    "BatchRenorm": layer(kn.BatchRenorm),
    "SplitBatchNorm of 2": layer(kn.SplitBatchNorm, num_splits=2),
    "CrossIterationBatchNorm uncompensated": layer(kn.CrossIterationBatchNorm, compensate=False),
    "MovingAverageBatchNorm": layer(kn.MovingAverageBatchNorm, burn_in=0),
    "VirtualBatchNorm": _virtual,
    "ConditionalBatchNorm of 10": layer(
        kn.ConditionalBatchNorm, lambda x: {"condition": torch.arange(x.shape[0]) % 10}, num_classes=10
    ),
    "DomainBatchNorm of 2": layer(kn.DomainBatchNorm, lambda x: {"domain": 0}, domains=2),
    "WhiteningBatchNorm of 16": layer(kn.WhiteningBatchNorm, group_size=16),
    "L1BatchNorm": layer(kn.L1BatchNorm),
    "RangeBatchNorm": layer(kn.RangeBatchNorm),
}
