"""One division of a data set into parts for training, validation and test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from keelnorm.lab.core.seeds import generator


@dataclass(frozen=True)
class Split:
    """Samples (n, ...) in float32 and labels (n,) in int64, in three parts that share no sample."""

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def classes(self) -> int:
        """How many classes the labels name."""
        return int(max(part.max() for part in (self.train_y, self.validation_y, self.test_y))) + 1

    def with_inputs(self, change: Callable[[Tensor], Tensor]) -> Split:
        """The same with every part's samples changed."""
        x = [change(part) for part in (self.train_x, self.validation_x, self.test_x)]
        return Split(x[0], self.train_y, x[1], self.validation_y, x[2], self.test_y)

    def centered(self) -> Split:
        """The same with the training part's mean sample subtracted, divided by one overall standard deviation."""
        center = self.train_x.mean(dim=0)
        width = (self.train_x - center).square().mean().sqrt()
        return self.with_inputs(lambda x: (x - center) / width)


def split(x: Tensor, y: Tensor, *, data: str, seed: int, validation: int, test: int, train: int | None = None) -> Split:
    """Divide at random, drawn by `seed`.

    Args:
        x: all samples. Bytes become values in [0, 1] in the parts alone, so that a large data set stays small.
        y: their labels.
        data: the data set's identity, an axis of the draw.
        seed: the other axis.
        validation: samples in this part.
        test: samples in this part.
        train: samples in the training part; None: all that are left.

    Raises:
        ValueError: when there are too few samples.
    """
    held_out = validation + test
    wanted = held_out + (1 if train is None else train)
    if len(x) < wanted:
        raise ValueError(f"{data} has {len(x)} samples; this division needs at least {wanted}")
    order = torch.randperm(len(x), generator=generator(draw="split", data=data, seed=seed))
    first, second, third = order[held_out:][:train], order[:validation], order[validation:held_out]
    return Split(*(part for chosen in (first, second, third) for part in (_values(x[chosen]), y[chosen])))


def _values(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x
