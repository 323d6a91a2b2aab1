"""Is the loss smoother with batch normalization?

Measured as in figure 4 of Santurkar et al. (2018): along training, from where the network is, a few steps of different
lengths in the direction of the gradient: how much the loss varies on the way, and how far the gradient moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan, Seeds, seeds_text
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.data import images
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.verdicts import ratio_finding
from keelnorm.lab.reading.wording import ACTIVATION_NAMES, listed, times, where_text
from keelnorm.lab.training.arms import BN, NONE, arm_named
from keelnorm.lab.training.stacks import Stack, StackedMLP
from keelnorm.lab.training.train import Descent, batches, correct, losses, percent, rounded, statistics_paused
from keelnorm.measure.page_parts import Axis, Figure, Series, Table
from keelnorm.measure.statistics import Interval, geometric_mean, mean, ratio

ARMS = (NONE, BN)
ACTIVATIONS = ("relu", "tanh")
WIDTHS = (64,) * 6
BATCH = 60
RATE = 0.1
REACH = (0.05, 0.1, 0.2, 0.4)
"""Step sizes along the gradient: half of the learning rate to four times it, the same for both arms."""
SPAN = 0.02
"""For the aside: the longest step as a share of the weights' length, the same for both arms."""
EVERY = 10
SEEDS = Seeds(quick=3, full=8)


def landscape(*, data: str, activation: str, arm: str, seed: int, steps: int) -> Result:
    """Train one network, and look around it every few steps.

    Returns:
        By look: step; loss; the range of the loss over `REACH` (`variation`); the largest change of the gradient over
        it (`change`); the largest change over distance (`smoothness`); the range of the loss over steps that are a
        given share of the weights' length (`variation_relative`). And the test accuracy at the end.
    """
    split = images(data, seed)
    stack = StackedMLP(
        split.train_x[0].numel(),
        WIDTHS,
        split.classes,
        arm_named(arm),
        generator(draw="initialization", data=data, seed=seed),
        activation=activation,
        initialization="xavier",
    )
    descent = Descent(torch.full((1,), RATE))
    looks: dict[str, list[float | None]] = {}
    order = batches(len(split.train_y), BATCH, steps, generator(draw="order", data=data, seed=seed))
    stack.train()
    for step, chosen in enumerate(order):
        x, y = split.train_x[chosen], split.train_y[chosen]
        if step % EVERY == 0:
            for name, value in look_around(stack, x, y).items():
                looks.setdefault(name, []).append(rounded(torch.tensor([value]), 7)[0])
        losses(stack, x, y).sum().backward()
        descent.step(stack)
    stack.eval()
    with torch.no_grad():
        accuracy = percent(correct(stack, split.test_x, split.test_y))[0]
    return {"step": list(range(0, steps, EVERY)), **looks, "accuracy": accuracy}


