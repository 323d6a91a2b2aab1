"""Offsets of the values of a tile, and sums over the values of a channel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channel_tile(tile, block, N, C, S, A: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr):
    """A tile of the values of a block of channels.

    Returns:
        offsets in the tensor, spots in the mask (N, *S) and inside, whether the value exists, all (A, B); and the
        channels, (1, B) or (1, 1).
    """
    down = tl.arange(0, A)[:, None]
    across = tl.arange(0, B)[None, :]
    if LAST:
        rows = tile * A + down
        channels = block * B + across
        inside = (rows < N * S) & (channels < C)
        if WIDE:
            rows = rows.to(tl.int64)
        return rows * C + channels, rows + tl.zeros_like(channels), inside, channels
    else:
        wide_blocks = tl.cdiv(S, B)
        n = (tile // wide_blocks) * A + down
        s = (tile % wide_blocks) * B + across
        inside = (n < N) & (s < S)
        if WIDE:
            n = n.to(tl.int64)
        channels = tl.zeros([1, 1], dtype=tl.int32) + block
        return (n * C + block) * S + s, n * S + s, inside, channels


@triton.jit
def memory_tile(N, C, S, A: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr):
    """This program's tile of the memory as a matrix; returns as `channel_tile`, with channels (1, B) or (A, 1)."""
    rows = tl.program_id(0) * A + tl.arange(0, A)[:, None]
    columns = tl.program_id(1) * B + tl.arange(0, B)[None, :]
    if LAST:
        inside = (rows < N * S) & (columns < C)
        if WIDE:
            rows = rows.to(tl.int64)
        return rows * C + columns, rows + tl.zeros_like(columns), inside, columns
    else:
        inside = (rows < N * C) & (columns < S)
        if WIDE:
            rows = rows.to(tl.int64)
        return rows * S + columns, (rows // C) * S + columns, inside, rows % C


@triton.jit
def sum_per_channel(v, LAST: tl.constexpr):
    """Sum a tile over each channel, to (1, B) or (1, 1), always in the same order."""
    if LAST:
        return tl.sum(v, axis=0, keep_dims=True)
    else:
        return tl.sum(tl.sum(v, axis=1, keep_dims=True), axis=0, keep_dims=True)


@triton.jit
def counted(inside, mask, spots, MASKED: tl.constexpr):
    """Whether a value exists and counts by the mask."""
    if MASKED:
        return inside & (tl.load(mask + spots, mask=inside, other=0) != 0)
    else:
        return inside


@triton.jit
def values_in_tile(tile, N, S, A: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr):
    """The number of a channel's values in a tile."""
    if LAST:
        return tl.minimum(N * S - tile * A, A)
    else:
        wide_blocks = tl.cdiv(S, B)
        return tl.minimum(N - (tile // wide_blocks) * A, A) * tl.minimum(S - (tile % wide_blocks) * B, B)


@triton.jit
def load_coefficients(center, scale, shift, channels, C):
    """Load the coefficients of y = act((x − center)·scale + shift) of these channels."""
    exists = channels < C
    return (
        tl.load(center + channels, mask=exists, other=0.0),
        tl.load(scale + channels, mask=exists, other=0.0),
        tl.load(shift + channels, mask=exists, other=0.0),
    )
