"""Does batch normalization regularize, so that dropout is needed less?

A small training part, so that there is something to regularize. What is told apart is the noise of the moments, which
is what can regularize, from all else that batch normalization does: the same network on the same batches, with the
moments of the whole training part in place of the batch's, has no noise; with those of groups within the batch it has
more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from keelnorm.lab.claims._regularization_training import (
    ARMS,
    BATCH,
    DROPOUT,
    MOST_TEST,
    SAMPLES,
    VALIDATION,
    WIDTHS,
    train_arm,
)
from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import ByForm, Plan, Seeds, seeds_text
from keelnorm.lab.reading.best_rates import (
    CHOSEN_BY_VALIDATION,
    Best,
    accuracies,
    best_by_arm,
    edge_notes,
    rate_row,
    rate_table,
)
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.series import accuracy_boxes
from keelnorm.lab.reading.verdicts import Finding, difference_finding, difference_findings
from keelnorm.lab.reading.wording import signed, where_text
from keelnorm.measure.page_parts import Table
from keelnorm.measure.statistics import difference, mean

RATES = ByForm(quick=(0.3, 1.0), full=(0.1, 0.3, 1.0, 3.0))
STEPS = ByForm(quick=100, full=150)
SEEDS = Seeds(quick=5, full=16)
SHOWN = tuple(arm for arm in ARMS if arm != "ghost 2")
"""In the figure; groups of 2 lie far below its axis."""


def _cells(plan: Plan, data: str) -> Sequence[Cell]:
    slow = {"noiseless": 3.0, "ghost 2": 1.6}
    return [
        Cell(
            train_arm,
            {"data": data, "arm": arm, "seed": seed, "rates": RATES.of(plan), "steps": STEPS.of(plan)},
            cost=STEPS.of(plan) * len(RATES.of(plan)) * 6e-4 * slow.get(arm, 1.0),
        )
        for seed in SEEDS.of(plan)
        for arm in ARMS
    ]


def read(plan: Plan, results: Results) -> Reading:
    """What batch norm gains, how much of it its noise makes, and what dropout adds with and without it."""
    findings, rows, rate_rows, words, notes = [], [], [], [], []
    test: dict[str, dict[str, list[float]]] = {}
    for data in CLAIM.sets(plan):
        runs = Runs(_cells(plan, data), results)
        by_arm = {arm: runs.of(arm) for arm in ARMS}
        where = where_text(data, f"{SAMPLES} for training")
        best = best_by_arm(by_arm, RATES.of(plan))
        test[where] = accuracies(best)
        loss = {arm: best[arm].of(by_arm[arm], "test_loss") for arm in ARMS}
        findings += _findings(where, test[where], loss)
        words.append(_words(where, test[where]))
        rows += [_row(where, arm, best, by_arm) for arm in ARMS]
        rate_rows += [rate_row(where, label, best[arm]) for arm, (label, *_) in ARMS.items()]
        notes += [] if plan.quick else edge_notes(where, {f"of {ARMS[arm][0]}": each for arm, each in best.items()})
    answer = f"On {'; on '.join(words)}."
    far_below = mean([accuracy for by_arm in test.values() for accuracy in by_arm["ghost 2"]]).value
    columns = ["where", "arm", "training", "test", "change", "test loss"]
    return Reading(
        answer,
        findings,
        [
            accuracy_boxes(
                test,
                {arm: ARMS[arm][:2] for arm in SHOWN},
                f"{answer} Groups of 2 reach {far_below:.1f} %, below what is drawn.",
            )
        ],
        [
            Table(
                "Accuracy in percent at the rate chosen on validation data, its change against no normalization, and "
                "the loss (cross-entropy) on test data",
                columns,
                rows,
            ),
            rate_table(RATES.of(plan), rate_rows),
        ],
        setup=_setup(plan),
        notes=[
            *notes,
            "Batch norm without noise, minus no normalization, is what batch norm gains by training differently; batch "
            "norm minus batch norm without noise is what the noise of its moments adds.",
            "The share that dropout drops was not tuned for each arm. On other seeds 0.1 and 0.3 were about as good as "
            f"each other, with and without batch norm, and 0.5 was worse; {DROPOUT:g} lies between.",
            "A step without noise runs the whole training part through the network: that is for telling causes "
            "apart, not for use.",
        ],
    )


def _row(where: str, arm: str, best: Mapping[str, Best], by_arm: Mapping[str, Sequence[Result]]) -> list[str]:
    training, loss = (mean(best[arm].of(by_arm[arm], field)) for field in ("train", "test_loss"))
    change = "" if arm == "none" else signed(difference(best[arm].test, best["none"].test), 2)
    return [where, ARMS[arm][0], training.text(1), mean(best[arm].test).text(1), change, loss.text(3)]


def _findings(where: str, test: Mapping[str, list[float]], loss: Mapping[str, list[float]]) -> list[Finding]:
    decisive = {
        "test accuracy, batch norm − none": ("bn", "none"),
        "test accuracy, batch norm − the same without its noise": ("bn", "noiseless"),
    }
    asides = {
        "test accuracy, batch norm − dropout": ("bn", "dropout"),
        "test accuracy, groups of 10 − without noise": ("ghost 10", "noiseless"),
        "test accuracy, groups of 10 − batch norm": ("ghost 10", "bn"),
        "test accuracy, groups of 2 − batch norm": ("ghost 2", "bn"),
    }
    added, beside = (
        [a - b for a, b in zip(test[arm], test[without], strict=True)]
        for arm, without in (("dropout", "none"), ("both", "bn"))
    )
    dropout, lower = (
        "what dropout adds: without batch norm − with it",
        "test loss, batch norm without its noise − with it",
    )
    return [
        *difference_findings(where, test, decisive, digits=2),
        difference_finding(dropout, where, added, beside, digits=2),
        *difference_findings(where, test, asides, digits=2, decisive=False),
        difference_finding(lower, where, loss["noiseless"], loss["bn"], unit="nats", digits=4, decisive=False),
    ]


def _words(where: str, test: Mapping[str, list[float]]) -> str:
    pairs = (("bn", "none"), ("bn", "noiseless"), ("dropout", "none"), ("both", "bn"))
    whole, noise, alone, beside = (difference(test[arm], test[over]) for arm, over in pairs)
    return (
        f"{where}, batch norm changes the accuracy by {signed(whole, 1)}; the noise of its moments makes "
        f"{signed(noise, 2)} of that, and dropout adds {signed(alone, 1)} without it and {signed(beside, 1)} with it"
    )


def _setup(plan: Plan) -> dict[str, str]:
    return {
        "Network": f"fully connected, {WIDTHS[0]} - {WIDTHS[1]} hidden units with ReLU, He's initialization, centered "
        "pixels",
        "Training": f"{SAMPLES} samples, {STEPS.of(plan)} steps of gradient descent, batches of {BATCH}, the same for "
        "all arms",
        "Without noise": "the loss of the same batch, but the moments are those of the whole training part",
        "Groups": "kn.GhostBatchNorm: moments of groups of 10 or 2 within the same batch, which is more noise",
        "Dropout": f"a share of {DROPOUT:g} behind each activation, with and without batch norm",
        "Learning rate": CHOSEN_BY_VALIDATION,
        "Test data": f"all that {SAMPLES} samples for training and {VALIDATION} for validation leave, at most "
        f"{MOST_TEST}",
        "Seeds": seeds_text(SEEDS.of(plan)),
    }


CLAIM: Claim = Claim(
    number=6,
    title="Regularization",
    statement="Batch normalization regularizes, so that dropout is needed less.",
    question="Does the noise of a batch's moments help, and is dropout then needed less?",
    literature="Ioffe and Szegedy see a regularizer in that a sample's values depend on the others in its batch, and "
    "leave dropout out of their network. Luo et al. derive a regularizing term from the noise of the moments. Hoffer "
    "et al. bring the noise of small batches to large ones, and generalize better. Li et al. find that dropout ahead "
    "of a batch norm can harm, because it changes the variance between training and use.",
    sources=[
        Source("Ioffe, Szegedy 2015, section 3.4", "https://arxiv.org/abs/1502.03167"),
        Source("Luo, Wang, Shao, Peng 2019", "https://arxiv.org/abs/1809.00846"),
        Source("Hoffer, Hubara, Soudry 2017", "https://arxiv.org/abs/1705.08741"),
        Source("Li, Chen, Hu, Yang 2019", "https://arxiv.org/abs/1801.05134"),
    ],
    criterion="Holds if, with few training data, batch norm raises the test accuracy, does so more than the same batch "
    "norm without noise in its moments, and leaves less to dropout than a network without batch norm does: three "
    "intervals above 0. Depends if some are; does not hold if none is and one lies below 0.",
    data=("digits", "mnist"),
    cells=lambda plan: [cell for data in CLAIM.sets(plan) for cell in _cells(plan, data)],
    read=read,
)
