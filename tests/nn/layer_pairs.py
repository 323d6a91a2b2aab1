"""keelnorm's layers against torch.nn's: the pairs, the same step through both, and how results are compared."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import keelnorm as kn

#: (keelnorm's, torch's, the shape of an input with 5 channels)
PAIRS = (
    (kn.BatchNorm1d, nn.BatchNorm1d, (7, 5)),
    (kn.BatchNorm1d, nn.BatchNorm1d, (3, 5, 4)),
    (kn.BatchNorm2d, nn.BatchNorm2d, (3, 5, 4, 3)),
    (kn.BatchNorm3d, nn.BatchNorm3d, (2, 5, 3, 2, 3)),
)
PAIR_IDS = ("1d-rank2", "1d-rank3", "2d", "3d")
CHANNELS = 5

MOMENTS = ("running_mean", "running_var", "num_batches_tracked")


def randomize(layer: nn.Module) -> nn.Module:
    """Give weight, bias and running statistics values that no part of the formula leaves out unnoticed."""
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            if name.endswith("num_batches_tracked"):
                value.fill_(2)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2)
            else:
                value.normal_()
    return layer


def twin(layer: nn.Module, theirs: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """torch's layer in float64 with the state of ``layer``: the oracle."""
    oracle = theirs(*args, **kwargs).to(torch.float64)
    oracle.load_state_dict(copy.deepcopy(layer.state_dict()))
    return oracle.train(layer.training)


def assert_near(
    actual: Tensor, expected: Tensor, units: float = 16, scale: float = 1.0, computed_in: torch.dtype = torch.float64
) -> None:
    """Fail where ``actual`` is further from ``expected`` than ``units`` roundings of the values that were added up.

    A sum of terms of magnitude m, accumulated in a wider type or pairwise and rounded a few times, is off by a few
    units in the last place of m, however small the sum. ``scale`` is m where that exceeds the largest result;
    ``computed_in`` is the type of the sums where that is narrower than the result's.
    """
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    error = (actual.detach().double() - expected.detach().double()).abs().max().item()
    largest = max(expected.detach().double().abs().max().item(), scale)
    bound = units * max(torch.finfo(actual.dtype).eps, torch.finfo(computed_in).eps) * largest
    assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}"


def assert_same_moments(ours: nn.Module, theirs: nn.Module, **tolerance: Any) -> None:
    """Fail unless all buffers agree, the counters exactly."""
    expected = dict(theirs.named_buffers())
    found = dict(ours.named_buffers())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if value.is_floating_point():
            assert_near(value, expected[name], **tolerance)
        else:
            assert torch.equal(value, expected[name]), name


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return copy.deepcopy(module.state_dict())


def assert_untouched(module: nn.Module, before: dict[str, Tensor]) -> None:
    """Fail unless parameters and buffers are bit for bit what they were."""
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        if value.device.type != "meta":
            assert torch.equal(value, before[name]), name


def step(module: nn.Module, x: Tensor, dy: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """One forward and backward: the output, and the gradients of x and of all parameters, by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = module(x, *args, **kwargs)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def assert_same_step(ours: dict[str, Tensor], theirs: dict[str, Tensor], units: float = 32, **tolerance: Any) -> None:
    """Fail unless the results of two calls of :func:`step` agree."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value is None) == (theirs[name] is None), name
        if value is not None:
            assert_near(value, theirs[name], units, **tolerance)
