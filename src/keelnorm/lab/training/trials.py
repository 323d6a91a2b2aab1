"""The training run that most claims are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from keelnorm.lab.core.cell import Cell, Result
from keelnorm.lab.core.seeds import Axis, generator
from keelnorm.lab.data import Split, images
from keelnorm.lab.training.arms import arm_named
from keelnorm.lab.training.stacks import Initialization, Place, Stack, StackedCNN, StackedMLP
from keelnorm.lab.training.train import Descent, correct, percent, train


@dataclass(frozen=True)
class Trial:
    """What a trial is asked for: the axes of its cell.

    Args:
        data: a data set's identity.
        arm: a normalization's name.
        seed: draws split, initialization and order of the samples.
        rates: learning rates.
        evaluate_at: numbers of steps after which to evaluate; the last ends the training.
        network: "mlp" or "cnn".
        widths: of the hidden layers; channels of the convolutions, of which every second halves the image.
        activation: see `keelnorm.lab.training.stacks`, as for initialization, place and dropout.
        scales: factors of the initial weights. Rates and scales are tried in all combinations (replicas run over
            scales, and within a scale over rates), or one with the other where `paired`.
        momenta: a momentum for each replica; none where empty.
        initialization: how weights are drawn.
        place: where a hidden layer normalizes.
        centered: whether pixels are centered and scaled.
        batch: samples in a batch.
        samples: in the training part; 0: all.
        dropout: the share of hidden values dropped in training.
        paired: whether each rate goes with the scale at its place.
    """

    data: str
    arm: str
    seed: int
    rates: tuple[float, ...]
    evaluate_at: tuple[int, ...]
    network: str = "mlp"
    widths: tuple[int, ...] = (100, 100, 100)
    activation: str = "relu"
    scales: tuple[float, ...] = (1.0,)
    momenta: tuple[float, ...] = ()
    initialization: Initialization = "xavier"
    place: Place = "before"
    centered: bool = True
    batch: int = 60
    samples: int = 0
    dropout: float = 0.0
    paired: bool = False

    def descent(self) -> Descent:
        """Gradient descent with the learning rate and the momentum of each replica."""
        rates = torch.tensor(self.rates)
        momentum = torch.tensor(self.momenta) if self.momenta else 0.0
        return Descent(rates if self.paired else rates.repeat(len(self.scales)), momentum=momentum)

    def stack(self, split: Split) -> Stack:
        """The networks at their start, a replica for each combination."""
        scales = torch.tensor(self.scales)
        scales = scales if self.paired else scales.repeat_interleave(len(self.rates))
        draw = generator(draw="initialization", data=self.data, seed=self.seed)
        _, into, side, _ = split.train_x.shape
        if self.network == "mlp":
            return StackedMLP(
                split.train_x[0].numel(), self.widths, split.classes, arm_named(self.arm), draw, scales,
                activation=self.activation, initialization=self.initialization, place=self.place, dropout=self.dropout,
            )  # fmt: skip
        strides = tuple(1 + layer % 2 for layer in range(len(self.widths)))
        return StackedCNN(
            into, side, self.widths, strides, split.classes, arm_named(self.arm), draw, scales, pool=True,
            activation=self.activation, initialization=self.initialization, place=self.place, dropout=self.dropout,
        )  # fmt: skip


def trial(**axes: Any) -> Result:
    """Train one network for every learning rate and initial scale, side by side.

    The seed draws split, initialization and order of the samples by named axes that leave out all that is compared.

    Args:
        **axes: the fields of `Trial`.

    Returns:
        The fields of `keelnorm.lab.training.train.History`, and the accuracy on the training part at the end.
    """
    asked = Trial(**axes)
    split = images(asked.data, asked.seed, centered=asked.centered, train=asked.samples or None)
    stack = asked.stack(split)
    order = generator(draw="order", data=asked.data, seed=asked.seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(asked.seed)  # dropout's masks
        history = train(
            stack, split, asked.descent(), batch=asked.batch, evaluate_at=asked.evaluate_at, generator=order
        )
    stack.eval()
    with torch.no_grad():
        training = percent(correct(stack, split.train_x, split.train_y))
    return dict(vars(history)) | {"train": training}


def trial_cell(cost_of_step: float, **axes: Axis) -> Cell:
    """A cell of `trial`. `cost_of_step` is about how many seconds a step of it takes."""
    marks = axes["evaluate_at"]
    assert isinstance(marks, tuple)
    return Cell(trial, axes, cost=cost_of_step * float(marks[-1]) + 0.05)
