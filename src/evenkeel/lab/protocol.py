"""What the experiments of `evenkeel demo` share: networks, arms, grids and the cells made of them."""

from __future__ import annotations

from collections.abc import Sequence

from evenkeel.lab.arms import EVENKEEL, NONE, TORCH
from evenkeel.lab.cell import Cell
from evenkeel.lab.experiment import Plan
from evenkeel.lab.tasks import BATCH, curves

ARMS = (NONE, TORCH, EVENKEEL)
NETWORKS = ("mlp", "cnn")
TARGET = 90.0
"""Accuracy in percent that counts as having learnt."""

DATA = "1,797 handwritten digits of 8 × 8 pixels (scikit-learn): 1,297 / 200 / 300, split by seed"
NETWORKS_TEXT = (
    "fully connected: 64-100-100-100-10; convolutional: three 3 × 3 convolutions of 8, 16 and 16 "
    "channels on 8 × 8, 4 × 4 and 4 × 4 positions, then one linear layer; ReLU"
)
OPTIMIZER = f"gradient descent without momentum, batches of {BATCH}, constant learning rate"
PREPARED = (
    "pixels centred with the training part's mean image and divided by one overall deviation; He's initialization"
)
PLAIN = "pixels from 0 to 1 as they come; the initialization of torch.nn"

RATES = (0.001, 0.01, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
QUICK_RATES = (0.001, 0.1, 0.5, 1.0, 2.0, 10.0)
PLAIN_RATES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
QUICK_PLAIN_RATES = (0.1, 0.2, 0.5, 1.0)

# About a third apart: steps are compared by their ratio.
_MARKS = (0, 2, 4, 6, 8, 11, 15, 20, 27, 36, 50, 70, 100, 130, 170, 230, 300)
_QUICK_MARKS = (0, 3, 6, 10, 15, 22, 32, 50, 70, 100, 140, 200)
_HORIZON = {
    ("mlp", "prepared"): 170,
    ("cnn", "prepared"): 130,
    ("mlp", "plain"): 300,
    ("cnn", "plain"): 130,
}
_QUICK_HORIZON = {
    ("mlp", "prepared"): 70,
    ("cnn", "prepared"): 50,
    ("mlp", "plain"): 200,
    ("cnn", "plain"): 100,
}


def rates(plan: Plan, preparation: str) -> tuple[float, ...]:
    """The learning rates that are tried."""
    if preparation == "plain":
        return QUICK_PLAIN_RATES if plan.quick else PLAIN_RATES
    return QUICK_RATES if plan.quick else RATES


def marks(plan: Plan, network: str, preparation: str = "prepared") -> tuple[int, ...]:
    """After how many steps a run is evaluated; the last is its end."""
    horizon = (_QUICK_HORIZON if plan.quick else _HORIZON)[network, preparation]
    return tuple(mark for mark in (_QUICK_MARKS if plan.quick else _MARKS) if mark <= horizon)


def cost(network: str, arm: str, replicas: int, steps: int) -> float:
    """About how many seconds a training cell takes on one core: for the order and the bar only."""
    replica_step = {"mlp": 2.5e-4, "cnn": 6e-4}[network]
    return replica_step * replicas * steps * (1.0 if arm == NONE.name else 1.5) + 0.1


def curve_cells(plan: Plan, preparation: str) -> Sequence[Cell]:
    """Every network, arm and seed over the grid of learning rates, at the usual scale."""
    tried = rates(plan, preparation)
    return [
        Cell(
            curves,
            {
                "network": network,
                "arm": arm.name,
                "seed": seed,
                "preparation": preparation,
                "rates": tried,
                "scales": (1.0,),
                "evaluate_at": marks(plan, network, preparation),
            },
            cost=cost(network, arm.name, len(tried), marks(plan, network, preparation)[-1]),
        )
        for network in NETWORKS
        for seed in range(plan.seeds)
        for arm in ARMS
    ]


def seeds_text(plan: Plan) -> str:
    """How many seeds, and what a seed is."""
    few = "" if plan.seeds >= 5 else "; fewer than five: read the intervals with care"
    return (
        f"{plan.seeds}, each a split, an initialization and an order of the samples that all arms "
        f"share; intervals are 95 % t-intervals over seeds{few}"
    )
