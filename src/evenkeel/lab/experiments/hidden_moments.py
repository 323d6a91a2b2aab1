"""How much do the moments of what a hidden layer receives wander while the network trains?

This is the observation behind the name "internal covariate shift". It is measured as in figure 1 of
Ioffe and Szegedy (2015, arXiv:1502.03167): on what the last hidden layer's activation receives. Beside it
stands what comes out of the weights before it is normalized, because that nothing holds still.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from evenkeel.lab.arms import EVENKEEL, NONE, TORCH, arm_named
from evenkeel.lab.cell import Cell, Result, Results
from evenkeel.lab.data import digits
from evenkeel.lab.experiment import Plan
from evenkeel.lab.figures import Axis, Figure, Measure, Section, Series, Table
from evenkeel.lab.networks import LABELS, Stack, stack
from evenkeel.lab.phrases import listed, times
from evenkeel.lab.protocol import (
    ARMS,
    DATA,
    NETWORKS,
    NETWORKS_TEXT,
    OPTIMIZER,
    PREPARED,
    cost,
    marks,
    seeds_text,
)
from evenkeel.lab.reading import Runs, band
from evenkeel.lab.seeds import generator
from evenkeel.lab.statistics import mean, ratio
from evenkeel.lab.tasks import BATCH
from evenkeel.lab.training import batch_moments, plain, train
from evenkeel.lab.wander import Wander, received_by

RATE = 0.1
SHOWN_UNIT = 0


def moments(*, network: str, arm: str, seed: int, rate: float, evaluate_at: tuple[int, ...]) -> Result:
    """Train one network and follow the moments of its last hidden layer on the validation images.

    Returns:
        steps; shift and spread of what the activation receives, shift_before of what the weights give
        before normalization; unit_mean and unit_deviation of one unit; test accuracy.
    """
    split = digits(seed)
    received, before = Wander(), Wander()

    def probe(step: int, model: Stack) -> None:
        block = model.blocks[-1]
        assert isinstance(block, nn.Sequential)
        # Hooks make the pair run unfused while they are there, and are gone before training goes on.
        with (
            batch_moments(model),
            received_by(block) as outside,
            received_by(block[-1]) as inside,
        ):
            model(split.validation_x)
        received.add(inside[0])
        before.add(outside[0])

    history = train(
        stack(
            network,
            arm_named(arm),
            torch.ones(1),
            generator(draw="initialization", network=network, seed=seed),
        ),
        split,
        torch.tensor([rate]),
        batch=BATCH,
        evaluate_at=evaluate_at,
        generator=generator(draw="order", seed=seed),
        probe=probe,
    )
    return {
        "steps": history.steps,
        "shift": plain(received.shift(), 5),
        "shift_before": plain(before.shift(), 5),
        "spread": plain(received.spread(), 5),
        "unit_mean": plain(torch.stack(received.means)[:, SHOWN_UNIT], 5),
        "unit_deviation": plain(torch.stack(received.deviations)[:, SHOWN_UNIT], 5),
        "test": [row[0] for row in history.test],
    }


class HiddenMoments:
    """Mean and deviation of the last hidden layer's input over training."""

    name = "hidden_moments"
    title = "Moments of a hidden layer"
    question = "Does batch normalization hold a hidden layer's input still?"
    order = 4

    def cells(self, plan: Plan) -> Sequence[Cell]:
        return [
            Cell(
                moments,
                {
                    "network": network,
                    "arm": arm.name,
                    "seed": seed,
                    "rate": RATE,
                    "evaluate_at": marks(plan, network),
                },
                cost=cost(network, arm.name, 2, marks(plan, network)[-1]),
            )
            for network in NETWORKS
            for seed in range(plan.seeds)
            for arm in ARMS
        ]

    def read(self, plan: Plan, results: Results) -> Section:
        runs = Runs(self.cells(plan), results)
        measures: list[Measure] = []
        figures: list[Figure] = []
        tables: list[Table] = []
        answers: list[str] = []
        for network in NETWORKS:
            where = LABELS[network]
            by_arm = {arm.name: runs.of(network, arm.name) for arm in ARMS}
            measure, words = _measure(where, by_arm)
            measures.append(measure)
            answers.append(f"{words} on the {where} network")
            figures += [_unit(where, by_arm), _shift(where, by_arm)]
            tables.append(_table(where, by_arm))
        return Section(
            self.name,
            self.title,
            self.question,
            "By the end of training, the means of what the last hidden layer's activation receives "
            f"have moved, with evenkeel's batch norm, {listed(answers)}.",
            setup=[
                ("Data", DATA),
                ("Networks", NETWORKS_TEXT),
                ("Preparation", PREPARED),
                ("Training", f"{OPTIMIZER} of {RATE:g} in every arm"),
                (
                    "Shift",
                    "per unit, the distance of its mean on the validation images from the mean before "
                    "training, over its deviation; averaged over units. Batch norm's own moments are "
                    "the validation batch's",
                ),
                ("Seeds", seeds_text(plan)),
            ],
            measures=measures,
            figures=figures,
            tables=tables,
            notes=[
                "A layer that normalizes its own input is bound to hold that input's moments near "
                "(β, γ); the dashed curves show that what comes out of the weights still moves. Whether "
                "less shift is what makes training faster is another question, which this does not "
                "answer."
            ],
        )


