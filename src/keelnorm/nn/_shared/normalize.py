"""Normalization as a step of a variant: by given moments in plain torch, or by those of the batch."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from keelnorm import functional
from keelnorm.engine import dispatch
from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import State
from keelnorm.engine.composite import centered, finished
from keelnorm.engine.layout import per_channel
from keelnorm.engine.recomputed_steps import elementwise
from keelnorm.moments import Moments, compute_dtype


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """Compute ``act((x − mean) / √(var + eps) · weight + bias + residual)``, differentiable in every argument.

    ``mean``, ``var``, ``weight`` and ``bias`` have the shape (C,), or broadcast to x.
    """
    return elementwise(partial(_normalized, eps=eps, act=act), residual, x, mean, var, weight, bias)


def _normalized(
    residual: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: Activation,
) -> Tensor:
    dtype = compute_dtype(x)
    mean, var = _broadcast(mean, x), _broadcast(var, x)
    y = centered(x, mean) * (var + eps).rsqrt().to(dtype)
    if weight is not None:
        y = y * _broadcast(weight, x).to(dtype)
    if bias is not None:
        y = y + _broadcast(bias, x).to(dtype)
    return finished(y, x, residual, act)


def _broadcast(values: Tensor, x: Tensor) -> Tensor:
    return per_channel(values, x) if values.dim() == 1 else values


def normalize_by_batch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: Activation,
    mask: Tensor | None,
    keep_moments: bool,
) -> tuple[Tensor, Moments | None]:
    """Normalize x by its own moments: ``act(bn(x) + residual)``, on the fused kernels where there is no mask.

    ``mask`` is None, or boolean with as many dimensions as x, broadcastable to it.

    Returns:
        The result, and the moments without their gradient; None unless ``keep_moments``, which costs a pass over x.
    """
    if mask is None:
        state = State(training=True, update=False, momentum=None, eps=eps)
        y = dispatch.batch_norm(x, residual, weight, bias, state, act)
        return y, functional.moments(x.detach()) if keep_moments else None
    moments = Moments.from_tensor(x, mask)
    var = moments.m2 / moments.count.clamp(min=1)  # 0 if the mask leaves no value
    detached = Moments(moments.count, moments.mean.detach(), moments.m2.detach())
    return normalize(x, moments.mean, var, weight, bias, eps, residual, act), detached
