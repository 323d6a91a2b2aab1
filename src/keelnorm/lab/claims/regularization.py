"""Does batch normalization regularize, so that dropout is needed less?

A small training part, so that there is something to regularize. What is told apart is the noise of the moments, which
is what can regularize, from all else that batch normalization does: the same network on the same batches, with the
moments of the whole training part in place of the batch's, has no noise; with those of groups within the batch it has
more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import keelnorm as kn
from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan, seeds_text
from keelnorm.lab.core.seeds import generator, seed_from
from keelnorm.lab.data.images import all_images
from keelnorm.lab.data.split import Split, split
from keelnorm.lab.reading.figures import Axis, Figure, Series, Table
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.lab.reading.wording import signed
from keelnorm.lab.training.arms import BN, NONE, Arm
from keelnorm.lab.training.learning_rates import Best
from keelnorm.lab.training.networks import Stack, StackedMLP
from keelnorm.lab.training.train import Descent, batches, losses, percent, plain, right
from keelnorm.lab.training.trials import rate_columns, rate_row, tuned, where_text
from keelnorm.measure.statistics import Interval, difference, mean

SAMPLES = 500
VALIDATION = 300
MOST_TEST = 2000
WIDTHS = (128, 128)
BATCH = 50
RATES = (0.1, 0.3, 1.0, 3.0)
QUICK_RATES = (0.3, 1.0)
STEPS = 150
QUICK_STEPS = 100
DROPOUT = 0.2


def _ghost(size: int) -> Arm:
    return Arm(
        f"ghost {size}",
        f"groups of {size}",
        lambda spatial, channels, replicas: kn.GhostBatchNorm(replicas * channels, ghost_size=size),
    )


# name: (label, style, normalization, dropout)
ARMS: dict[str, tuple[str, str, Arm, float]] = {
    "none": ("no normalization", "none", NONE, 0.0),
    "dropout": ("dropout", "dropout", NONE, DROPOUT),
    "noiseless": ("batch norm without noise", "other-1", BN, 0.0),
    "bn": ("batch norm", "bn", BN, 0.0),
    "ghost 10": ("batch norm, groups of 10", "ghost", _ghost(10), 0.0),
    "ghost 2": ("batch norm, groups of 2", "other-3", _ghost(2), 0.0),
    "both": ("batch norm and dropout", "both", BN, DROPOUT),
}
SHOWN = tuple(arm for arm in ARMS if arm != "ghost 2")
"""In the figure; groups of 2 lie far below its axis."""


def few(data: str, seed: int) -> Split:
    """A small training part, and for test most of what is left: small differences need many samples."""
    x, y = all_images(data)
    test = min(MOST_TEST, len(x) - SAMPLES - VALIDATION)
    return split(x, y, data=data, seed=seed, validation=VALIDATION, test=test, train=SAMPLES).centred()


def losses_without_noise(stack: Stack, x: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
    """The loss of each replica on the chosen samples, (R,), normalized with the moments of all samples x."""
    logits: Tensor = stack(x)[:, chosen]
    each = F.cross_entropy(logits.flatten(0, 1), y[chosen].repeat(stack.replicas), reduction="none")
    return each.view(stack.replicas, -1).mean(dim=1)


def regularized(*, data: str, arm: str, seed: int, rates: tuple[float, ...], steps: int) -> Result:
    """Train one arm at every learning rate on a small training part.

    Returns:
        "validation" and "test" accuracy as in `training.train.History`, after the last step alone; "train", the
        accuracy on the training part, and the mean losses "train_loss" and "test_loss", all in evaluation mode.
    """
    _, _, normalization, dropout = ARMS[arm]
    part = few(data, seed)
    stack = StackedMLP(
        part.train_x[0].numel(), WIDTHS, part.classes, normalization,
        generator(draw="initialization", data=data, seed=seed), torch.ones(len(rates)), dropout=dropout,
    )  # fmt: skip
    descent = Descent(torch.tensor(rates))
    stack.train()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed_from(draw="dropout", data=data, seed=seed))
        for chosen in batches(SAMPLES, BATCH, steps, generator(draw="order", data=data, seed=seed)):
            if arm == "noiseless":
                loss = losses_without_noise(stack, part.train_x, part.train_y, chosen)
            else:
                loss = losses(stack, part.train_x[chosen], part.train_y[chosen])
            loss.sum().backward()
            descent.step(stack)
    stack.eval()
    with torch.no_grad():
        return {
            "validation": [percent(right(stack, part.validation_x, part.validation_y))],
            "test": [percent(right(stack, part.test_x, part.test_y))],
            "train": percent(right(stack, part.train_x, part.train_y)),
            "test_loss": plain(losses(stack, part.test_x, part.test_y), 5),
            "train_loss": plain(losses(stack, part.train_x, part.train_y), 5),
        }


def cells(plan: Plan) -> Sequence[Cell]:
    return [cell for data in _sets(plan) for cell in _cells(plan, data)]


def _sets(plan: Plan) -> list[str]:
    return plan.sets("digits", "mnist")


def _rates(plan: Plan) -> tuple[float, ...]:
    return QUICK_RATES if plan.quick else RATES


def _steps(plan: Plan) -> int:
    return QUICK_STEPS if plan.quick else STEPS


def _cells(plan: Plan, data: str) -> Sequence[Cell]:
    slow = {"noiseless": 3.0, "ghost 2": 1.6}
    return [
        Cell(
            regularized,
            {"data": data, "arm": arm, "seed": seed, "rates": _rates(plan), "steps": _steps(plan)},
            cost=_steps(plan) * len(_rates(plan)) * 6e-4 * slow.get(arm, 1.0),
        )
        for seed in _seeds(plan)
        for arm in ARMS
    ]


def _seeds(plan: Plan) -> range:
    return plan.seed_range(quick=5, full=16)


def read(plan: Plan, results: Results) -> Reading:
    findings, rows, rate_rows, notes = [], [], [], []
    names: list[str] = []
    boxes: dict[str, list[tuple[int, float]]] = {arm: [] for arm in ARMS}
    words = []
    for data in _sets(plan):
        runs = Runs(_cells(plan, data), results)
        by_arm = {arm: runs.of(arm) for arm in ARMS}
        where = where_text(data, f"{SAMPLES} for training")
        chosen = tuned(by_arm, _rates(plan))
        found, said = _findings(where, chosen, by_arm)
        findings += found
        words.append(said)
        for arm, (label, *_) in ARMS.items():
            test, training = chosen[arm].test, at(by_arm[arm], "train", chosen[arm])
            boxes[arm] += [(len(names), accuracy) for accuracy in test]
            change = "" if arm == "none" else signed(difference(test, chosen["none"].test), 2)
            loss = mean(at(by_arm[arm], "test_loss", chosen[arm])).text(3)
            rows.append([where, label, mean(training).text(1), mean(test).text(1), change, loss])
            rate_rows.append(rate_row(where, label, chosen[arm]))
            if chosen[arm].at_edge and not plan.quick:
                notes.append(f"{where}: the best rate of {label}, {chosen[arm].rate:g}, lies at the edge of the grid.")
        names.append(where)
    lowest = min(accuracy for arm in SHOWN for _, accuracy in boxes[arm])
    answer = f"On {'; on '.join(words)}."
    return Reading(
        answer,
        findings,
        [
            Figure(
                "Test accuracy at the best rate",
                Axis("data", categories=names),
                Axis("test accuracy, %", limits=(lowest - 0.5, 100.0)),
                [
                    Series(ARMS[arm][0], ARMS[arm][1], [x for x, _ in boxes[arm]], [y for _, y in boxes[arm]])
                    for arm in SHOWN
                ],
                f"A box for each arm over the seeds. {answer} Groups of 2 reach "
                f"{mean([accuracy for _, accuracy in boxes['ghost 2']]).value:.1f} %, below what is drawn.",
                kind="boxes",
            )
        ],
        [
            Table(
                "Accuracy in percent at the rate chosen on validation data, its change against no normalization, and "
                "the "
                "loss (cross-entropy) on test data",
                ["where", "arm", "training", "test", "change", "test loss"],
                rows,
            ),
            Table(
                "Accuracy in percent on validation data by learning rate (* : the one chosen), and on test data there",
                rate_columns(_rates(plan)),
                rate_rows,
            ),
        ],
        setup=[
            ("Network", f"fully connected, {WIDTHS[0]} - {WIDTHS[1]} hidden units with ReLU, He's initialization, "
            f"centred pixels"),
            ("Training", f"{SAMPLES} samples, {_steps(plan)} steps of gradient descent, batches of {BATCH}, the same "
            f"for all arms"),
            ("Without noise", "the loss of the same batch, but the moments are those of the whole training part"),
            ("Groups", "kn.GhostBatchNorm: moments of groups of 10 or 2 within the same batch, which is more noise"),
            ("Dropout", f"a share of {DROPOUT:g} behind each activation, with and without batch norm"),
            ("Learning rate", "for each arm the one with the highest validation accuracy"),
            ("Test data", f"all that {SAMPLES} samples for training and {VALIDATION} for validation leave, at most "
            f"{MOST_TEST}"),
            ("Seeds", seeds_text(_seeds(plan))),
        ],
        notes=[
            *notes,
            "Batch norm without noise, minus no normalization, is what batch norm gains by training differently; batch "
            "norm minus batch norm without noise is what the noise of its moments adds.",
            f"The share that dropout drops was not tuned for each arm. On other seeds 0.1 and 0.3 were about as good "
            f"as each other, "
            f"with and without batch norm, and 0.5 was worse; {DROPOUT:g} lies between.",
            "A step without noise runs the whole training part through the network: that is for telling causes "
            "apart, not for use.",
        ],
    )  # fmt: skip


def _findings(
    where: str, chosen: Mapping[str, Best], by_arm: Mapping[str, Sequence[Result]]
) -> tuple[list[Finding], str]:
    """The effects, and the same in words."""

    def gain(arm: str, over: str) -> Interval:
        return difference(chosen[arm].test, chosen[over].test)

    def lower_loss(arm: str, over: str) -> Interval:
        return difference(*(at(by_arm[each], "test_loss", chosen[each]) for each in (over, arm)))

    whole, noise = gain("bn", "none"), gain("bn", "noiseless")
    alone, beside = gain("dropout", "none"), gain("both", "bn")
    less = difference(
        [a - b for a, b in zip(chosen["dropout"].test, chosen["none"].test, strict=True)],
        [a - b for a, b in zip(chosen["both"].test, chosen["bn"].test, strict=True)],
    )
    aside = {"digits": 2, "decisive": False}
    findings = [
        Finding("test accuracy, batch norm − none", where, whole, 0.0, digits=2),
        Finding("test accuracy, batch norm − the same without its noise", where, noise, 0.0, digits=2),
        Finding("what dropout adds: without batch norm − with it", where, less, 0.0, digits=2),
        Finding("test accuracy, batch norm − dropout", where, gain("bn", "dropout"), 0.0, **aside),  # type: ignore[arg-type]
        Finding("test accuracy, groups of 10 − without noise", where, gain("ghost 10", "noiseless"), 0.0, **aside),  # type: ignore[arg-type]
        Finding("test accuracy, groups of 10 − batch norm", where, gain("ghost 10", "bn"), 0.0, **aside),  # type: ignore[arg-type]
        Finding("test accuracy, groups of 2 − batch norm", where, gain("ghost 2", "bn"), 0.0, **aside),  # type: ignore[arg-type]
        Finding(
            "test loss, batch norm without its noise − with it", where, lower_loss("bn", "noiseless"), 0.0,
            unit="nats", digits=4, decisive=False,
        ),
    ]  # fmt: skip
    return findings, (
        f"{where}, batch norm changes the accuracy by {signed(whole, 1)}; the noise of its moments makes "
        f"{signed(noise, 2)} of that, and dropout adds {signed(alone, 1)} without it and {signed(beside, 1)} with it"
    )


def at(results: Sequence[Result], field: str, best: Best) -> list[float]:
    """A field of the results by seed, at the chosen rate."""
    return [result[field][best.index] for result in results]


CLAIM = Claim(
    number=6,
    title="Regularization",
    statement="Batch normalization regularizes, so that dropout is needed less.",
    question="Does the noise of a batch's moments help, and is dropout then needed less?",
    literature="Ioffe and Szegedy see a regularizer in that a sample's values depend on the others in its batch, and "
    "leave dropout out of their "
    "network. Luo et al. derive a regularizing term from the noise of the moments. Hoffer et al. bring the noise of "
    "small batches to "
    "large ones, and generalize better. Li et al. find that dropout ahead of a batch norm can harm, because it "
    "changes the variance "
    "between training and use.",
    sources=[
        Source("Ioffe, Szegedy 2015, section 3.4", "https://arxiv.org/abs/1502.03167"),
        Source("Luo, Wang, Shao, Peng 2019", "https://arxiv.org/abs/1809.00846"),
        Source("Hoffer, Hubara, Soudry 2017", "https://arxiv.org/abs/1705.08741"),
        Source("Li, Chen, Hu, Yang 2019", "https://arxiv.org/abs/1801.05134"),
    ],
    criterion="Holds if, with few training data, batch norm raises the test accuracy, does so more than the same "
    "batch norm without noise in its "
    "moments, and leaves less to dropout than a network without batch norm does: three intervals above 0. Depends if "
    "some are; does not "
    "hold if none is and one lies below 0.",
    data=("digits", "mnist"),
    cells=cells,
    read=read,
)
