"""Batches in which not all values count: masks, lengths, sample weights, and too few values for a variance."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import PADDINGS, Options, State
from keelnorm.engine.composite import finished, normalized, scaled
from keelnorm.engine.error_messages import describe, is_count
from keelnorm.engine.layout import check_kind, counted, require_memory
from keelnorm.engine.recomputed_steps import elementwise, padded
from keelnorm.engine.running_statistics import update_running
from keelnorm.moments import (
    LEAST_FREQUENCY,
    Moments,
    Weighting,
    broadcast_mask,
    broadcast_weight,
    wide_dtype,
)

TooFew: TypeAlias = Literal["error", "running", "skip"]
TOO_FEW = get_args(TooFew)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """Return the mask of padded sequences: mask[n, t] = t < lengths[n].

    Args:
        lengths: Steps of each sequence, integers from 0 to ``size``, shape (N,).
        size: Steps after padding, L.

    Shape:
        (N,) -> (N, L), boolean; the mask of an x of shape (N, C, L).

    Raises:
        TypeError: ``lengths`` is not a dense tensor of integers.
        ValueError: ``lengths`` does not have shape (N,), or, on the CPU, some are below 0 or above ``size``.

    Example:
        >>> length_mask(torch.tensor([1, 3]), 3).int().tolist()
        [[1, 0, 0], [1, 1, 1]]
    """
    if not isinstance(lengths, Tensor) or lengths.dtype not in _INTEGERS:
        raise TypeError(f"length_mask: lengths must be a tensor of integers, shape (N,); got {describe(lengths)}")
    check_kind("length_mask", "lengths", lengths)
    if not hasattr(size, "__index__"):
        raise TypeError(f"length_mask: size must be an integer, the steps after padding; got {describe(size)}")
    if lengths.dim() != 1:
        raise ValueError(f"length_mask: lengths must have shape (N,), a number for each; got {describe(lengths)}")
    if not is_count(size, 0):
        raise ValueError(f"length_mask: size must be an integer from 0 on, below 2**31; got {describe(size)}")
    if lengths.is_cpu and lengths.numel() and not (lengths.min() >= 0 and lengths.max() <= size):
        raise ValueError(
            f"length_mask: lengths must be from 0 to size, {size}; got {lengths.min().item()} to {lengths.max().item()}"
        )
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def common_mask(mask: Tensor, x: Tensor) -> Tensor | None:
    """Return the mask as (N, *S), contiguous, where it is the same for all channels; else None."""
    mask = broadcast_mask(mask, x)
    require_memory("keelnorm", mask=mask)
    return mask.expand(x.shape[0], 1, *x.shape[2:]).squeeze(1).contiguous() if mask.shape[1] == 1 else None


def check_policy(what: str, too_few: Any) -> None:
    """Raise unless ``too_few`` is a policy for one value per channel in training."""
    if too_few not in TOO_FEW:
        raise ValueError(f"{what}: too_few must be one of {TOO_FEW}; got {describe(too_few)}")


def check_padding(what: str, padding: Any) -> None:
    """Raise unless ``padding`` is a policy for masked values."""
    if padding not in PADDINGS:
        raise ValueError(f"{what}: padding must be one of {PADDINGS}; got {describe(padding)}")


def named_mask(what: str, mask: Any, x: Tensor) -> Tensor:
    """Return the mask with as many dimensions as x, or raise an error that begins with what was called."""
    if isinstance(mask, Tensor):
        check_kind(what, "the mask", mask)
    try:
        return broadcast_mask(mask, x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from None


def take_mask(state: State, options: Options, x: Tensor, too_few: str) -> State:
    """Return the state with the call's mask, after checking that the mask is legal and leaves a variance."""
    what, mask = state.what, options.mask
    check_padding(what, options.padding)
    if mask is None:
        return state
    common = common_mask(named_mask(what, mask, x), x)
    if common is None:
        raise ValueError(f"{what}: the mask must be the same for all channels, (N,) or (N, *S); got {describe(mask)}")
    state = state._replace(mask=common, keep=options.padding == "keep")
    if state.training and common.is_cpu and not torch.compiler.is_compiling() and int(common.sum()) == 1:
        if too_few == "error":
            raise ValueError(
                f"{what}: the mask leaves one value per channel, so the variance is undefined; got {describe(x)}. "
                "Let more count, evaluate with model.eval(), or give the layer too_few='running' or 'skip'"
            )
        return without_variance(state, too_few)
    return state


