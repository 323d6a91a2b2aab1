"""Whitening, and the scales that need no squares."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from variants.variant import Variant

from keelnorm.nn.l1 import L1BatchNorm, RangeBatchNorm
from keelnorm.nn.whitening import WhiteningBatchNorm


def spread(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *([1] * (x.dim() - 2)))


def affine(layer: torch.nn.Module, y: Tensor) -> Tensor:
    if layer.weight is not None:
        y = y * spread(layer.weight, y)
    return y if layer.bias is None else y + spread(layer.bias, y)


def by_definition(layer: torch.nn.Module, cov: Tensor) -> Tensor:
    """Huang et al. (2018), arXiv:1804.08450: U·Λ^(−1/2)·Uᵀ. Autograd differentiates it for distinct eigenvalues."""
    values, vectors = torch.linalg.eigh(cov + layer.eps * torch.eye(len(cov), dtype=cov.dtype))
    return vectors @ torch.diag(values**-0.5) @ vectors.T


def by_newton(layer: torch.nn.Module, cov: Tensor) -> Tensor:
    """Huang et al. (2019), arXiv:1904.03441, algorithm 1."""
    cov = cov + layer.eps * torch.eye(len(cov), dtype=cov.dtype)
    trace = cov.trace()
    p = torch.eye(len(cov), dtype=cov.dtype)
    for _ in range(layer.iterations):
        p = (3 * p - torch.linalg.matrix_power(p, 3) @ (cov / trace)) / 2
    return p / trace.sqrt()


def whitened(root: Callable[[torch.nn.Module, Tensor], Tensor], layer: torch.nn.Module, x: Tensor) -> Tensor:
    """Each group of channels, by its own covariance matrix in training and the running one in evaluation."""
    parts = []
    for group, part in enumerate(x.split(layer.group_size, dim=1)):
        channels = slice(group * layer.group_size, (group + 1) * layer.group_size)
        samples = part.movedim(1, -1).reshape(-1, layer.group_size)  # (M, D)
        if layer.training or layer.running_mean is None:
            mean = samples.mean(0)
            cov = (samples - mean).T @ (samples - mean) / len(samples)
        else:
            mean, cov = layer.running_mean[channels], layer.running_cov[group]
        rows = (samples - mean) @ root(layer, cov).T
        parts.append(rows.reshape(x.shape[0], *x.shape[2:], layer.group_size).movedim(-1, 1))
    return affine(layer, torch.cat(parts, dim=1))


def by_scale(
    scale: Callable[[Tensor, Tensor], Tensor], layer: torch.nn.Module, x: Tensor, mask: Tensor | None = None
) -> Tensor:
    """(x − mean) / √(scale² + eps), channel by channel; what the mask leaves out comes out as 0."""
    if mask is not None:
        while mask.dim() < x.dim():
            mask = mask.unsqueeze(1 if mask.dim() == x.dim() - 1 and mask.dim() > 1 else -1)
        mask = mask.expand_as(x)
    channels = []
    for c in range(x.shape[1]):
        counted = x[:, c] if mask is None else x[:, c][mask[:, c]]
        if layer.training or layer.running_mean is None:
            mean = counted.mean()
            var = scale(counted, mean) ** 2
        else:
            mean, var = layer.running_mean[c], layer.running_var[c]
        channels.append((x[:, c] - mean) / (var + layer.eps).sqrt())
    y = affine(layer, torch.stack(channels, dim=1))
    return y if mask is None else torch.where(mask, y, 0)


def absolute(values: Tensor, mean: Tensor) -> Tensor:
    """Hoffer et al. (2018), arXiv:1803.01814: √(π/2)·‖x − mean‖₁/n."""
    return math.sqrt(math.pi / 2) * (values - mean).abs().sum() / values.numel()


def extent(values: Tensor, mean: Tensor) -> Tensor:
    """Banner et al. (2018), arXiv:1805.11046: range(x − mean)/√(2·ln n)."""
    return ((values - mean).max() - (values - mean).min()) / math.sqrt(2 * math.log(values.numel()))


def grouped(channels: int, **keywords: Any) -> WhiteningBatchNorm:
    """In pairs, where the channels make pairs."""
    return WhiteningBatchNorm(channels, group_size=2 - channels % 2, iterations=7, **keywords)


SQUARED_SCALE = {"test_running_statistics_are_the_batchs": "running_var keeps the square of the scale, not a variance."}

VARIANTS = [
    Variant("whitening-zca", partial(WhiteningBatchNorm, method="zca"), partial(whitened, by_definition),
            buffers=("running_cov",)),
    Variant("whitening-newton", WhiteningBatchNorm, partial(whitened, by_newton), buffers=("running_cov",)),
    Variant("whitening-groups", grouped, partial(whitened, by_newton),
            shapes=((7, 4), (4, 6, 5), (4, 4, 3, 4)), buffers=("running_cov",)),
    Variant("L1", L1BatchNorm, partial(by_scale, absolute), masks=True, dtypes=(torch.bfloat16, torch.float16),
            unkept=SQUARED_SCALE),
    Variant("range", RangeBatchNorm, partial(by_scale, extent), dtypes=(torch.bfloat16, torch.float16),
            unkept=SQUARED_SCALE),
]  # fmt: skip
