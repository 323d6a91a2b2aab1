"""Launches of the kernels: which, over which grid, with which arguments. Whatever is legal has been checked."""

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
from keelnorm.engine.kernels.triton.tiling import Tiling, View, power_of_two, up
from keelnorm.engine.kernels.triton.tuning import choose

_CHANNELS = 32
"""Channels of a program that works on vectors of them."""
_MERGED = 64
"""Parts that a merging program holds at a time."""


class Act(NamedTuple):
    """An activation as kernels take it."""

    code: int
    a: float
    b: float


class Given(NamedTuple):
    """What a backward reads beside x."""

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
    """A pointer for an argument that the kernel will not read."""
    return x if t is None else t


def _bytes(mask: Tensor | None, x: Tensor) -> Tensor:
    return x if mask is None else mask.view(torch.uint8)


def _vector(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((rows, x.shape[1]), dtype=dtype, device=x.device)


def _count(running: Running, mask: Tensor | None, view: View) -> bool:
    """Count the batch, unless a kernel is left to do it: the return value.

    A mask's count is known to the device alone; and a cumulative average reads what it has been counted into.
    """
    if not running.update or running.batches is None:
        return False
    if mask is None:
        if view.values < 2 or running.momentum is not None:
            return view.values > 1
        running.batches.add_(1)
    else:
        running.batches.add_(mask.sum() > 1)
    return False


def moments(
    x: Tensor, mask: Tensor | None, view: View, weight: Tensor | None = None, bias: Tensor | None = None,
    running: Running | None = None, eps: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(mean, var, rstd) (3, C) and the coefficients (3, C) of y, by two kernels."""
    cut = choose(view, x).reduction
    running = running or Running()
    counting = _count(running, mask, view)
    updates = running.update and running.mean is not None
    saved, coefficients = _vector(x, 3, torch.float64), _vector(x, 3, torch.float32)
    parts = torch.empty((3, cut.splits, view.c), dtype=torch.float64, device=x.device)
    with launching(x):
        part_kernel[cut.blocks, cut.splits](
            x, _bytes(mask, x), parts, _or(running.batches, x), view.n, view.c, view.s, cut.tiles, cut.per_program,
            A=cut.a, B=cut.b, LAST=view.last, WIDE=view.wide, MASKED=mask is not None, COUNT_BATCH=counting,
            num_warps=cut.warps,
        )  # fmt: skip
        merge_kernel[up(view.c, _CHANNELS),](
            parts, saved, coefficients, _or(weight, x), _or(bias, x), _or(running.mean, x), _or(running.var, x),
            _or(running.batches, x), _or(running.counts, x), view.c, cut.splits, running.momentum or 0.0, eps,
            SPLITS=min(power_of_two(cut.splits), _MERGED), B=_CHANNELS, HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None, UPDATE=updates, CUMULATIVE=running.momentum is None,
            HAS_COUNTS=running.counts is not None, COEFFICIENTS=True,
        )  # fmt: skip
    return saved, coefficients


def measure(
    x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, running: Running, training: bool,
    eps: float, view: View,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `moments` in training; outside it the running statistics are those that normalize."""
    if training:
        return moments(x, mask, view, weight, bias, running, eps)
    assert running.mean is not None and running.var is not None
    saved, found = _vector(x, 3, torch.float64), _vector(x, 3, torch.float32)
    with launching(x):
        coefficient_kernel[up(view.c, _CHANNELS),](
            running.mean, running.var, saved, found, _or(weight, x), _or(bias, x), view.c, eps,
            B=_CHANNELS, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, RUNNING=True,
        )  # fmt: skip
    return saved, found


def coefficients(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """centre, scale, shift (3, C) of y = act((x − centre)·scale + shift + residual)."""
    found = _vector(x, 3, torch.float32)
    with launching(x):
        coefficient_kernel[up(x.shape[1], _CHANNELS),](
            mean, rstd, x, found, _or(weight, x), _or(bias, x), x.shape[1], 0.0,
            B=_CHANNELS, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, RUNNING=False,
        )  # fmt: skip
    return found


def apply(
    x: Tensor, residual: Tensor | None, mask: Tensor | None, keep: bool, y: Tensor, coefficients: Tensor, view: View,
    act: Act,
) -> None:  # fmt: skip
    """Write y."""
    cut = choose(view, x).elementwise
    with launching(x):
        apply_kernel[cut.blocks, cut.splits](
            x, _or(residual, x), _bytes(mask, x), y, coefficients, view.n, view.c, view.s, act.a, act.b,
            A=cut.a, B=cut.b, LAST=view.last, WIDE=view.wide, ACT=act.code, HAS_RESIDUAL=residual is not None,
            MASKED=mask is not None, KEEP=keep, num_warps=cut.warps,
        )  # fmt: skip


def forward(
    x: Tensor, residual: Tensor | None, mask: Tensor | None, keep: bool, y: Tensor, weight: Tensor | None,
    bias: Tensor | None, running: Running, training: bool, eps: float, view: View, act: Act,
) -> Tensor:  # fmt: skip
    """Write y (which may be x), update the running statistics, and return (mean, var, rstd)."""
    cut = choose(view, x).forward
    if not training or cut is None:
        saved, found = measure(x, mask, weight, bias, running, training, eps, view)
        apply(x, residual, mask, keep, y, found, view, act)
        return saved
    saved = _vector(x, 3, torch.float64)
    counting = _count(running, mask, view)
    with launching(x):
        forward_kernel[cut.blocks,](
            x, _or(residual, x), _bytes(mask, x), y, saved, _or(weight, x), _or(bias, x), _or(running.mean, x),
            _or(running.var, x), _or(running.batches, x), _or(running.counts, x), view.n, view.c, view.s,
            running.momentum or 0.0, eps, act.a, act.b,
            A=cut.a, B=cut.b, LAST=view.last, WIDE=view.wide, ACT=act.code, HAS_RESIDUAL=residual is not None,
            MASKED=mask is not None, KEEP=keep, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            UPDATE=running.update and running.mean is not None, CUMULATIVE=running.momentum is None,
            HAS_COUNTS=running.counts is not None, COUNT_BATCH=counting, num_warps=cut.warps,
        )  # fmt: skip
    return saved


def sums(
    x: Tensor, given: Given, mask: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    coefficients: Tensor, view: View, act: Act,
) -> Tensor:  # fmt: skip
    """Σg and Σg·x̂ (2, C)."""
    found = _vector(x, 2, torch.float64)
    _reduce(x, given, mask, mean, rstd, weight, coefficients, view, act, True, found, None, None)
    return found


def _reduce(
    x: Tensor, given: Given, mask: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    coefficients: Tensor, view: View, act: Act, training: bool, found: Tensor | None, gradients: Tensor | None,
    slopes: Tensor | None,
) -> None:  # fmt: skip
    """The sums over g: into `found` in float64, or as gradients of weight and bias, and with the slopes of dx."""
    cut = choose(view, x).reduction
    parts = torch.empty((3, cut.splits, view.c), dtype=torch.float64, device=x.device)
    with launching(x):
        grad_part_kernel[cut.blocks, cut.splits](
            given.dy, x, _or(given.y, x), _or(given.residual, x), _bytes(mask, x), parts, coefficients,
            view.n, view.c, view.s, cut.tiles, cut.per_program, act.a, act.b,
            A=cut.a, B=cut.b, LAST=view.last, WIDE=view.wide, ACT=act.code, HAS_Y=given.y is not None,
            HAS_RESIDUAL=given.residual is not None, MASKED=mask is not None, num_warps=cut.warps,
        )  # fmt: skip
        grad_merge_kernel[up(view.c, _CHANNELS),](
            parts, mean, rstd, _or(weight, x), coefficients, _or(found, x),
            *((x, x) if gradients is None else gradients), _or(slopes, x), view.c, cut.splits, view.values,
            SPLITS=min(power_of_two(cut.splits), _MERGED), B=_CHANNELS, HAS_WEIGHT=weight is not None,
            MASKED=mask is not None, TRAINING=training, GRADIENTS=gradients is not None, SLOPES=slopes is not None,
        )  # fmt: skip


def slopes(x: Tensor, means: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, coefficients: Tensor) -> Tensor:
    """slope and offset (2, C) of dx = g·scale + (x − centre)·slope + offset."""
    found = _vector(x, 2, torch.float32)
    with launching(x):
        slope_kernel[up(x.shape[1], _CHANNELS),](
            means.contiguous(), mean, rstd, _or(weight, x), coefficients, found, x.shape[1],
            B=_CHANNELS, HAS_WEIGHT=weight is not None,
        )  # fmt: skip
    return found


def write_gradients(
    x: Tensor, given: Given, mask: Tensor | None, keep: bool, dx: Tensor | None, dresidual: Tensor | None,
    coefficients: Tensor, slopes: Tensor | None, view: View, act: Act,
) -> None:  # fmt: skip
    """Write dx (which may be x) and dresidual."""
    cut = choose(view, x).elementwise
    with launching(x):
        grad_input_kernel[cut.blocks, cut.splits](
            given.dy, x, _or(given.y, x), _or(given.residual, x), _bytes(mask, x), _or(dx, x), _or(dresidual, x),
            coefficients, _or(slopes, x), view.n, view.c, view.s, act.a, act.b,
            A=cut.a, B=cut.b, LAST=view.last, WIDE=view.wide, ACT=act.code, HAS_Y=given.y is not None,
            HAS_RESIDUAL=given.residual is not None, MASKED=mask is not None, KEEP=keep, TRAINING=slopes is not None,
            NEED_INPUT=dx is not None, NEED_RESIDUAL=dresidual is not None, num_warps=cut.warps,
        )  # fmt: skip


def backward(
    x: Tensor, given: Given, mask: Tensor | None, keep: bool, dx: Tensor | None, dresidual: Tensor | None,
    saved: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, need_vectors: bool, view: View,
    act: Act,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write dx (which may be x) and dresidual; the gradients of weight and bias in float32."""
    found = coefficients(x, saved[0], saved[2], weight, bias)
    gradients = _vector(x, 2, torch.float32)
    cut = choose(view, x).backward
    if cut is None:
        needs_sums = need_vectors or (training and dx is not None)
        slopes_of = _vector(x, 2, torch.float32) if training and dx is not None else None
        if needs_sums:
            _reduce(
                x, given, mask, saved[0], saved[2], weight, found, view, act, training, None, gradients, slopes_of
            )  # fmt: skip
        if dx is not None or dresidual is not None:
            write_gradients(x, given, mask, keep, dx, dresidual, found, slopes_of, view, act)
    else:
        with launching(x):
            backward_kernel[cut.blocks,](
                given.dy, x, _or(given.y, x), _or(given.residual, x), _bytes(mask, x), _or(dx, x), _or(dresidual, x),
                saved, found, _or(weight, x), gradients[0], gradients[1], view.n, view.c, view.s, view.values,
                act.a, act.b,
                A=cut.a, B=cut.b, LAST=view.last, WIDE=view.wide, ACT=act.code, HAS_Y=given.y is not None,
                HAS_RESIDUAL=given.residual is not None, MASKED=mask is not None, KEEP=keep,
                HAS_WEIGHT=weight is not None, TRAINING=training, NEED_INPUT=dx is not None,
                NEED_RESIDUAL=dresidual is not None, num_warps=cut.warps,
            )  # fmt: skip
    return gradients[0], gradients[1]


def invert(
    y: Tensor, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, view: View, act: Act
) -> None:
    """Write x, which may be y."""
    cut: Tiling = choose(view, y).elementwise
    with launching(y):
        invert_kernel[cut.blocks, cut.splits](
            y, x, saved, _or(weight, y), _or(bias, y), view.n, view.c, view.s, act.a,
            A=cut.a, B=cut.b, LAST=view.last, WIDE=view.wide, ACT=act.code, HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None, LARGEST=torch.finfo(x.dtype).max, num_warps=cut.warps,
        )  # fmt: skip