def look_around(stack: Stack, x: Tensor, y: Tensor) -> dict[str, float]:
    """The loss and its gradient along the gradient; the network is left as it was."""
    parameters = list(stack.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    with statistics_paused(stack):
        loss, gradient = _value_and_gradient(stack, parameters, x, y)
        length = _norm(gradient)
        weights = _norm(before)

        def at(size: float) -> tuple[float, list[Tensor]]:
            with torch.no_grad():
                for parameter, start, direction in zip(parameters, before, gradient, strict=True):
                    parameter.copy_(start - size * direction)
            return _value_and_gradient(stack, parameters, x, y)

        try:
            seen = [at(size) for size in REACH]
            relative = [at(share * SPAN * weights / length)[0] for share in (0.25, 0.5, 1.0)]
        finally:
            with torch.no_grad():
                for parameter, start in zip(parameters, before, strict=True):
                    parameter.copy_(start)
    values = [loss, *(value for value, _ in seen)]
    changes = [_norm(a - b for a, b in zip(moved, gradient, strict=True)) for _, moved in seen]
    return {
        "loss": loss,
        "variation": max(values) - min(values),
        "change": max(changes),
        "smoothness": max(change / (size * length) for change, size in zip(changes, REACH, strict=True)),
        "variation_relative": max([loss, *relative]) - min([loss, *relative]),
    }


def _value_and_gradient(stack: Stack, parameters: Sequence[Tensor], x: Tensor, y: Tensor) -> tuple[float, list[Tensor]]:
    loss = losses(stack, x, y).sum()
    return loss.item(), list(torch.autograd.grad(loss, parameters))


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(math.fsum(tensor.double().square().sum().item() for tensor in tensors))


def _conditions(plan: Plan) -> list[tuple[str, str]]:
    return [(data, activation) for data in CLAIM.sets(plan) for activation in ACTIVATIONS]


def _cells(plan: Plan, data: str, activation: str) -> Sequence[Cell]:
    steps = 120 if plan.quick else 400
    return [
        Cell(
            landscape,
            {"data": data, "activation": activation, "arm": arm.name, "seed": seed, "steps": steps},
            cost=steps * 4e-3,
        )
        for seed in SEEDS.of(plan)
        for arm in ARMS
    ]


QUANTITIES = {
    "variation": "range of the loss along the gradient",
    "change": "change of the gradient along itself",
    "smoothness": "change of the gradient over distance",
    "variation_relative": f"range of the loss over steps of {100 * SPAN:g} % of the weights' length",
}
DECISIVE = ("variation", "change", "smoothness")
"""Figure 4 (a), (b) and (c) of Santurkar et al."""


def _typical(history: Result, name: str) -> float:
    """The geometric mean over training: a curve that falls by orders of magnitude counts everywhere alike."""
    return geometric_mean([max(value, 1e-12) for value in history[name] if value is not None]).value


def read(plan: Plan, results: Results) -> Reading:
    """How much less the loss and its gradient change with batch norm, by activation."""
    findings, figures, rows, words = [], [], [], []
    for data, activation in _conditions(plan):
        runs = Runs(_cells(plan, data, activation), results)
        by_arm = {arm.name: runs.of(arm.name) for arm in ARMS}
        where = where_text(data, ACTIVATION_NAMES[activation])
        ratios = {
            name: ratio(*([_typical(history, name) for history in by_arm[arm.name]] for arm in ARMS))
            for name in QUANTITIES
        }
        findings += [
            ratio_finding(f"{title}, without batch norm ÷ with it", where, ratios[name], decisive=name in DECISIVE)
            for name, title in QUANTITIES.items()
        ]
        words.append(
            f"{_less(ratios['variation'], 'the loss varies')}, {_less(ratios['change'], 'the gradient moves')} and "
            f"{_less(ratios['smoothness'], 'over the distance it moves')} ({where})"
        )
        figures += [_figure(where, by_arm, name, ratios) for name in DECISIVE]
        rows += [_row(where, arm.label, by_arm[arm.name]) for arm in ARMS]
    return Reading(
        f"Along the gradient, with batch norm, {listed(words)}.",
        findings,
        figures,
        [
            Table(
                "Geometric means over training, with intervals over seeds",
                ["where", "arm", "range of the loss", "change of the gradient", "over distance", "accuracy, %"],
                rows,
            )
        ],
        setup=_setup(plan),
        notes=[
            "Steps are the same in absolute terms. With batch norm the loss does not depend on the length of the "
            "weights ahead of it, and its gradient falls as that length grows, so a step of a given length means "
            f"different things in the two arms; the aside repeats the loss's range for steps of {100 * SPAN:g} % of "
            "the weights' length.",
        ],
    )


def _setup(plan: Plan) -> dict[str, str]:
    return {
        "Network": f"fully connected, {len(WIDTHS)} hidden layers of {WIDTHS[0]}, Xavier's initialization",
        "Training": f"gradient descent at the rate {RATE:g} in both arms, batches of {BATCH}",
        "Looking around": f"every {EVERY} steps, on the batch at hand: the loss and its gradient at the network's "
        f"weights and at {', '.join(f'{size:g}' for size in REACH)} times the gradient from them",
        "Range of the loss": "the largest minus the smallest of these losses",
        "Change of the gradient": "the largest distance of these gradients from the first one; over distance: the "
        "largest of these, each over the length of its step",
        "Seeds": seeds_text(SEEDS.of(plan)),
    }


def _less(ratio_: Interval, what: str) -> str:
    return f"{what} {times(ratio_, 'less', 'more', 'no clearly different amount')}"


def _row(where: str, label: str, histories: list[Result]) -> list[str]:
    texts = [
        geometric_mean([_typical(history, name) for history in histories]).text(None)
        for name in ("variation", "change", "smoothness")
    ]
    return [where, label, *texts, mean([history["accuracy"] for history in histories]).text()]


def _figure(where: str, by_arm: dict[str, list[Result]], name: str, ratios: dict[str, Interval]) -> Figure:
    series = []
    for arm in ARMS:
        curves = list(zip(*(history[name] for history in by_arm[arm.name]), strict=True))
        known = [[max(value, 1e-9) for value in values if value is not None] for values in curves]
        middle = [geometric_mean(values).value if values else None for values in known]
        low = [min(values) if values else None for values in known]
        high = [max(values) if values else None for values in known]
        series.append(Series(arm.label, arm.name, by_arm[arm.name][0]["step"], middle, low, high))
    return Figure(
        f"{QUANTITIES[name].capitalize()}: {where}",
        Axis("steps"),
        Axis(QUANTITIES[name], scale="log"),
        series,
        f"{QUANTITIES[name].capitalize()} over training, {where}; the band is the range over seeds. Over the whole of "
        f"training it is ×{ratios[name].text(2)} as large without batch norm as with it.",
    )


CLAIM: Claim = Claim(
    number=23,
    title="Smoother loss",
    statement="Batch normalization makes the loss landscape smoother.",
    question="Do loss and gradient change less along the gradient with batch norm?",
    literature="Santurkar et al. explain the effect of batch norm by this, with measurements on VGG and bounds for a "
    "single layer, against the explanation by covariate shift. A bound by the weights' length is no smoothness of the "
    "network itself: the loss of a network whose weights' length does not matter is as smooth as those weights are "
    "long (van Laarhoven 2017). Yang et al. show that deep plain networks with batch norm have exploding gradients at "
    "initialization, which is the opposite of smooth.",
    sources=[
        Source("Santurkar, Tsipras, Ilyas, Mądry 2018, section 3 and figure 4", "https://arxiv.org/abs/1805.11604"),
        Source("van Laarhoven 2017", "https://arxiv.org/abs/1706.05350"),
        Source("Yang, Pennington, Rao, Sohl-Dickstein, Schoenholz 2019", "https://arxiv.org/abs/1902.08129"),
    ],
    criterion="Holds if, with each activation, the range of the loss, the change of the gradient along it and that "
    "change over the distance (effective smoothness) are all larger without batch norm (the interval of the ratio lies "
    "above 1); depends if some are; does not hold if some are smaller and none larger.",
    data=("digits", "mnist", "images"),
    cells=lambda plan: [cell for data, activation in _conditions(plan) for cell in _cells(plan, data, activation)],
    read=read,
)
