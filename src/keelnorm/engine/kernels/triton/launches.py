"""Launches of the kernels: which kernel runs, over which grid, with which arguments.

The operators have checked all arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keelnorm.engine.kernels.triton.apply import apply_kernel, coefficient_kernel
from keelnorm.engine.kernels.triton.device import launching
from keelnorm.engine.kernels.triton.grad_input import grad_input_kernel, slope_kernel
from keelnorm.engine.kernels.triton.grad_stats import grad_merge_kernel, grad_part_kernel
from keelnorm.engine.kernels.triton.invert import invert_kernel
from keelnorm.engine.kernels.triton.on_chip import backward_kernel, forward_kernel
from keelnorm.engine.kernels.triton.stats import merge_kernel, part_kernel
from keelnorm.engine.kernels.triton.tiling import View, divide_up, power_of_two
from keelnorm.engine.kernels.triton.tuning import choose

_CHANNELS = 32
"""Channels of a program that works on vectors over the channels."""
_MERGED = 64
"""Parts that a merging program loads at a time."""


class Act(NamedTuple):
    """An activation as kernels take it: its name and parameters."""

    name: str = "none"
    a: float = 0.0
    b: float = 0.0


class Call(NamedTuple):
    """The arguments that most launches share.

    Args:
        x: The values; y in `invert`.
        view: How the kernels see x.
        act: The activation.
        weight, bias: γ and β, (C,); None for ones and zeros.
        mask: Which values count, (N, *S); None for all.
        keep: Whether masked values of a result are those of its input; else they are 0.
    """

    x: Tensor
    view: View
    act: Act = Act()
    weight: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    keep: bool = False


class GradientInputs(NamedTuple):
    """The tensors that a backward reads beside x."""

    dy: Tensor
    y: Tensor | None
    residual: Tensor | None


class Running(NamedTuple):
    """The running statistics, and how they are updated."""

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None
    counts: Tensor | None = None
    update: bool = False
    momentum: float | None = 0.0


def _or(t: Tensor | None, x: Tensor) -> Tensor:
    """t, or x as the pointer of an argument that the kernel does not read."""
    return x if t is None else t


def _bytes(mask: Tensor | None, x: Tensor) -> Tensor:
    return x if mask is None else mask.view(torch.uint8)


def _empty_rows(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((rows, x.shape[1]), dtype=dtype, device=x.device)


def _count_batch(call: Call, running: Running) -> bool:
    """Count the batch here, or return True where the kernel is to count it.

    With a mask only the device knows whether there are two values. A cumulative average reads the new count.
    """
    if not running.update or running.batches is None:
        return False
    if call.mask is None:
        if call.view.values < 2 or running.momentum is not None:
            return call.view.values > 1
        running.batches.add_(1)
    else:
        running.batches.add_(call.mask.sum() > 1)
    return False


def moments(call: Call, running: Running | None = None, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Find (mean, var, rstd) (3, C) and the coefficients (3, C) of y, by two kernels."""
    x, view, weight, bias, mask = call.x, call.view, call.weight, call.bias, call.mask
    cut = choose(view, x).reduction
    running = running or Running()
    kernel_counts_batch = _count_batch(call, running)
    updates = running.update and running.mean is not None
    saved, coefficients = _empty_rows(x, 3, torch.float64), _empty_rows(x, 3, torch.float32)
    parts = torch.empty((3, cut.splits, view.c), dtype=torch.float64, device=x.device)
    with launching(x):
        part_kernel[cut.blocks, cut.splits](
            x, _bytes(mask, x), parts, _or(running.batches, x), view.n, view.c, view.s, cut.tiles, cut.per_program,
            A=cut.a, B=cut.b, LAST=view.last, WIDE=view.wide, MASKED=mask is not None, COUNT_BATCH=kernel_counts_batch,
            num_warps=cut.warps,
        )  # fmt: skip
        merge_kernel[divide_up(view.c, _CHANNELS),](
            parts, saved, coefficients, _or(weight, x), _or(bias, x), _or(running.mean, x), _or(running.var, x),
            _or(running.batches, x), _or(running.counts, x), view.c, cut.splits, running.momentum or 0.0, eps,
            SPLITS=min(power_of_two(cut.splits), _MERGED), B=_CHANNELS, HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None, UPDATE=updates, CUMULATIVE=running.momentum is None,
            HAS_COUNTS=running.counts is not None, COEFFICIENTS=True,
        )  # fmt: skip
    return saved, coefficients


def measure(call: Call, running: Running, training: bool, eps: float) -> tuple[Tensor, Tensor]:
    """As `moments` in training; outside it from the running statistics."""
    if training:
        return moments(call, running, eps)
    assert running.mean is not None and running.var is not None
    saved = _empty_rows(call.x, 3, torch.float64)
    return saved, _coefficients(call, running.mean, running.var, saved, eps)


