"""How the moments of a layer's input drift, how its gradient changes, and noise that puts the drift back."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import evenkeel as ek
from evenkeel.lab.arms import BN, NONE, Arm, arm_named
from evenkeel.lab.cell import Result
from evenkeel.lab.data import images
from evenkeel.lab.networks import Stack, StackedMLP
from evenkeel.lab.seeds import generator
from evenkeel.lab.training import Descent, batch_moments, batches, losses, percent, plain, right, train
from evenkeel.lab.wander import Wander, received_by

WIDTHS = (100, 100, 100)


BATCH = 60


RATE = {"relu": 0.1, "sigmoid": 1.0}


# name: (activation, whether pixels are centred and scaled)
PREPARED = {
    "ReLU, raw pixels": ("relu", False),
    "ReLU, centred pixels": ("relu", True),
    "sigmoid, raw pixels": ("sigmoid", False),
}


PROBED = 2


"""The hidden layer whose gradient is watched while the layers ahead of it move."""


NOISE_SCALE, NOISE_SHIFT = 0.5, 1.5


RATES = (0.3, 1.0, 3.0)


TARGET = 90.0


class ShiftingNoise(nn.Module):
    """In training (1 + a)·x + b with a and b drawn anew for every channel at every step: moments that jump about.

    In evaluation nothing is changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draw = generator(draw="shifting noise")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        factor = 1 + NOISE_SCALE * torch.randn(x.shape[1], generator=self.draw)
        return factor * x + NOISE_SHIFT * torch.randn(x.shape[1], generator=self.draw)


def _noisy(spatial: int, channels: int, replicas: int) -> nn.Module:
    return ek.Sequential(ek.BatchNorm1d(replicas * channels), ShiftingNoise())


NOISY = Arm("noisy", "batch norm, then shifting noise", _noisy)


ARMS = (NONE, BN, NOISY)


def drift(*, data: str, activation: str, arm: str, seed: int, steps: int) -> Result:
    """Follow the moments of what the last hidden layer's activation receives, and of one unit the percentiles.

    Returns:
        steps; shift (see `evenkeel.lab.wander.Wander.shift`); percentiles 15, 50 and 85 of a unit; test accuracy at
        the end.
    """
    split = images(data, seed)
    layer = NOISY if arm == NOISY.name else arm_named(arm)
    stack = StackedMLP(
        split.train_x[0].numel(),
        WIDTHS,
        split.classes,
        layer,
        generator(draw="initialization", data=data, seed=seed),
        activation=activation,
        initialization="xavier",
    )
    wander = Wander()
    percentiles: list[list[float | None]] = []

    def probe(step: int, model: Stack) -> None:
        block = model.blocks[-1]
        assert isinstance(block, nn.Sequential)
        # Training mode, as the next layers see it: with the batch's moments, and with the noise where there is some.
        with batch_moments(model), received_by(block[-1]) as inside:
            model(split.validation_x)
        wander.add(inside[0])
        unit = inside[0][:, 0].double()
        percentiles.append(plain(torch.quantile(unit, torch.tensor([0.15, 0.5, 0.85], dtype=torch.float64)), 4))

    marks = tuple(sorted({round(steps * at / 15) for at in range(16)}))
    order = generator(draw="order", data=data, seed=seed)
    history = train(
        stack, split, torch.tensor([RATE[activation]]), batch=BATCH, evaluate_at=marks, generator=order, probe=probe
    )
    return {
        "steps": history.steps,
        "shift": plain(wander.shift(), 5),
        "percentiles": percentiles,
        "accuracy": history.test[-1][0],
    }


def gradient_change(*, data: str, activation: str, centred: bool, arm: str, seed: int, steps: int) -> Result:
    """How a layer's gradient changes when the layers ahead of it make their step (Santurkar et al. 2018, definition
    2.1).

    Returns:
        steps; cosine of the layer's gradient before and after, on the same batch; test accuracy at the end.
    """
    split = images(data, seed, centred=centred)
    stack = StackedMLP(
        split.train_x[0].numel(),
        WIDTHS,
        split.classes,
        arm_named(arm),
        generator(draw="initialization", data=data, seed=seed),
        activation=activation,
        initialization="xavier",
    ).train()
    descent = Descent(torch.tensor([RATE[activation]]))
    seen: dict[str, list[float]] = {"steps": [], "cosine": []}
    every = max(1, steps // 20)
    order = generator(draw="order", data=data, seed=seed)
    for step, chosen in enumerate(batches(len(split.train_y), BATCH, steps, order)):
        x, y = split.train_x[chosen], split.train_y[chosen]
        losses(stack, x, y).sum().backward()
        if step % every == 0:
            seen["steps"].append(step)
            seen["cosine"].append(cosine_after_earlier_layers(stack, x, y, RATE[activation]))
        descent.step(stack)
    stack.eval()
    with torch.no_grad():
        return {**seen, "accuracy": percent(right(stack, split.test_x, split.test_y))[0]}


def cosine_after_earlier_layers(stack: Stack, x: Tensor, y: Tensor, rate: float) -> float:
    """Cosine of the probed layer's gradient, which is there, and that after the step of the layers ahead of it."""
    moved = copy.deepcopy(stack)
    before = stack.weights[PROBED].grad
    assert before is not None
    ahead = [*moved.weights[:PROBED], *moved.biases[:PROBED], *moved.blocks[:PROBED].parameters()]
    own = [*stack.weights[:PROBED], *stack.biases[:PROBED], *stack.blocks[:PROBED].parameters()]
    with torch.no_grad():
        for parameter, source in zip(ahead, own, strict=True):
            if parameter is not None and source.grad is not None:
                parameter.sub_(rate * source.grad)
    moved.zero_grad()
    losses(moved, x, y).sum().backward()
    after = moved.weights[PROBED].grad
    assert after is not None
    return round(torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0).item(), 5)


def noisy_training(*, data: str, arm: str, seed: int, steps: int, rates: tuple[float, ...]) -> Result:
    """Train with sigmoid at every rate side by side, for steps to a target."""
    split = images(data, seed)
    layer = NOISY if arm == NOISY.name else arm_named(arm)
    stack = StackedMLP(
        split.train_x[0].numel(),
        WIDTHS,
        split.classes,
        layer,
        generator(draw="initialization", data=data, seed=seed),
        torch.ones(len(rates)),
        activation="sigmoid",
        initialization="xavier",
    )
    marks = [0]
    while marks[-1] < steps:
        marks.append(min(steps, max(marks[-1] + 2, round(marks[-1] * 1.25))))
    order = generator(draw="order", data=data, seed=seed)
    return dict(vars(train(stack, split, torch.tensor(rates), batch=BATCH, evaluate_at=marks, generator=order)))
