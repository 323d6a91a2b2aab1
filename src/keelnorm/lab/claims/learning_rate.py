"""Does batch normalization allow higher learning rates?

The largest rate at which a network still learns, and over how many powers of ten the rates that work reach. Both depend
on what batch norm is compared with: centered pixels alone raise the limit of a network without it, so raw and centered
ones are tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import ByForm, Plan, Seeds, seeds_text
from keelnorm.lab.reading.best_rates import rate_figure
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.series import bars
from keelnorm.lab.reading.verdicts import Finding, difference_finding, ratio_finding
from keelnorm.lab.reading.wording import ACTIVATION_NAMES, listed, times, where_text
from keelnorm.lab.training.arms import BN, LN, NONE
from keelnorm.lab.training.trials import trial_cell
from keelnorm.measure.page_parts import Axis, Figure, Table
from keelnorm.measure.statistics import Interval, geometric_mean, mean, ratio

ACTIVATIONS = ("relu", "tanh")
PIXELS = {False: "raw pixels", True: "centered pixels"}
TARGET = 90.0
WIDTHS = (64, 64, 64)
_RATES = tuple(float(f"{0.01 * 10 ** (step / 4):.3g}") for step in range(16))
"""0.01 to 56, a quarter of a power of ten apart."""
RATES = ByForm(quick=_RATES[4:13], full=_RATES)
ARMS = ByForm(quick=(NONE, BN), full=(NONE, LN, BN))
SEEDS = Seeds(quick=3, full=6)
LARGEST = "largest rate that learns"


def _conditions(plan: Plan) -> list[tuple[str, str, bool]]:
    return [
        (data, activation, centered)
        for data in CLAIM.sets(plan)
        for activation in ACTIVATIONS
        for centered in PIXELS
        if not plan.quick or (activation, centered) != ("relu", False)  # raw pixels with ReLU need many steps
    ]


def _steps(plan: Plan, *, centered: bool) -> int:
    return (60 if centered else 120) if plan.quick else 200


def _cells(plan: Plan, data: str, activation: str, centered: bool) -> Sequence[Cell]:
    return [
        trial_cell(
            len(RATES.of(plan)) * 3e-4,
            data=data,
            arm=arm.name,
            seed=seed,
            rates=RATES.of(plan),
            evaluate_at=(_steps(plan, centered=centered),),
            widths=WIDTHS,
            activation=activation,
            centered=centered,
        )
        for seed in SEEDS.of(plan)
        for arm in ARMS.of(plan)
    ]


def usable(history: Result, rates: Sequence[float]) -> tuple[float, float] | None:
    """The largest rate that reaches the target on test data, and the width of all that do in powers of ten.

    The largest rate is where the accuracy falls through the target, linear in the rate's logarithm between the last
    rate of the grid that works and the next one. A rate stands for a step of the grid in the width. None: none works.
    """
    accuracies = history["test"][-1]
    works = [accuracy >= TARGET for accuracy in accuracies]
    if not any(works):
        return None
    step = math.log10(rates[1] / rates[0])
    last = max(index for index, fine in enumerate(works) if fine)
    beyond = 0.0
    if last + 1 < len(rates):
        beyond = step * (accuracies[last] - TARGET) / (accuracies[last] - accuracies[last + 1])
    return rates[last] * 10**beyond, step * sum(works)


def read(plan: Plan, results: Results) -> Reading:
    """How many times higher the largest rate that learns is, by condition."""
    findings, asides, figures, rows, words, notes = [], [], [], [], [], []
    rates, arms = RATES.of(plan), ARMS.of(plan)
    gains: dict[str, Interval] = {}
    alone: dict[tuple[str, str, bool], dict[object, float]] = {}
    for data, activation, centered in _conditions(plan):
        runs = Runs(_cells(plan, data, activation, centered), results)
        by_arm = {arm.name: runs.of(arm.name) for arm in arms}
        where = where_text(data, ACTIVATION_NAMES[activation], PIXELS[centered])
        seen = {name: [usable(history, rates) for history in histories] for name, histories in by_arm.items()}
        # A network that learns at no rate counts with the lowest one.
        largest = {name: [rates[0] if one is None else one[0] for one in each] for name, each in seen.items()}
        width = {name: [0.0 if one is None else one[1] for one in each] for name, each in seen.items()}
        alone[data, activation, centered] = dict(zip(runs.seeds(), largest[NONE.name], strict=True))
        gain = gains[where] = ratio(largest[BN.name], largest[NONE.name])
        findings.append(ratio_finding(f"{LARGEST}, with batch norm ÷ without", where, gain, digits=1))
        wider = "powers of ten of rates that learn, batch norm − none"
        asides.append(
            difference_finding(wider, where, width[BN.name], width[NONE.name], unit="", digits=2, decisive=False)
        )
        if LN in arms:
            asides.append(_aside("with layer norm ÷ without", where, ratio(largest[LN.name], largest[NONE.name])))
        if centered and (data, activation, False) in alone:
            asides += _centering(data, activation, alone[data, activation, True], alone[data, activation, False])
        words.append(f"{times(gain, 'higher', 'lower', 'not clearly different')} ({where})")
        said = (
            f". The largest rate that reaches {TARGET:.0f} % is, with batch norm, ×{gain.text(1)} that of the network "
            "without normalization."
        )
        reference = (TARGET, f"{TARGET:.0f} %")
        figures.append(rate_figure(where, arms, by_arm, rates, said, reference=reference))
        rows += [
            [where, arm.label, geometric_mean(largest[arm.name]).text(None), mean(width[arm.name]).text(2)]
            for arm in arms
        ]
        for arm in arms:
            notes += _notes(where, arm.label, rates, largest[arm.name], seen[arm.name].count(None))
    return Reading(
        f"The largest rate at which a network still reaches {TARGET:.0f} % is, with batch norm, {listed(words)}.",
        [*findings, *asides],
        [_gains(gains), *figures],
        [
            Table(
                f"Rates that reach {TARGET:.0f} % on test data",
                ["where", "arm", "largest rate, interpolated", "width, powers of ten"],
                rows,
            )
        ],
        setup=_setup(plan),
        notes=[
            *notes,
            "The factor depends on the baseline: a network without normalization takes higher rates, too, when its "
            "pixels are centered. The findings say by how much.",
        ],
    )


def _setup(plan: Plan) -> dict[str, str]:
    rates = RATES.of(plan)
    return {
        "Network": f"fully connected, {' - '.join(map(str, WIDTHS))} hidden units, Xavier's initialization",
        "Pixels": "raw: from 0 to 1, as they come; centered: the mean image subtracted, divided by one overall "
        "deviation",
        "Training": f"{_steps(plan, centered=True)} steps on centered and {_steps(plan, centered=False)} on raw "
        "pixels, of gradient descent without momentum, batches of 60, constant rate",
        "Rates": f"{len(rates)} from {rates[0]:g} to {rates[-1]:g}, evenly spaced in the logarithm",
        "A rate learns": f"where the test accuracy at the end is at least {TARGET:.0f} %",
        "Seeds": seeds_text(SEEDS.of(plan)),
    }


def _notes(where: str, label: str, rates: Sequence[float], largest: Sequence[float], never: int) -> list[str]:
    """Where the grid ends before what was looked for."""
    notes = []
    if max(largest) >= rates[-1]:
        notes.append(
            f"{where}: with {label} a network still learns at the largest rate of the grid, {rates[-1]:g}; the true "
            "limit is higher."
        )
    if never:
        notes.append(
            f"{where}: {label} learns at no rate tried in {never} of {len(largest)} runs, which count with the lowest "
            f"one, {rates[0]:g}; with more steps they might learn."
        )
    return notes


def _aside(compared: str, where: str, effect: Interval) -> Finding:
    return ratio_finding(f"{LARGEST}, {compared}", where, effect, digits=1, decisive=False)


def _centering(data: str, activation: str, after: dict[object, float], before: dict[object, float]) -> list[Finding]:
    """What centered pixels alone do for the network without normalization, from the seeds that have both."""
    both = [seed for seed in after if seed in before]
    if not both:
        return []
    gain = ratio([after[seed] for seed in both], [before[seed] for seed in both])
    return [_aside("centered ÷ raw pixels", where_text(data, ACTIVATION_NAMES[activation], NONE.label), gain)]


def _gains(gains: dict[str, Interval]) -> Figure:
    said = listed([f"{name}: ×{gain.text(1)}" for name, gain in gains.items()])
    return Figure(
        "How many times higher the largest rate that learns is",
        Axis("condition", categories=list(gains)),
        Axis("largest rate, with over without batch norm", scale="log"),
        [bars("with over without batch norm", BN.name, list(gains.values()))],
        f"The largest learning rate that reaches {TARGET:.0f} %, with over without batch norm. {said}.",
        kind="dots",
        reference=(1.0, "no gain"),
    )


CLAIM: Claim = Claim(
    number=2,
    title="Higher learning rates",
    statement="Batch normalization allows higher learning rates.",
    question="At which learning rates does a network still learn?",
    literature="Ioffe and Szegedy train Inception at 5 and 30 times the rate of the original. Bjorck et al. find in "
    "this the main cause of what batch norm gains. Part of it is a change of units: with batch norm the weights' "
    "length sets the effective rate (van Laarhoven 2017).",
    sources=[
        Source("Ioffe, Szegedy 2015, section 4.2", "https://arxiv.org/abs/1502.03167"),
        Source("Bjorck, Gomes, Selman, Weinberger 2018", "https://arxiv.org/abs/1806.02375"),
        Source("van Laarhoven 2017", "https://arxiv.org/abs/1706.05350"),
    ],
    criterion="Holds if, with each activation and with raw and centred pixels, the largest rate that learns is higher "
    "with batch norm (the ratio's interval lies above 1); depends if under some of these only.",
    data=("digits", "mnist"),
    cells=lambda plan: [cell for condition in _conditions(plan) for cell in _cells(plan, *condition)],
    read=read,
)
