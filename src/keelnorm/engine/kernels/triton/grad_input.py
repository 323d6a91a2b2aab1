"""Kernels for dx = g·scale + (x − center)·slope + offset and dresidual = g, value by value."""

from __future__ import annotations

import triton
import triton.language as tl

from keelnorm.engine.kernels.triton.gate import gradient_before, store_dx
from keelnorm.engine.kernels.triton.grad_stats import slope_and_offset
from keelnorm.engine.kernels.triton.tile import counted, load_coefficients, memory_tile


@triton.jit
def slope_kernel(
    means, mean, rstd, weight, coefficients, slopes, C, B: tl.constexpr, HAS_WEIGHT: tl.constexpr
):  # fmt: skip
    """Write slopes (2, C) from the means (2, C) of g and g·x̂."""
    channels = tl.program_id(0) * B + tl.arange(0, B)
    exists = channels < C
    slope, offset = slope_and_offset(
        tl.load(means + channels, mask=exists, other=0.0).to(tl.float64),
        tl.load(means + C + channels, mask=exists, other=0.0).to(tl.float64),
        tl.load(mean + channels, mask=exists, other=0.0).to(tl.float64),
        tl.load(rstd + channels, mask=exists, other=0.0).to(tl.float64),
        tl.load(coefficients + channels, mask=exists, other=0.0).to(tl.float64),
        weight, channels, exists, HAS_WEIGHT, True,
    )  # fmt: skip
    tl.store(slopes + channels, slope, mask=exists)
    tl.store(slopes + C + channels, offset, mask=exists)


@triton.jit
def grad_input_kernel(
    dy, x, y, residual, mask, dx, dresidual, coefficients, slopes, N, C, S, a, b,
    A: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr, HAS_Y: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr, TRAINING: tl.constexpr,
    NEED_INPUT: tl.constexpr, NEED_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Write one tile of the gradients. For masked values they are 0, or dx is dy with KEEP, where y is x."""
    offsets, spots, inside, channels = memory_tile(N, C, S, A, B, LAST, WIDE)
    counts = counted(inside, mask, spots, MASKED)
    center, scale, shift = load_coefficients(coefficients, coefficients + C, coefficients + 2 * C, channels, C)
    values = tl.load(x + offsets, mask=counts, other=0.0).to(tl.float32)
    g = gradient_before(
        dy, values, center, scale, shift, y, residual, offsets, counts, a, b, ACT, HAS_Y, HAS_RESIDUAL
    )  # fmt: skip
    if NEED_RESIDUAL:
        tl.store(dresidual + offsets, g.to(dresidual.dtype.element_ty), mask=inside)
    if NEED_INPUT:
        out = g * scale
        if TRAINING:
            exists = channels < C
            slope = tl.load(slopes + channels, mask=exists, other=0.0)
            out += (values - center) * slope + tl.load(slopes + C + channels, mask=exists, other=0.0)
        store_dx(dx, out, dy, offsets, inside, counts, MASKED, KEEP)
