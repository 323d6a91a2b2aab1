"""Variants with a window of recent batches, outside the state_dict, and a burn-in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from keelnorm.engine.error_messages import describe, is_count
from keelnorm.engine.torch_internals import disable_compiler
from keelnorm.nn._shared.variant import Variant

Value = TypeVar("Value")

#: Decorates a forward that keeps Python state or differentiates: torch.compile breaks the graph there and calls it
#: (an error with fullgraph=True).
runs_eagerly = disable_compiler


class Recall(deque[tuple[Tensor, Value]]):
    """The values that the last forwards used, for a checkpoint's second run of one of them.

    A forward of such a layer changes the values that the next one uses, and the second run comes later. It is
    recognized by the statistics of its batch, which are bitwise those of the first run.
    """

    def find(self, statistics: Tensor) -> tuple[Value] | None:
        """The value of the latest forward with these statistics, in a tuple; None if there is none."""
        for known, value in reversed(self):
            if known.device == statistics.device and torch.equal(known, statistics):
                return (value,)
        return None


class WindowedVariant(Variant):
    """A variant with a window of recent batches; a subclass empties it in :meth:`reset_window`.

    Args:
        window: Number of batches that normalize together, including the current one.
        burn_in: Number of batches, at the start of training, that are normalized alone.
    """

    changed_by_forward: tuple[str, ...] = ("_burning_in",)
    #: Number of forwards in :class:`Recall`: more than ever lie between a forward and its backward, even in pipelines.
    _recalled = 64

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        window: int,
        burn_in: int,
    ) -> None:
        what = type(self).__name__
        for name, value, least in (("window", window, 1), ("burn_in", burn_in, 0)):
            if not is_count(value, least):
                raise ValueError(f"{what}: {name} is a number of batches, {least} or more; got {describe(value)}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.window = window
        self.burn_in = burn_in
        self._burning_in = burn_in > 0
        self.reset_window()

    def reset_window(self) -> None:
        """Empty the window, as loading a state_dict and ``reset_running_stats`` also do."""
        raise NotImplementedError

    def reset_running_stats(self) -> None:
        """As torch.nn's; the window is emptied too."""
        super().reset_running_stats()
        if "_burning_in" in self.__dict__:  # not yet set in torch.nn's constructor
            self._burning_in = self.burn_in > 0
            self.reset_window()

    def pools(self) -> bool:
        """Whether recent batches take part in this forward: in training, after the burn-in."""
        if self._burning_in and self.num_batches_tracked is not None:
            # Reading the counter waits for the device, so it is read during the burn-in only.
            self._burning_in = int(self.num_batches_tracked) < self.burn_in
        return self.training and not self._burning_in

    def extra_repr(self) -> str:
        """The options, for the layer's repr."""
        return f"{super().extra_repr()}, window={self.window}, burn_in={self.burn_in}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WindowedVariant:
        before = None if self.running_mean is None else self.running_mean.device
        super()._apply(fn, recurse)
        if self.running_mean is not None and self.running_mean.device != before:
            self.reset_window()  # its tensors are on the other device
        return self

    def _load_from_state_dict(self, *args: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*args, **keywords)
        self._burning_in = self.burn_in > 0
        self.reset_window()


def has_values(x: Tensor, mask: Tensor | None) -> bool:
    """Whether any value of the batch counts; reads the mask on the host."""
    return x.numel() > 0 and (mask is None or bool(mask.any()))
