"""How much does batch normalization depend on the batch's size?"""

from __future__ import annotations

from collections.abc import Sequence

from keelnorm.lab.core.cell import Cell, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import ByForm, Plan, Seeds, seeds_text
from keelnorm.lab.reading.by_batch_size import BestBySize, SizeParts, best_by_size
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.series import with_intervals
from keelnorm.lab.reading.verdicts import Finding, difference_finding
from keelnorm.lab.reading.wording import listed, where_text
from keelnorm.lab.training.arms import BN, GN, NONE
from keelnorm.lab.training.trials import trial_cell
from keelnorm.measure.statistics import mean

ARMS = (NONE, BN, GN)
SIZES = ByForm(quick=(2, 4, 64), full=(2, 4, 8, 16, 32, 64, 128, 256))
LARGE = 64
RATES = ByForm(quick=(0.01, 0.1, 0.3), full=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0))
SEEDS = Seeds(quick=3, full=5)
STEPS = {2: 2400, 4: 1600, 8: 1000, 16: 600, 32: 400, 64: 300, 128: 200, 256: 150}
"""Small batches get more steps and yet see fewer samples: see the note."""


def _steps(plan: Plan, size: int) -> int:
    return STEPS[size] // 5 if plan.quick else STEPS[size]


def _cells(plan: Plan, data: str) -> list[Cell]:
    return [
        trial_cell(
            1e-3 + size * 2e-5,
            data=data,
            arm=arm.name,
            seed=seed,
            rates=RATES.of(plan),
            evaluate_at=(_steps(plan, size),),
            widths=(64, 64),
            batch=size,
        )
        for size in SIZES.of(plan)
        for seed in SEEDS.of(plan)
        for arm in ARMS
    ]


def read(plan: Plan, results: Results) -> Reading:
    """What a batch of 2 costs batch norm, and what it costs a network without."""
    findings, words = [], []
    parts = SizeParts(SIZES.of(plan), edges=not plan.quick)
    for data in CLAIM.sets(plan):
        where = where_text(data)
        # Sizes are compared with each other too: a seed counts where it has a result for every arm at every size.
        runs = Runs(_cells(plan, data), results, arms=("arm", "batch"))
        best = best_by_size(runs, {size: [arm.name for arm in ARMS] for size in SIZES.of(plan)}, RATES.of(plan))
        own = {
            size: [history["test_batch"][-1][each[BN.name].index] for history in runs.of((BN.name, size))]
            for size, each in best.items()
        }
        findings += _findings(where, best, own[2])
        words.append(_words(where, best))
        own_means = [mean(values) for values in own.values()]
        by_own = with_intervals("batch norm, test batch's moments", BN.name, list(own), own_means, faint=True)
        said = f"Test accuracy over the batch size in training, each arm and size at its best rate: {words[-1]}."
        parts.add(where, {arm.name: arm.label for arm in ARMS}, best, said, by_own)
    return Reading(
        f"In accuracy, {listed(words)}.",
        findings,
        parts.figures,
        [parts.table()],
        setup=_setup(plan),
        notes=[
            *parts.notes,
            "Small batches get more steps and yet see fewer samples; arms are compared at the same size, with the same "
            "steps. The faint curve evaluates the same networks with the test data's own moments: where it is as low, "
            "the training itself was hurt.",
        ],
    )


def _findings(where: str, best: BestBySize, own: Sequence[float]) -> list[Finding]:
    bn, none = ({size: best[size][arm.name].test for size in (2, 4, LARGE)} for arm in (BN, NONE))
    lost, lost_without = ([a - b for a, b in zip(arm[LARGE], arm[2], strict=True)] for arm in (bn, none))
    against_2, against_4 = (f"batch {LARGE} − batch {size}" for size in (2, 4))
    beside = "at batch 2, test data normalized by their own moments − by the running statistics"
    return [
        difference_finding(f"test accuracy of batch norm, {against_2}", where, bn[LARGE], bn[2]),
        difference_finding("what batch 2 costs: batch norm − none", where, lost, lost_without),
        difference_finding(f"test accuracy of batch norm, {against_4}", where, bn[LARGE], bn[4], decisive=False),
        difference_finding(
            f"test accuracy of no normalization, {against_2}", where, none[LARGE], none[2], decisive=False
        ),
        difference_finding(beside, where, own, bn[2], decisive=False),
    ]


def _words(where: str, best: BestBySize) -> str:
    of = {(arm, size): mean(best[size][arm].test) for arm in (BN.name, NONE.name) for size in (2, LARGE)}
    return (
        f"batch norm reaches {of[BN.name, 2].text(1)} % at batch 2 and {of[BN.name, LARGE].text(1)} % at {LARGE} "
        f"(without normalization {of[NONE.name, 2].value:.1f} and {of[NONE.name, LARGE].value:.1f} %; {where})"
    )


def _setup(plan: Plan) -> dict[str, str]:
    return {
        "Network": "fully connected, 64 - 64 hidden units with ReLU, Xavier's initialization, centered pixels",
        "Training": "gradient descent; "
        + ", ".join(f"{_steps(plan, size)} steps at batch {size}" for size in SIZES.of(plan)),
        "Learning rate": "for each arm and size the one with the highest validation accuracy, of "
        f"{', '.join(f'{rate:g}' for rate in RATES.of(plan))}",
        "Seeds": seeds_text(SEEDS.of(plan)),
    }


CLAIM: Claim = Claim(
    number=11,
    title="Dependence on the batch's size",
    statement="Batch normalization depends on the batch's size, and fails with very small batches.",
    question="What does batch norm lose with small batches?",
    literature="Wu and He show that ResNet-50's error rises steeply below 16 samples a batch, and propose group norm; "
    "Ioffe's batch renormalization is about the same. With two samples a normalized value can only be +1 or −1 times a "
    "factor: what the network learns from is the order of the two.",
    sources=[
        Source("Wu, He 2018: group normalization, figure 1", "https://arxiv.org/abs/1803.08494"),
        Source("Ioffe 2017: batch renormalization", "https://arxiv.org/abs/1702.03275"),
    ],
    criterion=f"Holds if the accuracy of batch norm at batch 2 is lower than at {LARGE}, and loses more than the "
    "network without normalization does (both intervals above 0); depends if one is.",
    data=("digits", "mnist"),
    cells=lambda plan: [cell for data in CLAIM.sets(plan) for cell in _cells(plan, data)],
    read=read,
)
