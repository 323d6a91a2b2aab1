"""Forward and backward in one kernel each, for blocks of channels that fit into a program's registers.

x is read once and y or dx is written once: the minimum of memory traffic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from keelnorm.engine.kernels.triton.gate import gradient_before, store_dx, store_y
from keelnorm.engine.kernels.triton.grad_stats import write_gradients
from keelnorm.engine.kernels.triton.stats import finish_moments
from keelnorm.engine.kernels.triton.tile import channel_tile, counted, load_coefficients, sum_per_channel


@triton.jit
def forward_kernel(
    x, residual, mask, y, saved, weight, bias, running_mean, running_var, batches, counts_of, N, C, S, momentum, eps,
    a, b,
    A: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, UPDATE: tl.constexpr, CUMULATIVE: tl.constexpr, HAS_COUNTS: tl.constexpr,
    COUNT_BATCH: tl.constexpr,
):  # fmt: skip
    """Find the moments in two passes over registers, update the running statistics, and write y."""
    block = tl.program_id(0)
    if COUNT_BATCH:
        if block == 0:
            tl.store(batches, tl.load(batches) + 1)
    offsets, spots, inside, channels = channel_tile(0, block, N, C, S, A, B, LAST, WIDE)
    counts = counted(inside, mask, spots, MASKED)
    given = tl.load(x + offsets, mask=inside, other=0.0)
    values = tl.where(counts, given.to(tl.float32), 0.0)
    number = sum_per_channel(counts.to(tl.int32), LAST)
    divisor = tl.maximum(number, 1).to(tl.float32)
    middle = sum_per_channel(values, LAST) / divisor
    deviation = tl.where(counts, values - middle, 0.0)
    rest = sum_per_channel(deviation, LAST) / divisor
    square = sum_per_channel(deviation * deviation, LAST) / divisor
    mean = middle.to(tl.float64) + rest.to(tl.float64)
    var = square.to(tl.float64) - rest.to(tl.float64) * rest.to(tl.float64)
    var = tl.where(var < 0, 0.0, var)  # NaN stays
    center, scale, shift = finish_moments(
        number.to(tl.float64), mean, var, channels, channels < C, saved, saved, weight, bias, running_mean, running_var,
        batches, counts_of, C, momentum, eps, HAS_WEIGHT, HAS_BIAS, UPDATE, CUMULATIVE, HAS_COUNTS, False,
    )  # fmt: skip
    v = (values - center) * scale + shift
    if HAS_RESIDUAL:
        v += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    store_y(y, v, given, offsets, inside, counts, a, b, ACT, MASKED, KEEP)


@triton.jit
def backward_kernel(
    dy, x, y, residual, mask, dx, dresidual, saved, coefficients, weight, dweight, dbias, N, C, S, count, a, b,
    A: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr, HAS_Y: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    TRAINING: tl.constexpr, NEED_INPUT: tl.constexpr, NEED_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Sum g, and write the gradients of weight and bias, dx and dresidual."""
    block = tl.program_id(0)
    offsets, spots, inside, channels = channel_tile(0, block, N, C, S, A, B, LAST, WIDE)
    counts = counted(inside, mask, spots, MASKED)
    exists = channels < C
    center, scale, shift = load_coefficients(coefficients, coefficients + C, coefficients + 2 * C, channels, C)
    values = tl.load(x + offsets, mask=counts, other=0.0).to(tl.float32)
    g = gradient_before(
        dy, values, center, scale, shift, y, residual, offsets, counts, a, b, ACT, HAS_Y, HAS_RESIDUAL
    )  # fmt: skip
    away = tl.where(counts, values - center, 0.0)
    divisor = tl.zeros_like(center).to(tl.float64) + count
    if MASKED:
        divisor = tl.maximum(sum_per_channel(counts.to(tl.int32), LAST), 1).to(tl.float64)
    slope, offset = write_gradients(
        sum_per_channel(g, LAST).to(tl.float64), sum_per_channel(g * away, LAST).to(tl.float64),
        tl.load(saved + channels, mask=exists, other=0.0), tl.load(saved + 2 * C + channels, mask=exists, other=0.0),
        center.to(tl.float64), weight, saved, dweight, dbias, saved, channels, exists, C, divisor,
        HAS_WEIGHT, TRAINING, True, False,
    )  # fmt: skip
    if NEED_RESIDUAL:
        tl.store(dresidual + offsets, g.to(dresidual.dtype.element_ty), mask=inside)
    if NEED_INPUT:
        out = g * scale + away * slope + offset
        store_dx(dx, out, dy, offsets, inside, counts, MASKED, KEEP)
