"""Kernels for y = act((x − mean)·rstd·weight + bias + residual) with known mean and rstd, value by value."""

from __future__ import annotations

import triton
import triton.language as tl

from keelnorm.engine.kernels.triton.gate import store_y
from keelnorm.engine.kernels.triton.stats import coefficients_of
from keelnorm.engine.kernels.triton.tile import counted, load_coefficients, memory_tile


@triton.jit
def coefficient_kernel(
    mean, rstd_or_var, saved, coefficients, weight, bias, C, eps,
    B: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, RUNNING: tl.constexpr,
):  # fmt: skip
    """Write coefficients (3, C) from mean and rstd; with RUNNING, from the running variance, and write saved (3, C)."""
    channels = tl.program_id(0) * B + tl.arange(0, B)
    exists = channels < C
    mean_of = tl.load(mean + channels, mask=exists, other=0.0).to(tl.float64)
    rstd = tl.load(rstd_or_var + channels, mask=exists, other=1.0).to(tl.float64)
    if RUNNING:
        tl.store(saved + channels, mean_of, mask=exists)
        tl.store(saved + C + channels, rstd, mask=exists)
        rstd = 1.0 / tl.sqrt(rstd + eps)
        tl.store(saved + 2 * C + channels, rstd, mask=exists)
    center, scale, shift = coefficients_of(mean_of, rstd, weight, bias, channels, exists, HAS_WEIGHT, HAS_BIAS)
    tl.store(coefficients + channels, center, mask=exists)
    tl.store(coefficients + C + channels, scale, mask=exists)
    tl.store(coefficients + 2 * C + channels, shift, mask=exists)


@triton.jit
def apply_kernel(
    x, residual, mask, y, coefficients, N, C, S, a, b,
    A: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Write one tile of y; for masked values 0, or x with KEEP."""
    offsets, spots, inside, channels = memory_tile(N, C, S, A, B, LAST, WIDE)
    center, scale, shift = load_coefficients(coefficients, coefficients + C, coefficients + 2 * C, channels, C)
    given = tl.load(x + offsets, mask=inside, other=0.0)
    v = (given.to(tl.float32) - center) * scale + shift
    if HAS_RESIDUAL:
        v += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    counts = counted(inside, mask, spots, MASKED)
    store_y(y, v, given, offsets, inside, counts, a, b, ACT, MASKED, KEEP)
