"""Below which |γ| a channel has no effect."""

from __future__ import annotations

import torch
from torch import Tensor

from keelnorm.doctor.evidence.layers import LayerFacts


def dead_below(layer: LayerFacts) -> Tensor:
    """For each channel the |γ| up to which its normalized input is lost in rounding, (C,).

    The channel's output is γ·x̂ + β, where x̂ has variance 1. It is added to β, and in the next layer to outputs of
    about the root mean square of γ. With u the rounding unit of the layer's dtype, all of γ·x̂ is lost for

        |γ| ≤ u · max(|β|, √mean(γ²))
    """
    weight = layer.weight
    assert weight is not None
    unit = max(torch.finfo(dtype).eps for name, dtype in layer.dtypes.items() if dtype.is_floating_point)
    scale = weight.square().mean().sqrt().expand_as(weight)
    return unit * (scale if layer.bias is None else torch.maximum(scale, layer.bias.abs()))
