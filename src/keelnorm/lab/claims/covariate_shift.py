"""Does batch normalization reduce internal covariate shift? And is that why networks train faster?

Three measurements: how far the moments of what a hidden layer receives drift; how much a layer's gradient changes when
the layers ahead of it move; and whether the gain is lost when noise behind the batch norm puts the shift back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from keelnorm.lab.claims._covariate_shift_figures import cosine_figure, drift_figure, unit_figure
from keelnorm.lab.claims._covariate_shift_training import (
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
from keelnorm.lab.core.claim import Claim, EarlierCriterion, Reading, Source
from keelnorm.lab.core.plan import Plan, Seeds, seeds_text
from keelnorm.lab.reading.best_rates import Tuned, edge_notes, fewest_steps
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.verdicts import Finding, difference_finding, ratio_finding, speedup_finding
from keelnorm.lab.reading.wording import listed, steps, where_text
from keelnorm.lab.training.arms import BN, NONE
from keelnorm.measure.page_parts import Figure, Table
from keelnorm.measure.statistics import Speedup, geometric_mean, mean, ratio, speedup

LEAST = 1e-6
"""Drifts below it count as this much, so that a ratio is defined."""
SEEDS = Seeds(quick=3, full=8)


def _drift_cells(plan: Plan, data: str) -> list[Cell]:
    length = 200 if plan.quick else 500
    return [
        Cell(
            drift,
            {"data": data, "arm": arm.name, "seed": seed, "steps": length, "rates": DRIFT_RATES},
            cost=length * 2.5e-3,
        )
        for seed in SEEDS.of(plan)
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
                "centered": centered,
                "arm": arm.name,
                "seed": seed,
                "steps": length,
                "rates": RATES[activation],
            },
            cost=length * 2e-3,
        )
        for activation, centered in PREPARED.values()
        for seed in SEEDS.of(plan)
        for arm in (NONE, BN)
    ]


@dataclass(frozen=True)
class Drifts:
    """The networks of (a) and (c), each arm at its own rate: histories, drift at the end, speed-ups."""

    histories: dict[str, list[Result]]
    tuned: dict[str, Tuned]
    ends: dict[str, list[float]]
    gains: dict[str, Speedup]

    @classmethod
    def of(cls, runs: Runs) -> Drifts:
        """From the results of all arms."""
        histories = {arm.name: runs.of(arm.name) for arm in ARMS}
        tuned = {name: fewest_steps(each, DRIFT_RATES, TARGET) for name, each in histories.items()}
        ends = {name: [max(h["shift"][-1][tuned[name].index], LEAST) for h in each] for name, each in histories.items()}
        horizon = float(histories["none"][0]["steps"][-1])
        compared = {"bn": ("bn", "none"), "noisy": ("noisy", "none"), "without noise": ("bn", "noisy")}
        gains = {
            name: speedup(tuned[arm].steps, tuned[against].steps, horizon) for name, (arm, against) in compared.items()
        }
        return cls(histories, tuned, ends, gains)

    def findings(self, where: str) -> list[Finding]:
        """The drift (a), and what noise that puts it back costs (c)."""
        where = f"{where}, sigmoid"
        drifts = ratio(self.ends["none"], self.ends["bn"])
        drifts_at = "(a) drift of a hidden layer's input, without batch norm ÷ with it"
        restored = "(c) drift with noise behind batch norm − without batch norm"
        steps_by = "(c) speed-up: steps to 90 % without batch norm ÷ steps with it"
        cost = "(c) what the shift costs: steps to 90 %, batch norm with noise ÷ without the noise"
        left = "(c) what is gained with the shift put back: steps to 90 % without batch norm ÷ with it and noise"
        return [
            ratio_finding(drifts_at, where, drifts, digits=1),
            difference_finding(
                restored, where, self.ends["noisy"], self.ends["none"], unit="deviations", digits=2, decisive=False
            ),
            speedup_finding(steps_by, where, self.gains["bn"], decisive=False),
            speedup_finding(cost, where, self.gains["without noise"]),
            speedup_finding(left, where, self.gains["noisy"], larger=False),
        ]

    def rows(self, where: str) -> list[list[str]]:
        """A row for each arm: rate, drift, steps, accuracy."""
        return [
            [
                where,
                arm.label,
                f"{tuned.rate:g}",
                mean(self.ends[arm.name]).text(3),
                _steps_text(tuned.steps),
                mean([history["test"][-1][tuned.index] for history in self.histories[arm.name]]).text(1),
            ]
            for arm, tuned in zip(ARMS, self.tuned.values(), strict=True)
        ]

    def words(self, where: str, turned: Sequence[str]) -> str:
        """All three measurements in a sentence; `turned` says how the cosines of (b) go."""
        ends = {name: mean(each).value for name, each in self.ends.items()}
        return (
            f"a hidden layer's input drifts {ends['none']:.2f} → {ends['bn']:.3f} deviations; the cosine of a layer's "
            f"gradient goes {listed(turned)}; with noise that puts the drift at {ends['noisy']:.2f}, batch norm needs "
            f"{steps(self.gains['noisy'])} than none ({steps(self.gains['bn'])} without the noise; {where})"
        )


@dataclass
class Cosines:
    """What (b) tells: a finding and rows for every rate, words and figures for the middle one, which decides."""

    findings: list[Finding] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, where: str, runs: Runs) -> Cosines:
        """From the results of both arms."""
        found = cls()
        for name, prepared in PREPARED.items():
            by_arm = {arm.name: runs.of(arm.name, *prepared) for arm in (NONE, BN)}
            for index in range(len(RATES[prepared[0]])):
                found._add(where, name, index, by_arm)
        return found

    def _add(self, where: str, name: str, index: int, by_arm: dict[str, list[Result]]) -> None:
        """One network at one rate."""
        rates = RATES[PREPARED[name][0]]
        rate, middle = rates[index], index == len(rates) // 2
        cosine = {
            arm: [mean([row[index] for row in run["cosine"]]).value for run in found] for arm, found in by_arm.items()
        }
        self.findings.append(
            difference_finding(
                "(b) cosine of a layer's gradient before and after earlier layers move, batch norm − none",
                f"{where}, {name}, rate {rate:g}",
                cosine["bn"],
                cosine["none"],
                unit="",
                digits=3,
                decisive=middle,
            )
        )
        for arm in (NONE, BN):
            accuracy = mean([run["accuracy"][index] for run in by_arm[arm.name]])
            self.rows.append([where, name, f"{rate:g}", arm.label, mean(cosine[arm.name]).text(3), accuracy.text(1)])
        if middle:
            self.words.append(f"{mean(cosine['none']).value:.2f} → {mean(cosine['bn']).value:.2f} with {name}")
            self.figures.append(cosine_figure(where, name, index, rate, by_arm))


def read(plan: Plan, results: Results) -> Reading:
    """The three measurements on every data set."""
    findings, figures, drift_rows, cosine_rows, words, notes = [], [], [], [], [], []
    for data in CLAIM.sets(plan):
        where = where_text(data)
        drifts = Drifts.of(Runs(_drift_cells(plan, data), results))
        cosines = Cosines.of(where, Runs(_gradient_cells(plan, data), results, where=("activation", "centered")))
        of_drift = drifts.findings(where)
        findings += [of_drift[0], *cosines.findings, *of_drift[1:]]
        drawn = {name: (histories, drifts.tuned[name].index) for name, histories in drifts.histories.items()}
        figures += [drift_figure(where, drawn), unit_figure(where, drawn), *cosines.figures]
        drift_rows += drifts.rows(where)
        cosine_rows += cosines.rows
        words.append(drifts.words(where, cosines.words))
        notes += edge_notes(where, {f"of {arm.label} in (a) and (c)": drifts.tuned[arm.name] for arm in ARMS})
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


def _setup(plan: Plan) -> dict[str, str]:
    return {
        "Network": f"fully connected, {' - '.join(map(str, WIDTHS))} hidden units, Xavier's initialization",
        "(a) Drift": "distance of a unit's mean at the last activation's input from its mean before training, over its "
        "deviation, averaged over units; in training mode on the validation images; sigmoid, centered pixels",
        "(b) Gradient": f"of hidden layer {PROBED + 1}'s weights on the same batch, before and after the step of the "
        "layers ahead of it; the cosine's mean over training; the same rate in both arms, the middle one decides",
        "(c) Noise": f"behind every batch norm in training: times 1 + {NOISE_SCALE:g}·N(0, 1), plus {NOISE_SHIFT:g}·"
        "N(0, 1), drawn anew for each layer, channel and step; the networks of (a)",
        "Learning rate": "in (a) and (c) for each arm the one with the fewest steps to 90 % on validation data",
        "Seeds": seeds_text(SEEDS.of(plan)),
    }


def _steps_text(needed: Sequence[float | None]) -> str:
    known = [max(value, 1.0) for value in needed if value is not None]
    return f"{geometric_mean(known).text(0)} ({len(known)} of {len(needed)})" if known else "-"


CLAIM: Claim = Claim(
    number=3,
    title="Internal covariate shift",
    statement="Batch normalization reduces internal covariate shift, and that is why networks train faster.",
    question="Does a layer's input hold still with batch norm, and is that what helps?",
    literature="Ioffe and Szegedy name the drift of a layer's inputs internal covariate shift, and its reduction as "
    "the reason for what batch norm gains. Santurkar et al. define it by the change of a layer's gradient when earlier "
    "layers move, find no reduction by batch norm, and show that a network whose shift is put back by noise trains as "
    "fast.",
    sources=[
        Source("Ioffe, Szegedy 2015, sections 1 and 4.1, figure 1", "https://arxiv.org/abs/1502.03167"),
        Source("Santurkar, Tsipras, Ilyas, Mądry 2018, sections 2.1 and 2.2", "https://arxiv.org/abs/1805.11604"),
    ],
    criterion="Holds if with batch norm (a) the moments of a hidden layer's input drift less, (b) a layer's gradient "
    "changes less when the layers ahead of it move, in every set-up, and (c) noise that puts the shift back takes the "
    "gain away: it costs steps, and batch norm with it needs no fewer than none. Depends if some of these hold.",
    earlier=(
        EarlierCriterion(
            "2026-11-27",
            "Holds if with batch norm (a) the moments of a hidden layer's input drift less and (b) a layer's gradient "
            "changes less when the layer ahead of it moves, in every set-up; depends if some of these hold. Whether "
            "the gain needs it is shown beside (c): batch norm with noise that restores the shift, against none.",
            "A review found that (c) is what the claim is about, and that its noise was the same in every layer.",
        ),
    ),
    data=("digits", "mnist"),
    cells=lambda plan: [
        cell for data in CLAIM.sets(plan) for cell in (*_drift_cells(plan, data), *_gradient_cells(plan, data))
    ],
    read=read,
)
