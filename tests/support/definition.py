"""Batch normalization by its definition: float64, two passes, every gradient written out.

    xhat = (x − mean) / √(var + eps)       v = xhat·weight + bias + residual       y = act(v)
    g = dy where v > 0 (relu), dy (none)   dresidual = g
    dbias = Σg    dweight = Σ g·xhat       dx = weight / √(var + eps) · (g − Σg/M − xhat·Σ(g·xhat)/M)

In inference mean and var are given, and dx has its first term only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cases import Problem

#: Unit roundoff of float32: half the distance from 1 to the next number.
UNIT = 2.0**-24


class Quantity(NamedTuple):
    """A right result, and the magnitude of its summands, to which rounding errors are relative.

    ``scale`` has a value per channel.
    """

    value: Tensor
    scale: Tensor


def spread(values: Tensor, rank: int) -> Tensor:
    """C values in a shape that broadcasts against (N, C, *S)."""
    return values.view(1, -1, *([1] * (rank - 2)))


def over(x: Tensor) -> list[int]:
    """All dimensions except the channels."""
    return [0, *range(2, x.dim())]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel."""
    x = x.double()
    mean = x.mean(over(x))
    return mean, (x - spread(mean, x.dim())).square().mean(over(x))


def rms(x: Tensor) -> Tensor:
    """Root mean square of each channel."""
    return x.square().mean(over(x)).sqrt()


def expect(problem: Problem, *, eps: float, momentum: float) -> dict[str, Quantity]:
    """The right result of a forward and a backward: y, gradients and, in training, the new running statistics."""
    options, rank, x = problem.options, problem.x.dim(), problem.x.double()
    weight, bias = spread(problem.weight.double(), rank), spread(problem.bias.double(), rank)
    running_mean, running_var = problem.running_mean.double(), problem.running_var.double()
    count = x.numel() // x.shape[1]

    mean, var = moments(x) if options.training else (running_mean, running_var)
    rstd = spread((var + eps).rsqrt(), rank)
    xhat = (x - spread(mean, rank)) * rstd
    residual = torch.zeros_like(x) if problem.residual is None else problem.residual.double()
    value = xhat * weight + bias + residual
    y = value.clamp(min=0) if options.activation == "relu" else value

    g = problem.dy.double()
    if options.activation == "relu":
        g = torch.where(value > 0, g, 0)
    sum_g, sum_gxhat = g.sum(over(x)), (g * xhat).sum(over(x))
    along_mean, along_xhat = spread(sum_g, rank) / count, xhat * spread(sum_gxhat, rank) / count
    if not options.training:
        along_mean = along_xhat = torch.zeros_like(x)
    slope = rstd * weight

    found = {
        "y": Quantity(y, rms((xhat * weight).abs() + bias.abs() + residual.abs())),
        "dx": Quantity(
            slope * (g - along_mean - along_xhat), rms(slope.abs() * (g.abs() + along_mean.abs() + along_xhat.abs()))
        ),
        # An error of the mean enters every term, however near to the mean its x is.
        "dweight": Quantity(sum_gxhat, (g.abs() * torch.maximum(xhat.abs(), spread(rms(xhat), rank))).sum(over(x))),
        "dbias": Quantity(sum_g, g.abs().sum(over(x))),
    }
    if problem.residual is not None:
        found["dresidual"] = Quantity(g, rms(g))
    if options.training:
        keep = 1 - momentum
        found["running_mean"] = Quantity(
            keep * running_mean + momentum * mean, keep * running_mean.abs() + momentum * rms(x)
        )
        new_var = keep * running_var + momentum * var * count / (count - 1)
        found["running_var"] = Quantity(new_var, new_var)
    return found
