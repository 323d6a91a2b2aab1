"""Real data that needs no network, split anew for every seed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from evenkeel.lab.seeds import generator

VALIDATION = 200
TEST = 300
GREY_LEVELS = 16.0


@dataclass(frozen=True)
class Split:
    """One division of a data set. Images are (n, C, H, W) in float32, labels (n,) in int64."""

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    return images, torch.tensor(bunch.target, dtype=torch.int64)


def digits(seed: int, *, centred: bool = True) -> Split:
    """scikit-learn's 1,797 handwritten digits (8 x 8) as 1,297 / 200 / 300, drawn by `seed`.

    Args:
        seed: draws the division.
        centred: subtract the training part's mean image and divide by one overall deviation. Without:
            pixels in [0, 1], as they come.
    """
    images, labels = _digits()
    order = torch.randperm(len(images), generator=generator(draw="split", data="digits", seed=seed))
    held_out = VALIDATION + TEST
    train, validation, test = order[held_out:], order[:VALIDATION], order[VALIDATION:held_out]
    if centred:
        centre = images[train].mean(dim=0)
        scaled = (images - centre) / (images[train] - centre).square().mean().sqrt()
    else:
        scaled = images / GREY_LEVELS
    return Split(
        scaled[train],
        labels[train],
        scaled[validation],
        labels[validation],
        scaled[test],
        labels[test],
    )
