"""The reference back end: the meaning of every kernel in plain torch, for any device, dtype and layout.

The formulas, per channel with M = N·S values and g the gradient in front of the activation:

    xhat = (x − mean)·rstd            y = act(xhat·weight + bias + residual)
    dbias = Σg     dweight = Σg·xhat     dx = weight·rstd·(g − Σg/M − xhat·Σ(g·xhat)/M)

They are evaluated around a rounded mean (the ``centre``), so that x − centre is exact where it matters, and what the
rounding left over goes into the shift.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from evenkeel.layout import per_channel, reduced_dims
from evenkeel.moments import Moments, compute_dtype, wide_dtype

name = "reference"
calls = 0


class _Affine(NamedTuple):
    """What turns x into the value in front of the activation: (x − centre)·scale + shift."""

    centre: Tensor
    scale: Tensor
    shift: Tensor


def _affine(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> _Affine:
    dtype = compute_dtype(x)
    centre = mean.to(dtype)
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    shift = (centre.to(mean.dtype) - mean) * scale
    if bias is not None:
        shift = shift + bias.to(shift.dtype)
    return _Affine(*(per_channel(v.to(dtype), x) for v in (centre, scale, shift)))


def _gate(dy: Tensor, x: Tensor, affine: _Affine, y: Tensor | None, activation: int) -> Tensor:
    """g: the gradient in front of the activation, in the compute dtype."""
    dtype = compute_dtype(x)
    g = dy.to(dtype)
    if activation == 0:
        return g
    output = y if y is not None else (x.to(dtype) - affine.centre) * affine.scale + affine.shift
    return torch.where(output <= 0, 0, g)


def stats(x: Tensor) -> Moments:
    """Moments of each channel."""
    _count_call()
    return Moments.from_tensor(x)


def apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> Tensor:
    """``act(bn(x) + residual)`` with the given mean and 1/√(var + ε)."""
    _count_call()
    affine = _affine(x, mean, rstd, weight, bias)
    y = (x.to(compute_dtype(x)) - affine.centre) * affine.scale + affine.shift
    dtype = x.dtype
    if residual is not None:
        y = y + residual
        dtype = torch.promote_types(dtype, residual.dtype)
    if activation == 1:
        y = torch.relu(y)
    return y.to(dtype)


def grad_stats(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """Σg and Σg·xhat: the gradients of bias and weight, and what ``grad_input`` needs."""
    _count_call()
    affine = _affine(x, mean, rstd, weight, bias)
    g = _gate(dy, x, affine, y, activation)
    wide, dims = wide_dtype(x.device), reduced_dims(x)
    sum_g = g.sum(dims, dtype=wide)
    around_centre = (g * (x.to(g.dtype) - affine.centre)).sum(dims, dtype=wide)
    return sum_g, (around_centre - (mean - affine.centre.flatten().to(wide)) * sum_g) * rstd


def grad_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    grad_means: tuple[Tensor, Tensor] | None,
    activation: int,
) -> Tensor:
    """dx, from the means of g and g·xhat over all values that were normalized together (None: fixed statistics)."""
    _count_call()
    affine = _affine(x, mean, rstd, weight, bias)
    g = _gate(dy, x, affine, y, activation)
    dx = g * affine.scale
    if grad_means is not None:
        mean_g, mean_gxhat = grad_means
        scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
        slope = -scale * rstd * mean_gxhat
        offset = -scale * mean_g - slope * (mean - affine.centre.flatten().to(mean.dtype))
        dx = (
            dx
            + (x.to(g.dtype) - affine.centre) * per_channel(slope.to(g.dtype), x)
            + per_channel(offset.to(g.dtype), x)
        )
    return dx.to(x.dtype)


def _count_call() -> None:
    global calls
    calls += 1
