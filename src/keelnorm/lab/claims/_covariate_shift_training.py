"""How the moments of a layer's input drift, how its gradient changes, and noise that puts the drift back."""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.lab.core.cell import Result
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.data import images
from keelnorm.lab.training.arms import BN, NONE, Arm, arm_named
from keelnorm.lab.training.input_shift import MeanDrift, received_by
from keelnorm.lab.training.stacks import Stack, StackedMLP
from keelnorm.lab.training.train import (
    Descent,
    batch_moments,
    batches,
    correct,
    losses,
    percent,
    rounded,
    statistics_paused,
    train,
)

WIDTHS = (100, 100, 100)
BATCH = 60
RATES = {"relu": (0.03, 0.1, 0.3), "sigmoid": (0.3, 1.0, 3.0)}
DRIFT_RATES = (0.1, 0.3, 1.0, 3.0)
TARGET = 90.0
# name: (activation, whether pixels are centered and scaled). Without batch norm the sigmoid network does not learn from
# raw pixels, so it gets centered ones.
PREPARED = {
    "ReLU, raw pixels": ("relu", False),
    "ReLU, centered pixels": ("relu", True),
    "sigmoid, centered pixels": ("sigmoid", True),
}
PROBED = 2
"""The hidden layer whose gradient is watched while the layers ahead of it move: the last one."""
NOISE_SCALE, NOISE_SHIFT = 0.5, 2.0
LOOKS = 20
"""How often the gradient is looked at in a training run."""


