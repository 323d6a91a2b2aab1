"""Does batch normalization help convolutional networks?"""

from __future__ import annotations

from collections.abc import Sequence

from keelnorm.lab.core.cell import Cell, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import ByForm, Plan, Seeds, kind_of, seeds_text
from keelnorm.lab.reading.best_rates import (
    CHOSEN_BY_VALIDATION,
    accuracies,
    best_by_arm,
    edge_notes,
    rate_figure,
    rate_row,
    rate_table,
)
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.verdicts import difference_findings
from keelnorm.lab.reading.wording import listed, signed, where_text
from keelnorm.lab.training.arms import BN, GN, NONE
from keelnorm.lab.training.trials import trial_cell
from keelnorm.measure.statistics import mean

ARMS = (NONE, BN, GN)
CHANNELS = (8, 16, 16, 32)
RATES = ByForm(quick=(0.1, 0.3, 1.0), full=(0.03, 0.1, 0.3, 1.0, 3.0))
HIGH = 1.0
"""A rate that is high for a network without normalization."""
STEPS = {
    "digits": ByForm(quick=60, full=200),
    "mnist": ByForm(quick=60, full=300),
    "images": ByForm(quick=80, full=400),
}
SEEDS = Seeds(quick=3, full=6)


def _cells(plan: Plan, data: str) -> Sequence[Cell]:
    rates = RATES.of(plan)
    return [
        trial_cell(
            (1.5e-3 if kind_of(data) == "digits" else 8e-3) * len(rates),
            data=data,
            arm=arm.name,
            seed=seed,
            rates=rates,
            evaluate_at=(STEPS[kind_of(data)].of(plan),),
            network="cnn",
            widths=CHANNELS,
            initialization="he",
        )
        for seed in SEEDS.of(plan)
        for arm in ARMS
    ]


def read(plan: Plan, results: Results) -> Reading:
    """What batch norm gains at each arm's best rate, and at a high one."""
    findings, figures, rows, words, notes = [], [], [], [], []
    rates = RATES.of(plan)
    at_best = "test accuracy at each arm's best rate, batch norm −"
    for data in CLAIM.sets(plan):
        where = where_text(data)
        runs = Runs(_cells(plan, data), results)
        by_arm = {arm.name: runs.of(arm.name) for arm in ARMS}
        best = best_by_arm(by_arm, rates)
        test = accuracies(best)
        at_high = {arm: [run["test"][-1][rates.index(HIGH)] for run in found] for arm, found in by_arm.items()}
        of_best = difference_findings(where, test, {f"{at_best} none": (BN.name, NONE.name)}, digits=2)
        high = {f"test accuracy at the high rate {HIGH:g}, batch norm − none": (BN.name, NONE.name)}
        of_high = difference_findings(where, at_high, high)
        against = {f"{at_best} group norm": (BN.name, GN.name)}
        findings += of_best + of_high + difference_findings(where, test, against, digits=2, decisive=False)
        words.append(
            f"{mean(test[NONE.name]).value:.1f} → {mean(test[BN.name]).value:.1f} % at each one's best rate "
            f"({signed(of_best[0].effect, 1)}) and by {signed(of_high[0].effect, 1)} at the high rate {HIGH:g} "
            f"({where})"
        )
        rows += [rate_row(where, arm.label, best[arm.name]) for arm in ARMS]
        notes += [] if plan.quick else edge_notes(where, {f"of {arm.label}": best[arm.name] for arm in ARMS})
        figures.append(rate_figure(where, ARMS, by_arm, rates, f": {words[-1]}."))
    return Reading(
        f"Batch norm takes a convolutional network's accuracy from {listed(words)}.",
        findings,
        figures,
        [rate_table(rates, rows)],
        setup={
            "Network": f"{len(CHANNELS)} convolutions of 3 × 3 with {', '.join(map(str, CHANNELS))} channels and ReLU, "
            "every second of stride 2, mean over positions, one linear layer; He's initialization, centered pixels",
            "Training": "gradient descent, batches of 60; "
            + ", ".join(f"{STEPS[kind_of(data)].of(plan)} steps on {where_text(data)}" for data in CLAIM.sets(plan)),
            "Learning rate": CHOSEN_BY_VALIDATION,
            "Seeds": seeds_text(SEEDS.of(plan)),
        },
        notes=[
            *notes,
            "Small images saturate: where both arms are near the top there is little left to gain at the best rate.",
        ],
    )


CLAIM: Claim = Claim(
    number=15,
    title="Convolutional networks",
    statement="Batch normalization helps convolutional networks.",
    question="How much accuracy does batch norm gain in a convolutional network?",
    literature="Most convolutional networks since 2015 have it, residual networks among them. In a convolution a "
    "channel's moments come from all positions of all samples, so that even small batches have many values. Networks "
    "without it can reach the same accuracy with scaled weights and clipped gradients (Brock et al. 2021).",
    sources=[
        Source("Ioffe, Szegedy 2015, section 3.2", "https://arxiv.org/abs/1502.03167"),
        Source("He, Zhang, Ren, Sun 2016: deep residual learning", "https://arxiv.org/abs/1512.03385"),
        Source("Brock, De, Smith, Simonyan 2021", "https://arxiv.org/abs/2102.06171"),
    ],
    criterion="Holds if, on every data set, the test accuracy with batch norm is higher both at each arm's best rate "
    f"and at the high rate {HIGH:g}; depends if in some of these.",
    data=("digits", "mnist", "images"),
    cells=lambda plan: [cell for data in CLAIM.sets(plan) for cell in _cells(plan, data)],
    read=read,
)
