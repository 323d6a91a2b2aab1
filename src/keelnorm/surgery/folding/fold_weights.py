"""Compute the new weight and bias of a layer that a batch norm is folded into, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.surgery.folding.foldable_layers import is_transposed


class Affine(NamedTuple):
    """A batch norm in evaluation: x·scale + shift per channel, both float64 of shape (C,)."""

    scale: Tensor
    shift: Tensor


class Weights(NamedTuple):
    """Weight and bias of a convolution or linear layer, in float64."""

    weight: Tensor
    bias: Tensor | None


def affine_of(layer: BatchNormBase) -> Affine:
    """Compute scale = γ / √(running_var + eps) and shift = β − running_mean · scale."""
    assert layer.running_mean is not None and layer.running_var is not None
    scale = (layer.running_var.detach().double() + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.detach().double()
    shift = -layer.running_mean.detach().double() * scale
    if layer.bias is not None:
        shift = shift + layer.bias.detach().double()
    return Affine(scale, shift)


def weights_of(module: nn.Module) -> Weights:
    """The weight and bias that a layer has, in float64."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    return Weights(weight.detach().double(), None if bias is None else bias.detach().double())


def absorb_following(module: nn.Module, weights: Weights, affine: Affine) -> Weights:
    """The weights of a layer with the batch norm *after* it folded in.

    (Wx + b)·scale + shift = (scale·W)x + (b·scale + shift), with a scale for each output channel.
    """
    grouped, shape = _by_groups(module, weights.weight), weights.weight.shape
    groups, kernel = grouped.shape[0], [1] * (grouped.dim() - 3)
    # (groups, in, out, *kernel) for transposed convolutions, (groups, out, in, *kernel) otherwise
    spread = (groups, 1, -1, *kernel) if is_transposed(module) else (groups, -1, 1, *kernel)
    weight = (grouped * affine.scale.view(spread)).reshape(shape)
    bias = affine.shift if weights.bias is None else weights.bias * affine.scale + affine.shift
    return Weights(weight, bias)


def absorb_preceding(module: nn.Module, weights: Weights, affine: Affine) -> Weights:
    """The weights of a layer with the batch norm *before* it folded in.

    W(x·scale + shift) + b = (W·scale)x + (b + W·shift), with a scale for each input channel; exact only if the layer
    does not pad with zeros, or the shift is 0.
    """
    grouped, shape = _by_groups(module, weights.weight), weights.weight.shape
    groups, kernel = grouped.shape[0], [1] * (grouped.dim() - 3)
    spread = (groups, -1, 1, *kernel) if is_transposed(module) else (groups, 1, -1, *kernel)
    weight = (grouped * affine.scale.view(spread)).reshape(shape)
    if not bool(affine.shift.any()):
        return Weights(weight, weights.bias)
    shift = (grouped * affine.shift.view(spread)).flatten(2).sum(2).flatten()  # one per output channel
    return Weights(weight, shift if weights.bias is None else weights.bias + shift)


def channels(module: nn.Module) -> tuple[int, int]:
    """The number of a layer's input channels, and of its output channels."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels  # type: ignore[return-value]


def rounded(weights: Weights, dtype: torch.dtype) -> Weights:
    """The weights rounded to the layer's dtype."""
    return Weights(weights.weight.to(dtype), None if weights.bias is None else weights.bias.to(dtype))


def _by_groups(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight with the groups as an additional first dimension.

    torch.nn's weights are (out, in / groups, *kernel), and (in, out / groups, *kernel) if transposed.
    """
    groups = getattr(module, "groups", 1)
    return weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
