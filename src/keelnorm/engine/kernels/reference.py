"""The reference back end: the definition of every kernel in plain torch, for any device, dtype and layout.

The formulas, per channel with M = N·S values and g the gradient before the activation:

    xhat = (x − mean)·rstd       v = xhat·weight + bias + residual       y = act(v)       g = dy·act′(v)
    dbias = Σg     dweight = Σg·xhat     dx = weight·rstd·(g − Σg/M − xhat·Σ(g·xhat)/M)     dresidual = g

They are evaluated around the rounded mean (the ``center``), so that x − center is exact for x near the mean; the shift
corrects for the rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keelnorm.engine.activations import Activation
from keelnorm.engine.layout import per_channel, reduced_dims
from keelnorm.moments import Moments, compute_dtype, wide_dtype

name = "reference"
calls = 0


class _Affine(NamedTuple):
    """The coefficients of the value before the activation, (x − center)·scale + shift."""

    center: Tensor
    scale: Tensor
    shift: Tensor


def _affine(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> _Affine:
    dtype = compute_dtype(x)
    center = mean.to(dtype)
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    shift = (center.to(mean.dtype) - mean) * scale
    if bias is not None:
        shift = shift + bias.to(shift.dtype)
    return _Affine(*(per_channel(v.to(dtype), x) for v in (center, scale, shift)))


def _preactivation(x: Tensor, affine: _Affine, residual: Tensor | None) -> Tensor:
    v = (x.to(compute_dtype(x)) - affine.center) * affine.scale + affine.shift
    return v if residual is None else v + residual


def _gate(dy: Tensor, x: Tensor, affine: _Affine, y: Tensor | None, residual: Tensor | None, act: Activation) -> Tensor:
    """g, the gradient before the activation, in the compute dtype or a wider one; v is y, if given (ReLU)."""
    g = dy.to(torch.promote_types(compute_dtype(x), dy.dtype))
    if act.code == 0:
        return g
    return act.gradient(g, y if y is not None else _preactivation(x, affine, residual)).to(g.dtype)


def stats(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Moments of each channel, over the values that count by ``mask`` (N, *S)."""
    _count_call()
    return Moments.from_tensor(x, mask)


def apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """``act(bn(x) + residual)`` with the given mean and 1/√(var + ε)."""
    _count_call()
    v = _preactivation(x, _affine(x, mean, rstd, weight, bias), residual)
    return act.forward(v).to(x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))


def grad_stats(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    residual: Tensor | None,
    act: Activation,
) -> tuple[Tensor, Tensor]:
    """Σg and Σg·xhat: the gradients of bias and weight, which ``grad_input`` takes the means of."""
    _count_call()
    affine = _affine(x, mean, rstd, weight, bias)
    g = _gate(dy, x, affine, y, residual, act)
    wide, dims = wide_dtype(x.device), reduced_dims(x)
    sum_g = g.sum(dims, dtype=wide)
    around_center = (g * (x.to(g.dtype) - affine.center)).sum(dims, dtype=wide)
    return sum_g, (around_center - (mean - affine.center.flatten().to(wide)) * sum_g) * rstd


def grad_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    residual: Tensor | None,
    grad_means: tuple[Tensor, Tensor] | None,
    act: Activation,
) -> Tensor:
    """Compute dx from the means of g and g·xhat over all values normalized together (None: fixed statistics)."""
    _count_call()
    affine = _affine(x, mean, rstd, weight, bias)
    g = _gate(dy, x, affine, y, residual, act)
    dx = g * affine.scale
    if grad_means is not None:
        mean_g, mean_gxhat = grad_means
        scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
        slope = -scale * rstd * mean_gxhat
        offset = -scale * mean_g - slope * (mean - affine.center.flatten().to(mean.dtype))
        dx = (
            dx
            + (x.to(g.dtype) - affine.center) * per_channel(slope.to(g.dtype), x)
            + per_channel(offset.to(g.dtype), x)
        )
    return dx.to(x.dtype)


def grad_residual(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """Compute dresidual = g, in dy's dtype."""
    _count_call()
    return _gate(dy, x, _affine(x, mean, rstd, weight, bias), y, residual, act).to(dy.dtype)


def invert(
    y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, act: Activation
) -> Tensor:
    """Rebuild x = mean + (act⁻¹(y) − bias)/(weight·rstd), in y's dtype and layout.

    Clamped to finite values: x was finite where y is, and y's rounding error must not turn it into infinity.
    """
    _count_call()
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    v = act.inverse(y.to(rstd.dtype))
    if bias is not None:
        v = v - per_channel(bias.to(rstd.dtype), y)
    largest = torch.finfo(y.dtype).max
    return (per_channel(mean, y) + v / per_channel(scale, y)).clamp(-largest, largest).to(y.dtype)


def _count_call() -> None:
    global calls
    calls += 1
