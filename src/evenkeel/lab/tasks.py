"""The training run that most experiments are made of."""

from __future__ import annotations

import torch

from evenkeel.lab.arms import arm_named
from evenkeel.lab.cell import Result
from evenkeel.lab.data import digits
from evenkeel.lab.networks import stack
from evenkeel.lab.seeds import generator
from evenkeel.lab.training import train

BATCH = 60


def curves(
    *,
    network: str,
    arm: str,
    seed: int,
    preparation: str,
    rates: tuple[float, ...],
    scales: tuple[float, ...],
    evaluate_at: tuple[int, ...],
) -> Result:
    """Train every learning rate at every initialization scale, and return the curves.

    The seed draws the split, the initialization and the order of the samples, by named axes that leave
    out the arm, the rate and the scale: these are compared on the same draws.

    Returns:
        The fields of `History`; replicas run over scales, and within a scale over rates.
    """
    replica_rates = torch.tensor(rates).repeat(len(scales))
    replica_scales = torch.tensor(scales).repeat_interleave(len(rates))
    network_stack = stack(
        network,
        arm_named(arm),
        replica_scales,
        generator(draw="initialization", network=network, seed=seed),
        initialization="torch" if preparation == "plain" else "he",
    )
    history = train(
        network_stack,
        digits(seed, centred=preparation != "plain"),
        replica_rates,
        batch=BATCH,
        evaluate_at=evaluate_at,
        generator=generator(draw="order", seed=seed),
    )
    return dict(vars(history))