def _last(by_arm: dict[str, list[Result]], arm: str, key: str) -> list[float]:
    return [row[key][-1] for row in by_arm[arm]]


def _measure(where: str, by_arm: dict[str, list[Result]]) -> tuple[Measure, str]:
    ends = {arm.name: mean(_last(by_arm, arm.name, "shift")) for arm in ARMS}
    change = {
        arm.name: ratio(_last(by_arm, NONE.name, "shift"), _last(by_arm, arm.name, "shift"))
        for arm in (TORCH, EVENKEEL)
    }
    own = change[EVENKEEL.name]
    measure = Measure(
        "Shift of a hidden unit's mean, in deviations",
        where,
        ends,
        {name: each.text(2) for name, each in ends.items()},
        f"÷{own.text()}" if own.value >= 1 else f"×{1 / own.value:.1f}",
        {"ratio": own, "ratio torch": change[TORCH.name]},
    )
    return measure, times(own, "less", "more", "not clearly less or more")


def _unit(where: str, by_arm: dict[str, list[Result]]) -> Figure:
    series = []
    for arm in ARMS:
        first = by_arm[arm.name][0]
        pairs = list(zip(first["unit_mean"], first["unit_deviation"], strict=True))
        edges = [(None, None) if None in pair else (pair[0] - pair[1], pair[0] + pair[1]) for pair in pairs]
        series.append(
            Series(
                arm.label,
                arm.name,
                first["steps"],
                first["unit_mean"],
                [low for low, _ in edges],
                [high for _, high in edges],
            )
        )
    travels = listed([f"{each.label} from {two_digits(each.y[0])} to {two_digits(each.y[-1])}" for each in series])
    return Figure(
        f"One unit's input, mean and deviation: {where}",
        Axis("steps"),
        Axis("input of the activation"),
        series,
        f"Mean of what one unit of the last hidden layer receives over training, {where}, first seed; "
        f"the band is one deviation on either side, not an interval. The mean goes, for {travels}.",
    )


def two_digits(value: float | None) -> str:
    """The number with two digits, and no sign where that leaves zero."""
    return "-" if value is None else f"{round(value, 2) + 0.0:.2f}"


def _shift(where: str, by_arm: dict[str, list[Result]]) -> Figure:
    series = [
        band(arm.label, arm.name, rows[0]["steps"], [row["shift"] for row in rows])
        for arm in ARMS
        for rows in [by_arm[arm.name]]
    ]
    rows = by_arm[EVENKEEL.name]
    before = [row["shift_before"] for row in rows]
    series.append(band("evenkeel, before normalizing", EVENKEEL.name, rows[0]["steps"], before, faint=True))
    ends = listed([f"{each.label} {each.y[-1]:.2f}" for each in series])
    return Figure(
        f"Shift of the units' means: {where}",
        Axis("steps"),
        Axis("shift since the start, deviations"),
        series,
        f"Distance of the units' means from their start, in deviations, averaged over the units of the "
        f"last hidden layer, {where}. At the end: {ends}.",
    )


def _table(where: str, by_arm: dict[str, list[Result]]) -> Table:
    return Table(
        f"After training at the rate {RATE:g} ({where})",
        [
            "arm",
            "shift",
            "shift before normalizing",
            "deviation over its start",
            "test accuracy, %",
        ],
        [
            [
                arm.label,
                mean(_last(by_arm, arm.name, "shift")).text(2),
                mean(_last(by_arm, arm.name, "shift_before")).text(2),
                mean(_last(by_arm, arm.name, "spread")).text(2),
                mean(_last(by_arm, arm.name, "test")).text(1),
            ]
            for arm in ARMS
        ],
    )


EXPERIMENT = HiddenMoments()
