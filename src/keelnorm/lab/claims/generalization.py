"""Does a network with batch normalization generalize better? And is that more than that it trains better?"""

from __future__ import annotations

from collections.abc import Sequence

from keelnorm.lab.core.cell import Cell, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan, seeds_text
from keelnorm.lab.reading.figures import Axis, Figure, Series, Table
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.lab.reading.wording import listed
from keelnorm.lab.training.arms import BN, NONE
from keelnorm.lab.training.trials import edge_notes, rate_columns, rate_row, trial_cell, tuned, where_text
from keelnorm.measure.statistics import difference, mean

ARMS = (NONE, BN)
RATES = (0.03, 0.1, 0.3, 1.0)
STEPS = 500
QUICK_STEPS = 150


def cells(plan: Plan) -> Sequence[Cell]:
    return [cell for data in _sets(plan) for cell in _cells(plan, data)]


def _sets(plan: Plan) -> list[str]:
    return plan.sets("digits", "mnist", "images")


def _cells(plan: Plan, data: str) -> Sequence[Cell]:
    return [
        trial_cell(
            3e-3,
            data=data,
            arm=arm.name,
            seed=seed,
            rates=RATES,
            evaluate_at=(QUICK_STEPS if plan.quick else STEPS,),
        )
        for seed in _seeds(plan)
        for arm in ARMS
    ]


def _seeds(plan: Plan) -> range:
    return plan.seed_range(quick=6, full=20)


def read(plan: Plan, results: Results) -> Reading:
    findings, rows, rate_rows, words, notes = [], [], [], [], []
    names: list[str] = []
    boxes: dict[str, list[tuple[int, float]]] = {arm.name: [] for arm in ARMS}
    for data in _sets(plan):
        runs = Runs(_cells(plan, data), results)
        by_arm = {arm.name: runs.of(arm.name) for arm in ARMS}
        chosen = tuned(by_arm, RATES)
        where = where_text(data)
        gain = difference(chosen[BN.name].test, chosen[NONE.name].test)
        findings.append(Finding("test accuracy, batch norm − none", where, gain, 0.0, digits=2))
        training = {
            arm.name: [history["train"][chosen[arm.name].index] for history in by_arm[arm.name]] for arm in ARMS
        }
        gaps = {
            arm.name: [a - b for a, b in zip(training[arm.name], chosen[arm.name].test, strict=True)] for arm in ARMS
        }
        narrower = difference(gaps[NONE.name], gaps[BN.name])
        findings.append(
            Finding("gap between training and test, none − batch norm", where, narrower, 0.0, digits=2, decisive=False)
        )
        words.append(f"{gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}] points on {where}")
        for arm in ARMS:
            best = chosen[arm.name]
            boxes[arm.name] += [(len(names), accuracy) for accuracy in best.test]
            rows.append(
                [
                    where,
                    arm.label,
                    mean(training[arm.name]).text(1),
                    mean(best.test).text(1),
                    mean(gaps[arm.name]).text(2),
                ]
            )
            rate_rows.append(rate_row(where, arm.label, best))
        names.append(where)
        notes += edge_notes(where, chosen, ARMS)
    lowest = min(accuracy for each in boxes.values() for _, accuracy in each)
    return Reading(
        f"Test accuracy changes with batch norm by {listed(words)}.",
        findings,
        [
            Figure(
                "Test accuracy at the best rate",
                Axis("data", categories=names),
                Axis("test accuracy, %", limits=(lowest - 0.5, 100.0)),
                [
                    Series(arm.label, arm.name, [x for x, _ in boxes[arm.name]], [y for _, y in boxes[arm.name]])
                    for arm in ARMS
                ],
                f"A box for each arm over the seeds. Batch norm changes the mean by {listed(words)}.",
                kind="boxes",
            )
        ],
        [
            Table(
                "Accuracy in percent at the rate chosen on validation data, and the gap in points",
                ["where", "arm", "training", "test", "gap"],
                rows,
            ),
            Table(
                "Accuracy in percent on validation data by learning rate (* : the one chosen), and on test data there",
                rate_columns(RATES),
                rate_rows,
            ),
        ],
        setup=[
            (
                "Network",
                "fully connected, 100 - 100 - 100 hidden units with ReLU, Xavier's initialization, centred pixels",
            ),
            ("Training", f"{QUICK_STEPS if plan.quick else STEPS} steps of gradient descent, batches of 60"),
            ("Learning rate", "for each arm the one with the highest validation accuracy at the end"),
            ("Seeds", seeds_text(_seeds(plan))),
        ],
        notes=[
            *notes,
            "Both arms fit the training part (almost) wholly, so what is left is generalization. Test parts of "
            "different seeds overlap, "
            "which makes the intervals a little too narrow.",
        ],
    )


CLAIM = Claim(
    number=7,
    title="Better generalization",
    statement="Networks with batch normalization generalize better.",
    question="Is the test accuracy higher with batch norm, each arm at its best rate?",
    literature="Ioffe and Szegedy see it as a side effect of the noise in a batch's moments; Luo et al. derive a "
    "regularizing term from it. "
    "Bjorck et al. attribute it to the larger rates. Networks without any normalization reach the same accuracy on "
    "ImageNet with "
    "other means (Brock et al. 2021).",
    sources=[
        Source("Ioffe, Szegedy 2015, section 3.4", "https://arxiv.org/abs/1502.03167"),
        Source("Luo, Wang, Shao, Peng 2019", "https://arxiv.org/abs/1809.00846"),
        Source("Bjorck, Gomes, Selman, Weinberger 2018", "https://arxiv.org/abs/1806.02375"),
        Source("Brock, De, Smith, Simonyan 2021", "https://arxiv.org/abs/2102.06171"),
    ],
    criterion="Holds if, on every data set, the interval of the paired difference in test accuracy lies above 0, "
    "each arm at the rate that is "
    "best on validation data; does not hold if it lies below.",
    data=("digits", "mnist", "images"),
    cells=cells,
    read=read,
)
