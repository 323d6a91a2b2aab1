"""The arms of the claim about weight decay, what is compared between them, and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from keelnorm.lab.claims._weight_decay_training import KINDS
from keelnorm.lab.core.cell import Result
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.series import band, bars
from keelnorm.lab.reading.verdicts import Finding, difference_finding, ratio_finding
from keelnorm.lab.training.arms import BN, NONE, Arm
from keelnorm.measure.page_parts import Axis, Figure
from keelnorm.measure.statistics import Interval, difference, geometric_mean, mean, ratio

ARMS = {
    "none": ("no normalization, no decay", "none"),
    "none decay": ("no normalization, decay", "ln"),
    "none rate": ("no normalization, the same effective rate", "gn"),
    "bn": ("batch norm, no decay", "bn"),
    "bn decay": ("batch norm, decay", "other-2"),
    "bn rate": ("batch norm, the same effective rate", "other-3"),
}
NETWORKS = (NONE, BN)
DECAYING = {
    "hidden": "hidden weights",
    "weights": "all weights",
    "all": "all parameters",
}
INVARIANT = 1e-3
"""Share by which outputs may change when weights ahead of a batch norm are doubled; ε keeps it from being exactly 0."""
LEFT = 10.0
"""Percent of what decay does to the outputs that may be left when only the effective rate is the same."""
EQUAL = 0.5
"""Points by which two accuracies may differ and still be called equal."""
Setting = tuple[str, float, float]
"""What decays, the rate, the decay."""


def left_over(found: Mapping[str, Sequence[Result]], network: str) -> Interval:
    """‖decay − the same effective rate‖ over ‖decay − no decay‖, between the outputs, in percent, by seed."""
    shares = []
    for with_decay, twin, without in zip(*(found[f"{network}{how}"] for how in (" decay", " rate", "")), strict=True):
        apart = math.dist(with_decay["outputs"], without["outputs"])
        shares.append(100.0 * max(math.dist(with_decay["outputs"], twin["outputs"]), 1e-9) / max(apart, 1e-9))
    return mean(shares)


@dataclass(frozen=True)
class Twins:
    """The networks at one rate and decay: results by arm and seed."""

    where: str
    found: dict[str, list[Result]]

    def effective(self, arm: str) -> list[float]:
        """The effective rates at the end."""
        return [each["effective"][-1] for each in self.found[arm]]

    def of_outputs(self, network: Arm, *, decisive: bool) -> list[Finding]:
        """How much the outputs depend on the weights' length, and on decay beyond the effective rate."""
        doubled = mean([each["scaled"] for each in self.found[network.name]])
        changed = f"change of the outputs when the hidden weights are doubled, {network.label}"
        left = f"part of decay's effect on the outputs that the effective rate leaves unexplained, {network.label}"
        return [
            Finding(changed, self.where, doubled, INVARIANT, larger=False, unit="of the largest", digits=6,
                    decisive=decisive),
            Finding(left, f"{self.where}, hidden weights", left_over(self.found, network.name), LEFT, larger=False,
                    unit="%", digits=2, decisive=decisive),
        ]  # fmt: skip

    def asides(self) -> list[Finding]:
        """What decay does to the effective rate, and to accuracy beside the same effective rate."""
        higher = "effective rate η/‖w‖² at the end with batch norm, decay over no decay"
        same = "test accuracy with batch norm, decay − the same effective rate"
        decay, rate = ([each["test"] for each in self.found[arm]] for arm in ("bn decay", "bn rate"))
        return [
            ratio_finding(higher, self.where, self._kept(), decisive=False),
            difference_finding(same, f"{self.where}, hidden weights", decay, rate, digits=2, decisive=False),
        ]

    def _kept(self) -> Interval:
        return ratio(self.effective("bn decay"), self.effective("bn"))

    def rows(self) -> list[list[str]]:
        """A row for each arm: effective rate, training and test accuracy."""
        training, test = (
            {arm: mean([each[part] for each in found]) for arm, found in self.found.items()}
            for part in ("train", "test")
        )
        return [
            [
                self.where,
                label,
                geometric_mean(self.effective(arm)).text(None),
                training[arm].text(1),
                test[arm].text(2),
            ]
            for arm, (label, _) in ARMS.items()
        ]

    def figure(self) -> Figure:
        """The effective learning rate of every arm over training."""
        return Figure(
            f"Effective learning rate: {self.where}",
            Axis("steps"),
            Axis("η/‖w‖², mean over hidden layers", scale="log"),
            [
                band(label, style, found[0]["steps"], [each["effective"] for each in found], geometric=True)
                for (label, style), found in zip(ARMS.values(), self.found.values(), strict=True)
            ],
            f"The effective learning rate over training. At the end decay keeps it ×{self._kept().text(2)} as high "
            "with batch norm; the network with the same effective rate lies on the one with decay.",
        )


