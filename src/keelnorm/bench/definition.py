"""The definition of batch normalization, in float64 and plain tensor arithmetic.

Source: S. Ioffe, C. Szegedy, 2015, arXiv:1502.03167, algorithm 1 and the gradients of section 3.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ELEMENTS = 4 << 20  # 32 MB per float64 tensor; channels are independent, so they are computed in blocks
KINK = 1e-4

#: In bfloat16 a value of up to 8 is rounded before a residual is added, by up to half a unit in the last place.
KINKS = {torch.bfloat16: 0.04}


@dataclass
class Quantity:
    """An expected tensor, and per channel the magnitude that its rounding error is relative to.

    The magnitude is the largest term an element is computed from, or for a sum the sum of its
    absolute terms. Where x is centered, the mean is a term: the smaller the variance of a channel
    relative to its mean, the less precision is left.
    """

    value: Tensor
    scale: Tensor


def _blocks(x: Tensor) -> Iterator[slice]:
    channels = x.shape[1]
    step = max(1, BLOCK_ELEMENTS * channels // max(1, x.numel()))
    for start in range(0, channels, step):
        yield slice(start, min(start + step, channels))


def _sum_dims(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def _view(vector: Tensor, like: Tensor) -> Tensor:
    return vector.double().view(1, -1, *(1 for _ in like.shape[2:]))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, in two passes."""
    x = x.double()
    mean = x.mean(_sum_dims(x))
    return mean, (x - _view(mean, x)).square().mean(_sum_dims(x))


def normalize(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps)."""
    return (x.double() - _view(mean, x)) * _view((var.double() + eps).rsqrt(), x)


def _affine(normalized: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    out = normalized * _view(weight, normalized) + _view(bias, normalized)
    return out if residual is None else out + residual.double()


def _part(tensor: Tensor | None, block: slice) -> Tensor | None:
    return None if tensor is None else tensor[:, block]


@torch.no_grad()
def clear_kink(x: Tensor, residual: Tensor | None, dy: Tensor, state: Mapping[str, Tensor], eps: float) -> None:
    """Zero dy where the activation's input is close to zero.

    There, rounding decides whether a gradient passes, and both answers are right. With a gradient of
    zero, every result is defined.
    """
    for block in _blocks(x):
        part = x[:, block]
        normalized = normalize(part, *moments(part), eps)
        z = _affine(normalized, _part(residual, block), state["weight"][block], state["bias"][block])
        dy[:, block].masked_fill_(z.abs() < KINKS.get(x.dtype, KINK), 0.0)


@torch.no_grad()
def leave_kink(x: Tensor, residual: Tensor | None, state: Mapping[str, Tensor], eps: float) -> None:
    """Move the activation's inputs away from zero, where dy cannot be set to zero.

    Changes the residual if there is one, else x. Changing x moves the moments a little, so this is
    repeated until no input is close to zero.

    Raises:
        ValueError: Some inputs stay close to zero.
    """
    kink = KINKS.get(x.dtype, KINK)
    for block in _blocks(x):
        part, rest = x[:, block], _part(residual, block)
        weight, bias = state["weight"][block], state["bias"][block]
        for _ in range(20):
            mean, var = moments(part)
            z = _affine(normalize(part, mean, var, eps), rest, weight, bias)
            near = z.abs() < kink
            if not near.any():
                break
            step = torch.where(z < 0, -2.5 * kink, 2.5 * kink) * near
            if rest is not None:
                rest.add_(step.to(rest.dtype))
            else:
                part.add_((step * _view((var + eps).sqrt() / weight, part)).to(part.dtype))
        else:
            raise ValueError("the activation's input cannot be moved away from zero")


@torch.no_grad()
def inference(
    x: Tensor, residual: Tensor | None, state: Mapping[str, Tensor], *, eps: float, relu: bool
) -> dict[str, Quantity]:
    """Expected y with the running statistics."""
    y = torch.empty_like(x)
    scales = []
    for block in _blocks(x):
        part, rest = x[:, block], _part(residual, block)
        mean, var = state["running_mean"][block].double(), state["running_var"][block].double()
        weight, bias = state["weight"][block].double(), state["bias"][block].double()
        normalized = normalize(part, mean, var, eps)
        z = _affine(normalized, rest, weight, bias)
        y[:, block] = z.relu_() if relu else z
        offset = mean.abs() * (var + eps).rsqrt()
        scales.append(_output_scale(normalized, offset, rest, weight, bias))
    return {"y": Quantity(y, torch.cat(scales))}


def _output_scale(normalized: Tensor, offset: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    scale = weight.abs() * (_largest(normalized) + offset) + bias.abs()
    return scale if residual is None else scale + _largest(residual).double()


@torch.no_grad()
def training(
    x: Tensor,
    residual: Tensor | None,
    dy: Tensor,
    state: Mapping[str, Tensor],
    *,
    eps: float,
    momentum: float,
    relu: bool,
) -> dict[str, Quantity]:
    """Expected y, gradients and running statistics of one training step.

    Tensors of the size of x are rounded once, to its dtype; all others stay float64.
    """
    samples = x.numel() // x.shape[1]
    kept = {name: torch.empty_like(x) for name in ("y", "dx")}
    if residual is not None:
        kept["dresidual"] = torch.empty_like(x)
    values: defaultdict[str, list[Tensor]] = defaultdict(list)
    scales: defaultdict[str, list[Tensor]] = defaultdict(list)
    for block in _blocks(x):
        part, rest = x[:, block].double(), _part(residual, block)
        weight, bias = state["weight"][block].double(), state["bias"][block].double()
        mean, var = moments(part)
        rstd = (var + eps).rsqrt()
        offset = mean.abs() * rstd
        normalized = normalize(part, mean, var, eps)
        z = _affine(normalized, rest, weight, bias)
        dz = dy[:, block].double()
        if relu:
            dz = dz * (z > 0)
        dims = _sum_dims(part)
        terms = dz * normalized
        dweight, dbias = terms.sum(dims), dz.sum(dims)
        dx = dz - _view(dbias / samples, part) - normalized * _view(dweight / samples, part)
        kept["y"][:, block] = z.relu_() if relu else z
        scales["y"].append(_output_scale(normalized, offset, rest, weight, bias))
        kept["dx"][:, block] = dx * _view(weight * rstd, part)
        scales["dx"].append(weight.abs() * rstd * _largest(dz) * (1 + offset))
        if residual is not None:
            kept["dresidual"][:, block] = dz
            scales["dresidual"].append(_largest(dz))
        values["dweight"].append(dweight)
        values["dbias"].append(dbias)
        scales["dbias"].append(dz.abs().sum(dims))
        scales["dweight"].append(terms.abs().sum(dims) + scales["dbias"][-1] * offset)
        values["running_mean"].append(torch.lerp(state["running_mean"][block].double(), mean, momentum))
        scales["running_mean"].append(part.abs().mean(dims) + values["running_mean"][-1].abs())
        unbiased = var * samples / max(1, samples - 1)
        values["running_var"].append(torch.lerp(state["running_var"][block].double(), unbiased, momentum))
        scales["running_var"].append(values["running_var"][-1] + mean.abs() * var.sqrt())
    found = kept | {name: torch.cat(parts) for name, parts in values.items()}
    return {name: Quantity(value, torch.cat(scales[name])) for name, value in found.items()}


def _largest(x: Tensor) -> Tensor:
    largest: Tensor = torch.linalg.vector_norm(x, float("inf"), dim=_sum_dims(x))
    return largest