def without_variance(state: State, too_few: str) -> State:
    """Return the state for one value per channel, where the policy is not "error": nothing is updated."""
    if too_few == "skip":
        return state._replace(update=False)
    if state.running_mean is None:
        raise ValueError(
            f"{state.what}: too_few='running' needs running statistics, which this layer does not keep; use 'skip', or "
            "track_running_stats=True"
        )
    return state._replace(training=False, update=False)


def weighted(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    state: State,
    act: Activation,
    options: Options,
    too_few: str,
) -> Tensor:
    """Return ``act(bn(x) + residual)`` with moments weighted by the call's ``sample_weight``, in plain torch."""
    assert options.sample_weight is not None
    w = broadcast_weight(state.what, options.sample_weight, x)
    mask = None if state.mask is None else state.mask.unsqueeze(1)
    given = x
    if mask is not None:
        x, w = padded(mask, x, None), counted(mask, w)
        residual = None if residual is None else padded(mask, residual, None)  # NaN would reach dx, as 0·NaN
    if state.training and w.is_cpu and not torch.compiler.is_compiling():
        state = _enough_weight(state, w.expand(x.shape[0], 1, *x.shape[2:]), options.weighting, x, too_few)
    wide = wide_dtype(x.device)
    if state.training:
        moments = Moments.from_tensor(x, mask, options.sample_weight, options.weighting)
        mean, var = moments.mean, moments.var_or_zero
        if state.update:
            update_running(state, mean.detach(), var.detach(), moments.count.detach(), squares=moments.squares)
    else:
        assert state.running_mean is not None and state.running_var is not None
        mean, var = state.running_mean.to(wide), state.running_var.to(wide)
    rstd = (var + state.eps).rsqrt()
    y = elementwise(partial(_normalized, eps=state.eps, act=act), residual, x, mean, rstd, weight, bias)
    return y if mask is None else padded(mask, y, given if state.keep else None)


def _normalized(
    residual: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, act: Activation,
) -> Tensor:  # fmt: skip
    y, _ = normalized(x, (mean, rstd), eps)
    return finished(scaled(y, weight, bias), x, residual, act)


def _enough_weight(state: State, w: Tensor, weighting: Weighting, x: Tensor, too_few: str) -> State:
    """Return the state, after checking that the weights (N, 1, *S) leave a variance.

    Where no value counts at all, nothing is updated, as with a mask.
    """
    total, values = w.to(torch.float64).sum().item(), int((w > 0).sum())
    enough = values > 1 if weighting == "importance" else total >= LEAST_FREQUENCY
    learns = state.update and state.running_mean is not None
    if values == 0 or enough or (values > 1 and not learns):
        return state
    if too_few != "error":
        return without_variance(state, too_few)
    remedy = "evaluate with model.eval(), or give the layer too_few='running' or 'skip'"
    if values == 1:
        raise ValueError(
            f"{state.what}: sample_weight leaves one value per channel, so the variance is undefined; got "
            f"{describe(x)}. Let more count, {remedy}"
        )
    raise ValueError(
        f"{state.what}: sample_weight is a frequency, and the weights add up to {total:g}; the unbiased running "
        "variance divides by Σw − 1, so Σw must be above 1. Give weighting='importance' where only the weights' "
        f"ratios matter, {remedy}"
    )
