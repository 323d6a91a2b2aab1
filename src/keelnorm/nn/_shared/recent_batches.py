"""What variants share that keep something of their last batches: a window outside the state_dict, and a burn-in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, without its import before it is needed

from keelnorm.engine.error_messages import describe, is_count
from keelnorm.nn._shared.variant import Variant

Value = TypeVar("Value")

#: For a forward that keeps in Python what differs from batch to batch, or differentiates: torch.compile runs it as it
#: is, between two graphs (an error with fullgraph=True).
runs_eagerly = _disable_dynamo


class Recall(deque[tuple[Tensor, Value]]):
    """What the last forwards computed with, so that a checkpoint's second run of one computes with the same.

    Such a layer's forward changes what it computes with next, and the second run comes after that. It is told by the
    statistics of its batch, which are those of the first run to the bit.
    """

    def find(self, statistics: Tensor) -> tuple[Value] | None:
        """The value of the newest forward with these statistics, in a tuple, or None where there is none."""
        for known, value in reversed(self):
            if known.device == statistics.device and torch.equal(known, statistics):
                return (value,)
        return None


class Remembering(Variant):
    """A variant that keeps something of its last batches. A subclass empties what it keeps in :meth:`reset_window`.

    Args:
        window: Number of batches that normalize together, the current one included.
        burn_in: So many batches are normalized alone, at the beginning of training.
    """

    #: Forwards whose second run finds what the first computed with: more than are ever between a forward and its
    #: backward, pipelines included. A few vectors each.
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
        """Forget the last batches. Loading a state_dict does so, and so does ``reset_running_stats``."""
        raise NotImplementedError

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if "_burning_in" in self.__dict__:  # not while torch.nn's constructor runs
            self._burning_in = self.burn_in > 0
            self.reset_window()

    def pools(self) -> bool:
        """Whether the last batches take part in this forward: the burn-in is over."""
        if self._burning_in and self.num_batches_tracked is not None:
            # Read only until it is over, as it waits for the device.
            self._burning_in = int(self.num_batches_tracked) < self.burn_in
        return self.training and not self._burning_in

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, burn_in={self.burn_in}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Remembering:
        before = None if self.running_mean is None else self.running_mean.device
        super()._apply(fn, recurse)
        if self.running_mean is not None and self.running_mean.device != before:
            self.reset_window()  # what it holds lies on the other device
        return self

    def _load_from_state_dict(self, *args: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*args, **keywords)
        self._burning_in = self.burn_in > 0
        self.reset_window()


def has_values(x: Tensor, mask: Tensor | None) -> bool:
    """Whether the batch counts at all. A mask is looked at by the host for it."""
    return x.numel() > 0 and (mask is None or bool(mask.any()))
