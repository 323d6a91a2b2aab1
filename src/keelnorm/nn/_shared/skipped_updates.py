"""The count of running-statistics updates that a layer left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from keelnorm.engine.update_counts import SKIPPED, UpdateCounts


class CountsSkipped(_BatchNorm):
    """A batch normalization with ``skipped_updates``, which is no buffer: parameters and buffers are torch.nn's."""

    #: None where someone has made a layer of another class one of these.
    _updates: UpdateCounts | None = None

    @property
    def skipped_updates(self) -> Tensor | None:
        """How many updates were left out, per channel, (C,) int64, because something not finite would have been stored.

        The counter itself, on the device of the running statistics; None without them. It is no part of the state_dict.
        """
        counts = self.update_counts()
        return None if counts is None else counts[SKIPPED]

    @skipped_updates.setter
    def skipped_updates(self, values: Tensor) -> None:
        counter = self.skipped_updates
        if counter is not None:
            counter.copy_(values)

    def update_counts(self) -> Tensor | None:
        """All counts of :class:`~keelnorm.engine.update_counts.UpdateCounts`; None without running statistics."""
        if not self._knows_channels():
            return None
        return (self._updates or self.count_skipped()).beside(self.running_mean)  # type: ignore[arg-type]

    def count_skipped(self) -> UpdateCounts:
        """Begin to count, from 0 on, the updates that are left out."""
        updates = self._updates = self._updates or UpdateCounts()
        self._place_counts()
        if updates.tensor is not None:
            updates.tensor.zero_()  # where it is: a CUDA graph may count there
        return updates

    def reset_running_stats(self) -> None:
        """As torch.nn's, whose constructor calls it too."""
        super().reset_running_stats()
        self.count_skipped()

    def _knows_channels(self) -> bool:
        return self.running_mean is not None and not is_lazy(self.running_mean)

    def _place_counts(self) -> None:
        """Have the counts beside the running mean before they are needed: a CUDA graph can't make them."""
        if self._knows_channels() and self._updates is not None:
            self._updates.beside(self.running_mean)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CountsSkipped:
        super()._apply(fn, recurse)
        self._place_counts()
        return self

    def _load_from_state_dict(self, *args: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*args, **keywords)
        self._place_counts()

    def _replicate_for_data_parallel(self) -> torch.nn.Module:
        replica = super()._replicate_for_data_parallel()
        if self._updates is not None:
            replica._updates = self._updates.shared()  # type: ignore[assignment]
        return replica  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: the counts as a tensor, so that a file names no class that torch.nn's lacks."""
        updates = self.__dict__.get("_updates")
        return self.__dict__ | {"_updates": None if updates is None else updates.tensor}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In files from before, the counter was a buffer.
        counter = state["_buffers"].pop("skipped_updates", None)
        state["_non_persistent_buffers_set"].discard("skipped_updates")
        counts = state.pop("_updates", None)
        super().__setstate__(state)
        if not isinstance(counts, UpdateCounts):
            self._updates = UpdateCounts()
            self._updates.tensor = counts
        else:  # of a subclass that says itself what its copies take
            self._updates = counts
        if counter is not None:
            self.skipped_updates = counter
