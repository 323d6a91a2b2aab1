"""Where does batch normalization belong: before the activation, after it, or on what comes into a layer's weights?"""

from __future__ import annotations

from collections.abc import Sequence

from keelnorm.lab.core.cell import Cell, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import ByForm, Plan, Seeds, seeds_text
from keelnorm.lab.reading.best_rates import accuracies, best_by_arm, edge_notes, rate_row, rate_table
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.series import bars
from keelnorm.lab.reading.verdicts import difference_findings
from keelnorm.lab.reading.wording import ACTIVATION_NAMES, listed, where_text
from keelnorm.lab.training.arms import BN
from keelnorm.lab.training.trials import trial_cell
from keelnorm.measure.page_parts import Axis, Figure
from keelnorm.measure.statistics import Interval, mean

PLACES = {
    "before": "before the activation (a layer's output)",
    "after": "after the activation",
    "input": "at every layer's input",
}
STYLES = {"before": "bn", "after": "other-1", "input": "other-2"}
ACTIVATIONS = ByForm(quick=("relu", "tanh"), full=("relu", "tanh", "sigmoid"))
WIDTHS = (100, 100, 100, 100)
RATES = ByForm(quick=(0.1, 0.3, 1.0), full=(0.03, 0.1, 0.3, 1.0, 3.0))
SEEDS = Seeds(quick=3, full=8)


def _conditions(plan: Plan) -> list[tuple[str, str]]:
    return [(data, activation) for data in CLAIM.sets(plan) for activation in ACTIVATIONS.of(plan)]


def _cells(plan: Plan, data: str, activation: str) -> Sequence[Cell]:
    return [
        trial_cell(
            4e-3,
            data=data,
            arm=BN.name,
            seed=seed,
            rates=RATES.of(plan),
            evaluate_at=(60 if plan.quick else 200,),
            widths=WIDTHS,
            activation=activation,
            place=place,
        )
        for seed in SEEDS.of(plan)
        for place in PLACES
    ]


def read(plan: Plan, results: Results) -> Reading:
    """Accuracy before the activation against that in the other places, by activation."""
    findings, rows, words, notes = [], [], [], []
    by_condition: dict[str, dict[str, Interval]] = {}
    pairs = {
        "test accuracy, before − after the activation": ("before", "after"),
        "test accuracy, before the activation − at every layer's input": ("before", "input"),
    }
    for data, activation in _conditions(plan):
        where = where_text(data, ACTIVATION_NAMES[activation])
        runs = Runs(_cells(plan, data, activation), results, arms=("place",))
        best = best_by_arm({place: runs.of(place) for place in PLACES}, RATES.of(plan))
        gains = difference_findings(where, accuracies(best), pairs, digits=2)
        findings += gains
        after, into = (finding.effect.value for finding in gains)
        words.append(f"{after:+.2f} points against after it and {into:+.2f} against the input ({where})")
        by_condition[where] = {place: mean(each.test) for place, each in best.items()}
        rows += [rate_row(where, title, best[place]) for place, title in PLACES.items()]
        notes += edge_notes(where, {title: best[place] for place, title in PLACES.items()})
    return Reading(
        f"Before the activation, accuracy differs by {listed(words)}.",
        findings,
        [_figure(by_condition)],
        [rate_table(RATES.of(plan), rows)],
        setup={
            "Network": f"fully connected, {len(WIDTHS)} hidden layers of {WIDTHS[0]}, Xavier's initialization, "
            "centered pixels",
            "At every layer's input": "the network's input and the output layer's input are normalized too",
            "Training": "gradient descent, batches of 60, a number of steps that is the same for all",
            "Learning rate": "for each place the one with the highest validation accuracy",
            "Seeds": seeds_text(SEEDS.of(plan)),
        },
        notes=notes,
    )


def _figure(by_condition: dict[str, dict[str, Interval]]) -> Figure:
    described = listed(
        [
            f"{name}: {', '.join(f'{each.value:.1f} {PLACES[place]}' for place, each in by_place.items())}"
            for name, by_place in by_condition.items()
        ]
    )
    lowest = min(each.low for by_place in by_condition.values() for each in by_place.values())
    return Figure(
        "Test accuracy by place",
        Axis("condition", categories=list(by_condition)),
        Axis("test accuracy, %", limits=(max(0.0, lowest - 1.0), 100.0)),
        [
            bars(title, STYLES[place], [by_place[place] for by_place in by_condition.values()])
            for place, title in PLACES.items()
        ],
        f"Test accuracy of networks with batch norm in three places. {described}.",
        kind="dots",
    )


CLAIM: Claim = Claim(
    number=21,
    title="Before or after the activation",
    statement="Batch normalization belongs before the activation.",
    question="Does batch norm work best before the activation?",
    literature="Ioffe and Szegedy put it before, because a sum of many inputs is closer to a Gaussian than what an "
    "activation gives. Mishkin, Sergievskiy and Matas find it better after the activation on ImageNet (49.3 % against "
    "47.8 % before it, with γ and β). Before the activation it can be folded into the weights ahead of it and fused "
    "with the activation, which is a practical reason.",
    sources=[
        Source("Ioffe, Szegedy 2015, section 3.2", "https://arxiv.org/abs/1502.03167"),
        Source("Mishkin, Sergievskiy, Matas 2017", "https://arxiv.org/abs/1606.02228"),
    ],
    criterion="Holds if, with every activation, the accuracy before the activation is higher than after it and than "
    "at the layers' "
    "inputs; depends if it is under some conditions; does not hold if it is lower somewhere and higher nowhere.",
    data=("digits", "mnist"),
    cells=lambda plan: [cell for data, activation in _conditions(plan) for cell in _cells(plan, data, activation)],
    read=read,
)
