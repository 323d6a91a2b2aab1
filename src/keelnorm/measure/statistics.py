"""Means, differences and ratios over seeds, each with its 95 % t-interval.

A seed draws the split, the initialization and the order of the samples, and all arms of a seed share
them. Two arms are therefore compared seed by seed, which removes the variation they share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval from `n` seeds. With one seed the interval is infinite."""

    value: float
    low: float
    high: float
    n: int

    def text(self, digits: int | None = 1) -> str:
        """The estimate and, in brackets, its interval; three significant digits where None."""
        if not math.isfinite(self.value):
            return "-"
        if digits is None:
            digits = max(0, 2 - math.floor(math.log10(abs(self.value)))) if self.value else 0
        value = f"{self.value:.{digits}f}"
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return f"{value} [one seed]"
        return f"{value} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def excludes(self, value: float) -> bool:
        """Whether the interval lies wholly on one side of `value`."""
        return value < self.low or value > self.high


def mean(values: Sequence[float]) -> Interval:
    """The mean over seeds with its t-interval: mean -/+ t(n - 1) s / sqrt(n)."""
    n = len(values)
    if n == 0:
        raise ValueError("a mean needs at least one value, got none")
    center = math.fsum(values) / n
    if n == 1:
        return Interval(center, -math.inf, math.inf, 1)
    from scipy.special import stdtrit

    variance = math.fsum((value - center) ** 2 for value in values) / (n - 1)
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * math.sqrt(variance / n)
    return Interval(center, center - half, center + half, n)


def difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean of first - second, paired by position."""
    return mean([a - b for a, b in zip(first, second, strict=True)])


def geometric_mean(values: Sequence[float]) -> Interval:
    """The geometric mean of positive values: the t-interval of the logarithm."""
    logs = mean([math.log(value) for value in values])
    return Interval(math.exp(logs.value), math.exp(logs.low), _exp(logs.high), logs.n)


def ratio(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The geometric mean of first / second, paired by position."""
    return geometric_mean([a / b for a, b in zip(first, second, strict=True)])


def _exp(value: float) -> float:
    """The exponential, or infinity where it overflows."""
    return math.inf if value > 700 else math.exp(value)


Bound = Literal["exact", "at least", "at most", "unknown"]


@dataclass(frozen=True)
class Speedup:
    """Steps of the baseline over steps of an arm, to reach a target.

    A run that never reaches the target is censored at the horizon: it would need more steps than it
    was given. Dropping such runs would favor the arm that fails, so they count with the horizon, and
    `bound` says whether the ratio is then exact or a bound.
    """

    ratio: Interval
    bound: Bound
    reached: int
    reached_baseline: int

    def text(self) -> str:
        """The ratio with its bound, for a table."""
        if self.bound == "unknown":
            return "not reached"
        prefix = {"exact": "", "at least": "≥ ", "at most": "≤ "}[self.bound]
        return f"{prefix}×{self.ratio.text(1 if self.ratio.value >= 2 else 2)}"


def speedup(
    steps: Sequence[float | None], baseline: Sequence[float | None], horizon: float, own_horizon: float | None = None
) -> Speedup:
    """Steps of the baseline over steps of the arm, paired by seed; None is "not reached".

    Args:
        steps: Steps of the arm by seed.
        baseline: Steps of the baseline by seed.
        horizon: How many steps the baseline was trained.
        own_horizon: How many steps the arm was trained; None: as many.
    """
    own_horizon = horizon if own_horizon is None else own_horizon
    late, late_baseline = steps.count(None), baseline.count(None)
    bound: Bound = "exact"
    if late and late_baseline:
        bound = "unknown"
    elif late_baseline:
        bound = "at least"
    elif late:
        bound = "at most"
    counted = [own_horizon if value is None else value for value in steps]
    counted_baseline = [horizon if value is None else value for value in baseline]
    return Speedup(
        ratio(counted_baseline, counted),
        bound,
        len(steps) - late,
        len(baseline) - late_baseline,
    )


def first_crossing(x: Sequence[float], y: Sequence[float], target: float) -> float | None:
    """The x at which y first reaches the target, with linear interpolation; None if it never does."""
    for index, value in enumerate(y):
        if value < target:
            continue
        if index == 0:
            return float(x[0])
        before = y[index - 1]
        part = (target - before) / (value - before)
        return x[index - 1] + part * (x[index] - x[index - 1])
    return None
