"""What do the remedies for small batches repair, and what not?

Each remedy is trained at batches from 2 to 256, with the same samples seen as batch normalization at that size.
"""

from __future__ import annotations

from keelnorm.lab.claims._small_batches_training import ACCUMULATED, ARMS, GHOST, WIDTHS, WINDOW, train_remedy
from keelnorm.lab.core.cell import Cell, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import ByForm, Plan, Seeds, seeds_text
from keelnorm.lab.reading.by_batch_size import BestBySize, SizeParts, best_by_size
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.verdicts import Finding, difference_finding
from keelnorm.lab.reading.wording import listed, signed, where_text
from keelnorm.measure.statistics import difference, mean

SIZES = ByForm(quick=(2, 64), full=(2, 4, 8, 32, 256))
RATES = ByForm(quick=(0.03, 0.1), full=(0.01, 0.03, 0.1, 0.3))
SEEDS = Seeds(quick=3, full=5)
STEPS = {2: 800, 4: 600, 8: 400, 32: 200, 64: 150, 256: 150}
REMEDIES = ("renorm", "cross", "moving", "sync")


def _steps(plan: Plan, size: int) -> int:
    return STEPS[size] * 3 // 8 if plan.quick else STEPS[size]


def _arms(size: int) -> list[str]:
    """The arms at a size: synchronized ones only where the pooled batch is not most of the training part."""
    return [name for name in ARMS if name != "sync" or size * ACCUMULATED <= 256]


def _cells(plan: Plan, data: str) -> list[Cell]:
    slow = {"cross": 3.0, "moving": 2.0, "renorm": 2.0}
    return [
        Cell(
            train_remedy,
            {
                "data": data,
                "arm": arm,
                "batch": size,
                "seed": seed,
                "rates": RATES.of(plan),
                "steps": _steps(plan, size),
            },
            cost=_steps(plan, size) * (1e-3 + size * 2e-5) * slow.get(arm, 1.0),
        )
        for size in SIZES.of(plan)
        for seed in SEEDS.of(plan)
        for arm in _arms(size)
    ]


def read(plan: Plan, results: Results) -> Reading:
    """What each remedy gains over batch norm, and what is left to batch norm at the largest size."""
    findings, words = [], []
    sizes = SIZES.of(plan)
    parts = SizeParts(sizes, edges=not plan.quick)
    for data in CLAIM.sets(plan):
        where = where_text(data)
        # Sizes are compared with each other too: a seed counts where it has a result for every arm at every size.
        runs = Runs(_cells(plan, data), results, arms=("arm", "batch"))
        best = best_by_size(runs, {size: _arms(size) for size in sizes}, RATES.of(plan))
        for size in (each for each in sizes if each <= 8):
            findings += _findings(where, best, size, sizes[-1])
        words.append(_words(where, best, sizes[-1]))
        said = f"Test accuracy over the batch size, each arm and size at its best rate: {words[-1]}."
        parts.add(where, {name: arm.label for name, arm in ARMS.items()}, best, said)
    return Reading(
        f"With small batches, {'; '.join(words)}.",
        findings,
        parts.figures,
        [parts.table()],
        setup=_setup(plan),
        notes=parts.notes,
    )


def _findings(where: str, best: BestBySize, size: int, large: int) -> list[Finding]:
    """At one size: what each arm gains, and what the remedies leave."""
    at_size, test = f"{where}, batch {size}", {arm: each.test for arm, each in best[size].items()}
    gains = [
        difference_finding(
            f"test accuracy, {ARMS[arm].label} − batch norm",
            at_size,
            test[arm],
            test["bn"],
            decisive=arm in REMEDIES and size == 2,
        )
        for arm in (*REMEDIES, "ghost", "gn")
    ]
    left = [
        difference_finding(
            f"what is left: {ARMS[arm].label} − batch norm at batch {large}",
            at_size,
            test[arm],
            best[large]["bn"].test,
            decisive=False,
        )
        for arm in REMEDIES
    ]
    return gains + left


def _words(where: str, best: BestBySize, large: int) -> str:
    bn = best[2]["bn"].test
    gains = [f"{ARMS[arm].label} by {signed(difference(best[2][arm].test, bn), 1)}" for arm in REMEDIES]
    return (
        f"batch norm reaches {mean(bn).value:.1f} % at batch 2 and {mean(best[large]['bn'].test).value:.1f} % at "
        f"batch {large}; the remedies change accuracy at batch 2: {listed(gains)} ({where})"
    )


def _setup(plan: Plan) -> dict[str, str]:
    return {
        "Network": f"fully connected, {WIDTHS[0]} - {WIDTHS[1]} hidden units with ReLU, Xavier's initialization, "
        "centered pixels",
        "Training": "gradient descent; "
        + ", ".join(f"{_steps(plan, size)} steps at batch {size}" for size in SIZES.of(plan)),
        "Batch renormalization": "kn.BatchRenorm, r_max from 1 to 3 and d_max from 0 to 5 between batch 50 and 250",
        "Cross-iteration": f"kn.CrossIterationBatchNorm over {WINDOW} batches, told the weight ahead of it",
        "Moving average": f"kn.MovingAverageBatchNorm over {WINDOW} batches, weights ahead of it centered",
        "Synchronized": f"what kn.SyncBatchNorm computes on {ACCUMULATED} processes, or kn.backward_as_one_batch with "
        f"{ACCUMULATED} micro-batches: the moments of {ACCUMULATED} batches; the same samples in {ACCUMULATED} "
        "times fewer steps",
        "Ghost": f"kn.GhostBatchNorm with groups of {GHOST}: a remedy for large batches, shown as a control",
        "Learning rate": "for each arm and size the one with the highest validation accuracy, of "
        f"{', '.join(f'{rate:g}' for rate in RATES.of(plan))}",
        "Seeds": seeds_text(SEEDS.of(plan)),
    }


CLAIM: Claim = Claim(
    number=19,
    title="Remedies for small batches",
    statement="What batch normalization loses with small batches, its remedies bring back.",
    question="Which remedy repairs batch norm at batches of 2 to 8?",
    literature="Batch renormalization corrects the batch's moments to the running statistics, cross-iteration and "
    "moving-average batch norm take the last batches' moments in, synchronization those of other processes. Their "
    "papers report accuracies near those of large batches, mostly on ImageNet with 2 to 32 samples of many positions "
    "each; a fully connected layer has no positions, and at batch 2 two values a channel. Group norm does not look at "
    "the batch at all.",
    sources=[
        Source("Ioffe 2017: batch renormalization", "https://arxiv.org/abs/1702.03275"),
        Source("Yao, Cao, Zheng, Huang, Lin 2021: cross-iteration", "https://arxiv.org/abs/2002.05712"),
        Source("Yan et al. 2020: moving average", "https://arxiv.org/abs/2001.06838"),
        Source("Hoffer, Hubara, Soudry 2017: ghost", "https://arxiv.org/abs/1705.08741"),
        Source("Wu, He 2018: group normalization", "https://arxiv.org/abs/1803.08494"),
    ],
    criterion="Holds if at batch 2 every remedy (renormalization, cross-iteration, moving average, synchronization) "
    "has a higher test accuracy than batch norm (each interval above 0); depends if some have. What they gain at 4 and "
    "8, and what is left to batch norm with a large batch, is shown beside.",
    data=("digits", "mnist"),
    cells=lambda plan: [cell for data in CLAIM.sets(plan) for cell in _cells(plan, data)],
    read=read,
)
