"""Below which |γ| a channel has no effect."""

from __future__ import annotations

import torch
from torch import Tensor


def dead_below(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """For each channel the |γ| up to which its normalized input is lost in rounding, of the weight's shape.

    The channel's output is γ·x̂ + β, where x̂ has variance 1. It is added to β, and in the next layer to outputs of
    about the root mean square of γ. With u the rounding unit of the layer's dtype, all of γ·x̂ is lost for

        |γ| ≤ u · max(|β|, √mean(γ²))
    """
    scale = weight.square().mean().sqrt().expand_as(weight)
    return torch.finfo(dtype).eps * (scale if bias is None else torch.maximum(scale, bias.abs()))
