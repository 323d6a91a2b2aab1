"""How a tensor is cut into tiles, and which kernels run for it: plain arithmetic, which needs neither GPU nor Triton.

A tile is A × B values. Channels-last, that is A positions of B channels; contiguous, it is A samples of B positions,
all of one channel. Reductions give a program several tiles of its channels and merge what the programs found; where
all values of a channel fit into one tile, one program holds them on chip, and x is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

TILE = 2048
"""Values in a tile of the kernels that walk over a tensor: 16 a thread of 4 warps."""
FORWARD_ON_CHIP, BACKWARD_ON_CHIP = 16384, 8192
"""Values of a channel's block that a program keeps in registers: x, or x and dy."""
SECTOR = 32
"""Bytes that a GPU fetches at least: narrower rows of a tile would be fetched several times."""
PROGRAMS = 4
"""Programs that a reduction starts for each multiprocessor, so that loads of some hide the waits of others."""
ADDED_IN_FLOAT = 128
"""Tiles that a program adds up in float32 before it goes on in float64."""
MANY_PROGRAMS = 65535
"""The longest second dimension of a grid."""
WIDE = 2**30
"""From so many values on, offsets are 64 bits wide; what a tile adds beyond the end then never overflows."""


@dataclass(frozen=True)
class View:
    """A tensor (N, C, *S) as kernels see it: S positions a sample, and whether the channels are innermost."""

    n: int
    c: int
    s: int
    last: bool

    @classmethod
    def of(cls, shape: Sequence[int], channels_last: bool) -> View:
        """With one position a sample, or none, a contiguous tensor is a channels-last one."""
        n, c, *spatial = shape
        s = prod(spatial)
        return cls(n, c, s, channels_last or s == 1)

    @property
    def values(self) -> int:
        """Of each channel."""
        return self.n * self.s

    @property
    def rows(self) -> int:
        """Of the matrix that the memory is."""
        return self.values if self.last else self.n * self.c

    @property
    def columns(self) -> int:
        """Of the matrix that the memory is."""
        return self.c if self.last else self.s

    @property
    def wide(self) -> bool:
        """Whether offsets need 64 bits."""
        return self.values * self.c >= WIDE


@dataclass(frozen=True)
class Tiling:
    """One cut.

    Args:
        a, b: Rows and columns of a tile.
        warps: Of a program.
        blocks: Programs side by side: blocks of channels; of rows where the kernel goes value by value.
        splits: Programs that share a block's values; of columns where the kernel goes value by value.
        tiles: In a block, all splits together.
        per_program: Tiles that a program walks over.
    """

    a: int
    b: int
    warps: int
    blocks: int
    splits: int = 1
    tiles: int = 1
    per_program: int = 1


def elementwise(view: View, tile: int = TILE, warps: int = 4) -> Tiling:
    """For kernels that go over the memory as it lies, value by value."""
    b = min(power_of_two(view.columns), 1024, tile)
    a = min(power_of_two(view.rows), max(1, tile // b))
    return Tiling(a, b, warps, divide_up(view.rows, a), divide_up(view.columns, b))


def reduction(view: View, itemsize: int, processors: int, tile: int = TILE, warps: int = 4) -> Tiling:
    """For kernels that sum over the values of each channel."""
    if view.last:
        # A row of a tile is two sectors or more, so that few channels still make whole fetches.
        b = min(power_of_two(view.c), max(64 // itemsize, 16) * 2)
        a = min(power_of_two(view.values), max(1, tile // b))
        blocks, tiles = divide_up(view.c, b), divide_up(view.values, a)
    else:
        b = min(power_of_two(view.s), 1024, tile)
        a = min(power_of_two(view.n), max(1, tile // b))
        blocks, tiles = view.c, divide_up(view.n, a) * divide_up(view.s, b)
    splits = min(max(divide_up(PROGRAMS * processors, blocks), divide_up(tiles, ADDED_IN_FLOAT)), tiles, MANY_PROGRAMS)
    per_program = divide_up(tiles, splits)
    return Tiling(a, b, warps, blocks, divide_up(tiles, per_program), tiles, per_program)


def on_chip(view: View, itemsize: int, limit: int) -> Tiling | None:
    """One tile for all values of a channel, or of a block of channels; None where it would not fit into a program."""
    if not view.last:
        a, b = power_of_two(view.n), power_of_two(view.s)
        return Tiling(a, b, _warps(a * b), view.c) if a * b <= limit else None
    a, least = power_of_two(view.values), min(power_of_two(view.c), SECTOR // itemsize)
    if a * least > limit:
        return None
    b = least
    while b < 128 and b < view.c and a * b * 2 <= TILE * 2:
        b *= 2
    return Tiling(a, b, _warps(a * b), divide_up(view.c, b))


def candidates(view: View, itemsize: int, processors: int) -> list[tuple[Tiling, Tiling]]:
    """(reduction, elementwise) cuts worth timing, the one that is taken without timing first."""
    sizes = [(TILE, 4), (TILE // 2, 4), (2 * TILE, 8), (2 * TILE, 4), (4 * TILE, 8)]
    found = [
        (reduction(view, itemsize, processors, tile, warps), elementwise(view, tile, warps)) for tile, warps in sizes
    ]
    return list(dict.fromkeys(found))


def _warps(values: int) -> int:
    """32 values a thread at most."""
    return min(max(values // 1024, 1), 16)


def power_of_two(count: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << max(count - 1, 0).bit_length()


def divide_up(count: int, by: int) -> int:
    """count / by, rounded up."""
    return -(-count // by)
