"""Plain batch normalization as a part of a variant: its result, and the moments that it normalized with."""

from __future__ import annotations

from torch import Tensor

from keelnorm import functional
from keelnorm.engine import dispatch
from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import State
from keelnorm.moments import Moments
from keelnorm.nn._shared.variant import normalize


def by_batch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: Activation,
    mask: Tensor | None,
    wanted: bool,
) -> tuple[Tensor, Moments | None]:
    """``act(bn(x) + residual)`` with x's own moments, on the fused kernels where there is no mask; and these moments.

    Args:
        mask: None, or boolean with as many dimensions as x, broadcastable to it.
        wanted: Whether the moments are asked for, which costs one more reading of x.
    """
    if mask is None:
        y = dispatch.batch_norm(x, residual, weight, bias, State(None, None, None, True, False, None, eps), act)
        return y, functional.moments(x.detach()) if wanted else None
    moments = Moments.from_tensor(x, mask)
    var = moments.m2 / moments.count.clamp(min=1)  # 0 where the mask leaves no value
    detached = Moments(moments.count, moments.mean.detach(), moments.m2.detach())
    return normalize(x, moments.mean, var, weight, bias, eps, residual, act), detached
