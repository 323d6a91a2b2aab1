"""Batch norm with less and with more noise in its moments, and their training on few samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import keelnorm as kn
from keelnorm.lab.core.cell import Result
from keelnorm.lab.core.seeds import generator, seed_from
from keelnorm.lab.data.data_split import Split, split
from keelnorm.lab.data.images import all_images
from keelnorm.lab.training.arms import BN, NONE, Arm
from keelnorm.lab.training.stacks import Stack, StackedMLP
from keelnorm.lab.training.train import Descent, batches, correct, losses, percent, rounded

SAMPLES = 500
VALIDATION = 300
MOST_TEST = 2000
WIDTHS = (128, 128)
BATCH = 50
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


def few(data: str, seed: int) -> Split:
    """A small training part, and for test most of what is left: small differences need many samples."""
    x, y = all_images(data)
    test = min(MOST_TEST, len(x) - SAMPLES - VALIDATION)
    return split(x, y, data=data, seed=seed, validation=VALIDATION, test=test, train=SAMPLES).centered()


def losses_without_noise(stack: Stack, x: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
    """The loss of each replica on the chosen samples, (R,), normalized with the moments of all samples x."""
    logits: Tensor = stack(x)[:, chosen]
    each = F.cross_entropy(logits.flatten(0, 1), y[chosen].repeat(stack.replicas), reduction="none")
    return each.view(stack.replicas, -1).mean(dim=1)


def train_arm(*, data: str, arm: str, seed: int, rates: tuple[float, ...], steps: int) -> Result:
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
            "validation": [percent(correct(stack, part.validation_x, part.validation_y))],
            "test": [percent(correct(stack, part.test_x, part.test_y))],
            "train": percent(correct(stack, part.train_x, part.train_y)),
            "test_loss": rounded(losses(stack, part.test_x, part.test_y), 5),
            "train_loss": rounded(losses(stack, part.train_x, part.train_y), 5),
        }