def coefficients(call: Call, mean: Tensor, rstd: Tensor) -> Tensor:
    """center, scale, shift (3, C) of y = act((x − center)·scale + shift + residual)."""
    return _coefficients(call, mean, rstd, None, 0.0)


def _coefficients(call: Call, mean: Tensor, rstd_or_var: Tensor, saved: Tensor | None, eps: float) -> Tensor:
    """Coefficients from rstd; with ``saved`` from the running variance, and (mean, var, rstd) are written there."""
    x, view, weight, bias = call.x, call.view, call.weight, call.bias
    found = _empty_rows(x, 3, torch.float32)
    with launching(x):
        coefficient_kernel[divide_up(view.c, _CHANNELS),](
            mean, rstd_or_var, _or(saved, x), found, _or(weight, x), _or(bias, x), view.c, eps,
            B=_CHANNELS, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, RUNNING=saved is not None,
        )  # fmt: skip
    return found


def apply(call: Call, residual: Tensor | None, y: Tensor, coefficients: Tensor) -> None:
    """Write y, which may be x."""
    x, view, act, mask, keep = call.x, call.view, call.act, call.mask, call.keep
    cut = choose(view, x).elementwise
    with launching(x):
        apply_kernel[cut.blocks, cut.splits](
            x, _or(residual, x), _bytes(mask, x), y, coefficients, view.n, view.c, view.s, act.a, act.b,
            A=cut.a, B=cut.b, LAST=view.last, WIDE=view.wide, ACT=act.name, HAS_RESIDUAL=residual is not None,
            MASKED=mask is not None, KEEP=keep, num_warps=cut.warps,
        )  # fmt: skip


def forward(call: Call, residual: Tensor | None, y: Tensor, running: Running, training: bool, eps: float) -> Tensor:
    """Write y (which may be x), update the running statistics, and return (mean, var, rstd)."""
    x, view, act, weight, bias, mask, keep = call.x, call.view, call.act, call.weight, call.bias, call.mask, call.keep
    cut = choose(view, x).forward
    if not training or cut is None:
        saved, found = measure(call, running, training, eps)
        apply(call, residual, y, found)
        return saved
    saved = _empty_rows(x, 3, torch.float64)
    kernel_counts_batch = _count_batch(call, running)
    with launching(x):
        forward_kernel[cut.blocks,](
            x, _or(residual, x), _bytes(mask, x), y, saved, _or(weight, x), _or(bias, x), _or(running.mean, x),
            _or(running.var, x), _or(running.batches, x), _or(running.counts, x), view.n, view.c, view.s,
            running.momentum or 0.0, eps, act.a, act.b,
            A=cut.a, B=cut.b, LAST=view.last, WIDE=view.wide, ACT=act.name, HAS_RESIDUAL=residual is not None,
            MASKED=mask is not None, KEEP=keep, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            UPDATE=running.update and running.mean is not None, CUMULATIVE=running.momentum is None,
            HAS_COUNTS=running.counts is not None, COUNT_BATCH=kernel_counts_batch, num_warps=cut.warps,
        )  # fmt: skip
    return saved


def sums(call: Call, inputs: GradientInputs, mean: Tensor, rstd: Tensor, coefficients: Tensor) -> Tensor:
    """Σg and Σg·x̂ (2, C)."""
    parts = _grad_parts(call, inputs, coefficients)
    found = _empty_rows(call.x, 2, torch.float64)
    _merge_grad_parts(call, parts, mean, rstd, coefficients, sums=found)
    return found


def _grad_parts(call: Call, inputs: GradientInputs, coefficients: Tensor) -> Tensor:
    """Σg, Σg·(x − center) and the number of values (3, splits, C) of each part of a channel's values."""
    x, view, act, mask = call.x, call.view, call.act, call.mask
    cut = choose(view, x).reduction
    parts = torch.empty((3, cut.splits, view.c), dtype=torch.float64, device=x.device)
    with launching(x):
        grad_part_kernel[cut.blocks, cut.splits](
            inputs.dy, x, _or(inputs.y, x), _or(inputs.residual, x), _bytes(mask, x), parts, coefficients,
            view.n, view.c, view.s, cut.tiles, cut.per_program, act.a, act.b,
            A=cut.a, B=cut.b, LAST=view.last, WIDE=view.wide, ACT=act.name, HAS_Y=inputs.y is not None,
            HAS_RESIDUAL=inputs.residual is not None, MASKED=mask is not None, num_warps=cut.warps,
        )  # fmt: skip
    return parts


