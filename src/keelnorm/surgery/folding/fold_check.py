"""How far the folded is from the unfolded: layer by layer, and for the whole model."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.surgery.folding.fold_sites import Site, again
from keelnorm.surgery.folding.fold_weights import Weights
from keelnorm.surgery.known_layers import rest_of


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest difference of a layer, relative to the largest value of its output, that is taken for rounding.

    A weight that is rounded to nearest is off by eps/2 of itself, so an output by at most eps/2 · Σ|w·x|. 16·eps lets
    that sum be 32 times the output's largest value: beyond, digits are lost by cancellation, as in a channel whose mean
    is very large against its deviation.
    """
    return 1e-10 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps


def layer_difference(
    norm: _BatchNorm, site: Site, x: Tensor, before: Weights, after: Weights, is_producer: bool
) -> float:
    """The largest difference that folding makes to a pair's output, relative to the output's largest value.

    Args:
        norm: The batch norm.
        site: The layer that takes it in.
        x: What enters the first of the two.
        before, after: The layer's weights without and with the batch norm, the latter as they are rounded.
        is_producer: Whether the layer comes first.
    """
    old, new = _twin(site, before), _twin(site, after)
    normalize = copy.deepcopy(norm).double()
    behind = copy.deepcopy(rest_of(norm)).double()
    rest = site.call.args[1:], site.call.kwargs
    kwargs = {name: value for name, value in rest[1].items() if name != "input"}
    x = x.detach().double()
    with torch.no_grad():
        if is_producer:
            expected = normalize(along(site, old(x, *rest[0], **kwargs)))
            found = behind(along(site, new(x, *rest[0], **kwargs)))
        else:
            expected = old(along(site, normalize(x)))
            found = new(along(site, x))
    return difference([expected], [found])


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest difference between floating-point tensors, each relative to its largest finite value.

    What is NaN or infinite in both in the same way does not differ; what is in one of them makes it infinite.
    """
    largest = 0.0
    for a, b in zip(expected, found, strict=True):
        if not (a.is_floating_point() or a.is_complex()) or a.numel() == 0:
            continue
        if a.shape != b.shape:
            return torch.inf
        wide = torch.complex128 if a.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        same = (a == b) | (a.isnan() & b.isnan())
        if bool(same.all()):
            continue
        scale = torch.where(a.isfinite(), a, 0).abs().max()
        off = torch.where(same, 0, (a - b).abs()).max() / scale
        largest = max(largest, float(off.nan_to_num(nan=torch.inf)))
    return largest


def _twin(site: Site, weights: Weights) -> nn.Module:
    """A copy of the layer in float64, with these weights."""
    twin = copy.deepcopy(site.call.module)
    twin.weight = nn.Parameter(weights.weight.double())
    twin.bias = None if weights.bias is None else nn.Parameter(weights.bias.double())  # type: ignore[assignment]
    return twin


def along(site: Site, x: Tensor) -> Tensor:
    for call in site.chain:
        x = again(call, x)
    return x
