"""A converted model's first call, in which activations and additions run by themselves: nothing more is kept there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.saving import assert_same_bits, kept, outcome
from torch import Tensor, nn

import keelnorm as kn

STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda y, x: torch.relu(y),
    "relu in place": lambda y, x: F.relu(y, inplace=True),
    "method in place": lambda y, x: y.relu_(),
    "relu6": lambda y, x: F.relu6(y),
    "relu6 in place": lambda y, x: F.relu6(y, inplace=True),
    "silu": lambda y, x: F.silu(y),
    "silu in place": lambda y, x: F.silu(y, inplace=True),
    "hardswish in place": lambda y, x: F.hardswish(y, inplace=True),
    "leaky relu": lambda y, x: F.leaky_relu(y, 0.2),
    "leaky relu in place": lambda y, x: F.leaky_relu_(y, 0.2),
    "elu": lambda y, x: F.elu(y),
    "elu in place": lambda y, x: F.elu(y, inplace=True),
    "mish": lambda y, x: F.mish(y),
    "tanh": lambda y, x: torch.tanh(y),
    "sigmoid": lambda y, x: y.sigmoid(),
    "softplus": lambda y, x: F.softplus(y),
    "swish by hand": lambda y, x: y * torch.sigmoid(y),
    "addition": lambda y, x: y + x,
    "addition from the right": lambda y, x: x + y,
    "addition in place": lambda y, x: y.add_(x),
    "addition and relu": lambda y, x: torch.relu(y + x),
    "addition and relu in place": lambda y, x: F.relu(y.add_(x), inplace=True),
    "read twice": lambda y, x: torch.relu(y) + y,
}


class Written(nn.Module):
    """Blocks as code writes them: each result is read by a convolution and by the next block's addition."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.bns = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.step = [step]

    def forward(self, x: Tensor) -> Tensor:
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = self.step[0](bn(conv(x)), x)
        return F.avg_pool2d(x, 2)


def converted(step: str) -> nn.Module:
    torch.manual_seed(0)
    model, _ = kn.convert(Written(STEPS[step]))
    return model


@pytest.mark.parametrize("step", STEPS)
def test_the_same_bits(step: str) -> None:
    model, x = converted(step), torch.randn(2, 4, 8, 8)
    twin = copy.deepcopy(model)
    with kn.save_memory(twin):
        for _ in range(3):
            assert_same_bits(outcome(twin, x), outcome(model, x))


@pytest.mark.parametrize("step", [step for step in STEPS if step not in ("read twice", "mish")])
def test_the_first_call_keeps_what_later_ones_do(step: str) -> None:
    model, x = converted(step), torch.randn(2, 4, 16, 16)
    first = kept(model, x, 8)
    for _ in range(2):
        model(x).sum().backward()
    later = kept(model, x, 8)
    one = x.numel() * x.element_size()
    assert first == later, (first / one, later / one)


def test_a_second_backward_and_second_derivatives() -> None:
    model, x = converted("addition and relu in place"), torch.randn(2, 4, 8, 8, requires_grad=True)
    twin = copy.deepcopy(model)
    with kn.save_memory(twin):
        y = twin(x)
    theirs = model(x)
    for again in (True, True, False):
        [ours], [other] = (torch.autograd.grad(out.square().sum(), x, retain_graph=again) for out in (y, theirs))
        assert torch.equal(ours, other)
    twice: list[Any] = []
    for m in (copy.deepcopy(model), twin):
        out = m(x)
        [g] = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        twice.append(torch.autograd.grad(g.square().sum(), x)[0])
    torch.testing.assert_close(*twice)


def test_a_result_that_is_changed_afterwards() -> None:
    """torch raises, since relu needs its result; recomputed it is there, and the gradient is right."""
    model: Any = converted("relu")
    x = torch.randn(2, 4, 8, 8)
    model.step[0] = lambda y, x: torch.relu(y).add_(1)
    twin = copy.deepcopy(model)
    twin.step[0] = lambda y, x: torch.relu(y).add(1)
    with kn.save_memory(model):
        ours = outcome(model, x)
    assert_same_bits(ours, outcome(twin, x))
