"""Kernels for Σg and Σg·x̂ of each channel: the gradients of bias and weight, which dx depends on."""

from __future__ import annotations

import triton
import triton.language as tl

from keelnorm.engine.kernels.triton.gate import gradient_before
from keelnorm.engine.kernels.triton.tile import channel_tile, counted, load_coefficients, sum_per_channel


@triton.jit
def grad_part_kernel(
    dy, x, y, residual, mask, parts, coefficients, N, C, S, tiles, per_program, a, b,
    A: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr, HAS_Y: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write parts[0, 1][split, c] = Σg, Σg·(x − center) over a split of channel c, and parts[2] = number of values."""
    block, split = tl.program_id(0), tl.program_id(1)
    first = split * per_program
    offsets, spots, inside, channels = channel_tile(first, block, N, C, S, A, B, LAST, WIDE)
    center, scale, shift = load_coefficients(coefficients, coefficients + C, coefficients + 2 * C, channels, C)
    sums = tl.zeros([A, B], dtype=tl.float32)
    products = tl.zeros([A, B], dtype=tl.float32)
    number = tl.zeros([A, B], dtype=tl.int32)
    for tile in range(first, tl.minimum(first + per_program, tiles)):
        offsets, spots, inside, channels = channel_tile(tile, block, N, C, S, A, B, LAST, WIDE)
        counts = counted(inside, mask, spots, MASKED)
        values = tl.load(x + offsets, mask=counts, other=0.0).to(tl.float32)
        g = gradient_before(
            dy, values, center, scale, shift, y, residual, offsets, counts, a, b, ACT, HAS_Y, HAS_RESIDUAL
        )  # fmt: skip
        sums += g
        products += tl.where(counts, g * (values - center), 0.0)
        if MASKED:
            number += counts.to(tl.int32)
    exists = channels < C
    at = parts + split * C + channels
    step = tl.num_programs(1) * C
    tl.store(at, sum_per_channel(sums.to(tl.float64), LAST), mask=exists)
    tl.store(at + step, sum_per_channel(products.to(tl.float64), LAST), mask=exists)
    if MASKED:
        tl.store(at + 2 * step, sum_per_channel(number, LAST).to(tl.float64), mask=exists)


@triton.jit
def grad_merge_kernel(
    parts, mean, rstd, weight, coefficients, sums, dweight, dbias, slopes, C, splits, count,
    SPLITS: tl.constexpr, B: tl.constexpr, HAS_WEIGHT: tl.constexpr, MASKED: tl.constexpr, GRADIENTS: tl.constexpr,
    SLOPES: tl.constexpr,
):  # fmt: skip
    """Write sums (2, C) = Σg, Σg·x̂ or the gradients of bias and weight; with SLOPES also the slopes (2, C) of dx."""
    channels = tl.program_id(0) * B + tl.arange(0, B)[None, :]
    exists = channels < C
    sum_g = tl.zeros([1, B], dtype=tl.float64)
    sum_gx = tl.zeros([1, B], dtype=tl.float64)
    number = tl.zeros([1, B], dtype=tl.float64)
    for start in range(0, splits, SPLITS):
        rows = start + tl.arange(0, SPLITS)[:, None]
        there = (rows < splits) & exists
        at = parts + rows * C + channels
        sum_g += tl.sum(tl.load(at, mask=there, other=0.0), axis=0, keep_dims=True)
        sum_gx += tl.sum(tl.load(at + splits * C, mask=there, other=0.0), axis=0, keep_dims=True)
        if MASKED:
            number += tl.sum(tl.load(at + 2 * splits * C, mask=there, other=0.0), axis=0, keep_dims=True)
    mean_of = tl.load(mean + channels, mask=exists, other=0.0).to(tl.float64)
    rstd_of = tl.load(rstd + channels, mask=exists, other=0.0).to(tl.float64)
    center = tl.load(coefficients + channels, mask=exists, other=0.0).to(tl.float64)
    divisor = tl.maximum(number, 1.0) if MASKED else tl.zeros_like(number) + count
    write_gradients(
        sum_g, sum_gx, mean_of, rstd_of, center, weight, sums, dweight, dbias, slopes, channels, exists, C, divisor,
        HAS_WEIGHT, SLOPES, GRADIENTS, SLOPES,
    )  # fmt: skip


@triton.jit
def write_gradients(
    sum_g, sum_gx, mean, rstd, center, weight, sums, dweight, dbias, slopes, channels, exists, C, count,
    HAS_WEIGHT: tl.constexpr, TRAINING: tl.constexpr, GRADIENTS: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """Write the results that follow from Σg and Σg·(x − center); return slope and offset of dx."""
    sum_gxhat = (sum_gx - (mean - center) * sum_g) * rstd
    if GRADIENTS:
        tl.store(dbias + channels, sum_g.to(tl.float32), mask=exists)
        tl.store(dweight + channels, sum_gxhat.to(tl.float32), mask=exists)
    else:
        tl.store(sums + channels, sum_g, mask=exists)
        tl.store(sums + C + channels, sum_gxhat, mask=exists)
    slope, offset = slope_and_offset(
        sum_g / count, sum_gxhat / count, mean, rstd, center, weight, channels, exists, HAS_WEIGHT, TRAINING
    )  # fmt: skip
    if SLOPES:
        tl.store(slopes + channels, slope, mask=exists)
        tl.store(slopes + C + channels, offset, mask=exists)
    return slope, offset


@triton.jit
def slope_and_offset(
    mean_g, mean_gxhat, mean, rstd, center, weight, channels, exists, HAS_WEIGHT: tl.constexpr, TRAINING: tl.constexpr
):  # fmt: skip
    """Return slope and offset of dx = g·scale + (x − center)·slope + offset; 0 with fixed statistics."""
    scale = rstd
    if HAS_WEIGHT:
        scale = rstd * tl.load(weight + channels, mask=exists, other=0.0).to(tl.float64)
    if TRAINING:
        slope = -scale * rstd * mean_gxhat
        offset = -scale * mean_g - slope * (mean - center)
    else:
        slope = tl.zeros_like(mean_g)
        offset = tl.zeros_like(mean_g)
    return slope.to(tl.float32), offset.to(tl.float32)
