"""The training run that most claims are made of, and how its results are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from keelnorm.lab.core.cell import Cell, Result
from keelnorm.lab.core.plan import kind_of
from keelnorm.lab.core.seeds import Axis, generator
from keelnorm.lab.data import images
from keelnorm.lab.training.arms import Arm, arm_named
from keelnorm.lab.training.learning_rates import Best, best
from keelnorm.lab.training.networks import Initialization, Place, Stack, StackedCNN, StackedMLP
from keelnorm.lab.training.train import Descent, percent, right, train
from keelnorm.measure.statistics import mean

ACTIVATION_NAMES = {"relu": "ReLU", "tanh": "tanh", "sigmoid": "sigmoid", "identity": "no activation"}


def trial(
    *,
    data: str,
    arm: str,
    seed: int,
    rates: tuple[float, ...],
    evaluate_at: tuple[int, ...],
    network: str = "mlp",
    widths: tuple[int, ...] = (100, 100, 100),
    activation: str = "relu",
    scales: tuple[float, ...] = (1.0,),
    momenta: tuple[float, ...] = (),
    initialization: Initialization = "xavier",
    place: Place = "before",
    centred: bool = True,
    batch: int = 60,
    samples: int = 0,
    dropout: float = 0.0,
    paired: bool = False,
) -> Result:
    """Train one network for every learning rate and initial scale, side by side.

    The seed draws split, initialization and order of the samples by named axes that leave out all that is compared.

    Args:
        data: a data set's identity.
        arm: a normalization's name.
        seed: draws everything.
        rates, scales: tried in all combinations (replicas run over scales, and within a scale over rates), or one with
            the other where `paired`.
        momenta: a momentum for each replica; none where empty.
        evaluate_at: numbers of steps after which to evaluate; the last ends the training.
        network: "mlp" or "cnn".
        widths: of the hidden layers; channels of the convolutions, of which every second halves the image.
        activation, initialization, place, dropout: see `keelnorm.lab.training.networks`.
        centred: whether pixels are centred and scaled.
        batch: samples in a batch.
        samples: in the training part; 0: all.

    Returns:
        The fields of `keelnorm.lab.training.train.History`, and the accuracy on the training part at the end.
    """
    split = images(data, seed, centred=centred, train=samples or None)
    if paired:
        replica_rates, replica_scales = torch.tensor(rates), torch.tensor(scales)
    else:
        replica_rates = torch.tensor(rates).repeat(len(scales))
        replica_scales = torch.tensor(scales).repeat_interleave(len(rates))
    draw = generator(draw="initialization", data=data, seed=seed)
    _, into, side, _ = split.train_x.shape
    stack: Stack
    if network == "mlp":
        stack = StackedMLP(
            split.train_x[0].numel(), widths, split.classes, arm_named(arm), draw, replica_scales,
            activation=activation, initialization=initialization, place=place, dropout=dropout,
        )  # fmt: skip
    else:
        strides = tuple(1 + layer % 2 for layer in range(len(widths)))
        stack = StackedCNN(
            into, side, widths, strides, split.classes, arm_named(arm), draw, replica_scales, pool=True,
            activation=activation, initialization=initialization, place=place, dropout=dropout,
        )  # fmt: skip
    momentum = torch.tensor(momenta) if momenta else 0.0
    order = generator(draw="order", data=data, seed=seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)  # dropout's masks
        history = train(
            stack,
            split,
            Descent(replica_rates, momentum=momentum),
            batch=batch,
            evaluate_at=evaluate_at,
            generator=order,
        )
    stack.eval()
    with torch.no_grad():
        training = percent(right(stack, split.train_x, split.train_y))
    return dict(vars(history)) | {"train": training}


def trial_cell(cost_of_step: float, **axes: Axis) -> Cell:
    """A cell of `trial`. `cost_of_step` is about how many seconds a step of it takes."""
    marks = axes["evaluate_at"]
    assert isinstance(marks, tuple)
    return Cell(trial, axes, cost=cost_of_step * float(marks[-1]) + 0.05)


def where_text(data: str, *parts: str) -> str:
    """A condition in words: the kind of data, then the rest."""
    return ", ".join([kind_of(data), *parts])


def tuned(by_arm: Mapping[str, Sequence[Result]], rates: Sequence[float], curve: str = "test") -> dict[str, Best]:
    """Each arm at the rate with its highest validation accuracy."""
    return {name: best(histories, rates, curve) for name, histories in by_arm.items()}


def edge_notes(where: str, chosen: Mapping[str, Best], arms: Sequence[Arm]) -> list[str]:
    """A note for each arm whose best rate lies at the edge of the grid."""
    return [
        f"{where}: the best rate of {arm.label}, {chosen[arm.name].rate:g}, lies at the edge of the grid; a wider one "
        "might do better."
        for arm in arms
        if chosen[arm.name].at_edge
    ]


def rate_row(where: str, label: str, chosen: Best) -> list[str]:
    """A table's row: validation accuracy at every rate, * at the one chosen, then the test accuracy there."""
    texts = [f"{value:.1f}{' *' if index == chosen.index else ''}" for index, value in enumerate(chosen.row)]
    return [where, label, *texts, mean(chosen.test).text(1)]


def rate_columns(rates: Sequence[float]) -> list[str]:
    """The columns that `rate_row` fills."""
    return ["where", "arm", *(f"rate {rate:g}" for rate in rates), "test"]
