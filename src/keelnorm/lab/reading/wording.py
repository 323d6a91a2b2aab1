"""Words for numbers: every comparison says which way it went, or that it can't be told."""

from __future__ import annotations

import math
from collections.abc import Sequence

from keelnorm.lab.core.plan import kind_of
from keelnorm.measure.statistics import Interval, Speedup

ACTIVATION_NAMES = {"relu": "ReLU", "tanh": "tanh", "sigmoid": "sigmoid", "identity": "no activation"}


def where_text(data: str, *parts: str) -> str:
    """A condition in words: the kind of data, then the rest."""
    return ", ".join([kind_of(data), *parts])


def listed(parts: Sequence[str]) -> str:
    """Parts in a sentence: "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def times(ratio: Interval, more: str, less: str, same: str) -> str:
    """A ratio in words: "3.1 times MORE [2.4, 4.0]", its inverse with LESS, or SAME with the ratio.

    The direction is claimed only where the interval leaves out 1.
    """
    if not ratio.excludes(1.0):
        return f"{same} (×{ratio.text(2)})"
    if ratio.value > 1.0:
        return f"{_number(ratio)} times {more}"
    return f"{_number(inverse(ratio))} times {less}"


def inverse(ratio: Interval) -> Interval:
    """The interval of 1 / ratio; with one seed it is infinite as the ratio's own is."""
    high = 1 / ratio.low if ratio.low > 0 else math.inf
    return Interval(1 / ratio.value, 1 / ratio.high, high, ratio.n)


def steps(speedup: Speedup) -> str:
    """A speed-up in words, with its bound where runs did not reach the target."""
    if speedup.bound == "unknown":
        return "can't be compared (neither reaches the target in every run)"
    words = times(speedup.ratio, "fewer steps", "more steps", "no clearly different number of steps")
    return words if speedup.bound == "exact" else f"{speedup.bound} {words}"


def signed(difference: Interval, digits: int = 0) -> str:
    """A difference of percentages, with its sign."""
    low, high = (f"{end:+.{digits}f}" for end in (difference.low, difference.high))
    return f"{difference.value:+.{digits}f} [{low}, {high}] points"


def _number(ratio: Interval) -> str:
    return ratio.text(1 if ratio.value >= 2 else 2)
