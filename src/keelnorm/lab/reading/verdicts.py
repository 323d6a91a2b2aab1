"""Findings, and the verdict that follows from their intervals by a rule fixed before anything is run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from keelnorm.measure.statistics import Bound, Interval, Speedup, difference

Arm = TypeVar("Arm", bound=Hashable)

Outcome = Literal["supports", "contradicts", "not resolved"]
Verdict = Literal["holds", "depends", "does not hold", "not resolved", "no answer"]

MEANING: dict[Verdict, str] = {
    "holds": "every decisive finding supports the claim: its interval lies wholly on the claimed side",
    "depends": "some decisive findings support the claim, and others contradict it or are not resolved",
    "does not hold": "no decisive finding supports the claim, and at least one contradicts it",
    "not resolved": "every decisive interval reaches to both sides: more seeds or more data might tell",
    "no answer": "the cells that would have told have failed",
}


@dataclass(frozen=True)
class Finding:
    """One effect with its interval, and the value that the claim says it exceeds.

    Args:
        quantity: what was compared, such as "accuracy, batch norm − none".
        where: under which condition, such as "digits, sigmoid"; the findings of a claim are its conditions.
        effect: a paired difference, or the geometric mean of a paired ratio.
        threshold: the claim says that the effect lies beyond this value.
        larger: whether "beyond" is above.
        unit: printed behind the number ("points", "ms"); "×" is printed before it and is for ratios.
        digits: decimals to print.
        bound: for ratios with runs that never arrive, what the ratio is: a lower or an upper bound can support or
            contradict on one side only.
        decisive: whether it counts for the verdict; the others are shown beside.
    """

    quantity: str
    where: str
    effect: Interval
    threshold: float
    larger: bool = True
    unit: str = "points"
    digits: int = 1
    bound: Bound = "exact"
    decisive: bool = True

    @property
    def outcome(self) -> Outcome:
        """Whether the whole interval lies on the claimed side, on the other, or on neither."""
        above = self.effect.low > self.threshold and self.bound in ("exact", "at least")
        below = self.effect.high < self.threshold and self.bound in ("exact", "at most")
        if above or below:
            return "supports" if above == self.larger else "contradicts"
        return "not resolved"

    def text(self) -> str:
        """The effect with its interval and unit."""
        if self.bound == "unknown":
            return "not reached by either"
        prefix = {"exact": "", "at least": "≥ ", "at most": "≤ "}[self.bound]
        if self.unit == "×":
            return f"{prefix}×{self.effect.text(self.digits)}"
        sign = "+" if self.effect.value > 0 and self.threshold == 0 else ""
        return f"{prefix}{sign}{self.effect.text(self.digits)} {self.unit}".rstrip()


def speedup_finding(quantity: str, where: str, gain: Speedup, **how: bool) -> Finding:
    """A finding from a ratio of steps, with its bound."""
    digits = 1 if gain.ratio.value >= 2 else 2
    return Finding(quantity, where, gain.ratio, 1.0, unit="×", digits=digits, bound=gain.bound, **how)


def ratio_finding(
    quantity: str, where: str, effect: Interval, *, larger: bool = True, digits: int = 2, decisive: bool = True
) -> Finding:
    """A finding from a ratio, which the claim says lies above 1, or below it."""
    return Finding(quantity, where, effect, 1.0, larger=larger, unit="×", digits=digits, decisive=decisive)


def difference_finding(
    quantity: str,
    where: str,
    first: Sequence[float],
    second: Sequence[float],
    *,
    unit: str = "points",
    digits: int = 1,
    decisive: bool = True,
) -> Finding:
    """A finding from the paired difference of values by seed: the claim says that the first lie above the second."""
    return Finding(quantity, where, difference(first, second), 0.0, unit=unit, digits=digits, decisive=decisive)


def difference_findings(
    where: str,
    by_arm: Mapping[Arm, Sequence[float]],
    pairs: Mapping[str, tuple[Arm, Arm]],
    *,
    digits: int = 1,
    decisive: bool = True,
) -> list[Finding]:
    """By quantity, a `difference_finding` from the values of two arms."""
    return [
        difference_finding(quantity, where, by_arm[first], by_arm[second], digits=digits, decisive=decisive)
        for quantity, (first, second) in pairs.items()
    ]


def verdict(findings: Sequence[Finding]) -> Verdict:
    """What the decisive findings say together; `MEANING` has the rule in words."""
    outcomes = {finding.outcome for finding in findings if finding.decisive}
    if not outcomes:
        return "no answer"
    if outcomes == {"supports"}:
        return "holds"
    if "supports" in outcomes:
        return "depends"
    return "does not hold" if "contradicts" in outcomes else "not resolved"
