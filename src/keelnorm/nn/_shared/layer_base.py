"""The base class of the drop-in layers and the variants."""

from __future__ import annotations

import torch
from torch import Tensor

from keelnorm.nn._shared.module_errors import KeelnormModule
from keelnorm.nn._shared.skipped_updates import CountsSkipped
from keelnorm.nn._shared.statistics_control import Controlled


class Layer(KeelnormModule, Controlled, CountsSkipped):
    """A batch normalization with ``torch.nn``'s constructor, whose forward checks its input itself."""

    #: Legal numbers of dimensions of the input; None for any from two on.
    _ranks: tuple[int, ...] | None = None
    #: Whether a result in training can wait for the operation that follows; in evaluation all can.
    defers_in_training: bool = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        newer = {} if bias else {"bias": False}  # older versions of torch do not have it
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **newer)

    def _check_input_dim(self, input: Tensor) -> None:
        """Do nothing: the forward checks its input itself."""
