"""Training with weight decay: on which parameters, and beside a twin that has its effective learning rate instead.

Gradient descent with decay takes w to (1 − ηλ)·w − η·g(w). Where a batch norm follows, only the direction of w counts
and g(c·w) = g(w)/c. A twin c·w without decay therefore takes the same direction when its rate is η·c²/(1 − ηλ).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from keelnorm.lab.core.cell import Result
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.data import Split, images
from keelnorm.lab.training.arms import arm_named
from keelnorm.lab.training.stacks import Stack, StackedMLP
from keelnorm.lab.training.train import batch_moments, batches, correct, losses, percent

SAMPLES = 500
WRONG = 0.2
"""The share of the training labels that are drawn at random from the other classes."""
WIDTHS = (64, 64)
BATCH = 50
RATE = 0.03
DECAY = 0.03
LOOKS = 10
SHOWN = 50
"""Test samples whose outputs are compared."""
KINDS = ("hidden", "weights", "all")
"""What decays: the weights ahead of a normalization; those of the output layer, too; γ, β and biases, too."""


def with_wrong_labels(data: str, seed: int) -> Split:
    """`SAMPLES` training samples, of which a share has the label of another class; the other parts are as they are."""
    split = images(data, seed, train=SAMPLES)
    draw = generator(draw="wrong labels", data=data, seed=seed)
    wrong = torch.rand(len(split.train_y), generator=draw) < WRONG
    other = torch.randint(1, split.classes, split.train_y.shape, generator=draw)
    split.train_y[wrong] = ((split.train_y + other) % split.classes)[wrong]
    return split


def _network(split: Split, name: str, data: str, seed: int, replicas: int = 1) -> Stack:
    draw = generator(draw="initialization", data=data, seed=seed)
    ones = torch.ones(replicas)
    return StackedMLP(split.train_x[0].numel(), WIDTHS, split.classes, arm_named(name), draw, ones).train()


def train_at_one_setting(*, data: str, arm: str, seed: int, steps: int) -> Result:
    """Train one arm: "bn" or "none" alone, with "decay", or with "rate", the effective rate of the one with decay.

    For the last, the network with decay is trained beside it on the same batches.

    Returns:
        steps; effective: the mean of η/‖w‖² over hidden layers; test and training accuracy at the end; outputs: for
        some test samples, with the moments of all of the test part; scaled: see `change_when_doubled`.
    """
    split = with_wrong_labels(data, seed)
    name, _, how = arm.partition(" ")
    stack = _network(split, name, data, seed)
    leader = _network(split, name, data, seed) if how == "rate" else None
    decay = DECAY if how == "decay" else 0.0
    looks: dict[str, list[float]] = {"steps": [], "effective": []}
    order = batches(len(split.train_y), BATCH, steps, generator(draw="order", data=data, seed=seed))
    for step, chosen in enumerate(order, start=1):
        x, y = split.train_x[chosen], split.train_y[chosen]
        squares = [1.0] * len(WIDTHS)
        scales = squares
        if leader is not None:
            squares = [(own / theirs) ** 2 for own, theirs in zip(_lengths(stack), _lengths(leader), strict=True)]
            scales = [square / (1 - RATE * DECAY) for square in squares]
            losses(leader, x, y).sum().backward()
            _step(leader, [1.0] * len(WIDTHS), DECAY)
        losses(stack, x, y).sum().backward()
        if step % max(1, steps // LOOKS) == 0:
            looks["steps"].append(step)
            effective = [RATE * square / length**2 for square, length in zip(squares, _lengths(stack), strict=True)]
            looks["effective"].append(float(f"{sum(effective) / len(effective):.5g}"))
        _step(stack, scales, decay)
    stack.eval()
    with torch.no_grad():
        accuracy = percent(correct(stack, split.test_x, split.test_y))[0]
        training = percent(correct(stack, split.train_x, split.train_y))[0]
        scaled = change_when_doubled(stack, split.test_x)
        # The running statistics of weights that shrink lag behind; the comparison is of what the weights say.
        with batch_moments(stack):
            outputs = [float(f"{value:.6g}") for value in stack(split.test_x)[0, :SHOWN].flatten().tolist()]
    return {**looks, "test": accuracy, "train": training, "scaled": scaled, "outputs": outputs}


@torch.no_grad()
def _step(stack: Stack, scales: Sequence[float], decay: float) -> None:
    """Gradient descent; hidden weights with the rate times their scale, and with decay; clears the gradients."""
    hidden = {id(weight): scale for weight, scale in zip(list(stack.weights)[:-1], scales, strict=True)}
    for parameter in stack.parameters():
        if parameter.grad is None:
            continue
        scale = hidden.get(id(parameter), 1.0)
        if id(parameter) in hidden and decay:
            parameter.mul_(1 - RATE * decay)
        parameter.add_(parameter.grad, alpha=-RATE * scale)
        parameter.grad = None


@torch.no_grad()
def _lengths(stack: Stack) -> list[float]:
    return [weight.norm().item() for weight in list(stack.weights)[:-1]]


@torch.no_grad()
def change_when_doubled(stack: Stack, x: Tensor) -> float:
    """The largest change of an output over the largest output when all hidden weights and biases are doubled.

    With batch norm the batch's own moments normalize, since running statistics belong to the weights as they were.
    """
    once, twice = copy.deepcopy(stack).train(), copy.deepcopy(stack).train()
    for weight, bias in zip(list(twice.weights)[:-1], list(twice.biases)[:-1], strict=False):
        weight.mul_(2)
        if bias is not None:
            bias.mul_(2)
    before, after = once(x), twice(x)
    return float(f"{((after - before).abs().max() / before.abs().max()).item():.3g}")


def settings(
    rates: Sequence[float], decays: Sequence[float], between: Sequence[float]
) -> list[tuple[str, float, float]]:
    """(what decays, rate, decay) of each replica: "none" at every rate and those between, then each kind."""
    alone = [("none", rate, 0.0) for rate in sorted([*rates, *between])]
    return alone + [(kind, rate, decay) for kind in KINDS for rate in rates for decay in decays]


def train_at_settings(
    *,
    data: str,
    arm: str,
    seed: int,
    steps: int,
    rates: tuple[float, ...],
    decays: tuple[float, ...],
    between: tuple[float, ...],
) -> Result:
    """Train every setting side by side; returns the accuracies at the end, a value for each of `settings`."""
    split = with_wrong_labels(data, seed)
    kinds = settings(rates, decays, between)
    stack = _network(split, arm, data, seed, len(kinds))
    rate, decay = (torch.tensor([each[place] for each in kinds]).view(-1, 1) for place in (1, 2))
    reach = torch.tensor([-1 if kind == "none" else KINDS.index(kind) for kind, _, _ in kinds]).view(-1, 1)
    weights = list(stack.weights)
    # From which kind on a parameter decays.
    first = {id(parameter): 2 for parameter in stack.parameters()}
    first |= {id(weight): 0 for weight in weights[:-1]} | {id(weights[-1]): 1}
    kept = {place: 1 - rate * decay * (reach >= place) for place in (0, 1, 2)}
    for chosen in batches(len(split.train_y), BATCH, steps, generator(draw="order", data=data, seed=seed)):
        losses(stack, split.train_x[chosen], split.train_y[chosen]).sum().backward()
        with torch.no_grad():
            for parameter in stack.parameters():
                if parameter.grad is not None:
                    rows = parameter.view(len(kinds), -1)
                    rows.mul_(kept[first[id(parameter)]]).sub_(rate * parameter.grad.view_as(rows))
                    parameter.grad = None
    stack.eval()
    parts = {
        "validation": (split.validation_x, split.validation_y),
        "test": (split.test_x, split.test_y),
        "train": (split.train_x, split.train_y),
    }
    with torch.no_grad():
        return {name: percent(correct(stack, x, y)) for name, (x, y) in parts.items()}
