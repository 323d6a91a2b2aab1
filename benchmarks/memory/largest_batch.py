"""Search the largest batch that trains within a limit of memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

#: The first batch that is tried.
FIRST = 8
#: Tries that all follow the line.
ALL_BY_LINE = 5


def largest_batch(peak_of: Callable[[int], int | None], limit: int, first: int = FIRST) -> tuple[int, dict[int, int]]:
    """The largest batch whose peak is within the limit, and the peaks of all that were tried and are.

    Peaks grow almost linearly with the batch. So the line through the two largest that fit says what to try next, and
    few runs are needed. The result rests on runs alone: this batch fits, and the next one was tried and does not.

    Args:
        peak_of: Trains with a batch; the peak in bytes, or None if it was stopped above the limit.
        limit: Bytes.
        first: The batch to begin with.
    """
    fits: dict[int, int] = {}
    over: int | None = None
    batch = first
    for tries in count(1):
        peak = peak_of(batch)
        if peak is not None and peak <= limit:
            fits[batch] = peak
        else:
            over = batch
        largest = max(fits, default=0)
        if over is not None and over - largest <= 1:
            return largest, fits
        # Where peaks are far from linear, halving the range at every other try bounds their number.
        batch = _next(fits, over, limit, by_line=tries < ALL_BY_LINE or tries % 2 == 0)
    raise AssertionError


def _next(fits: dict[int, int], over: int | None, limit: int, *, by_line: bool) -> int:
    """A batch between the largest that fits and the smallest that does not."""
    *_, below, largest = [0, 0, *sorted(fits)]
    if by_line and below and (slope := (fits[largest] - fits[below]) / (largest - below)) > 0:
        guess = largest + int((limit - fits[largest]) / slope)
    else:
        guess = 2 * largest if over is None else (largest + over) // 2
    guess = min(max(guess, largest + 1), 4 * largest if over is None else over - 1)
    return max(1, guess)
