"""Does a network with batch normalization care less for the scale of its initial weights?"""

from __future__ import annotations

from collections.abc import Sequence

from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import LONGER, ByForm, Plan, Seeds, seeds_text, steps_for
from keelnorm.lab.reading.results_by_arm import Runs, shares_reaching
from keelnorm.lab.reading.verdicts import difference_findings
from keelnorm.lab.reading.wording import ACTIVATION_NAMES, listed, where_text
from keelnorm.lab.training.arms import BN, NONE
from keelnorm.lab.training.trials import trial_cell
from keelnorm.measure.page_parts import Axis, Figure, Series, Table
from keelnorm.measure.statistics import Interval, mean

ARMS = (NONE, BN)
ACTIVATIONS = ("sigmoid", "tanh", "relu")
TARGET = 90.0
SCALES = ByForm(quick=(0.01, 0.1, 1.0, 10.0), full=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0))
RATES = ByForm(quick=(0.3, 1.0), full=(0.03, 0.1, 0.3, 1.0))
STEPS = ByForm(quick=70, full=150)
SEEDS = Seeds(quick=3, full=8)


def _conditions(plan: Plan) -> list[tuple[str, str]]:
    return [(data, activation) for data in CLAIM.sets(plan) for activation in ACTIVATIONS]


def _cells(plan: Plan, data: str, activation: str) -> Sequence[Cell]:
    scales, rates = SCALES.of(plan), RATES.of(plan)
    return [
        trial_cell(
            len(scales) * len(rates) * 3e-4,
            data=data,
            arm=arm.name,
            seed=seed,
            rates=rates,
            scales=scales,
            evaluate_at=(steps_for(data, STEPS.of(plan)),),
            widths=(64, 64, 64),
            activation=activation,
        )
        for seed in SEEDS.of(plan)
        for arm in ARMS
    ]


def read(plan: Plan, results: Results) -> Reading:
    """The share of scales and rates that work, by activation."""
    findings, figures, rows, words = [], [], [], []
    for data, activation in _conditions(plan):
        runs = Runs(_cells(plan, data, activation), results)
        by_arm = {arm.name: runs.of(arm.name) for arm in ARMS}
        where = where_text(data, ACTIVATION_NAMES[activation])
        shares = {name: shares_reaching(TARGET, histories) for name, histories in by_arm.items()}
        gain = {"share of scales and rates that reach 90 %, batch norm − none": (BN.name, NONE.name)}
        findings += difference_findings(where, shares, gain, digits=0)
        averages = {name: mean(values) for name, values in shares.items()}
        words.append(f"{averages[NONE.name].value:.0f} % → {averages[BN.name].value:.0f} % ({where})")
        figures += [_figure(plan, where, arm.label, by_arm[arm.name], averages[arm.name]) for arm in ARMS]
        rows.append([where, *(averages[arm.name].text(0) for arm in ARMS)])
    scales, rates = SCALES.of(plan), RATES.of(plan)
    return Reading(
        f"Of all combinations of initial scale and learning rate, those that reach {TARGET:.0f} % are, without → with "
        f"batch norm, {listed(words)}.",
        findings,
        figures,
        [Table("Share of the combinations that reach 90 %, in percent", ["where", *(arm.label for arm in ARMS)], rows)],
        setup={
            "Network": "fully connected, three hidden layers of 64, centered pixels; Xavier's weights times the scale, "
            "zero biases",
            "Combinations": f"scales {', '.join(f'{s:g}' for s in scales)}; rates {', '.join(f'{r:g}' for r in rates)}",
            "Training": f"{STEPS.of(plan)} steps of gradient descent (larger images: {LONGER} times as many), batches "
            "of 60",
            "Seeds": seeds_text(SEEDS.of(plan)),
        },
        notes=[
            "Ahead of a batch norm the scale of the weights does not change what the network computes; it changes how "
            "fast the weights turn. That is why very large scales can still be too large for a given number of steps."
        ],
    )


def _figure(plan: Plan, where: str, label: str, histories: list[Result], average: Interval) -> Figure:
    scales, rates = SCALES.of(plan), RATES.of(plan)
    means = [sum(values) / len(values) for values in zip(*(h["test"][-1] for h in histories), strict=True)]
    series = [
        Series(f"×{scale:g}", "bn", list(range(len(rates))), means[row * len(rates) : (row + 1) * len(rates)])
        for row, scale in enumerate(scales)
    ]
    return Figure(
        f"{label[0].upper()}{label[1:]}: {where}",
        Axis("learning rate", categories=[f"{rate:g}" for rate in rates]),
        Axis("scale of the initial weights"),
        series,
        f"Mean test accuracy by initial scale (rows) and learning rate (columns), {where}, {label}. "
        f"{average.value:.0f} % of the combinations reach {TARGET:.0f} %.",
        kind="heatmap",
        value=Axis("test accuracy, %", limits=(0.0, 100.0)),
    )


CLAIM: Claim = Claim(
    number=5,
    title="Less sensitive to initialization",
    statement="Networks with batch normalization are less sensitive to the initial weights.",
    question="Over which scales of the initial weights does a network still learn?",
    literature="Ioffe and Szegedy argue that a layer's output after batch norm does not depend on the scale of its "
    "weights. That makes the forward pass indifferent to it; the gradient, and with it how far a step turns the "
    "weights, still falls as they grow. Initialization made for the purpose can train deep residual networks without "
    "any normalization (Zhang, Dauphin, Ma 2019).",
    sources=[
        Source("Ioffe, Szegedy 2015, section 3.3", "https://arxiv.org/abs/1502.03167"),
        Source("Zhang, Dauphin, Ma 2019: Fixup initialization", "https://arxiv.org/abs/1901.09321"),
    ],
    criterion="Holds if, with each activation, more combinations of scale and rate reach 90 % with batch norm than "
    "without (the interval of the difference lies above 0); depends if with some only.",
    data=("digits", "mnist"),
    cells=lambda plan: [cell for data, activation in _conditions(plan) for cell in _cells(plan, data, activation)],
    read=read,
)
