"""A random call against its definition in float64: y, all gradients, the running statistics.

    mean = Σw·x/Σw    var = Σw·(x − mean)²/Σw    v = x̂·weight + bias + residual    y = act(v)    g = dy·act′(v)
    dx = weight·rstd·(g − w/Σw·Σg − x̂·w/Σw·Σ(g·x̂))    dweight = Σg·x̂    dbias = Σg    dresidual = g

Every value has a bound of its own: some roundings, of the dtype where it is stored and of the dtype that is computed in
everywhere before, of the terms that it is made of; carried through the activation by its steepness.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from kernels.random_cases import Case, Tensors, in_shape_of, laid, tensors_of
from support.activations import function_of, kinks_of
from torch import Tensor, nn

import keelnorm as kn

#: Roundings of the dtype that is computed in.
FEW = 32.0
#: Roundings of y that may reach x in place, as keelnorm.engine.inplace has them.
REBUILT = {torch.float32: 64.0, torch.float64: 64.0, torch.bfloat16: 8.0, torch.float16: 8.0}
SATURATED = 128.0


class Right(NamedTuple):
    """A result, and how far from it a good one may be."""

    value: Tensor
    allowed: Tensor | float


def check(case: Case) -> str | None:
    """What is wrong with its results, or None."""
    given = tensors_of(case)
    right = definition_of(case, given)
    found = run(case, given)
    if found.keys() != right.keys():
        return f"{sorted(found)} instead of {sorted(right)}\n{case}"
    for name, value in found.items():
        told = difference(value, *right[name])
        if told is not None:
            return f"{name}: {told}\n{case}"
    return None


def difference(value: Tensor, wanted: Tensor, allowed: Tensor | float) -> str | None:
    """How a value is wrong, or None."""
    if value.shape != wanted.shape:
        return f"shape {tuple(value.shape)} instead of {tuple(wanted.shape)}"
    error = (value.double() - wanted).abs()
    same = (value.double() == wanted) | (value.isnan() & wanted.isnan())
    good = same | (error <= allowed)
    if good.all():
        return None
    worst = torch.where(good, 0, error / allowed).nan_to_num(torch.inf).max().item()
    return f"{(~good).sum().item()} of {good.numel()} values are wrong, the worst by {worst:.3g} bounds"


def run(case: Case, given: Tensors) -> dict[str, Tensor]:
    """All results of the call, by name; "changed" among them where an argument did though it must not."""
    leaves = {
        name: t.detach().requires_grad_()
        for name in ("x", "residual", "weight", "bias")
        if (t := getattr(given, name)) is not None
    }
    kept = [t for t in (given.dy, given.mask, given.sample_weight, *leaves.values()) if t is not None]
    before = [t.detach().clone() for t in kept]
    x = leaves["x"]
    if case.inplace:
        x = laid(torch.zeros_like(x), case.layouts[0], case.dtype).copy_(x)
    mean, var = (None if t is None else laid(t, case.vector_layout) for t in (given.running_mean, given.running_var))
    with kn.kernels.use(case.kernel):
        y = kn.functional.batch_norm(
            x, mean, var, leaves.get("weight"), leaves.get("bias"), case.training, case.momentum, case.eps,
            activation=case.activation,
            residual=leaves.get("residual"), inplace=case.inplace, mask=given.mask, sample_weight=given.sample_weight,
            padding=case.padding,
        )  # fmt: skip
        found = {"y": y.detach().clone()}
        gradients = torch.autograd.grad(y, list(leaves.values()), given.dy)
    found |= {f"d{name}": value for name, value in zip(leaves, gradients, strict=True)}
    if case.running:
        found |= {"running_mean": mean, "running_var": var}
    for value, leaf in zip(gradients, leaves.values(), strict=True):
        if value.dtype != leaf.dtype:
            found["a gradient of another dtype"] = value
    if any(not torch.equal(t.nan_to_num(), old.nan_to_num()) for t, old in zip(kept, before, strict=True)):
        found["a changed argument"] = torch.ones(())
    return found


def definition_of(case: Case, given: Tensors) -> dict[str, Right]:
    """The right results by name. Where rounding decides on the side of a kink, given.dy becomes 0."""
    unit = torch.finfo(case.dtype).eps / 2
    of_vectors = torch.finfo(case.vectors).eps / 2
    tiny = smallest(case.dtype)
    fine = FEW * (2.0**-53 if case.dtype == torch.float64 else 2.0**-24)
    over = [d for d in range(given.x.dim()) if d != 1]

    def spread(values: Tensor | None, otherwise: float) -> Tensor:
        values = torch.full(case.shape[1:2], otherwise) if values is None else values
        return values.double().view(1, -1, *[1] * (len(case.shape) - 2))

    def total(values: Tensor) -> Tensor:
        return values.sum(over, keepdim=True)

    counts = torch.ones(case.shape, dtype=torch.bool) if given.mask is None else in_shape_of(given.x, given.mask)
    x, dy = (torch.where(counts, t.double(), 0) for t in (given.x, given.dy))
    residual = torch.zeros(()) if given.residual is None else torch.where(counts, given.residual.double(), 0)
    weight, bias = spread(given.weight, 1.0), spread(given.bias, 0.0)
    w = counts.double()
    if given.sample_weight is not None:
        w = w * in_shape_of(given.x, given.sample_weight)
    share = w / total(w) if case.training else torch.zeros_like(w)

    # ---- forward
    old_mean, old_var = spread(given.running_mean, 0.0), spread(given.running_var, 1.0)
    mean, var = old_mean, old_var
    if case.training:
        mean = total(share * x)
        var = total(share * (x - mean).square())
    rstd = (var + case.eps).rsqrt()
    xhat = (x - mean) * rstd
    v = (xhat * weight + bias + residual).requires_grad_()
    y = function_of(case.activation)(v)
    slope = torch.autograd.grad(y.sum(), v)[0]
    y, v = y.detach(), v.detach()
    off_mean = fine * var.sqrt() + 2.0**-50 * mean.abs()
    off_xhat = fine * (1 + xhat.abs()) + 2.0**-50 * mean.abs() * rstd
    off_v = weight.abs() * off_xhat + fine * ((xhat * weight).abs() + bias.abs() + residual.abs())
    steepest = max(1.2, getattr(case.activation, "negative_slope", 0.0))
    off_y = steepest * off_v + fine * (1 + v.abs()) * (case.activation is not None) + unit * y.abs() + tiny
    if case.inplace:  # what the backward has for x
        most = max(REBUILT[case.dtype], SATURATED * isinstance(case.activation, nn.ELU)) * 2 * unit
        lost = ((2 * unit * y.abs() + tiny) / slope + fine * (v.abs() + bias.abs())) / weight.abs()
        off_xhat = off_xhat + torch.minimum(lost.nan_to_num(torch.inf), most * (1 + xhat.abs()))
        off_xhat = off_xhat + 2 * unit * x.abs() * rstd + tiny
        off_v = off_v + weight.abs() * off_xhat
    for kink in kinks_of(case.activation):
        near = (v - kink).abs() <= 4 * off_v
        if isinstance(case.activation, nn.Softplus):  # which jumps there
            off_y = torch.where(near, torch.inf, off_y)
        if (near & counts).any():
            dy = torch.where(near, 0, dy)
            given.dy = torch.where(near & counts, 0, given.dy)

    # ---- backward
    g = dy * slope
    off_g = fine * g.abs()
    if not isinstance(case.activation, nn.ReLU | nn.ReLU6 | nn.LeakyReLU | type(None)):
        off_g = off_g + dy.abs() * (2 * off_v + fine)
    if not isinstance(case.activation, nn.ReLU | type(None)):  # may be stored between two passes
        off_g = off_g + unit * g.abs()
    sum_g, sum_gxhat = total(g), total(g * xhat)
    off_sum_g = total(off_g)
    off_sum_gxhat = total(off_g * xhat.abs() + g.abs() * off_xhat + fine * (g * xhat).abs())
    scale = (weight * rstd).abs()
    dx = weight * rstd * (g - share * sum_g - xhat * share * sum_gxhat)
    off_dx = off_g + share * (off_sum_g + xhat.abs() * off_sum_gxhat + off_xhat * sum_gxhat.abs())
    # With weights the terms are added up by autograd, in x's dtype.
    off_dx = off_dx + (2 * unit * case.sample_weight + fine) * (
        g.abs() + share * sum_g.abs() + share * (xhat * sum_gxhat).abs()
    )
    off_dx = scale * off_dx + unit * dx.abs() + tiny

    # ---- what the mask leaves out, and vectors
    left = (given.x, given.dy) if case.padding == "keep" else (torch.zeros(()), torch.zeros(()))
    right = {
        "y": Right(torch.where(counts, y, left[0].double()), off_y),
        "dx": Right(torch.where(counts, dx, left[1].double()), off_dx),
    }
    if given.residual is not None:
        right["dresidual"] = Right(torch.where(counts, g, 0), off_g + unit * g.abs() + tiny)
    vectors = {"dweight": (given.weight, sum_gxhat, off_sum_gxhat), "dbias": (given.bias, sum_g, off_sum_g)}
    for name, (parameter, value, off) in vectors.items():
        if parameter is not None:
            right[name] = Right(value.flatten(), (off + of_vectors * value.abs() + tiny).flatten())
    if case.running:
        keep, momentum, number = 1 - case.momentum, case.momentum, total(w)
        new = old_mean, old_var
        if case.training:
            new = keep * old_mean + momentum * mean, keep * old_var + momentum * var * number / (number - 1)
        errors = (
            momentum * off_mean + fine * (keep * old_mean).abs(),
            2 * fine * new[1] + 4 * (2.0**-50 * mean).square(),
        )
        for name, value, error in zip(("running_mean", "running_var"), new, errors, strict=True):
            allowed = (
                error + of_vectors * value.abs() * 1.01 + smallest(case.vectors)
                if case.training
                else torch.zeros_like(value)
            )
            right[name] = Right(value.flatten(), allowed.flatten())
    return right


def smallest(dtype: torch.dtype) -> float:
    """How far apart numbers are near 0; bfloat16's instructions take those below the normal ones for 0."""
    numbers = torch.finfo(dtype)
    return numbers.smallest_normal * (1 if dtype == torch.bfloat16 else numbers.eps)
