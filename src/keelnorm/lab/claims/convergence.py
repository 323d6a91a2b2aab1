"""Does a network with batch normalization learn in fewer steps?

How much it gains depends on what it is compared with, so there is a ladder of baselines: raw pixels and weights as they
come, centered pixels, larger weights, both; with sigmoid, where the 2015 paper began, and with ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence

from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import LONGER, ByForm, Plan, Seeds, seeds_text, steps_for
from keelnorm.lab.reading.best_rates import Tuned, edge_notes, fewest_steps
from keelnorm.lab.reading.results_by_arm import Runs, column
from keelnorm.lab.reading.series import band, bars
from keelnorm.lab.reading.verdicts import speedup_finding
from keelnorm.lab.reading.wording import listed, steps, where_text
from keelnorm.lab.training.arms import BN, NONE
from keelnorm.lab.training.trials import trial_cell
from keelnorm.measure.page_parts import Axis, Figure, Table
from keelnorm.measure.statistics import Speedup, geometric_mean, speedup

ARMS = (NONE, BN)
TARGET = 90.0
QUANTITY = "speed-up: steps to 90 % without batch norm ÷ steps with it"
COLUMNS = ("where", "arm", "rate", "steps", "seeds that arrive")
BATCH = 60
WIDTHS = (100, 100, 100)
# name: (activation, Xavier's weights times this, centered pixels, steps in quick form or 0, steps in full form); the
# steps are those without batch norm, and with it, which gets there sooner.
BASELINES: dict[str, tuple[str, float, bool, tuple[int, int], tuple[int, int]]] = {
    "sigmoid, raw pixels": ("sigmoid", 1.0, False, (160, 70), (1200, 100)),
    "sigmoid, centered pixels": ("sigmoid", 1.0, True, (0, 0), (350, 100)),
    "sigmoid, weights × 4": ("sigmoid", 4.0, False, (0, 0), (250, 70)),
    "sigmoid, both": ("sigmoid", 4.0, True, (100, 50), (150, 70)),
    "ReLU, raw pixels": ("relu", 1.0, False, (0, 0), (170, 60)),
    "ReLU, centered pixels": ("relu", 1.0, True, (50, 30), (80, 50)),
}
RATES = {
    "sigmoid": ByForm(quick=(1.0, 3.0), full=(0.3, 1.0, 3.0, 10.0)),
    "relu": ByForm(quick=(0.1, 0.3), full=(0.1, 0.3, 1.0, 3.0)),
}
SEEDS = Seeds(quick=4, full=7)


def evaluations(end: int) -> tuple[int, ...]:
    """The steps after which to evaluate: about a fifth apart, since steps are compared by their ratio."""
    found = [0, 3]
    while found[-1] < end:
        found.append(min(end, max(found[-1] + 1, round(found[-1] * 1.2))))
    return tuple(found)


def _conditions(plan: Plan) -> list[tuple[str, str]]:
    names = [name for name, (*_, quick, _) in BASELINES.items() if any(quick) or not plan.quick]
    return [(data, name) for data in CLAIM.sets(plan) for name in names]


def _cells(plan: Plan, data: str, baseline: str) -> Sequence[Cell]:
    activation, scale, centered, quick, full = BASELINES[baseline]
    without, with_bn = (steps_for(data, length) for length in (quick if plan.quick else full))
    marks = evaluations(without)
    return [
        trial_cell(
            1.2e-3 if arm is NONE else 1.8e-3,
            data=data,
            arm=arm.name,
            seed=seed,
            rates=RATES[activation].of(plan),
            evaluate_at=marks if arm is NONE else tuple(step for step in marks if step <= with_bn),
            widths=WIDTHS,
            activation=activation,
            scales=(scale,),
            centered=centered,
            batch=BATCH,
        )
        for seed in SEEDS.of(plan)
        for arm in ARMS
    ]


def read(plan: Plan, results: Results) -> Reading:
    """The speed-up by baseline, each arm at its best rate."""
    findings, figures, rows, words, notes = [], [], [], [], []
    ladder: dict[str, Speedup] = {}
    for data, baseline in _conditions(plan):
        runs = Runs(_cells(plan, data, baseline), results)
        by_arm = {arm.name: runs.of(arm.name) for arm in ARMS}
        tried = RATES[BASELINES[baseline][0]].of(plan)
        tuned = {name: fewest_steps(histories, tried, TARGET) for name, histories in by_arm.items()}
        horizons = {name: float(histories[0]["steps"][-1]) for name, histories in by_arm.items()}
        gain = speedup(tuned[BN.name].steps, tuned[NONE.name].steps, horizons[NONE.name], horizons[BN.name])
        where = where_text(data, baseline)
        findings.append(speedup_finding(QUANTITY, where, gain))
        ladder[where] = gain
        words.append(f"{steps(gain)} ({where})")
        figures.append(_figure(where, by_arm, tuned, gain))
        rows += [_row(where, arm.label, tuned[arm.name], horizons[arm.name]) for arm in ARMS]
        notes += [] if plan.quick else edge_notes(where, {f"of {arm.label}": tuned[arm.name] for arm in ARMS})
    return Reading(
        f"To {TARGET:.0f} % accuracy, batch norm needs {listed(words)}.",
        findings,
        [_ladder(ladder), *figures],
        [Table("Steps to 90 % on test data at the rate chosen on validation data", COLUMNS, rows)],
        setup={
            "Network": f"fully connected, {' - '.join(map(str, WIDTHS))} hidden units, Xavier's initialization",
            "Training": f"gradient descent without momentum, batches of {BATCH}, constant learning rate",
            "Learning rate": "for each arm the one with the fewest steps to the target on validation data",
            "Steps to target": "on test data, linear between evaluations; a run that does not get there counts at its "
            "last step, and the ratio is then a bound. Runs with batch norm are shorter; those "
            f"on larger images {LONGER} times as long",
            "Seeds": seeds_text(SEEDS.of(plan)),
        },
        notes=[
            *notes,
            "Running statistics start at (0, 1) and lag in the first steps; the faint curve shows the same network "
            "normalizing with the test batch's own moments.",
        ],
    )


def _ladder(gains: dict[str, Speedup]) -> Figure:
    """The gain against every baseline."""
    names = list(gains)
    said = listed([f"{name}: {gain.text()}" for name, gain in gains.items()])
    return Figure(
        "How many times fewer steps, by baseline",
        Axis("baseline", categories=names),
        Axis("steps to 90 %, without over with batch norm", scale="log"),
        [bars("steps without over with batch norm", BN.name, [gain.ratio for gain in gains.values()])],
        f"The ratio of steps to {TARGET:.0f} % accuracy, without over with batch norm, against each baseline. {said}.",
        kind="dots",
        reference=(1.0, "no gain"),
    )


def _row(where: str, label: str, tuned: Tuned, horizon: float) -> list[str]:
    known = [max(value, 1.0) for value in tuned.steps if value is not None]
    needed = geometric_mean(known).text(0) if known else f"none in {horizon:.0f}"
    return [where, label, f"{tuned.rate:g}", needed, f"{len(known)} of {len(tuned.steps)}"]


def _figure(where: str, by_arm: dict[str, list[Result]], tuned: dict[str, Tuned], gain: Speedup) -> Figure:
    series = []
    for arm in ARMS:
        best, histories = tuned[arm.name], by_arm[arm.name]
        curves_ = [column(history["test"][1:], best.index) for history in histories]
        series.append(band(f"{arm.label}, rate {best.rate:g}", arm.name, histories[0]["steps"][1:], curves_))
    best, histories = tuned[BN.name], by_arm[BN.name]
    lagless = [column(history["test_batch"][1:], best.index) for history in histories]
    series.append(band("batch norm, batch's moments", BN.name, histories[0]["steps"][1:], lagless, faint=True))
    return Figure(
        f"Test accuracy: {where}",
        Axis("steps", scale="log"),
        Axis("test accuracy, %", limits=(0.0, 100.0)),
        series,
        f"Test accuracy over training steps, {where}, each arm at its best learning rate. Batch norm needs "
        f"{steps(gain)}.",
        reference=(TARGET, f"{TARGET:.0f} %"),
    )


CLAIM: Claim = Claim(
    number=1,
    title="Faster convergence",
    statement="Networks with batch normalization converge faster.",
    question="Does batch norm reach a target accuracy in fewer steps?",
    literature="Ioffe and Szegedy report the accuracy of Inception in 14 times fewer steps. How much of that is left "
    "depends on the baseline: good initialization and centred inputs give part of it without any normalization.",
    sources=[
        Source("Ioffe, Szegedy 2015, section 4.1 and figure 1", "https://arxiv.org/abs/1502.03167"),
        Source("LeCun, Bottou, Orr, Müller 1998: Efficient BackProp", "https://doi.org/10.1007/3-540-49430-8_2"),
    ],
    criterion="Holds if, under every baseline, the interval of the ratio of steps (without batch norm ÷ with it) "
    "lies above 1; depends if under some only; does not hold if it lies below 1 somewhere and above it nowhere.",
    data=("digits", "mnist", "images"),
    cells=lambda plan: [cell for data, baseline in _conditions(plan) for cell in _cells(plan, data, baseline)],
    read=read,
)
