"""Forward and backward from the reference operators, where no fast operator runs."""

from __future__ import annotations

import torch
from torch import Tensor

from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import Kept, Needs, State
from keelnorm.engine.kernels import reference
from keelnorm.engine.layout import counted
from keelnorm.engine.running_statistics import update_running
from keelnorm.moments import wide_dtype


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    state: State,
    act: Activation,
    saved: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return y, and (mean, var, rstd) as one (3, C) tensor.

    Args:
        saved: (mean, var, rstd) to normalize with. None finds them, and updates the running statistics.
    """
    given = saved is not None
    count: int | Tensor = 0
    if saved is None:
        saved, count = statistics(x, state)
    mean, _, rstd = saved.unbind()
    if state.mask is None:
        y = reference.apply(x, mean, rstd, weight, bias, residual, act)
    else:
        counts = state.mask.unsqueeze(1)
        y = reference.apply(counted(counts, x), mean, rstd, weight, bias, residual, act)
        y = counted(counts, y, x if state.keep else None)
    if not given:
        update(x, saved, count, state)
    return y, saved


def statistics(x: Tensor, state: State) -> tuple[Tensor, int | Tensor]:
    """Return (mean, var, rstd), and the number of values per channel."""
    count: int | Tensor = x.numel() // max(x.shape[1], 1)
    if state.training:
        moments = reference.stats(x, state.mask)
        if state.mask is not None:
            count = state.mask.sum()
        # An empty batch has no variance; any will do for no values.
        mean, var = moments.mean, moments.m2 / moments.count.clamp(min=1)
    else:
        assert state.running_mean is not None and state.running_var is not None
        wide = wide_dtype(x.device)
        mean, var = state.running_mean.to(wide), state.running_var.to(wide)
    return torch.stack([mean, var, (var + state.eps).rsqrt()]), count


def update(x: Tensor, saved: Tensor, count: int | Tensor, state: State) -> None:
    """Update the running statistics, or give the batch's moments to the state's sink."""
    if state.training and state.update and x.numel() > 0:
        update_running(state, saved[0], saved[1], count)


def fill_sink(x: Tensor, saved: Tensor, state: State) -> None:
    """Give the state's sink the moments that a fast operator found, which knows of no sink."""
    count = x.numel() // max(x.shape[1], 1) if state.mask is None else state.mask.sum()
    update(x, saved, count, state)


def backward(dy: Tensor, kept: Kept, need: Needs) -> tuple[Tensor | None, ...]:
    """Return dx, dresidual, dweight, dbias, the first two as far as they are needed."""
    x, residual, act = kept.x, kept.residual, kept.act
    count: int | Tensor = max(x.numel() // max(x.shape[1], 1), 1)
    given_dy, counts = dy, None
    if kept.mask is not None:
        counts, count = kept.mask.unsqueeze(1), kept.mask.sum().clamp(min=1)
        dy, x = counted(counts, dy), counted(counts, x)
        residual = None if residual is None else counted(counts, residual)
    mean, _, rstd = kept.saved
    given = (dy, x, mean, rstd, kept.weight, kept.bias, kept.y, residual)
    sum_g, sum_gxhat = reference.grad_stats(*given, act)
    dx = None
    if need.x:
        dx = reference.grad_input(*given, (sum_g / count, sum_gxhat / count) if kept.training else None, act)
        if counts is not None:
            dx = counted(counts, dx, given_dy if kept.keep else None)
    dresidual = reference.grad_residual(*given, act) if need.residual else None
    return dx, dresidual, sum_gxhat, sum_g  # autograd gives the last two the dtypes of weight and bias
