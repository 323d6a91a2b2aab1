"""The operators: their schemas, their outputs' shapes for tracing, and their derivative under torch.compile.

    forward:   y = act((x − mean)·rstd·weight + bias + residual), and the statistics that the backward needs
    backward:  all gradients in one pass, from x, and from y or the residual where an activation follows one
    inplace_, invert, backward_:  the same in x's own memory: y overwrites x, which the backward rebuilds

The native CPU library supplies the kernels for the CPU, and Triton's are registered here for GPUs, where compiled code
calls them by these names. Everything above this module goes through ``dispatch``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from keelnorm.engine.activations import NAMED
from keelnorm.engine.kernels import triton
from keelnorm.engine.layout import is_dense
from keelnorm.moments import compute_dtype

_library = torch.library.Library("keelnorm", "DEF")
_BN = "Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias"
_ACT = "int activation, float a, float b"
_RUNNING = "Tensor(b!)? running_mean, Tensor(c!)? running_var, Tensor(d!)? num_batches_tracked"
for _schema in (
    # Mean and biased variance per channel, of the values that the mask (N, *S) selects.
    "stats(Tensor x, Tensor? mask) -> Tensor",
    # Mean, var and rstd that normalize x, (3, C); the running statistics are updated as by forward_.
    f"measure_(Tensor x, {_RUNNING}, bool training, bool update, float? momentum, float eps, Tensor(e!)? counts=None)"
    " -> Tensor saved",
    f"apply({_BN}, Tensor? residual, {_ACT}) -> Tensor",
    # The rest of forward_, of which measure_ is the first part.
    f"finish(Tensor x, Tensor saved, Tensor? weight, Tensor? bias, Tensor? residual, {_ACT}) -> Tensor",
    f"grad_stats(Tensor dy, {_BN}, Tensor? y, Tensor? residual, {_ACT}) -> Tensor",
    f"grad_input(Tensor dy, {_BN}, Tensor? y, Tensor? residual, Tensor? grad_means, {_ACT}) -> Tensor",
    "forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var,"
    f" bool training, float eps, {_ACT}) -> (Tensor y, Tensor saved)",
    # As forward, and updates the running statistics where `update` says so; momentum None averages over all batches.
    f"forward_(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, {_RUNNING}, bool training, bool update,"
    # Channels of which something not finite would be stored keep their running statistics; `counts` (3, C) are those
    # of engine/update_counts.py. Values that the mask (N, *S) leaves out come out as 0, or as x where `keep` says so.
    f" float? momentum, float eps, {_ACT}, Tensor(e!)? counts=None, Tensor? mask=None, bool keep=False)"
    " -> (Tensor y, Tensor saved)",
    # As forward_; x becomes y.
    f"inplace_(Tensor(a!) x, Tensor? weight, Tensor? bias, {_RUNNING}, bool training, bool update, float? momentum,"
    f" float eps, {_ACT}, Tensor(e!)? counts=None) -> Tensor saved",
    # x from y, in y's layout: none, leaky_relu, elu.
    f"invert(Tensor y, Tensor saved, Tensor? weight, Tensor? bias, {_ACT}) -> Tensor",
    "backward(Tensor dy, Tensor x, Tensor saved, Tensor? weight, Tensor? bias, Tensor? y, Tensor? residual,"
    f" bool training, {_ACT}, bool need_input, bool need_residual, bool need_weight, bool need_bias,"
    " Tensor? mask=None, bool keep=False) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    # As backward without a residual; x becomes dx.
    f"backward_(Tensor dy, Tensor(a!) x, Tensor saved, Tensor? weight, Tensor? bias, bool training, {_ACT},"
    " bool need_weight, bool need_bias) -> (Tensor dweight, Tensor dbias)",
    # As forward_ in training and backward, of consecutive groups of samples, each normalized by itself; the last takes
    # all that are left. The running statistics take the groups in as one batch where `pooled` says so, else one by one.
    f"forward_groups_(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, {_RUNNING}, int groups, int size,"
    f" bool pooled, bool update, float? momentum, float eps, {_ACT}, Tensor(e!)? counts)"
    " -> (Tensor y, Tensor saved)",
    "backward_groups(Tensor dy, Tensor x, Tensor saved, Tensor? weight, Tensor? bias, Tensor? y, Tensor? residual,"
    f" int groups, int size, {_ACT}, bool need_input, bool need_residual, bool need_weight, bool need_bias)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

#: The operators of keelnorm.engine.kernels.triton.operators; groups run one by one there.
ON_GPUS = (
    "stats", "measure_", "apply", "finish", "grad_stats", "grad_input", "forward", "forward_", "inplace_", "invert",
    "backward", "backward_"
)  # fmt: skip


def _on_gpus(name: str) -> Callable[..., Any]:
    """Return an operator that loads Triton when it is first called."""

    def operator(*arguments: Any, **named: Any) -> Any:
        return getattr(triton.load(), name)(*arguments, **named)

    return operator


for _name in ON_GPUS:
    _library.impl(_name, _on_gpus(_name), "CUDA")

_RELU = NAMED["relu"].code


def gate_needs(
    activation: int, residual: Tensor | None, bias: Tensor | None, y: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return bias, y and residual, each as far as the backward needs it for the activation's derivative; else None.

    Without a residual the backward recomputes the activation's input from x. With one it reads y where y suffices
    (ReLU), else the residual.
    """
    if not activation:
        return None, None, None
    if residual is None:
        return bias, None, None
    return (None, y, None) if activation == _RELU else (bias, None, residual)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, bias, _, _, training, _, *activation = inputs
    y, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(x, weight, saved, *gate_needs(activation[0], residual, bias, y))
    ctx.training, ctx.activation = training, activation


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, saved, bias, y, residual = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
    write_residual = need_residual and ctx.activation[0] != 0
    dx, dresidual, dweight, dbias = torch.ops.keelnorm.backward(
        dy, x, saved, weight, bias, y, residual, ctx.training, *ctx.activation, need_x, write_residual, need_weight,
        need_bias,
    )  # fmt: skip
    if need_residual and not write_residual:
        dresidual = dy
    return dx, dresidual, dweight, dbias, *[None] * 7


