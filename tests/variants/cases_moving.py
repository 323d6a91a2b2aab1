"""What normalizes with more than the batch: the batches before, their root mean square, a reference batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from variants.variant import Variant

from keelnorm.nn.cross_iteration import CrossIterationBatchNorm
from keelnorm.nn.moving_average import MovingAverageBatchNorm
from keelnorm.nn.virtual import VirtualBatchNorm


def spread(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *([1] * (x.dim() - 2)))


def over(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def finish(layer: torch.nn.Module, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """With mean and var broadcastable."""
    y = (x - mean) / (var + layer.eps).sqrt()
    return y if layer.weight is None else y * spread(layer.weight, x) + spread(layer.bias, x)


def by_running(layer: torch.nn.Module, x: Tensor) -> Tensor:
    return finish(layer, x, spread(layer.running_mean, x), spread(layer.running_var, x))


def cross_iteration(layer: CrossIterationBatchNorm, x: Tensor) -> Tensor:
    """Yao et al. (2021), arXiv:2002.05712, section 3, without the Taylor term, which test_cross_iteration.py has."""
    if not layer.training and layer.running_mean is not None:
        return by_running(layer, x)
    means = [x.mean(over(x)), *(batch.mean for batch, _ in layer._last)]
    squares = [x.square().mean(over(x)), *(batch.var + batch.mean.square() for batch, _ in layer._last)]
    mean = torch.stack(means).mean(0)
    var = torch.stack(squares).mean(0) - mean.square()
    return finish(layer, x, spread(mean, x), spread(var, x))


def moving_average(layer: MovingAverageBatchNorm, x: Tensor) -> Tensor:
    """Yan et al. (2020), arXiv:2001.06838, for a window of one; test_moving_average.py has the others."""
    if not layer.training and layer.running_mean is not None:
        return by_running(layer, x)
    return finish(layer, x, torch.zeros(()), x.square().mean(over(x), keepdim=True))


def reference(channels: int) -> Tensor:
    return torch.randn(7, channels, 4, generator=torch.Generator().manual_seed(channels)) * 2 + 1


def with_reference(channels: int, **keywords: Any) -> VirtualBatchNorm:
    layer = VirtualBatchNorm(channels, **keywords)
    layer.set_reference(reference(channels))
    return layer


def virtual(layer: VirtualBatchNorm, x: Tensor) -> Tensor:
    """Salimans et al. (2016), arXiv:1606.03498, section 3.4: each sample with the reference batch."""
    C = x.shape[1]
    fixed = reference(C).to(x.dtype).movedim(1, 0).reshape(C, -1)
    values = torch.cat([fixed.expand(len(x), *fixed.shape), x.reshape(len(x), C, -1)], 2)
    shape = (len(x), C, *[1] * (x.dim() - 2))
    return finish(layer, x, values.mean(2).view(shape), values.var(2, correction=0).view(shape))


_OF_THE_REFERENCE = "The running statistics are those of reference batches: test_virtual.py."

VARIANTS = [
    Variant(
        "CrossIterationBatchNorm",
        partial(CrossIterationBatchNorm, window=3, compensate=False),
        cross_iteration,
        masks=True,
        compiles="The window is kept in Python, and ∂mean/∂θ is taken within the forward.",
        dtypes=(torch.bfloat16, torch.float16),
    ),
    Variant(
        "MovingAverageBatchNorm",
        MovingAverageBatchNorm,
        moving_average,
        masks=True,
        compiles="The windows are kept in Python, one of them by the backward.",
        dtypes=(torch.bfloat16, torch.float16),
        unkept={"test_running_statistics_are_the_batchs": "They are 0 and the mean square: test_moving_average.py."},
    ),
    Variant(
        "VirtualBatchNorm",
        with_reference,
        virtual,
        masks=True,
        dtypes=(torch.bfloat16, torch.float16),
        unkept={
            "test_running_statistics_are_the_batchs": _OF_THE_REFERENCE,
            "test_training_updates_once": _OF_THE_REFERENCE,
            "test_momentum_none_averages": _OF_THE_REFERENCE,
            "test_one_value_per_channel": "With the reference's values it has a variance.",
        },
    ),
]
