"""Batch normalization whose variance has a lower bound."""

from __future__ import annotations

import torch
from torch import Tensor

from keelnorm.engine.activations import Activation
from keelnorm.moments import Moments
from keelnorm.nn._shared.normalize import normalize
from keelnorm.nn._shared.variant import Variant


class FloorBatchNorm(Variant):
    """Batch normalization that never divides by less than the root of ``floor``.

    Example:
        >>> FloorBatchNorm(1, floor=1.0)(torch.tensor([[0.0], [8.0]])).shape
        torch.Size([2, 1])
    """

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
        floor: float = 0.01,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.floor = floor

    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        moments = Moments.from_tensor(x)
        var = moments.var_or_zero.clamp(min=self.floor)
        y = normalize(x, moments.mean, var, self.weight, self.bias, self.eps, residual, act)
        self.update_running(moments)
        return y
