"""Does a network with batch normalization generalize better? And is that more than that it trains better?"""

from __future__ import annotations

from collections.abc import Sequence

from keelnorm.lab.core.cell import Cell, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import ByForm, Plan, Seeds, seeds_text
from keelnorm.lab.reading.best_rates import accuracies, best_by_arm, edge_notes, rate_row, rate_table
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.series import accuracy_boxes
from keelnorm.lab.reading.verdicts import difference_findings
from keelnorm.lab.reading.wording import listed, where_text
from keelnorm.lab.training.arms import BN, NONE
from keelnorm.lab.training.trials import trial_cell
from keelnorm.measure.page_parts import Table
from keelnorm.measure.statistics import mean

ARMS = (NONE, BN)
RATES = (0.03, 0.1, 0.3, 1.0)
STEPS = ByForm(quick=150, full=500)
SEEDS = Seeds(quick=6, full=20)


def _cells(plan: Plan, data: str) -> Sequence[Cell]:
    return [
        trial_cell(
            3e-3,
            data=data,
            arm=arm.name,
            seed=seed,
            rates=RATES,
            evaluate_at=(STEPS.of(plan),),
        )
        for seed in SEEDS.of(plan)
        for arm in ARMS
    ]


def read(plan: Plan, results: Results) -> Reading:
    """What batch norm gains in test accuracy, and how the gap to training accuracy changes."""
    findings, rows, rate_rows, words, notes = [], [], [], [], []
    test: dict[str, dict[str, list[float]]] = {}
    for data in CLAIM.sets(plan):
        where = where_text(data)
        runs = Runs(_cells(plan, data), results)
        by_arm = {arm.name: runs.of(arm.name) for arm in ARMS}
        best = best_by_arm(by_arm, RATES)
        own = test[where] = accuracies(best)
        training = {arm: each.of(by_arm[arm], "train") for arm, each in best.items()}
        gaps = {arm: [a - b for a, b in zip(training[arm], own[arm], strict=True)] for arm in best}
        gain = {"test accuracy, batch norm − none": (BN.name, NONE.name)}
        narrower = {"gap between training and test, none − batch norm": (NONE.name, BN.name)}
        of_gain = difference_findings(where, own, gain, digits=2)
        findings += of_gain + difference_findings(where, gaps, narrower, digits=2, decisive=False)
        effect = of_gain[0].effect
        words.append(f"{effect.value:+.2f} [{effect.low:+.2f}, {effect.high:+.2f}] points on {where}")
        for arm in ARMS:
            texts = [mean(part[arm.name]).text(digits) for part, digits in ((training, 1), (own, 1), (gaps, 2))]
            rows.append([where, arm.label, *texts])
            rate_rows.append(rate_row(where, arm.label, best[arm.name]))
        notes += edge_notes(where, {f"of {arm.label}": best[arm.name] for arm in ARMS})
    return Reading(
        f"Test accuracy changes with batch norm by {listed(words)}.",
        findings,
        [
            accuracy_boxes(
                test,
                {arm.name: (arm.label, arm.name) for arm in ARMS},
                f"Batch norm changes the mean by {listed(words)}.",
            )
        ],
        [
            Table(
                "Accuracy in percent at the rate chosen on validation data, and the gap in points",
                ["where", "arm", "training", "test", "gap"],
                rows,
            ),
            rate_table(RATES, rate_rows),
        ],
        setup={
            "Network": "fully connected, 100 - 100 - 100 hidden units with ReLU, Xavier's initialization, centered "
            "pixels",
            "Training": f"{STEPS.of(plan)} steps of gradient descent, batches of 60",
            "Learning rate": "for each arm the one with the highest validation accuracy at the end",
            "Seeds": seeds_text(SEEDS.of(plan)),
        },
        notes=[
            *notes,
            "Both arms fit the training part (almost) wholly, so what is left is generalization. Test parts of "
            "different seeds overlap, which makes the intervals a little too narrow.",
        ],
    )


CLAIM: Claim = Claim(
    number=7,
    title="Better generalization",
    statement="Networks with batch normalization generalize better.",
    question="Is the test accuracy higher with batch norm, each arm at its best rate?",
    literature="Ioffe and Szegedy see it as a side effect of the noise in a batch's moments; Luo et al. derive a "
    "regularizing term from it. Bjorck et al. attribute it to the larger rates. Networks without any normalization "
    "reach the same accuracy on ImageNet with other means (Brock et al. 2021).",
    sources=[
        Source("Ioffe, Szegedy 2015, section 3.4", "https://arxiv.org/abs/1502.03167"),
        Source("Luo, Wang, Shao, Peng 2019", "https://arxiv.org/abs/1809.00846"),
        Source("Bjorck, Gomes, Selman, Weinberger 2018", "https://arxiv.org/abs/1806.02375"),
        Source("Brock, De, Smith, Simonyan 2021", "https://arxiv.org/abs/2102.06171"),
    ],
    criterion="Holds if, on every data set, the interval of the paired difference in test accuracy lies above 0, each "
    "arm at the rate that is best on validation data; does not hold if it lies below.",
    data=("digits", "mnist", "images"),
    cells=lambda plan: [cell for data in CLAIM.sets(plan) for cell in _cells(plan, data)],
    read=read,
)
