"""What does inference with the population's statistics need, and what goes wrong without them?"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan, Seeds, seeds_text
from keelnorm.lab.core.seeds import generator, seed_from
from keelnorm.lab.data import images
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.series import bars
from keelnorm.lab.reading.verdicts import Finding, difference_finding
from keelnorm.lab.reading.wording import listed, signed, where_text
from keelnorm.lab.training.train import batches
from keelnorm.measure.page_parts import Axis, Figure, Table
from keelnorm.measure.statistics import Interval, difference, mean

ARMS = {"torch": ("torch.nn's batch norm", nn.BatchNorm1d), "bn": ("keelnorm's batch norm", kn.BatchNorm1d)}
WIDTH = 100
BATCH = 60
RATE = 0.3
SLOW = 0.001
"""A momentum that is too small for so short a training."""
SAME = 1e-4
"""Outputs differ by less than this share of their size: rounding."""
SEEDS = Seeds(quick=3, full=10)
STATES = {
    "evaluation": "running statistics",
    "sorted": "the batch's own moments, test images sorted by label",
    "mixed": "the batch's own moments, test images mixed",
    "slow": f"running statistics of momentum {SLOW:g}",
    "slow, recalibrated": "the same, after kn.recalibrate",
    "inf": "running statistics after one batch with Inf",
    "inf, recalibrated": "after that batch and kn.recalibrate",
}


def network(layer: type[nn.Module], features: int, classes: int) -> nn.Sequential:
    """A fully connected network as a user would write it."""
    modules: list[nn.Module] = [nn.Flatten()]
    for into in (features, WIDTH, WIDTH):
        modules += [nn.Linear(into, WIDTH, bias=False), layer(WIDTH), nn.ReLU()]
    return nn.Sequential(*modules, nn.Linear(WIDTH, classes))


def accuracy_by_state(*, data: str, arm: str, seed: int, steps: int) -> Result:
    """Train one network, and evaluate it with running statistics in several states.

    Returns:
        The test accuracy in percent in each of `STATES`; `alone`: the largest difference between an image's outputs
        alone and in a batch, over the largest output.
    """
    split = images(data, seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed_from(draw="initialization", data=data, seed=seed))
        model = network(ARMS[arm][1], split.train_x[0].numel(), split.classes)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    slow = copy.deepcopy(model)
    for module in slow.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = SLOW
    for chosen in batches(len(split.train_y), BATCH, steps, generator(draw="order", data=data, seed=seed)):
        optimizer.zero_grad()
        with torch.no_grad():
            _follow(slow, model)
            slow.train()(split.train_x[chosen])
        nn.functional.cross_entropy(model(split.train_x[chosen]), split.train_y[chosen]).backward()
        optimizer.step()
    _follow(slow, model)
    x, y = split.test_x, split.test_y
    order = y.argsort(stable=True)
    hit = copy.deepcopy(model).train()
    bad = split.train_x[:BATCH].clone()
    bad[0].view(-1)[:] = float("inf")
    with torch.no_grad():
        hit(bad)
    loader = split.train_x.split(BATCH)
    return {
        "evaluation": accuracy(model.eval(), x, y),
        "sorted": accuracy(model.train(), x[order], y[order], copied=True),
        "mixed": accuracy(model.train(), x, y, copied=True),
        "slow": accuracy(slow.eval(), x, y),
        "slow, recalibrated": accuracy(recalibrated(slow, loader), x, y),
        "inf": accuracy(hit.eval(), x, y),
        "inf, recalibrated": accuracy(recalibrated(hit, loader), x, y),
        "alone": alone(model.eval(), x),
    }


@torch.no_grad()
def _follow(other: nn.Module, model: nn.Module) -> None:
    """Give `other` the parameters of `model`; its running statistics stay its own."""
    for mine, trained in zip(other.parameters(), model.parameters(), strict=True):
        mine.copy_(trained)


def recalibrated(model: nn.Module, loader: Iterable[Tensor]) -> nn.Module:
    """A copy with the running statistics of the training part."""
    copied = copy.deepcopy(model)
    kn.recalibrate(copied, loader, progress=False)
    return copied.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, *, copied: bool = False) -> float:
    """The accuracy in percent, in batches of 60 as they come; of a copy, where the forward changes the model."""
    model = copy.deepcopy(model) if copied else model
    hits = [
        (model(part).argmax(1) == labels).float() for part, labels in zip(x.split(BATCH), y.split(BATCH), strict=True)
    ]
    return round(100.0 * torch.cat(hits).mean().item(), 4)


@torch.no_grad()
def alone(model: nn.Module, x: Tensor) -> float:
    """How much an image's outputs hang on what else is in its batch: the largest difference over the largest output."""
    together = model(x[:BATCH])
    apart = torch.cat([model(one) for one in x[:BATCH].split(1)])
    return float(f"{((together - apart).abs().max() / together.abs().max()).item():.3g}")


def _cells(plan: Plan, data: str) -> Sequence[Cell]:
    return [
        Cell(accuracy_by_state, {"data": data, "arm": arm, "seed": seed, "steps": 200}, cost=0.7)
        for seed in SEEDS.of(plan)
        for arm in ARMS
    ]


ByState = dict[str, list[float]]
"""Accuracies by state and seed."""


