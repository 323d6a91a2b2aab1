"""Arguments of moments: the types, and the errors for values, masks and weights that do not fit."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from keelnorm.engine.error_messages import describe
from keelnorm.engine.layout import check_kind

#: Meaning of weights: how often a value occurs, or how much it matters relative to the others.
Weighting: TypeAlias = Literal["frequency", "importance"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


def check_weighting(what: str, weighting: Any) -> None:
    """Raise unless ``weighting`` is legal."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"{what}: weighting must be one of {WEIGHTINGS}; got {describe(weighting)}")


def broadcast_weight(what: str, sample_weight: Any, x: Tensor) -> Tensor:
    """View weights with as many dimensions as x, broadcastable to its shape."""
    legal = (x.shape[0],), (x.shape[0], *x.shape[2:])
    if not isinstance(sample_weight, Tensor) or not sample_weight.is_floating_point():
        raise TypeError(f"{what}: sample_weight must be a floating-point tensor; got {describe(sample_weight)}")
    check_kind(what, "sample_weight", sample_weight)
    if tuple(sample_weight.shape) not in legal or sample_weight.device != x.device:
        raise ValueError(
            f"{what}: sample_weight must have shape {' or '.join(map(str, dict.fromkeys(legal)))} and be on "
            f"{x.device}; got {describe(sample_weight)}"
        )
    if sample_weight.is_cpu and not torch.compiler.is_compiling():
        illegal = sample_weight[~((sample_weight >= 0) & (sample_weight < torch.inf))]
        if illegal.numel() > 0:
            raise ValueError(
                f"{what}: sample_weight must not be negative, infinite or NaN; it has {illegal.flatten()[0].item()}"
            )
    if sample_weight.dim() == 1:
        return sample_weight.view(-1, *([1] * (x.dim() - 1)))
    return sample_weight.unsqueeze(1)


def check_values(x: Tensor) -> None:
    """Raise unless ``x`` is a floating-point tensor of shape (N, C, *S)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"moments are taken of a tensor of shape (N, C, *S); got {describe(x)}")
    check_kind("moments", "x", x)
    if not x.is_floating_point():
        raise TypeError(f"moments need floating-point values; got {describe(x)}. Convert it first, as with x.float()")
    if x.dim() < 2:
        raise ValueError(f"moments need a batch and a channel dimension (N, C, *S); got {describe(x)}")


def broadcast_mask(mask: Tensor, x: Tensor) -> Tensor:
    """View ``mask`` with as many dimensions as ``x``, broadcastable to its shape."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"a mask is a boolean tensor, True where a value counts; got {describe(mask)}")
    check_kind("moments", "the mask", mask)
    if mask.device != x.device:
        raise ValueError(f"the mask must be on the device of x, {x.device}; got {describe(mask)}")
    without_channels = (x.shape[0], *x.shape[2:])
    shape = tuple(mask.shape)
    if shape == (x.shape[0],) and x.dim() != 1:
        return mask.view(-1, *([1] * (x.dim() - 1)))
    if shape == without_channels:
        return mask.unsqueeze(1)
    if mask.dim() == x.dim() and all(m in (1, size) for m, size in zip(shape, x.shape, strict=True)):
        return mask
    raise ValueError(
        f"the mask does not fit x of shape {tuple(x.shape)}; got {describe(mask)}. Legal are ({x.shape[0]},), "
        f"{without_channels}, and {x.dim()} dimensions that broadcast against x"
    )
