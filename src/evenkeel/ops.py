"""The operators: their schemas, what they return when traced, and their derivative under torch.compile.

    forward:   y = act((x − mean)·rstd·weight + bias + residual), and what the backward needs of it
    backward:  of all of it in one go, from x alone (and y, where a residual hides what the activation let through)

The native CPU library supplies the kernels. Everything above this module goes through ``fused``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evenkeel.layout import is_dense

_library = torch.library.Library("evenkeel", "DEF")
for _schema in (
    "stats(Tensor x) -> Tensor",
    "apply(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? residual, int activation)"
    " -> Tensor",
    "grad_stats(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? y,"
    " int activation) -> Tensor",
    "grad_input(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? y,"
    " Tensor? grad_means, int activation) -> Tensor",
    "forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var,"
    " bool training, float eps, int activation) -> (Tensor y, Tensor saved)",
    # As forward, and updates the running moments where `update` says so; momentum None averages over all batches.
    "forward_(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, bool update, float? momentum, float eps,"
    " int activation) -> (Tensor y, Tensor saved)",
    "backward(Tensor dy, Tensor x, Tensor saved, Tensor? weight, Tensor? bias, Tensor? y, bool training,"
    " int activation, bool need_input, bool need_residual, bool need_weight, bool need_bias)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def gate_needs(activation: int, residual: Any, bias: Tensor | None, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Which of bias and y the backward needs to find out what the activation let through; None for the others.

    Without a residual it recomputes that from x, so y need not be kept.
    """
    if not activation:
        return None, None
    return (bias, None) if residual is None else (None, y)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, bias, _, _, training, _, activation = inputs
    y, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(x, weight, saved, *gate_needs(activation, residual, bias, y))
    ctx.options = training, activation


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, saved, bias, y = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
    training, activation = ctx.options
    write_residual = need_residual and activation != 0
    dx, dresidual, dweight, dbias = torch.ops.evenkeel.backward(
        dy, x, saved, weight, bias, y, training, activation, need_x, write_residual, need_weight, need_bias
    )
    if need_residual and not write_residual:
        dresidual = dy
    return dx, dresidual, dweight, dbias, None, None, None, None, None


torch.library.register_autograd("evenkeel::forward", _backward, setup_context=_setup_context, lib=_library)


# ---- what the operators return, for tracing


def _empty_as(x: Tensor) -> Tensor:
    return torch.empty_like(x) if is_dense(x) else torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("evenkeel::stats", lib=_library)
def _(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=torch.float64)


@torch.library.register_fake("evenkeel::apply", lib=_library)
def _(x: Tensor, *_: Any) -> Tensor:
    return _empty_as(x)


@torch.library.register_fake("evenkeel::grad_stats", lib=_library)
def _(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=torch.float64)


@torch.library.register_fake("evenkeel::grad_input", lib=_library)
def _(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return _empty_as(x)


@torch.library.register_fake("evenkeel::forward", lib=_library)
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_as(x), x.new_empty((3, x.shape[1]), dtype=torch.float64)


@torch.library.register_fake("evenkeel::forward_", lib=_library)
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_as(x), x.new_empty((3, x.shape[1]), dtype=torch.float64)


@torch.library.register_fake("evenkeel::backward", lib=_library)
def _(
    dy: Tensor, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None,
    training: bool, activation: int, need_input: bool, need_residual: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return (
        _empty_as(x) if need_input else None,
        _empty_as(x) if need_residual else None,
        x.new_empty(x.shape[1]) if need_weight else None,
        x.new_empty(x.shape[1]) if need_bias else None,
    )
