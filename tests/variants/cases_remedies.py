"""Remedies for small and for large batches: groups, corrections towards the running statistics, parts."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from variants.variant import Variant

from keelnorm.nn.ghost import GhostBatchNorm
from keelnorm.nn.renorm import BatchRenorm
from keelnorm.nn.split import SplitBatchNorm


def spread(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *([1] * (x.dim() - 2)))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, broadcastable."""
    dims = [0, *range(2, x.dim())]
    mean = x.mean(dims, keepdim=True)
    return mean, (x - mean).square().mean(dims, keepdim=True)


def by_batch(x: Tensor, eps: float) -> Tensor:
    mean, var = moments(x)
    return (x - mean) / (var + eps).sqrt()


def by_running(layer: torch.nn.Module, x: Tensor) -> Tensor:
    return (x - spread(layer.running_mean, x)) / (spread(layer.running_var, x) + layer.eps).sqrt()


def affine(layer: torch.nn.Module, xhat: Tensor) -> Tensor:
    return xhat if layer.weight is None else xhat * spread(layer.weight, xhat) + spread(layer.bias, xhat)


def ghost_sizes(layer: GhostBatchNorm, x: Tensor) -> list[int]:
    sizes = [len(part) for part in x.split(layer.ghost_size)]
    if len(sizes) > 1 and sizes[-1] * x[0, 0].numel() < 2:
        sizes[-2:] = [sizes[-2] + sizes[-1]]
    return sizes


def ghost(layer: GhostBatchNorm, x: Tensor) -> Tensor:
    """Hoffer et al. (2017), arXiv:1705.08741, algorithm 1: every ghost batch by its own moments."""
    if layer.training:
        xhat = torch.cat([by_batch(part, layer.eps) for part in x.split(ghost_sizes(layer, x))])
    else:
        xhat = by_batch(x, layer.eps) if layer.running_mean is None else by_running(layer, x)
    return affine(layer, xhat)


def renorm(layer: BatchRenorm, x: Tensor) -> Tensor:
    """Ioffe (2017), arXiv:1702.03275, algorithm 1, for bounds that are numbers."""
    if layer.running_mean is None:
        return affine(layer, by_batch(x, layer.eps))
    if not layer.training:
        return affine(layer, by_running(layer, x))
    mean_b, var_b = moments(x)
    sigma_b, sigma = (var_b + layer.eps).sqrt(), (spread(layer.running_var, x) + layer.eps).sqrt()
    with torch.no_grad():
        r = (sigma_b / sigma).clamp(1 / layer.r_max, layer.r_max)
        d = ((mean_b - spread(layer.running_mean, x)) / sigma).clamp(-layer.d_max, layer.d_max)
    return affine(layer, (x - mean_b) / sigma_b * r + d)


def split(layer: SplitBatchNorm, x: Tensor) -> Tensor:
    """Xie et al. (2020), arXiv:1911.09665, section 4.2: a batch norm for each part."""
    if not layer.training:
        return affine(layer, by_batch(x, layer.eps) if layer.running_mean is None else by_running(layer, x))
    parts = x.split(len(x) // layer.num_splits)
    owners = [layer] * len(parts) if layer.share_affine else [layer, *layer.aux_bn]
    return torch.cat([affine(owner, by_batch(part, layer.eps)) for owner, part in zip(owners, parts, strict=True)])


_AUXILIARY = tuple(f"aux_bn.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked"))

VARIANTS = [
    Variant(
        "GhostBatchNorm",
        partial(GhostBatchNorm, ghost_size=3),
        ghost,
        # groups in rows and group by group; with and without a short last group, and one that joins the last
        shapes=((7, 3), (6, 3), (4, 3, 5), (5, 2, 4, 33), (4, 5, 3, 4)),
        dtypes=(torch.bfloat16, torch.float16),
    ),
    # Bounds so tight that r and d lie on them, where the difference quotients of gradcheck see constants too.
    Variant(
        "BatchRenorm",
        partial(BatchRenorm, r_max=1.02, d_max=0.02),
        renorm,
        dtypes=(torch.bfloat16, torch.float16),
    ),
    Variant(
        "SplitBatchNorm",
        partial(SplitBatchNorm, share_affine=True),
        split,
        buffers=_AUXILIARY,
        dtypes=(torch.bfloat16, torch.float16),
        unkept={"test_running_statistics_are_the_batchs": "They are those of the first part."},
    ),
]
