"""The tests of the rules, as far as they need no more than the normal distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def t_test(distance: Tensor, error: Tensor, freedom: int) -> Tensor:
    """The two-sided p-values of Student's t = distance / error, from above.

    √(ν·ln(1 + t²/ν)·(1 − 1/(2ν))) is at most the normal deviate of the same probability (Wallace 1959, "Bounds on
    Normal Approximations to Student's and the Chi-Square Distributions", Annals of Mathematical Statistics 30). Where
    both are 0, nothing differs.
    """
    t2 = torch.where(distance > 0, (distance / error).square(), 0.0)
    deviate = (freedom * (t2 / freedom).log1p() * (1 - 1 / (2 * freedom))).sqrt()
    return torch.where(deviate.isinf(), 0.0, 2 * _above(deviate))


def f_test(f: Tensor, between: int, within: int) -> Tensor:
    """The probability of a variance ratio F with these degrees of freedom or a larger one, approximately.

    Paulson (1942), "An Approximate Normalization of the Analysis of Variance Distribution", Annals of Mathematical
    Statistics 13: the cube root of F is nearly normal.
    """
    a, b = 2 / (9 * between), 2 / (9 * within)
    root = f.clamp(min=0) ** (1 / 3)
    deviate = ((1 - b) * root - (1 - a)) / (b * root.square() + a).sqrt()
    return _above(deviate)


def _above(deviate: Tensor) -> Tensor:
    """The probability of more than a deviate of the standard normal distribution."""
    p: Tensor = torch.special.log_ndtr(-deviate).exp()
    return p


def sign_test(losses: int, wins: int) -> float:
    """The probability of so many losses or more among pairs that differ, where both are equally likely (McNemar 1947).

    Exact up to 1,000 pairs, normal with the correction for continuity above.
    """
    pairs = losses + wins
    if not pairs:
        return 1.0
    if pairs <= 1000:
        return float(sum(math.comb(pairs, k) for k in range(losses, pairs + 1)) / 2**pairs)
    return 0.5 * math.erfc((losses - 0.5 - pairs / 2) / math.sqrt(pairs / 2))
