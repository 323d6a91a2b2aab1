"""Batch normalization itself: the shortest variant that the base class allows, and the layer on the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from variants.variant import Variant

import keelnorm as kn
from keelnorm.engine.activations import Activation
from keelnorm.moments import Moments
from keelnorm.nn._shared import variant
from keelnorm.nn._shared.normalize import normalize


class PlainVariant(variant.Variant):
    """Normalizes with the batch's moments, by the parts that every variant is made of."""

    takes_mask = True

    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        moments = Moments.from_tensor(x, mask)
        var = moments.m2 / moments.count.clamp(min=1)  # 0 where the mask leaves no value
        y = normalize(x, moments.mean, var, self.weight, self.bias, self.eps, residual, act)
        self.update_running(moments)
        return y


def batch_norm(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """Ioffe, Szegedy (2015), arXiv:1502.03167, algorithm 1; in evaluation algorithm 2."""

    def spread(values: Tensor) -> Tensor:
        return values.view(1, -1, *([1] * (x.dim() - 2)))

    dims = [0, *range(2, x.dim())]
    if layer.training or layer.running_mean is None:
        mean = x.mean(dims, keepdim=True)
        var = (x - mean).square().mean(dims, keepdim=True)
    else:
        mean, var = spread(layer.running_mean), spread(layer.running_var)
    y = (x - mean) / (var + layer.eps).sqrt()
    return y if layer.weight is None else y * spread(layer.weight) + spread(layer.bias)


VARIANTS = [
    Variant("plain", PlainVariant, batch_norm, masks=True, dtypes=(torch.bfloat16, torch.float16)),
    Variant(
        "BatchNorm",
        kn.BatchNorm,
        batch_norm,
        masks=True,
        dtypes=(torch.bfloat16, torch.float16),
    ),
]
