"""Check a fold: how far the outputs of a folded layer or model differ from the unfolded one's."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.surgery.folding.fold_sites import Site, run_again
from keelnorm.surgery.folding.fold_weights import Weights
from keelnorm.surgery.known_layers import modules_after


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest difference of a layer, relative to the largest value of its output, that counts as rounding.

    A weight rounded to nearest is off by at most eps/2 of itself, and an output by at most eps/2 · Σ|w·x|. 16·eps
    allows that sum to be 32 times the output's largest value. If it is larger, digits cancel, as in a channel whose
    mean is much larger than its standard deviation.
    """
    return 1e-10 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps


def layer_difference(
    norm: BatchNormBase, site: Site, x: Tensor, before: Weights, after: Weights, is_producer: bool
) -> float:
    """The largest difference that folding makes to a pair's output, relative to the output's largest value.

    Args:
        norm: The batch norm.
        site: The layer that it is folded into.
        x: The input of the first of the two.
        before: The layer's weights without the batch norm.
        after: The layer's weights with the batch norm folded in, rounded.
        is_producer: Whether the layer comes first.
    """
    old, new = _twin(site, before), _twin(site, after)
    normalize = copy.deepcopy(norm).double()
    after_norm = copy.deepcopy(modules_after(norm)).double()
    args = site.call.args[1:]
    kwargs = {name: value for name, value in site.call.kwargs.items() if name != "input"}
    x = x.detach().double()
    with torch.no_grad():
        if is_producer:
            expected = normalize(run_between(site, old(x, *args, **kwargs)))
            found = after_norm(run_between(site, new(x, *args, **kwargs)))
        else:
            expected = old(run_between(site, normalize(x)))
            found = new(run_between(site, x))
    return difference([expected], [found])


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest difference between floating-point tensors, each relative to its largest finite value.

    Values that are NaN, or the same infinity, in both do not differ; in one alone they make the difference infinite.
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
        relative = torch.where(same, 0, (a - b).abs()).max() / scale
        largest = max(largest, float(relative.nan_to_num(nan=torch.inf)))
    return largest


def _twin(site: Site, weights: Weights) -> nn.Module:
    """A copy of the layer in float64, with these weights."""
    twin = copy.deepcopy(site.call.module)
    twin.weight = nn.Parameter(weights.weight.double())
    twin.bias = None if weights.bias is None else nn.Parameter(weights.bias.double())  # type: ignore[assignment]
    return twin


def run_between(site: Site, x: Tensor) -> Tensor:
    """Run the functions between the batch norm and the layer on x."""
    for call in site.chain:
        x = run_again(call, x)
    return x
