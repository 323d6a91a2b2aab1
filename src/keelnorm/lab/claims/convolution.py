"""Does batch normalization help convolutional networks?"""

from __future__ import annotations

from collections.abc import Sequence

from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan, kind_of, seeds_text
from keelnorm.lab.reading.figures import Axis, Figure, Table
from keelnorm.lab.reading.results_by_arm import Runs, band
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.lab.reading.wording import listed, signed
from keelnorm.lab.training.arms import BN, GN, NONE
from keelnorm.lab.training.trials import edge_notes, rate_columns, rate_row, trial_cell, tuned, where_text
from keelnorm.measure.statistics import difference, mean

ARMS = (NONE, BN, GN)
CHANNELS = (8, 16, 16, 32)
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
QUICK_RATES = (0.1, 0.3, 1.0)
HIGH = 1.0
"""A rate that is high for a network without normalization."""
STEPS = {"digits": (60, 200), "mnist": (60, 300), "images": (80, 400)}
"""In quick and in full form."""


def cells(plan: Plan) -> Sequence[Cell]:
    return [cell for data in _sets(plan) for cell in _cells(plan, data)]


def _sets(plan: Plan) -> list[str]:
    return plan.sets("digits", "mnist", "images")


def _rates(plan: Plan) -> tuple[float, ...]:
    return QUICK_RATES if plan.quick else RATES


def _cells(plan: Plan, data: str) -> Sequence[Cell]:
    rates = _rates(plan)
    return [
        trial_cell(
            (1.5e-3 if kind_of(data) == "digits" else 8e-3) * len(rates),
            data=data,
            arm=arm.name,
            seed=seed,
            rates=rates,
            evaluate_at=(STEPS[kind_of(data)][0 if plan.quick else 1],),
            network="cnn",
            widths=CHANNELS,
            initialization="he",
        )
        for seed in _seeds(plan)
        for arm in ARMS
    ]


def _seeds(plan: Plan) -> range:
    return plan.seed_range(quick=3, full=6)


def read(plan: Plan, results: Results) -> Reading:
    findings, figures, rows, words, notes = [], [], [], [], []
    rates = _rates(plan)
    for data in _sets(plan):
        runs = Runs(_cells(plan, data), results)
        by_arm = {arm.name: runs.of(arm.name) for arm in ARMS}
        chosen = tuned(by_arm, rates)
        where = where_text(data)
        gain = difference(chosen[BN.name].test, chosen[NONE.name].test)
        high = difference(_at(by_arm[BN.name], rates, HIGH), _at(by_arm[NONE.name], rates, HIGH))
        findings += [
            Finding("test accuracy at each arm's best rate, batch norm − none", where, gain, 0.0, digits=2),
            Finding(f"test accuracy at the high rate {HIGH:g}, batch norm − none", where, high, 0.0),
            Finding(
                "test accuracy at each arm's best rate, batch norm − group norm",
                where,
                difference(chosen[BN.name].test, chosen[GN.name].test),
                0.0,
                digits=2,
                decisive=False,
            ),
        ]
        words.append(
            f"{mean(chosen[NONE.name].test).value:.1f} → {mean(chosen[BN.name].test).value:.1f} % at each one's best "
            f"rate "
            f"({signed(gain, 1)}) and by {signed(high, 1)} at the high rate {HIGH:g} ({where})"
        )
        rows += [rate_row(where, arm.label, chosen[arm.name]) for arm in ARMS]
        notes += [] if plan.quick else edge_notes(where, chosen, ARMS)
        series = [band(arm.label, arm.name, rates, [h["test"][-1] for h in by_arm[arm.name]]) for arm in ARMS]
        figures.append(
            Figure(
                f"Accuracy by learning rate: {where}",
                Axis("learning rate", scale="log"),
                Axis("test accuracy, %", limits=(0.0, 100.0)),
                series,
                f"Test accuracy at the end of training over the learning rate, {where}: {words[-1]}.",
            )
        )
    return Reading(
        f"Batch norm takes a convolutional network's accuracy from {listed(words)}.",
        findings,
        figures,
        [
            Table(
                "Accuracy in percent on validation data by learning rate (* : the one chosen), and on test data there",
                rate_columns(rates),
                rows,
            )
        ],
        setup=[
            (
                "Network",
                f"{len(CHANNELS)} convolutions of 3 × 3 with {', '.join(map(str, CHANNELS))} channels and ReLU, "
                f"every second of stride 2, mean over "
                "positions, one linear layer; He's initialization, centred pixels",
            ),
            (
                "Training",
                "gradient descent, batches of 60; "
                + ", ".join(
                    f"{STEPS[kind_of(data)][0 if plan.quick else 1]} steps on {where_text(data)}"
                    for data in _sets(plan)
                ),
            ),
            ("Learning rate", "for each arm the one with the highest validation accuracy"),
            ("Seeds", seeds_text(_seeds(plan))),
        ],
        notes=[
            *notes,
            "Small images saturate: where both arms are near the top there is little left to gain at the best rate.",
        ],
    )


def _at(histories: Sequence[Result], rates: Sequence[float], rate: float) -> list[float]:
    return [history["test"][-1][list(rates).index(rate)] for history in histories]


CLAIM = Claim(
    number=15,
    title="Convolutional networks",
    statement="Batch normalization helps convolutional networks.",
    question="How much accuracy does batch norm gain in a convolutional network?",
    literature="Most convolutional networks since 2015 have it, residual networks among them. In a convolution a "
    "channel's moments come from all "
    "positions of all samples, so that even small batches have many values. Networks without it can reach the same "
    "accuracy with scaled weights "
    "and clipped gradients (Brock et al. 2021).",
    sources=[
        Source("Ioffe, Szegedy 2015, section 3.2", "https://arxiv.org/abs/1502.03167"),
        Source("He, Zhang, Ren, Sun 2016: deep residual learning", "https://arxiv.org/abs/1512.03385"),
        Source("Brock, De, Smith, Simonyan 2021", "https://arxiv.org/abs/2102.06171"),
    ],
    criterion=f"Holds if, on every data set, the test accuracy with batch norm is higher both at each arm's best "
    f"rate and at the high rate {HIGH:g}; "
    "depends if in some of these.",
    data=("digits", "mnist", "images"),
    cells=cells,
    read=read,
)
