"""Split a batch by group and restore its order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keelnorm.engine.layout import is_channels_last
from keelnorm.engine.recomputed_steps import joined


class Partition:
    """A partition of a batch's samples into groups.

    Args:
        numbers: The group of each sample; at least one.
        device: The device of the samples.
    """

    def __init__(self, numbers: list[int], device: torch.device) -> None:
        #: The groups that have samples, in order.
        self.present = sorted(set(numbers))
        self._sizes = [numbers.count(number) for number in self.present]
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        # None if the samples are in order already: nothing is copied then.
        self._order = None if order == list(range(len(order))) else torch.tensor(order, device=device)

    def split(self, values: Tensor | None) -> list[Any]:
        """The samples of each group; None for each group if ``values`` is None."""
        if values is None:
            return [None] * len(self.present)
        return list((values if self._order is None else _take(values, self._order)).split(self._sizes))

    def join(self, parts: list[Tensor]) -> Tensor:
        """Concatenate the groups' results in the order of the samples."""
        return parts[0] if len(parts) == 1 and self._order is None else joined(self._join, parts)

    def _join(self, *parts: Tensor) -> Tensor:
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        return values if self._order is None else _take(values, self._order.argsort())


def _take(values: Tensor, index: Tensor) -> Tensor:
    """The samples in another order, in the same memory layout."""
    if is_channels_last(values):
        return values.movedim(1, -1).index_select(0, index).movedim(-1, 1)
    return values.index_select(0, index)