def _merge_grad_parts(
    call: Call, parts: Tensor, mean: Tensor, rstd: Tensor, coefficients: Tensor, *, sums: Tensor | None = None,
    gradients: Tensor | None = None, slopes: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the sums over g (2, C) in float64, or the gradients (2, C) of weight and bias; and the slopes of dx."""
    x, view, weight, mask = call.x, call.view, call.weight, call.mask
    splits = parts.shape[1]
    with launching(x):
        grad_merge_kernel[divide_up(view.c, _CHANNELS),](
            parts, mean, rstd, _or(weight, x), coefficients, _or(sums, x),
            *((x, x) if gradients is None else gradients), _or(slopes, x), view.c, splits, view.values,
            SPLITS=min(power_of_two(splits), _MERGED), B=_CHANNELS, HAS_WEIGHT=weight is not None,
            MASKED=mask is not None, GRADIENTS=gradients is not None, SLOPES=slopes is not None,
        )  # fmt: skip


def slopes(call: Call, means: Tensor, mean: Tensor, rstd: Tensor, coefficients: Tensor) -> Tensor:
    """Find slope and offset (2, C) of dx = g·scale + (x − center)·slope + offset, from the means of g and g·x̂."""
    x, view, weight = call.x, call.view, call.weight
    found = _empty_rows(x, 2, torch.float32)
    with launching(x):
        slope_kernel[divide_up(view.c, _CHANNELS),](
            means.contiguous(), mean, rstd, _or(weight, x), coefficients, found, view.c,
            B=_CHANNELS, HAS_WEIGHT=weight is not None,
        )  # fmt: skip
    return found


def write_gradients(
    call: Call, inputs: GradientInputs, dx: Tensor | None, dresidual: Tensor | None, coefficients: Tensor,
    slopes: Tensor | None,
) -> None:  # fmt: skip
    """Write dx (which may be x) and dresidual."""
    x, view, act, mask, keep = call.x, call.view, call.act, call.mask, call.keep
    cut = choose(view, x).elementwise
    with launching(x):
        grad_input_kernel[cut.blocks, cut.splits](
            inputs.dy, x, _or(inputs.y, x), _or(inputs.residual, x), _bytes(mask, x), _or(dx, x), _or(dresidual, x),
            coefficients, _or(slopes, x), view.n, view.c, view.s, act.a, act.b,
            A=cut.a, B=cut.b, LAST=view.last, WIDE=view.wide, ACT=act.name, HAS_Y=inputs.y is not None,
            HAS_RESIDUAL=inputs.residual is not None, MASKED=mask is not None, KEEP=keep, TRAINING=slopes is not None,
            NEED_INPUT=dx is not None, NEED_RESIDUAL=dresidual is not None, num_warps=cut.warps,
        )  # fmt: skip


def backward(
    call: Call, inputs: GradientInputs, dx: Tensor | None, dresidual: Tensor | None, saved: Tensor, training: bool,
    need_vectors: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write dx (which may be x) and dresidual; the gradients of weight and bias in float32."""
    x, view, act, weight, mask, keep = call.x, call.view, call.act, call.weight, call.mask, call.keep
    found = coefficients(call, saved[0], saved[2])
    gradients = _empty_rows(x, 2, torch.float32)
    cut = choose(view, x).backward
    if cut is None:
        slopes_of_dx = _empty_rows(x, 2, torch.float32) if training and dx is not None else None
        if need_vectors or slopes_of_dx is not None:
            parts = _grad_parts(call, inputs, found)
            _merge_grad_parts(call, parts, saved[0], saved[2], found, gradients=gradients, slopes=slopes_of_dx)
        if dx is not None or dresidual is not None:
            write_gradients(call, inputs, dx, dresidual, found, slopes_of_dx)
        return gradients[0], gradients[1]
    with launching(x):
        backward_kernel[cut.blocks,](
            inputs.dy, x, _or(inputs.y, x), _or(inputs.residual, x), _bytes(mask, x), _or(dx, x), _or(dresidual, x),
            saved, found, _or(weight, x), gradients[0], gradients[1], view.n, view.c, view.s, view.values, act.a, act.b,
            A=cut.a, B=cut.b, LAST=view.last, WIDE=view.wide, ACT=act.name, HAS_Y=inputs.y is not None,
            HAS_RESIDUAL=inputs.residual is not None, MASKED=mask is not None, KEEP=keep,
            HAS_WEIGHT=weight is not None, TRAINING=training, NEED_INPUT=dx is not None,
            NEED_RESIDUAL=dresidual is not None, num_warps=cut.warps,
        )  # fmt: skip
    return gradients[0], gradients[1]


def invert(call: Call, x: Tensor, saved: Tensor) -> None:
    """Write x, which may be y."""
    y, view, act, weight, bias = call.x, call.view, call.act, call.weight, call.bias
    cut = choose(view, y).elementwise
    with launching(y):
        invert_kernel[cut.blocks, cut.splits](
            y, x, saved, _or(weight, y), _or(bias, y), view.n, view.c, view.s, act.a,
            A=cut.a, B=cut.b, LAST=view.last, WIDE=view.wide, ACT=act.name, HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None, LARGEST=torch.finfo(x.dtype).max, num_warps=cut.warps,
        )  # fmt: skip