torch.library.register_autograd("keelnorm::forward", _backward, setup_context=_setup_context, lib=_library)


# ---- shapes and dtypes of the outputs, for tracing


def _empty_as(x: Tensor) -> Tensor:
    return torch.empty_like(x) if is_dense(x) else torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor, rows: int) -> Tensor:
    return x.new_empty((rows, x.shape[1]), dtype=torch.float64)


def _per_channel(x: Tensor, wanted: bool) -> Tensor | None:
    return x.new_empty(x.shape[1], dtype=compute_dtype(x)) if wanted else None


@torch.library.register_fake("keelnorm::stats", lib=_library)
def _(x: Tensor, mask: Tensor | None) -> Tensor:
    return _rows(x, 2)


@torch.library.register_fake("keelnorm::grad_stats", lib=_library)
def _(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return _rows(x, 2)


@torch.library.register_fake("keelnorm::inplace_", lib=_library)
@torch.library.register_fake("keelnorm::measure_", lib=_library)
def _(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return _rows(x, 3)


@torch.library.register_fake("keelnorm::apply", lib=_library)
@torch.library.register_fake("keelnorm::finish", lib=_library)
@torch.library.register_fake("keelnorm::invert", lib=_library)
def _(x: Tensor, *_: Any) -> Tensor:
    return _empty_as(x)


@torch.library.register_fake("keelnorm::grad_input", lib=_library)
def _(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return _empty_as(x)


@torch.library.register_fake("keelnorm::forward", lib=_library)
@torch.library.register_fake("keelnorm::forward_", lib=_library)
def _(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _empty_as(x), _rows(x, 3)


@torch.library.register_fake("keelnorm::backward", lib=_library)
def _(dy: Tensor, x: Tensor, *others: Any, **_: Any) -> tuple[Tensor | None, ...]:
    return _gradients(x, *others[9:13])


def _gradients(
    x: Tensor, need_input: bool, need_residual: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, ...]:
    dx = _empty_as(x) if need_input else None
    dresidual = _empty_as(x) if need_residual else None
    return dx, dresidual, _per_channel(x, need_weight), _per_channel(x, need_bias)


@torch.library.register_fake("keelnorm::forward_groups_", lib=_library)
def _(x: Tensor, *others: Any, **_: Any) -> tuple[Tensor, Tensor]:
    return _empty_as(x), _rows(x, 3 * others[6])


@torch.library.register_fake("keelnorm::backward_groups", lib=_library)
def _(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    return _gradients(x, *others[-4:])


@torch.library.register_fake("keelnorm::backward_", lib=_library)
def _(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    *_, need_weight, need_bias = others
    return _per_channel(x, need_weight), _per_channel(x, need_bias)
