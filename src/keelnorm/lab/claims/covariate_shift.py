"""Does batch normalization reduce internal covariate shift? And is that why networks train faster?

Three measurements: how far the moments of what a hidden layer receives drift; how much a layer's gradient changes when
the layers ahead of it move; and whether the gain is lost when noise behind the batch norm puts the shift back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keelnorm.lab.claims._shift_figures import cosine_figure, drift_figure, unit_figure
from keelnorm.lab.claims._shifts import (
    ARMS,
    DRIFT_RATES,
    NOISE_SCALE,
    NOISE_SHIFT,
    PREPARED,
    PROBED,
    RATES,
    TARGET,
    WIDTHS,
    drift,
    gradient_change,
)
from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan, seeds_text
from keelnorm.lab.reading.figures import Figure, Table
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.verdicts import Finding, speedup_finding
from keelnorm.lab.reading.wording import listed, steps
from keelnorm.lab.training.arms import BN, NONE
from keelnorm.lab.training.learning_rates import Tuned, tune
from keelnorm.lab.training.trials import where_text
from keelnorm.measure.statistics import Speedup, difference, geometric_mean, mean, ratio, speedup

LEAST = 1e-6
"""Drifts below it count as this much, so that a ratio is defined."""


def _seeds(plan: Plan) -> range:
    return plan.seed_range(quick=3, full=8)


def _drift_cells(plan: Plan, data: str) -> list[Cell]:
    length = 200 if plan.quick else 500
    return [
        Cell(
            drift,
            {"data": data, "arm": arm.name, "seed": seed, "steps": length, "rates": DRIFT_RATES},
            cost=length * 2.5e-3,
        )
        for seed in _seeds(plan)
        for arm in ARMS
    ]


def _gradient_cells(plan: Plan, data: str) -> list[Cell]:
    length = 60 if plan.quick else 300
    return [
        Cell(
            gradient_change,
            {
                "data": data,
                "activation": activation,
                "centred": centred,
                "arm": arm.name,
                "seed": seed,
                "steps": length,
                "rates": RATES[activation],
            },
            cost=length * 2e-3,
        )
        for activation, centred in PREPARED.values()
        for seed in _seeds(plan)
        for arm in (NONE, BN)
    ]


def cells(plan: Plan) -> Sequence[Cell]:
    return [
        cell
        for data in plan.sets("digits", "mnist")
        for cell in (*_drift_cells(plan, data), *_gradient_cells(plan, data))
    ]


@dataclass(frozen=True)
class Drifts:
    """What the drifting networks tell, each arm at its own rate: histories, steps to the target, drift at the end."""

    histories: dict[str, list[Result]]
    tuned: dict[str, Tuned]
    ends: dict[str, list[float]]
    gains: dict[str, Speedup]

    @classmethod
    def of(cls, runs: Runs) -> Drifts:
        histories = {arm.name: runs.of(arm.name) for arm in ARMS}
        tuned = {name: tune(each, DRIFT_RATES, TARGET) for name, each in histories.items()}
        ends = {name: [max(h["shift"][-1][tuned[name].index], LEAST) for h in each] for name, each in histories.items()}
        horizon = float(histories["none"][0]["steps"][-1])
        gains = {
            name: speedup(tuned[name].steps, tuned[against].steps, horizon)
            for name, against in (("bn", "none"), ("noisy", "none"))
        }
        gains["without noise"] = speedup(tuned["bn"].steps, tuned["noisy"].steps, horizon)
        return cls(histories, tuned, ends, gains)

    def findings(self, where: str) -> list[Finding]:
        where = f"{where}, sigmoid"
        drifts = ratio(self.ends["none"], self.ends["bn"])
        restored = difference(self.ends["noisy"], self.ends["none"])
        return [
            Finding("(a) drift of a hidden layer's input, none over batch norm", where, drifts, 1.0, unit="×"),
            Finding(
                "(c) drift with noise behind batch norm − without batch norm",
                where,
                restored,
                0.0,
                unit="deviations",
                digits=2,
                decisive=False,
            ),
            speedup_finding("(c) steps to 90 %, none over batch norm", where, self.gains["bn"], decisive=False),
            speedup_finding(
                "(c) what the shift costs: steps to 90 %, batch norm with noise over batch norm",
                where,
                self.gains["without noise"],
            ),
            speedup_finding(
                "(c) what is gained with the shift put back: steps to 90 %, none over batch norm with noise",
                where,
                self.gains["noisy"],
                larger=False,
            ),
        ]

    def rows(self, where: str) -> list[list[str]]:
        return [
            [
                where,
                arm.label,
                f"{self.tuned[arm.name].rate:g}",
                mean(self.ends[arm.name]).text(3),
                _steps_text(self.tuned[arm.name].steps),
                mean([h["test"][-1][self.tuned[arm.name].index] for h in self.histories[arm.name]]).text(1),
            ]
            for arm in ARMS
        ]


def _cosines(where: str, runs: Runs) -> tuple[list[Finding], list[Figure], list[list[str]], list[str]]:
    """What (b) tells: at the middle rate the findings, at every rate a row."""
    findings, figures, rows, words = [], [], [], []
    for name, prepared in PREPARED.items():
        rates = RATES[prepared[0]]
        by_arm = {arm.name: runs.of(arm.name, *prepared) for arm in (NONE, BN)}
        for index, rate in enumerate(rates):
            found = {
                arm: [mean([row[index] for row in each["cosine"]]).value for each in runs_]
                for arm, runs_ in by_arm.items()
            }
            ends = {arm: mean([each["accuracy"][index] for each in runs_]) for arm, runs_ in by_arm.items()}
            middle = index == len(rates) // 2
            findings.append(
                Finding(
                    "(b) cosine of a layer's gradient before and after earlier layers move, batch norm − none",
                    f"{where}, {name}, rate {rate:g}",
                    difference(found["bn"], found["none"]),
                    0.0,
                    unit="",
                    digits=3,
                    decisive=middle,
                )
            )
            rows += [
                [where, name, f"{rate:g}", arm.label, mean(found[arm.name]).text(3), ends[arm.name].text(1)]
                for arm in (NONE, BN)
            ]
            if middle:
                words.append(f"{mean(found['none']).value:.2f} → {mean(found['bn']).value:.2f} with {name}")
                figures.append(cosine_figure(where, name, index, rate, by_arm))
    return findings, figures, rows, words


def read(plan: Plan, results: Results) -> Reading:
    findings, figures, drift_rows, cosine_rows, words, notes = [], [], [], [], [], []
    for data in plan.sets("digits", "mnist"):
        where = where_text(data)
        drifts = Drifts.of(Runs(_drift_cells(plan, data), results))
        gradients = Runs(_gradient_cells(plan, data), results, where=("activation", "centred"))
        of_cosines, cosine_figures, rows, turned = _cosines(where, gradients)
        of_drift = drifts.findings(where)
        findings += [of_drift[0], *of_cosines, *of_drift[1:]]
        drawn = {name: (histories, drifts.tuned[name].index) for name, histories in drifts.histories.items()}
        figures += [drift_figure(where, drawn), unit_figure(where, drawn), *cosine_figures]
        drift_rows += drifts.rows(where)
        cosine_rows += rows
        ends = {name: mean(each).value for name, each in drifts.ends.items()}
        words.append(
            f"a hidden layer's input drifts {ends['none']:.2f} → {ends['bn']:.3f} deviations; the cosine of a layer's "
            f"gradient goes {listed(turned)}; with noise that puts the drift at {ends['noisy']:.2f}, batch norm needs "
            f"{steps(drifts.gains['noisy'])} than none ({steps(drifts.gains['bn'])} without the noise; {where})"
        )
        notes += [
            f"{where}: the best rate of {arm.label} in (a) and (c), {drifts.tuned[arm.name].rate:g}, lies at the edge "
            "of the grid."
            for arm in ARMS
            if drifts.tuned[arm.name].at_edge
        ]
    return Reading(
        f"From no normalization to batch norm, {listed(words)}.",
        findings,
        figures,
        [
            Table(
                "(a) and (c): drift at the end (deviations), steps to 90 % and accuracy, each arm at its rate; sigmoid",
                ["where", "arm", "rate", "drift", "steps to 90 %", "accuracy, %"],
                drift_rows,
            ),
            Table(
                "(b): cosine of the gradient, mean over training, and accuracy at the end, by rate",
                ["where", "network", "rate", "arm", "cosine", "accuracy, %"],
                cosine_rows,
            ),
        ],
        setup=_setup(plan),
        notes=[
            *notes,
            "Batch norm pins the moments of what it puts out near (β, γ), so (a), measured right behind it, is no "
            "surprise.",
            "A cosine in a network that does not learn says little: the accuracy stands beside it.",
            "Noise does more than move the moments: what it costs in (c) is an upper bound on what the shift costs.",
        ],
    )


def _setup(plan: Plan) -> list[tuple[str, str]]:
    return [
        ("Network", f"fully connected, {' - '.join(map(str, WIDTHS))} hidden units, Xavier's initialization"),
        (
            "(a) Drift",
            "distance of a unit's mean at the last activation's input from its mean before training, over its "
            "deviation, averaged over units; in training mode on the validation images; sigmoid, centred pixels",
        ),
        (
            "(b) Gradient",
            f"of hidden layer {PROBED + 1}'s weights on the same batch, before and after the step of the layers ahead "
            "of it; the cosine's mean over training; the same rate in both arms, the middle one decides",
        ),
        (
            "(c) Noise",
            f"behind every batch norm in training: times 1 + {NOISE_SCALE:g}·N(0, 1), plus {NOISE_SHIFT:g}·N(0, 1), "
            "drawn anew for each layer, channel and step; the networks of (a)",
        ),
        ("Learning rate", "in (a) and (c) for each arm the one with the fewest steps to 90 % on validation data"),
        ("Seeds", seeds_text(_seeds(plan))),
    ]


def _steps_text(needed: Sequence[float | None]) -> str:
    known = [max(value, 1.0) for value in needed if value is not None]
    return f"{geometric_mean(known).text(0)} ({len(known)} of {len(needed)})" if known else "-"


CLAIM = Claim(
    number=3,
    title="Internal covariate shift",
    statement="Batch normalization reduces internal covariate shift, and that is why networks train faster.",
    question="Does a layer's input hold still with batch norm, and is that what helps?",
    literature="Ioffe and Szegedy name the drift of a layer's inputs internal covariate shift, and its reduction as "
    "the reason for what batch norm gains. "
    "Santurkar et al. define it by the change of a layer's gradient when earlier layers move, find no reduction by "
    "batch norm, and show that a network whose "
    "shift is put back by noise trains as fast.",
    sources=[
        Source("Ioffe, Szegedy 2015, sections 1 and 4.1, figure 1", "https://arxiv.org/abs/1502.03167"),
        Source("Santurkar, Tsipras, Ilyas, Mądry 2018, sections 2.1 and 2.2", "https://arxiv.org/abs/1805.11604"),
    ],
    criterion="Holds if with batch norm (a) the moments of a hidden layer's input drift less, (b) a layer's gradient "
    "changes less when the layers ahead of it move, in every set-up, and (c) noise that puts the shift back takes the "
    "gain away: it costs steps, and batch norm with it needs no fewer than none. Depends if some of these hold.",
    data=("digits", "mnist"),
    cells=cells,
    read=read,
)
