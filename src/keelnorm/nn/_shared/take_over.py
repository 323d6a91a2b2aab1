"""How a layer takes the place of a plain batch normalization: options, values, checkpoints, place in the model."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from keelnorm.engine.activations import is_untouched
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.nn.batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

#: The layers that can be taken over: exact types, whose whole state is torch.nn's, and the ranks of their inputs.
_RANKS: dict[type, tuple[int, ...] | None] = {
    kind: kind._ranks for kind in (BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d)
}
_RANKS |= {torch.nn.BatchNorm1d: (2, 3), torch.nn.BatchNorm2d: (4,), torch.nn.BatchNorm3d: (5,)}


def options_of(what: str, bn: Any) -> dict[str, Any]:
    """Constructor arguments of a batch normalization, for the layer that takes its place.

    Args:
        what: What was called, the first words of an error.
        bn: One of torch.nn's or keelnorm's drop-in layers.

    Raises:
        TypeError: It is another layer, or has a hook, a forward or a ``too_few`` of its own.
    """
    if type(bn) not in _RANKS:
        raise TypeError(
            f"{what}: takes over torch.nn.BatchNorm1d/2d/3d and keelnorm's layers of the same names; got "
            f"{type(bn).__name__}, of which something would be lost. Put one of those in its place first"
        )
    if not is_untouched(bn.__dict__):
        raise TypeError(
            f"{what}: the {type(bn).__name__} has a hook or a forward of its own, which would be lost. Remove it "
            "first, and put it on the new layer"
        )
    if getattr(bn, "too_few", "error") != "error":
        raise TypeError(
            f"{what}: the {type(bn).__name__} has too_few={bn.too_few!r}, which would be lost; go without it by "
            "bn.set_too_few('error')"
        )
    of = next(chain(bn.parameters(), bn.buffers()), None)
    return {
        "num_features": bn.num_features,
        "eps": bn.eps,
        "momentum": bn.momentum,
        "affine": bn.affine,
        "track_running_stats": bn.track_running_stats,
        "device": None if of is None else of.device,
        "dtype": None if of is None else of.dtype,
    }


def adopt(layer: Any, bn: BatchNormBase) -> None:
    """Copy values, mode and legal ranks from a batch normalization to the layer that takes its place."""
    if bn.bias is None:
        layer.register_parameter("bias", None)
    layer.load_state_dict(bn.state_dict(), strict=False)
    for name, parameter in bn.named_parameters():
        getattr(layer, name).requires_grad_(parameter.requires_grad)
    layer.train(bn.training)
    layer._ranks = _RANKS[type(bn)]


def expand_rows(layer: Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Repeat the vectors of a plain batch norm's checkpoint for each row of a layer with a row per class or domain."""
    for name, own in chain(layer._parameters.items(), layer._buffers.items()):
        given = state_dict.get(prefix + name)
        if isinstance(own, Tensor) and isinstance(given, Tensor) and given.shape == own.shape[1:] and own.dim() > 0:
            state_dict[prefix + name] = given.repeat(len(own), *[1] * given.dim())
