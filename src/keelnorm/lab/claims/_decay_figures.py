"""The arms of the claim about weight decay, and its figures."""

from __future__ import annotations

from keelnorm.lab.claims._decay import KINDS
from keelnorm.lab.core.cell import Result
from keelnorm.lab.reading.figures import Axis, Figure, Series
from keelnorm.lab.reading.results_by_arm import band
from keelnorm.lab.training.arms import BN, NONE
from keelnorm.measure.statistics import Interval

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


def gains_figure(where: str, gains: dict[tuple[str, str], Interval]) -> Figure:
    """What decay gains in accuracy, by what decays, with and without batch norm."""
    series = [
        Series(
            network.label,
            network.name,
            list(range(len(KINDS))),
            [gains[network.name, kind].value for kind in KINDS],
            [gains[network.name, kind].low for kind in KINDS],
            [gains[network.name, kind].high for kind in KINDS],
        )
        for network in NETWORKS
    ]
    said = [
        f"{DECAYING[kind]}: "
        + ", ".join(f"{gains[network.name, kind].value:+.1f} with {network.label}" for network in NETWORKS)
        for kind in KINDS
    ]
    return Figure(
        f"What decay gains: {where}",
        Axis("what decays", categories=[DECAYING[kind] for kind in KINDS]),
        Axis("test accuracy, decay − no decay, points"),
        series,
        "Test accuracy gained by decay, both at their best rate, in points, by what decays. "
        + "; ".join(said)
        + ". Intervals are 95 % over seeds.",
        kind="bars",
        reference=(0.0, "no gain"),
    )


def effective_figure(where: str, found: dict[str, list[Result]], kept: Interval) -> Figure:
    """The effective learning rate of every arm over training."""
    return Figure(
        f"Effective learning rate: {where}",
        Axis("steps"),
        Axis("η/‖w‖², mean over hidden layers", scale="log"),
        [
            band(label, style, found[arm][0]["steps"], [h["effective"] for h in found[arm]], geometric=True)
            for arm, (label, style) in ARMS.items()
        ],
        f"The effective learning rate over training. At the end decay keeps it ×{kept.text(2)} as high with batch "
        "norm; the network with the same effective rate lies on the one with decay.",
    )
