"""Kernels for the moments of each channel: each program computes those of its tiles, and a second kernel merges them.

A program sums x − center and (x − center)² in float32, where center is the mean of its first tile, and converts the
sums to float64: this is accurate when the mean is much larger than the standard deviation. The parts are merged in
float64 by Chan's formula, m2 = Σ m2ᵢ + Σ nᵢ·(meanᵢ − mean)², in a fixed order, so each run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from keelnorm.engine.kernels.triton.tile import channel_tile, counted, sum_per_channel, values_in_tile


@triton.jit
def part_kernel(
    x, mask, parts, batches, N, C, S, tiles, per_program,
    A: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
    COUNT_BATCH: tl.constexpr,
):  # fmt: skip
    """Write parts[0, 1, 2][split, c] = count, mean, m2 of a split of channel c."""
    block, split = tl.program_id(0), tl.program_id(1)
    first = split * per_program
    end = tl.minimum(first + per_program, tiles)
    if COUNT_BATCH:
        if (block == 0) & (split == 0):
            tl.store(batches, tl.load(batches) + 1)
    # A mask may leave no value of the first tile; then the center is the mean over all tiles.
    seen = tl.zeros([A, B], dtype=tl.float32)
    number = tl.zeros([A, B], dtype=tl.int32)
    stop = end if MASKED else tl.minimum(first + 1, end)
    for tile in range(first, stop):
        offsets, spots, inside, channels = channel_tile(tile, block, N, C, S, A, B, LAST, WIDE)
        counts = counted(inside, mask, spots, MASKED)
        seen += tl.load(x + offsets, mask=counts, other=0.0).to(tl.float32)
        number += counts.to(tl.int32)
    number = sum_per_channel(number, LAST)
    center = sum_per_channel(seen, LAST) / tl.maximum(number, 1).to(tl.float32)
    sums = tl.zeros([A, B], dtype=tl.float32)
    squares = tl.zeros([A, B], dtype=tl.float32)
    held_here = 0
    for tile in range(first, end):
        offsets, spots, inside, channels = channel_tile(tile, block, N, C, S, A, B, LAST, WIDE)
        counts = counted(inside, mask, spots, MASKED)
        deviation = tl.load(x + offsets, mask=counts, other=0.0).to(tl.float32) - center
        deviation = tl.where(counts, deviation, 0.0)
        sums += deviation
        squares += deviation * deviation
        held_here += values_in_tile(tile, N, S, A, B, LAST)
    count = number.to(tl.float64) if MASKED else (tl.zeros_like(number) + held_here).to(tl.float64)
    divisor = tl.maximum(count, 1.0)
    moved = sum_per_channel(sums.to(tl.float64), LAST)
    m2 = sum_per_channel(squares.to(tl.float64), LAST) - moved * moved / divisor
    offsets, spots, inside, channels = channel_tile(first, block, N, C, S, A, B, LAST, WIDE)
    exists = channels < C
    at = parts + split * C + channels
    step = tl.num_programs(1) * C
    tl.store(at, count, mask=exists)
    tl.store(at + step, center.to(tl.float64) + moved / divisor, mask=exists)
    tl.store(at + 2 * step, tl.where(m2 < 0, 0.0, m2), mask=exists)  # NaN stays


@triton.jit
def merge_kernel(
    parts, saved, coefficients, weight, bias, running_mean, running_var, batches, counts_of, C, splits, momentum, eps,
    SPLITS: tl.constexpr, B: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, UPDATE: tl.constexpr,
    CUMULATIVE: tl.constexpr, HAS_COUNTS: tl.constexpr, COEFFICIENTS: tl.constexpr,
):  # fmt: skip
    """Write saved (3, C) = mean, biased variance, 1/√(var + eps), and coefficients; update the running statistics."""
    channels = tl.program_id(0) * B + tl.arange(0, B)[None, :]
    exists = channels < C
    count = tl.zeros([1, B], dtype=tl.float64)
    weighted = tl.zeros([1, B], dtype=tl.float64)
    for start in range(0, splits, SPLITS):
        n, mean_of, _ = _load_parts(parts, channels, start, splits, C, SPLITS)
        count += tl.sum(n, axis=0, keep_dims=True)
        weighted += tl.sum(n * mean_of, axis=0, keep_dims=True)
    divisor = tl.maximum(count, 1.0)
    mean = weighted / divisor
    m2 = tl.zeros([1, B], dtype=tl.float64)
    for start in range(0, splits, SPLITS):
        n, mean_of, m2_of = _load_parts(parts, channels, start, splits, C, SPLITS)
        away = tl.where(n > 0, mean_of - mean, 0.0)
        m2 += tl.sum(m2_of + n * away * away, axis=0, keep_dims=True)
    var = m2 / divisor
    finish_moments(
        count, mean, var, channels, exists, saved, coefficients, weight, bias, running_mean, running_var, batches,
        counts_of, C, momentum, eps, HAS_WEIGHT, HAS_BIAS, UPDATE, CUMULATIVE, HAS_COUNTS, COEFFICIENTS,
    )  # fmt: skip


@triton.jit
def _load_parts(parts, channels, start, splits, C, SPLITS: tl.constexpr):
    rows = start + tl.arange(0, SPLITS)[:, None]
    there = (rows < splits) & (channels < C)
    at = parts + rows * C + channels
    step = splits * C
    return (
        tl.load(at, mask=there, other=0.0),
        tl.load(at + step, mask=there, other=0.0),
        tl.load(at + 2 * step, mask=there, other=0.0),
    )


@triton.jit
def finish_moments(
    count, mean, var, channels, exists, saved, coefficients, weight, bias, running_mean, running_var, batches,
    counts_of, C, momentum, eps, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, UPDATE: tl.constexpr,
    CUMULATIVE: tl.constexpr, HAS_COUNTS: tl.constexpr, COEFFICIENTS: tl.constexpr,
):  # fmt: skip
    """Write saved (3, C) and the coefficients (3, C) of y, update the running statistics, and return the coefficients.

    A channel keeps its running statistics where a new one would not be finite, which is counted as a skipped update,
    and where it has fewer than two values, which is not. keelnorm/engine/update_counts.py explains `counts_of` (3, C).
    """
    rstd = 1.0 / tl.sqrt(var + eps)
    tl.store(saved + channels, mean, mask=exists)
    tl.store(saved + C + channels, var, mask=exists)
    tl.store(saved + 2 * C + channels, rstd, mask=exists)
    center, scale, shift = coefficients_of(mean, rstd, weight, bias, channels, exists, HAS_WEIGHT, HAS_BIAS)
    if COEFFICIENTS:
        tl.store(coefficients + channels, center, mask=exists)
        tl.store(coefficients + C + channels, scale, mask=exists)
        tl.store(coefficients + 2 * C + channels, shift, mask=exists)
    if UPDATE:
        enough = count > 1
        factor = momentum
        if CUMULATIVE:
            # The number of batches before this one, which `batches` already includes if it has two values.
            before = tl.zeros_like(channels).to(tl.int64) + tl.load(batches)
            before -= enough.to(tl.int64)
            so_far = before
            if HAS_COUNTS:
                at = tl.load(counts_of + 2 * C + channels, mask=exists, other=0)
                so_far = tl.where(at == before, tl.load(counts_of + C + channels, mask=exists, other=0), before)
            factor = 1.0 / (so_far + 1).to(tl.float64)
        unbiased = var * (count / tl.maximum(count - 1, 1.0))
        mean_was = tl.load(running_mean + channels, mask=exists, other=0.0)
        var_was = tl.load(running_var + channels, mask=exists, other=0.0)
        mean_new = ((1 - factor) * mean_was.to(tl.float64) + factor * mean).to(mean_was.dtype)
        var_new = ((1 - factor) * var_was.to(tl.float64) + factor * unbiased).to(var_was.dtype)
        finite = (tl.abs(mean_new) < float("inf")) & (tl.abs(var_new) < float("inf"))
        taken = finite & enough
        tl.store(running_mean + channels, tl.where(taken, mean_new, mean_was), mask=exists)
        tl.store(running_var + channels, tl.where(taken, var_new, var_was), mask=exists)
        if HAS_COUNTS:
            skipped = tl.load(counts_of + channels, mask=exists, other=0)
            tl.store(counts_of + channels, skipped + (enough & (finite == 0)).to(tl.int64), mask=exists)
            if CUMULATIVE:
                tl.store(counts_of + C + channels, so_far + taken.to(tl.int64), mask=exists)
                tl.store(counts_of + 2 * C + channels, before + enough.to(tl.int64), mask=exists)
    return center, scale, shift


@triton.jit
def coefficients_of(mean, rstd, weight, bias, channels, exists, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Return center, scale, shift: x − center is exact near the mean, and the shift corrects for center's rounding."""
    center = mean.to(tl.float32)
    scale = rstd
    if HAS_WEIGHT:
        scale = rstd * tl.load(weight + channels, mask=exists, other=0.0).to(tl.float64)
    shift = (center.to(tl.float64) - mean) * scale
    if HAS_BIAS:
        shift += tl.load(bias + channels, mask=exists, other=0.0).to(tl.float64)
    return center, scale.to(tl.float32), shift.to(tl.float32)
