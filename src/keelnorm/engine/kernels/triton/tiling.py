"""Rules that cut a tensor into tiles: plain arithmetic, which needs neither a GPU nor Triton.

A tile is A × B values. For channels-last tensors these are A positions of B channels; for contiguous ones, A samples of
B positions of one channel. In a reduction a program works on several tiles of its channels, and the programs' results
are merged. Where all values of a channel fit into one tile, one program keeps them on chip, and x is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

TILE = 2048
"""Values in a tile of the kernels that walk over a tensor: 16 per thread of 4 warps."""
FORWARD_ON_CHIP, BACKWARD_ON_CHIP = 16384, 8192
"""Values of a block of channels that a program can keep in registers: x, or x and dy."""
SECTOR = 32
"""The fewest bytes that a GPU fetches: narrower rows of a tile would be fetched several times."""
PROGRAMS = 4
"""Programs of a reduction per multiprocessor, so that some compute while others wait for memory."""
ADDED_IN_FLOAT = 128
"""The most tiles that a program adds up in float32, before the sum goes on in float64."""
MANY_PROGRAMS = 65535
"""The longest second dimension of a grid."""
WIDE = 2**30
"""Tensors of at least so many values take 64-bit offsets; below it a tile beyond the end can't overflow 32 bits."""


@dataclass(frozen=True)
class View:
    """A tensor (N, C, *S) as kernels see it: n, c, s = N, C and positions per sample; last: channels are innermost."""

    n: int
    c: int
    s: int
    last: bool

    @classmethod
    def of(cls, shape: Sequence[int], channels_last: bool) -> View:
        """Make the view of a shape; a contiguous tensor of one position per sample is channels-last, too."""
        n, c, *spatial = shape
        s = prod(spatial)
        return cls(n, c, s, channels_last or s == 1)

    @property
    def values(self) -> int:
        """The number of values per channel."""
        return self.n * self.s

    @property
    def rows(self) -> int:
        """The rows of the memory as a matrix."""
        return self.values if self.last else self.n * self.c

    @property
    def columns(self) -> int:
        """The columns of the memory as a matrix."""
        return self.c if self.last else self.s

    @property
    def wide(self) -> bool:
        """Whether offsets need 64 bits."""
        return self.values * self.c >= WIDE


@dataclass(frozen=True)
class Tiling:
    """How a tensor is cut for one kernel.

    Args:
        a, b: Rows and columns of a tile.
        warps: Warps of a program.
        blocks: Blocks of channels, or blocks of rows for an elementwise kernel.
        splits: Programs that share a block's values, or blocks of columns for an elementwise kernel.
        tiles: Tiles of a block.
        per_program: Tiles of a program.
    """

    a: int
    b: int
    warps: int
    blocks: int
    splits: int = 1
    tiles: int = 1
    per_program: int = 1


def elementwise(view: View, tile: int = TILE, warps: int = 4) -> Tiling:
    """Cut for a kernel that works value by value, in the order of memory."""
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
    """Cut into one tile per channel or block of channels; None if that does not fit into a program."""
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
    """List (reduction, elementwise) cuts worth timing; the first is used without timing."""
    sizes = [(TILE, 4), (TILE // 2, 4), (2 * TILE, 8), (2 * TILE, 4), (4 * TILE, 8)]
    found = [
        (reduction(view, itemsize, processors, tile, warps), elementwise(view, tile, warps)) for tile, warps in sizes
    ]
    return list(dict.fromkeys(found))


def _warps(values: int) -> int:
    """At most 32 values per thread."""
    return min(max(values // 1024, 1), 16)


def power_of_two(count: int) -> int:
    """The smallest power of two that is not less than count."""
    return 1 << max(count - 1, 0).bit_length()


def divide_up(count: int, by: int) -> int:
    """Divide and round up."""
    return -(-count // by)