@dataclass(frozen=True)
class Tuned:
    """The networks that were tried at many settings, each at the best one for what decays.

    Args:
        where: the condition.
        chosen: by network and by what decays ("none" or one of `KINDS`), the setting and the results by seed there.
    """

    where: str
    chosen: dict[tuple[str, str], tuple[Setting, list[dict[str, float]]]]

    @classmethod
    def of(cls, where: str, runs: Runs, names: Sequence[Setting]) -> Tuned:
        """From the results of both networks at the settings of these names."""
        chosen = {}
        for network in NETWORKS:
            by_seed = runs.of(network.name)
            for kind in ("none", *KINDS):
                at = best_setting(by_seed, names, kind)
                there = [{part: result[part][at] for part in ("train", "test")} for result in by_seed]
                chosen[network.name, kind] = names[at], there
        return cls(where, chosen)

    def accuracy(self, network: Arm, kind: str) -> list[float]:
        """Test accuracy by seed."""
        return [each["test"] for each in self.chosen[network.name, kind][1]]

    def beyond(self) -> Interval:
        """What decay of all parameters gains over that of the hidden weights, with batch norm."""
        return difference(self.accuracy(BN, "all"), self.accuracy(BN, "hidden"))

    def asides(self) -> list[Finding]:
        """What decay gains, by network and by what decays."""
        return [
            difference_finding(
                f"test accuracy at the best settings, {network.label}, decay − no decay",
                f"{self.where}, {DECAYING[kind]}",
                self.accuracy(network, kind),
                self.accuracy(network, "none"),
                digits=2,
                decisive=False,
            )
            for network in NETWORKS
            for kind in KINDS
        ]

    def rows(self) -> list[list[str]]:
        """A row for each network and each kind of decay."""
        rows = []
        for network in NETWORKS:
            for kind in ("none", *KINDS):
                (_, rate, decay), found = self.chosen[network.name, kind]
                accuracies = [mean([each[part] for each in found]).text(1) for part in ("train", "test")]
                rows.append(
                    [self.where, network.label, DECAYING.get(kind, "none"), f"{rate:g}", f"{decay:g}", *accuracies]
                )
        return rows

    def edges(self, names: Sequence[Setting]) -> list[str]:
        """Which of the best rates and decays lie at the edge of the grid, in words."""
        said = []
        for network in NETWORKS:
            for kind in ("none", *KINDS):
                (_, rate, decay), _ = self.chosen[network.name, kind]
                rates, decays = ({each[place] for each in names if each[0] == kind} for place in (1, 2))
                edges = [f"rate {rate:g}"] if rate in (min(rates), max(rates)) else []
                edges += [f"decay {decay:g}"] if kind != "none" and decay in (min(decays), max(decays)) else []
                what = f"{self.where}, {network.label}, {DECAYING.get(kind, 'no decay')}"
                said += [f"{what}, {' and '.join(edges)}"] if edges else []
        return said

    def figure(self) -> Figure:
        """What decay gains in accuracy, by what decays, with and without batch norm."""
        gains = {
            network: [difference(self.accuracy(network, kind), self.accuracy(network, "none")) for kind in KINDS]
            for network in NETWORKS
        }
        said = [
            f"{DECAYING[kind]}: "
            + ", ".join(f"{each[place].value:+.1f} with {network.label}" for network, each in gains.items())
            for place, kind in enumerate(KINDS)
        ]
        return Figure(
            f"What decay gains: {self.where}",
            Axis("what decays", categories=[DECAYING[kind] for kind in KINDS]),
            Axis("test accuracy, decay − no decay, points"),
            [bars(network.label, network.name, each) for network, each in gains.items()],
            "Test accuracy gained by decay, both at their best rate, in points, by what decays. "
            + "; ".join(said)
            + ". Intervals are 95 % over seeds.",
            kind="bars",
            reference=(0.0, "no gain"),
        )


def best_setting(results: Sequence[Result], names: Sequence[Setting], kind: str) -> int:
    """The setting of a kind with the highest validation accuracy, on average over seeds."""
    among = [index for index, (name, _, _) in enumerate(names) if name == kind]
    return max(among, key=lambda index: math.fsum(result["validation"][index] for result in results))