def read(plan: Plan, results: Results) -> Reading:
    """What accuracy each state of the running statistics costs, in both layers."""
    findings: list[Finding] = []
    rows, words, names = [], [], []
    by_bar: dict[str, list[Interval]] = {arm: [] for arm in ARMS}
    for data in CLAIM.sets(plan):
        runs = Runs(_cells(plan, data), results)
        where = where_text(data)
        found = {arm: {state: [each[state] for each in runs.of(arm)] for state in (*STATES, "alone")} for arm in ARMS}
        findings += _findings(where, found["bn"], found["torch"])
        words.append(_words(where, found["bn"], found["torch"]))
        for arm, (label, _) in ARMS.items():
            accuracy_in = {state: mean(found[arm][state]) for state in STATES}
            rows += [[where, label, STATES[state], each.text(1)] for state, each in accuracy_in.items()]
            by_bar[arm] += accuracy_in.values()
        names += [f"{where}: {title}" for title in STATES.values()]
    return Reading(
        f"Accuracy is {listed(words)}.",
        findings,
        [
            Figure(
                "Test accuracy by state of the running statistics",
                Axis("state", categories=names),
                Axis("test accuracy, %", limits=(0.0, 100.0)),
                [bars(label, arm, by_bar[arm]) for arm, (label, _) in ARMS.items()],
                f"Test accuracy of the same trained networks: {listed(words)}.",
                kind="bars",
            )
        ],
        [Table("Test accuracy in percent", ["where", "layer", "what normalizes", "accuracy"], rows)],
        setup={
            "Network": f"fully connected, three hidden layers of {WIDTH} with ReLU",
            "Training": f"200 steps of gradient descent at {RATE:g}, batches of {BATCH}",
            f"Momentum {SLOW:g}": "a second set of running statistics of the same training",
            "Inf": "one forward in training mode of a batch in which one image is infinite; no step is made with it",
            "kn.recalibrate": "sets the running statistics to those of the training part, exactly",
            "Seeds": seeds_text(SEEDS.of(plan)),
        },
        notes=[
            "keelnorm's layers leave the running statistics alone in a batch that is not finite and count it "
            "(skipped_updates)."
        ],
    )


def _findings(where: str, ours: ByState, theirs: ByState) -> list[Finding]:
    largest = "largest difference of outputs alone and in a batch"
    decisive = {
        "accuracy, running statistics − the batch's own on images sorted by label": (
            ours["evaluation"], ours["sorted"]
        ),
        f"accuracy, momentum 0.1 − momentum {SLOW:g}": (ours["evaluation"], ours["slow"]),
        "accuracy that one batch with Inf costs torch.nn's batch norm": (theirs["evaluation"], theirs["inf"]),
    }  # fmt: skip
    asides = {
        "the remedy: accuracy after a batch with Inf, keelnorm − torch.nn": (ours["inf"], theirs["inf"]),
        "what a batch with Inf costs keelnorm's batch norm": (ours["evaluation"], ours["inf"]),
        "the remedy: kn.recalibrate on torch.nn's after Inf − before": (theirs["inf, recalibrated"], theirs["inf"]),
        f"the remedy: kn.recalibrate of momentum {SLOW:g} − before": (ours["slow, recalibrated"], ours["slow"]),
    }
    return [
        Finding(largest, where, mean(ours["alone"]), SAME, larger=False, unit="of the largest", digits=7),
        *(difference_finding(quantity, where, *pair) for quantity, pair in decisive.items()),
        *(difference_finding(quantity, where, *pair, decisive=False) for quantity, pair in asides.items()),
    ]


def _words(where: str, ours: ByState, theirs: ByState) -> str:
    good, by_label, slow, hit = (mean(ours[state]).value for state in ("evaluation", "sorted", "slow", "inf"))
    back = difference(theirs["inf, recalibrated"], theirs["inf"])
    return (
        f"{good:.1f} % with good running statistics, {by_label:.1f} % with the batch's own on images sorted by label, "
        f"{slow:.1f} % with momentum {SLOW:g}; one batch with Inf leaves torch.nn's at {mean(theirs['inf']).value:.1f} "
        f"% and keelnorm's at {hit:.1f} %, and kn.recalibrate brings torch.nn's back by {signed(back, 1)} ({where})"
    )


CLAIM: Claim = Claim(
    number=12,
    title="Inference with the population's statistics",
    statement="At inference batch normalization must use the population's statistics, and good ones.",
    question="What happens to accuracy when the running statistics are not used, late, or lost?",
    literature="Ioffe and Szegedy fix the transform at inference so that an output depends on its input alone. Moving "
    "averages lag behind and, with a small momentum, far; Wu and Johnson recommend precise statistics. A single batch "
    "with NaN or Inf stays in an average for ever.",
    sources=[
        Source("Ioffe, Szegedy 2015, section 3.1", "https://arxiv.org/abs/1502.03167"),
        Source("Wu, Johnson 2021: Rethinking “batch” in BatchNorm", "https://arxiv.org/abs/2105.07576"),
    ],
    criterion=f"Holds if outputs alone and in a batch agree to {SAME:g}, and if accuracy is lower with the batch's own "
    f"moments on images sorted by label, with a momentum of {SLOW:g}, and (in torch.nn's layer) after one batch with "
    "Inf. What keelnorm's layer and kn.recalibrate repair is shown beside.",
    data=("digits", "mnist"),
    cells=lambda plan: [cell for data in CLAIM.sets(plan) for cell in _cells(plan, data)],
    read=read,
)
