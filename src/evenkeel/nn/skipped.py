"""The count of running-moment updates that a layer left out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class CountsSkipped(_BatchNorm):
    """A batch normalization with the buffer ``skipped_updates``, which is no part of its state_dict."""

    def count_skipped(self) -> None:
        """Begin to count, from 0 on, the updates that are left out because the batch's moments are not finite."""
        mean, counter = self.running_mean, self._buffers.get("skipped_updates")
        if mean is not None and counter is not None and (counter.shape, counter.device) == (mean.shape, mean.device):
            counter.zero_()
            return
        counter = None if mean is None else torch.zeros(mean.shape, dtype=torch.int64, device=mean.device)
        self.register_buffer("skipped_updates", counter, persistent=False)

    def reset_running_stats(self) -> None:
        """As torch.nn's, whose constructor calls it too."""
        super().reset_running_stats()
        self.count_skipped()


def counter_beside(running: Tensor | None, counter: Tensor | None) -> Tensor | None:
    """The counter where it can count: not where state from a file took the place of a layer's on another device."""
    usable = counter is not None and running is not None and counter.device == running.device
    return counter if usable else None
