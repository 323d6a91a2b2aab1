"""A lower bound of the variance."""

from __future__ import annotations

from keelnorm.nn.floor import FloorBatchNorm
from torch import Tensor
from variants.cases_remedies import affine, by_running, moments
from variants.variant import Variant


def floor(layer: FloorBatchNorm, x: Tensor) -> Tensor:
    if not layer.training and layer.running_mean is not None:
        return affine(layer, by_running(layer, x))
    mean, var = moments(x)
    return affine(layer, (x - mean) / (var.clamp(min=layer.floor) + layer.eps).sqrt())


VARIANTS = [Variant("FloorBatchNorm", FloorBatchNorm, floor)]
