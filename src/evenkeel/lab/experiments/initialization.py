"""How far may the scale of the initial weights be off?"""

from __future__ import annotations

from collections.abc import Sequence

from evenkeel.lab.arms import EVENKEEL, NONE, TORCH
from evenkeel.lab.cell import Cell, Result, Results
from evenkeel.lab.experiment import Plan
from evenkeel.lab.figures import Axis, Figure, Measure, Section, Table
from evenkeel.lab.networks import LABELS
from evenkeel.lab.phrases import listed, signed
from evenkeel.lab.protocol import (
    ARMS,
    DATA,
    NETWORKS,
    NETWORKS_TEXT,
    OPTIMIZER,
    PREPARED,
    TARGET,
    cost,
    seeds_text,
)
from evenkeel.lab.reading import Runs, band
from evenkeel.lab.statistics import difference, mean
from evenkeel.lab.tasks import curves

SCALES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
QUICK_SCALES = (0.01, 0.1, 1.0, 10.0)
RATES = (0.01, 0.1, 1.0)
STEPS = {"mlp": 150, "cnn": 80}
QUICK_STEPS = {"mlp": 60, "cnn": 40}


def scales(plan: Plan) -> tuple[float, ...]:
    """The factors on He's weights that are tried."""
    return QUICK_SCALES if plan.quick else SCALES


def steps(plan: Plan, network: str) -> int:
    """How long a run trains."""
    return (QUICK_STEPS if plan.quick else STEPS)[network]


def at_best_rate(result: Result, tried: int) -> list[float]:
    """For each scale the final test accuracy at the rate with the best validation accuracy."""
    validation, test = result["validation"][-1], result["test"][-1]
    best = []
    for start in range(0, len(test), tried):
        chosen = max(range(start, start + tried), key=lambda index: validation[index])
        best.append(test[chosen])
    return best


def share(result: Result) -> float:
    """The share of all (scale, rate) combinations, in percent, that reach the target."""
    final: list[float] = result["test"][-1]
    return 100.0 * sum(each >= TARGET for each in final) / len(final)


class InitializationScale:
    """Final accuracy over three decades of initialization scale, each at its best learning rate."""

    name = "initialization"
    title = "Initialization"
    question = "Does batch normalization make training less sensitive to the initial weights?"
    order = 3

    def cells(self, plan: Plan) -> Sequence[Cell]:
        tried = scales(plan)
        return [
            Cell(
                curves,
                {
                    "network": network,
                    "arm": arm.name,
                    "seed": seed,
                    "preparation": "prepared",
                    "rates": RATES,
                    "scales": tried,
                    "evaluate_at": (steps(plan, network),),
                },
                cost=cost(network, arm.name, len(tried) * len(RATES), steps(plan, network)),
            )
            for network in NETWORKS
            for seed in range(plan.seeds)
            for arm in ARMS
        ]

    def read(self, plan: Plan, results: Results) -> Section:
        runs = Runs(self.cells(plan), results)
        tried = scales(plan)
        parts = [_read_network(plan, runs, network, tried) for network in NETWORKS]
        answers = [answer for _, _, _, answer in parts]
        return Section(
            self.name,
            self.title,
            self.question,
            f"Of all combinations of {len(tried)} initialization scales and {len(RATES)} learning "
            f"rates, the share that reaches {TARGET:.0f} % is {listed(answers)}.",
            setup=[
                ("Data", DATA),
                ("Networks", NETWORKS_TEXT),
                ("Preparation", f"{PREPARED}, times the scale in every layer"),
                ("Training", OPTIMIZER),
                (
                    "Learning rate",
                    f"of {listed([f'{rate:g}' for rate in RATES])} the best on validation data, for "
                    "each scale, arm and seed; the share counts all of them",
                ),
                (
                    "Steps",
                    listed([f"{steps(plan, name)} ({LABELS[name]})" for name in NETWORKS]),
                ),
                ("Seeds", seeds_text(plan)),
            ],
            measures=[measure for measure, _, _, _ in parts],
            figures=[figure for _, figure, _, _ in parts],
            tables=[table for _, _, table, _ in parts],
        )


def _read_network(plan: Plan, runs: Runs, network: str, tried: tuple[float, ...]) -> tuple[Measure, Figure, Table, str]:
    where = LABELS[network]
    by_arm = {arm.name: runs.of(network, arm.name) for arm in ARMS}
    best = {name: [at_best_rate(row, len(RATES)) for row in rows] for name, rows in by_arm.items()}
    shares = {name: [share(row) for row in rows] for name, rows in by_arm.items()}
    gain = {arm.name: difference(shares[arm.name], shares[NONE.name]) for arm in (TORCH, EVENKEEL)}
    means = {name: mean(values) for name, values in shares.items()}
    measure = Measure(
        f"Share of scales and rates that reaches {TARGET:.0f} %",
        where,
        means,
        {name: each.text(0, " %") for name, each in means.items()},
        signed(gain[EVENKEEL.name]),
        {"difference": gain[EVENKEEL.name], "difference torch": gain[TORCH.name]},
    )
    figure = Figure(
        f"Accuracy by initialization scale: {where}",
        Axis("initialization scale, times He's", scale="log"),
        Axis("test accuracy, %", limits=(0.0, 100.0)),
        [band(arm.label, arm.name, tried, best[arm.name]) for arm in ARMS],
        f"Test accuracy of the {where} network after {steps(plan, network)} steps over initialization "
        f"scales from {tried[0]:g} to {tried[-1]:g} times He's, at the best of {len(RATES)} learning "
        "rates. Combinations that reach the target: "
        + listed([f"{arm.label} {means[arm.name].text(0)} %" for arm in ARMS])
        + ".",
        reference=(TARGET, f"{TARGET:.0f} %"),
    )
    table = Table(
        f"Test accuracy in % by initialization scale, at the best rate ({where})",
        ["arm", *(f"{scale:g}" for scale in tried), f"share with {TARGET:.0f} %, %"],
        [
            [
                arm.label,
                *(mean(list(each)).text(1) for each in zip(*best[arm.name], strict=True)),
                means[arm.name].text(0),
            ]
            for arm in ARMS
        ],
    )
    answer = (
        f"{means[NONE.name].text(0)} % without normalization and {means[EVENKEEL.name].text(0)} % "
        f"with evenkeel's batch norm on the {where} network"
    )
    return measure, figure, table, answer


EXPERIMENT = InitializationScale()
