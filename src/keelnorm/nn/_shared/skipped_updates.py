"""The count of updates of the running statistics that a layer skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.engine.update_counts import SKIPPED, UpdateCounts


class CountsSkipped(BatchNormBase):
    """A batch normalization with ``skipped_updates``, which is not a buffer: the buffers are torch.nn's."""

    #: None if the layer's class was changed to this one after its construction.
    _updates: UpdateCounts | None = None

    @property
    def skipped_updates(self) -> Tensor | None:
        """Number of updates that were skipped, per channel, because a stored value would not have been finite.

        The counter itself, int64 (C,), on the device of the running statistics; None without these. It is not part of
        the state_dict.
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
        """Set all counts to 0."""
        updates = self._updates = self._updates or UpdateCounts()
        self._place_counts()
        if updates.tensor is not None:
            updates.tensor.zero_()  # in place: a CUDA graph may count there
        return updates

    def reset_running_stats(self) -> None:
        """As torch.nn's, and set the counts to 0; torch.nn's constructor calls it too."""
        super().reset_running_stats()
        self.count_skipped()

    def _knows_channels(self) -> bool:
        return self.running_mean is not None and not is_lazy(self.running_mean)

    def _place_counts(self) -> None:
        """Put the counts on the running mean's device before they are needed: a CUDA graph can't create them."""
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
            replica._updates = self._updates.shared()
        return replica  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles: counts are a tensor, so that a file names no class of keelnorm for them."""
        updates = self.__dict__.get("_updates")
        return self.__dict__ | {"_updates": None if updates is None else updates.tensor}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In older files the counter is a buffer.
        counter = state["_buffers"].pop("skipped_updates", None)
        state["_non_persistent_buffers_set"].discard("skipped_updates")
        counts = state.pop("_updates", None)
        super().__setstate__(state)
        if not isinstance(counts, UpdateCounts):
            self._updates = UpdateCounts()
            self._updates.tensor = counts
        else:  # of a subclass with a __getstate__ of its own
            self._updates = counts
        if counter is not None:
            self.skipped_updates = counter
