"""The arithmetic of folding: what becomes of a weight and a bias, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.surgery.folding.foldable_layers import is_transposed


class Affine(NamedTuple):
    """What a batch norm is in evaluation: x·scale + shift per channel; float64, shape (C,)."""

    scale: Tensor
    shift: Tensor


class Weights(NamedTuple):
    """Weight and bias of a convolution or linear layer, in float64."""

    weight: Tensor
    bias: Tensor | None


def affine_of(layer: _BatchNorm) -> Affine:
    """scale = γ / √(running_var + eps), shift = β − running_mean · scale."""
    assert layer.running_mean is not None and layer.running_var is not None
    scale = (layer.running_var.detach().double() + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.detach().double()
    shift = -layer.running_mean.detach().double() * scale
    if layer.bias is not None:
        shift = shift + layer.bias.detach().double()
    return Affine(scale, shift)


def weights_of(module: nn.Module) -> Weights:
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    return Weights(weight.detach().double(), None if bias is None else bias.detach().double())


def absorb_following(module: nn.Module, weights: Weights, affine: Affine) -> Weights:
    """The weights of a layer that does a batch norm *after* it too.

    (Wx + b)·scale + shift = (scale·W)x + (b·scale + shift), each output channel with its own scale.
    """
    grouped, shape = _by_groups(module, weights.weight), weights.weight.shape
    groups, kernel = grouped.shape[0], [1] * (grouped.dim() - 3)
    # (groups, in, out, *kernel) for transposed ones, (groups, out, in, *kernel) for the others
    spread = (groups, 1, -1, *kernel) if is_transposed(module) else (groups, -1, 1, *kernel)
    weight = (grouped * affine.scale.view(spread)).reshape(shape)
    bias = affine.shift if weights.bias is None else weights.bias * affine.scale + affine.shift
    return Weights(weight, bias)


def absorb_preceding(module: nn.Module, weights: Weights, affine: Affine) -> Weights:
    """The weights of a layer that does a batch norm *before* it too.

    W(x·scale + shift) + b = (W·scale)x + (b + W·shift), each input channel with its own scale; exact only where no
    position outside the input is taken for 0, unless the shift is 0.
    """
    grouped, shape = _by_groups(module, weights.weight), weights.weight.shape
    groups, kernel = grouped.shape[0], [1] * (grouped.dim() - 3)
    spread = (groups, -1, 1, *kernel) if is_transposed(module) else (groups, 1, -1, *kernel)
    weight = (grouped * affine.scale.view(spread)).reshape(shape)
    if not bool(affine.shift.any()):
        return Weights(weight, weights.bias)
    shift = (grouped * affine.shift.view(spread)).flatten(2).sum(2).flatten()  # of each output channel
    return Weights(weight, shift if weights.bias is None else weights.bias + shift)


def channels(module: nn.Module) -> tuple[int, int]:
    """How many channels a layer takes, and makes."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels  # type: ignore[return-value]


def rounded(weights: Weights, dtype: torch.dtype) -> Weights:
    """The weights as the layer will have them."""
    return Weights(weights.weight.to(dtype), None if weights.bias is None else weights.bias.to(dtype))


def _by_groups(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight with a first dimension more, that of the groups, whose channels come one after the other.

    torch.nn's are (out, in / groups, *kernel), and (in, out / groups, *kernel) where transposed.
    """
    groups = getattr(module, "groups", 1)
    return weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
