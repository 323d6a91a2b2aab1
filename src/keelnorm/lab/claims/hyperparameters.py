"""Do more settings of the hyperparameters work with batch normalization?

Learning rate, scale of the initial weights and momentum are drawn at random, the same settings for every arm, and it is
counted how many train a network to 90 %.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from keelnorm.lab.core.cell import Cell, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import LONGER, ByForm, Plan, Seeds, seeds_text, steps_for
from keelnorm.lab.core.seeds import seed_from
from keelnorm.lab.reading.results_by_arm import Runs, shares_reaching
from keelnorm.lab.reading.series import bars
from keelnorm.lab.reading.verdicts import difference_findings
from keelnorm.lab.reading.wording import ACTIVATION_NAMES, listed, where_text
from keelnorm.lab.training.arms import BN, LN, NONE
from keelnorm.lab.training.trials import trial_cell
from keelnorm.measure.page_parts import Axis, Figure, Table
from keelnorm.measure.statistics import Interval, mean

ARMS = (NONE, LN, BN)
ACTIVATIONS = ("relu", "tanh")
DEPTHS = (2, 4, 8)
WIDTH = 32
TARGET = 90.0
RATES = (1e-3, 10.0)
SCALES = (0.1, 10.0)
LEAST_MOMENTUM_LEFT = 0.01
"""1 − momentum is drawn log-uniformly from this to 1."""
STEPS = ByForm(quick=50, full=100)
SEEDS = Seeds(quick=3, full=5)


def settings(seed: int, count: int) -> dict[str, tuple[float, ...]]:
    """`count` random settings, each number log-uniform; rounded, so that they can be read.

    They are a scrambled Sobol sequence, which covers the ranges more evenly than independent draws.
    """
    sequence = torch.quasirandom.SobolEngine(3, scramble=True, seed=seed_from(draw="settings", seed=seed) % 2**31)
    draw = sequence.draw(count, dtype=torch.float64).t()
    rates, scales, left = (
        low * (high / low) ** row
        for row, (low, high) in zip(draw, (RATES, SCALES, (LEAST_MOMENTUM_LEFT, 1.0)), strict=True)
    )
    return {
        "rates": tuple(float(f"{value:.3g}") for value in rates.tolist()),
        "scales": tuple(float(f"{value:.3g}") for value in scales.tolist()),
        "momenta": tuple(float(f"{1 - value:.3g}") for value in left.tolist()),
    }


def _conditions(plan: Plan) -> list[tuple[str, str]]:
    return [(data, activation) for data in CLAIM.sets(plan) for activation in ACTIVATIONS]


def _widths(plan: Plan) -> list[tuple[int, ...]]:
    return [(WIDTH,) * depth for depth in (DEPTHS[1:2] if plan.quick else DEPTHS)]


def _cells(plan: Plan, data: str, activation: str) -> Sequence[Cell]:
    count = 16 if plan.quick else 24
    return [
        trial_cell(
            count * len(widths) * 5e-5,
            data=data,
            arm=arm.name,
            seed=seed,
            **settings(seed, count),
            paired=True,
            evaluate_at=(steps_for(data, STEPS.of(plan)),),
            widths=widths,
            activation=activation,
        )
        for widths in _widths(plan)
        for seed in SEEDS.of(plan)
        for arm in ARMS
    ]


def read(plan: Plan, results: Results) -> Reading:
    """The share of settings that work: under each condition, and over depths the differences of arms."""
    findings, rows, words = [], [], []
    by_condition: dict[str, dict[str, Interval]] = {}
    gain = {"share of settings that reach 90 %, batch norm − none": (BN.name, NONE.name)}
    against = {"share of settings that reach 90 %, batch norm − layer norm": (BN.name, LN.name)}
    for data, activation in _conditions(plan):
        # Depths are averaged: a seed counts where it has a result for every arm at every depth.
        runs = Runs(_cells(plan, data, activation), results, arms=("arm", "widths"))
        shares: dict[str, list[list[float]]] = {arm.name: [] for arm in ARMS}
        for widths in _widths(plan):
            for arm in ARMS:
                shares[arm.name].append(shares_reaching(TARGET, runs.of((arm.name, widths))))
            at_depth = where_text(data, ACTIVATION_NAMES[activation], f"{len(widths)} layers")
            by_condition[at_depth] = {arm: mean(by_depth[-1]) for arm, by_depth in shares.items()}
            rows.append([at_depth, *(each.text(0) for each in by_condition[at_depth].values())])
        where = where_text(data, ACTIVATION_NAMES[activation])
        overall = {arm: [sum(v) / len(v) for v in zip(*by_depth, strict=True)] for arm, by_depth in shares.items()}
        findings += difference_findings(where, overall, gain, digits=0)
        findings += difference_findings(where, overall, against, digits=0, decisive=False)
        none, layer, batch = (mean(overall[arm.name]).value for arm in ARMS)
        words.append(
            f"{none:.0f} % of the settings without and {batch:.0f} % with batch norm ({layer:.0f} % with layer norm; "
            f"{where})"
        )
    return Reading(
        f"A network reaches {TARGET:.0f} % with {listed(words)}.",
        findings,
        [_figure(by_condition)],
        [Table("Share of the settings that reach 90 %, in percent", ["where", *(arm.label for arm in ARMS)], rows)],
        setup={
            "Settings": f"drawn log-uniformly by a Sobol sequence, the same for all arms: learning rate {RATES[0]:g} "
            f"to {RATES[1]:g}, initial weights {SCALES[0]:g} to {SCALES[1]:g} times Xavier's, 1 − momentum "
            f"{LEAST_MOMENTUM_LEFT:g} to 1",
            "Network": f"fully connected, hidden layers of {WIDTH}, centered pixels",
            "Training": f"{STEPS.of(plan)} steps of gradient descent with momentum (larger images: {LONGER} "
            "times as many), batches of 60",
            "Counted": "settings with 90 % test accuracy at the end; a seed has its own draw of settings",
            "Seeds": seeds_text(SEEDS.of(plan)),
        },
        notes=[
            "A share is one of the ranges that were drawn from: other ranges give other shares. The comparison of arms "
            "over the same settings is what counts."
        ],
    )


def _figure(by_condition: dict[str, dict[str, Interval]]) -> Figure:
    described = listed(
        [
            f"{name}: {', '.join(f'{shares[arm.name].value:.0f} % with {arm.label}' for arm in ARMS)}"
            for name, shares in by_condition.items()
        ]
    )
    return Figure(
        "Settings that work",
        Axis("condition", categories=list(by_condition)),
        Axis("share of random settings that reach 90 %, %", limits=(0.0, 100.0)),
        [bars(arm.label, arm.name, [shares[arm.name] for shares in by_condition.values()]) for arm in ARMS],
        f"Share of random hyperparameter settings that reach 90 % accuracy. {described}.",
        kind="bars",
    )


CLAIM: Claim = Claim(
    number=10,
    title="Fewer hyperparameters to tune",
    statement="Networks with batch normalization depend less on hyperparameters.",
    question="Do more settings of rate, initial weights and momentum work with batch norm?",
    literature="Follows from what is said about learning rates and initialization; Bjorck et al. find that networks "
    "with batch norm train over a wider range of rates. Layer norm widens the range too. A share of working settings "
    "means something only for the ranges that are drawn from.",
    sources=[
        Source("Bjorck, Gomes, Selman, Weinberger 2018", "https://arxiv.org/abs/1806.02375"),
        Source("Ba, Kiros, Hinton 2016: layer normalization", "https://arxiv.org/abs/1607.06450"),
    ],
    criterion="Holds if, with each activation, the share of settings that reach 90 % is larger with batch norm than "
    "without; depends if with one only.",
    data=("digits", "mnist"),
    cells=lambda plan: [cell for condition in _conditions(plan) for cell in _cells(plan, *condition)],
    read=read,
)
