"""What the two claims about cost read: ratios of times and of bytes, by network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keelnorm.lab.core.cell import Result, Results
from keelnorm.lab.core.plan import Plan
from keelnorm.lab.training.cost_measurement import by_size
from keelnorm.measure.statistics import Interval, geometric_mean


@dataclass(frozen=True)
class Ratios:
    """The ratios of two arms in one network, over seeds; a pair is named as in "torch/none"."""

    by_seed: Sequence[Result]

    def step(self, pair: str) -> Interval:
        """Times of a training step."""
        return geometric_mean([each["step"][pair] for each in self.by_seed])

    def inference(self, pair: str) -> Interval:
        """Times of inference."""
        return geometric_mean([each["inference"][pair] for each in self.by_seed])

    def bytes_kept(self, pair: str) -> Interval:
        """Bytes kept for the backward."""
        first, second = pair.split("/")
        return geometric_mean([each["bytes"][first] / each["bytes"][second] for each in self.by_seed])


def ratios_by_size(plan: Plan, results: Results) -> dict[str, Ratios]:
    """The ratios of each network.

    Raises:
        ValueError: when one has no result.
    """
    return {size: Ratios(by_seed) for size, by_seed in by_size(plan, results).items()}


def measured_setup(found: dict[str, Ratios]) -> dict[str, str]:
    """The lines of the set-up that say how time and bytes were measured."""
    seeds = len(next(iter(found.values())).by_seed)
    return {
        "Time": "on one thread; arms take turns within a run, each round gives a ratio, and their median is a seed's",
        "Bytes": "of the distinct tensors that the forward keeps for the backward, without parameters and input",
        "Seeds": f"{seeds}; intervals are 95 % t-intervals of the logarithm",
    }