class ShiftingNoise(nn.Module):
    """In training (1 + a)·x + b, a and b drawn anew for every channel at every step: moments that jump about.

    In evaluation nothing is changed. All replicas share their noise.

    Args:
        draw: the generator of a and b.
        replicas: networks side by side.
    """

    def __init__(self, draw: torch.Generator, replicas: int = 1) -> None:
        super().__init__()
        self.draw, self.replicas = draw, replicas

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        a, b = torch.randn(2, x.shape[1] // self.replicas, generator=self.draw).repeat(1, self.replicas)
        noisy: Tensor = (1 + NOISE_SCALE * a) * x + NOISE_SHIFT * b
        return noisy


NOISY = Arm("noisy", "batch norm, then shifting noise", lambda *_: nn.Identity())
"""Named here; `_arm` builds its layers, since their noise belongs to a seed and a layer."""
ARMS = (NONE, BN, NOISY)


def _arm(name: str, data: str, seed: int) -> Arm:
    """The arm of that name; the noisy one draws from a generator for each layer of the seed."""
    if name != NOISY.name:
        return arm_named(name)
    layers = count()

    def normalization(spatial: int, channels: int, replicas: int) -> nn.Module:
        draw = generator(draw="shifting noise", data=data, seed=seed, layer=next(layers))
        return kn.Sequential(kn.BatchNorm1d(replicas * channels), ShiftingNoise(draw, replicas))

    return Arm(NOISY.name, NOISY.label, normalization)


def _network(
    data: str, activation: str, arm: str, seed: int, rates: tuple[float, ...], features: int, classes: int
) -> Stack:
    """A network for each learning rate, side by side."""
    return StackedMLP(
        features,
        WIDTHS,
        classes,
        _arm(arm, data, seed),
        generator(draw="initialization", data=data, seed=seed),
        torch.ones(len(rates)),
        activation=activation,
        initialization="xavier",
    )


def drift(*, data: str, arm: str, seed: int, steps: int, rates: tuple[float, ...]) -> Result:
    """Train a sigmoid network at every rate side by side, and follow what the last hidden layer's activation receives.

    Returns:
        The fields of `training.train.History`; at each evaluation and for each replica, `shift` (see
        `MeanDrift.shift`) and the 15th, 50th and 85th percentile of one unit's input (`percentiles`).
    """
    split = images(data, seed)
    stack = _network(data, "sigmoid", arm, seed, rates, split.train_x[0].numel(), split.classes)
    drifts = [MeanDrift() for _ in rates]
    percentiles: list[list[list[float | None]]] = []
    at = torch.tensor([0.15, 0.5, 0.85])

    def probe(_: int, model: Stack) -> None:
        block = model.blocks[-1]
        assert isinstance(block, nn.Sequential)
        # Training mode, as the next layers see it: with the batch's moments, and with the noise where there is some.
        with batch_moments(model), received_by(block[-1]) as inside:
            model(split.validation_x)
        received = inside[0].chunk(len(rates), dim=1)
        for each, own in zip(drifts, received, strict=True):
            each.add(own)
        percentiles.append([rounded(torch.quantile(own[:, 0], at), 4) for own in received])

    order = generator(draw="order", data=data, seed=seed)
    history = train(
        stack, split, torch.tensor(rates), batch=BATCH, evaluate_at=marks(steps), generator=order, probe=probe
    )
    by_rate = [rounded(each.shift(), 5) for each in drifts]
    return dict(vars(history)) | {
        "shift": [list(row) for row in zip(*by_rate, strict=True)],
        "percentiles": percentiles,
    }


def marks(steps: int) -> tuple[int, ...]:
    """Evaluations a quarter apart, from 0 on."""
    found = [0]
    while found[-1] < steps:
        found.append(min(steps, max(found[-1] + 2, round(found[-1] * 1.25))))
    return tuple(found)


def gradient_change(
    *, data: str, activation: str, centered: bool, arm: str, seed: int, steps: int, rates: tuple[float, ...]
) -> Result:
    """How a layer's gradient changes when the layers ahead of it make their step, at every rate side by side.

    Returns:
        steps; at each of them and for each replica the `cosine` of `cosine_after_earlier_layers`; test accuracy at the
        end (`accuracy`).
    """
    split = images(data, seed, centered=centered)
    stack = _network(data, activation, arm, seed, rates, split.train_x[0].numel(), split.classes).train()
    descent = Descent(torch.tensor(rates))
    at: list[int] = []
    cosines: list[list[float | None]] = []
    every = max(1, steps // LOOKS)
    order = generator(draw="order", data=data, seed=seed)
    for step, chosen in enumerate(batches(len(split.train_y), BATCH, steps, order)):
        x, y = split.train_x[chosen], split.train_y[chosen]
        losses(stack, x, y).sum().backward()
        if step % every == 0:
            at.append(step)
            cosines.append(rounded(cosine_after_earlier_layers(stack, x, y, descent.rates), 5))
        descent.step(stack)
    stack.eval()
    with torch.no_grad():
        accuracy = percent(correct(stack, split.test_x, split.test_y))
    return {"steps": at, "cosine": cosines, "accuracy": accuracy}


def cosine_after_earlier_layers(stack: Stack, x: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    """The cosine between the probed layer's gradient and the one after the step of the layers ahead of it, (R,).

    The gradients are of the same batch, and those before are there; the stack is left as it was. Santurkar et al.
    2018, definition 2.1 and figure 3.
    """
    replicas = stack.replicas
    probed = stack.weights[PROBED]
    ahead = [*stack.weights[:PROBED], *stack.biases[:PROBED], *stack.blocks[:PROBED].parameters()]
    moving = [parameter for parameter in ahead if parameter is not None]
    before = probed.grad
    assert before is not None
    kept = [parameter.detach().clone() for parameter in moving]
    with statistics_paused(stack):
        try:
            with torch.no_grad():
                for parameter in moving:
                    assert parameter.grad is not None
                    rows, gradient = parameter.view(replicas, -1), parameter.grad.reshape(replicas, -1)
                    rows.addcmul_(gradient, rates.view(-1, 1), value=-1.0)
            (after,) = torch.autograd.grad(losses(stack, x, y).sum(), [probed])
        finally:
            with torch.no_grad():
                for parameter, value in zip(moving, kept, strict=True):
                    parameter.copy_(value)
    return torch.nn.functional.cosine_similarity(before.reshape(replicas, -1), after.reshape(replicas, -1), dim=1)
