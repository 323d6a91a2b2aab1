"""Synchronized batch normalization, for the contract suite: on one rank, where it is batch normalization itself."""

from __future__ import annotations

import torch
from torch import Tensor
from variants.variant import Variant

from keelnorm.nn.sync.sync_batch_norm import SyncBatchNorm


def oracle(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """(x − mean)/√(var + eps)·weight + bias: Ioffe, Szegedy (2015), arXiv:1502.03167, algorithms 1 and 2."""
    dims = [d for d in range(x.dim()) if d != 1]

    def spread(values: Tensor) -> Tensor:
        return values.view(1, -1, *[1] * (x.dim() - 2))

    if layer.training or layer.running_mean is None:
        mean = x.mean(dims, keepdim=True)
        var = (x - mean).square().mean(dims, keepdim=True)
    else:
        mean, var = spread(layer.running_mean), spread(layer.running_var)
    y = (x - mean) / (var + layer.eps).sqrt()
    return y * spread(layer.weight) + spread(layer.bias) if layer.affine else y


VARIANTS = [Variant("SyncBatchNorm", SyncBatchNorm, oracle, masks=True, dtypes=(torch.bfloat16, torch.float16))]
