"""Outputs that are recomputed in the backward: the same bits, fewer bytes, and torch's own errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.forcing import KERNELS, require_kernel
from support.saving import (
    Block,
    assert_same_bits,
    assert_saving_changes_nothing,
    kept,
    network,
    outcome,
    unfused,
)
from torch import nn

import keelnorm as kn
from keelnorm.engine.activations import NAMED


@pytest.mark.parametrize("longest", [1, 2, 8])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [network, unfused], ids=["arguments", "converted"])
def test_the_same_bits(make: Callable[[], nn.Module], training: bool, longest: int) -> None:
    model = make().train(training)
    assert_saving_changes_nothing(model, torch.randn(2, 3, 8, 8), longest)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_back_end(kernel: str) -> None:
    require_kernel(kernel)
    with kn.kernels.use(kernel):
        assert_saving_changes_nothing(network(), torch.randn(2, 3, 9, 7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_dtypes_and_layouts(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    model = network().to(dtype).to(memory_format=memory_format)
    x = torch.randn(2, 3, 8, 8, dtype=dtype).to(memory_format=memory_format)
    assert_saving_changes_nothing(model, x)


@pytest.mark.parametrize("activation", [name for name in NAMED if name])
def test_every_activation(activation: str) -> None:
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), Block(activation), nn.Conv2d(4, 2, 1))
    assert_saving_changes_nothing(layer, torch.randn(2, 3, 8, 8))


def test_what_is_kept() -> None:
    """A chain of residual blocks keeps the inputs of its batch norms alone; a short chain some outputs too."""
    model, x = network(blocks=6), torch.randn(2, 3, 18, 18)
    one = 2 * 4 * 16 * 16 * 4
    without, short, long = kept(model, x, 0), kept(model, x, 1), kept(model, x, 16)
    assert without > short > long
    # 12 inputs of batch norms and the first convolution's output; statistics and the pooling's input are small.
    assert 13 * one <= long <= 13 * one + one // 2


def test_an_output_is_computed_once_for_several_readers() -> None:
    conv, bn = nn.Conv2d(3, 4, 3), kn.BatchNorm2d(4)
    readers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))

    class Several(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = bn(conv(x), activation="silu")
            return sum(reader(y) for reader in readers)

    model = Several()
    model.parts = nn.ModuleList([conv, bn, readers])
    with kn.save_memory(model):
        y = model(torch.randn(2, 3, 8, 8))
        before = kn.kernels.calls()
        y.sum().backward()
    after = kn.kernels.calls()
    assert sum(after.values()) - sum(before.values()) == 2  # the output again, and the batch norm's backward


def test_retained_graphs_and_several_backwards() -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    other = copy.deepcopy(model)
    expected = model(x)
    with kn.save_memory(other):
        found = other(x)
    for _ in range(3):
        for y in (expected, found):
            y.sum().backward(retain_graph=True)
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_double_backward() -> None:
    model = network("silu").double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    other = copy.deepcopy(model)
    found = []
    for each, saves in ((model, False), (other, True)):
        handle = kn.save_memory(each) if saves else None
        given = x.clone().requires_grad_()
        y = each(given)
        (g,) = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        g.square().sum().backward()
        found.append([given.grad, *(p.grad for p in each.parameters())])
        if handle is not None:
            handle.undo()
    assert_same_bits(found[1], found[0])


def test_an_output_that_is_changed_in_place_is_kept_as_it_is() -> None:
    conv, bn, last = nn.Conv2d(3, 4, 3), kn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([conv, bn, last])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            conv, bn, last = self.parts
            y = bn(conv(x), activation="relu")
            y.mul_(3)
            return last(y)

    assert_saving_changes_nothing(Changing(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("what", ["input", "weight"])
def test_what_was_changed_before_the_backward_is_torchs_error(what: str) -> None:
    conv, bn, last = nn.Conv2d(3, 4, 3), kn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    seen: list[torch.Tensor] = []

    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([conv, bn, last])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(conv(x))
            return last(bn(seen[-1], activation="relu"))

    model = Seeing()
    with kn.save_memory(model):
        y = model(torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        (seen[0] if what == "input" else last.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_views_of_an_output() -> None:
    conv, bn, last = nn.Conv2d(3, 4, 3), kn.BatchNorm2d(4), nn.Linear(4 * 36, 2)

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([conv, bn, last])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            conv, bn, last = self.parts
            return last(bn(conv(x), activation="gelu").flatten(1))

    model = Flat()
    assert_saving_changes_nothing(model, torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert kept(model, x, 4) == kept(model, x, 0) - 2 * 4 * 36 * 4


def test_variants_and_masks() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.ghost = nn.Conv1d(3, 4, 1), kn.BatchNorm1d(4), kn.GhostBatchNorm(4, 2)
            self.last = nn.Conv1d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = kn.functional.length_mask(torch.tensor([3, 5, 1, 5]), 5)
            return self.last(self.ghost(self.bn(self.conv(x), mask=mask, activation="relu"), activation="relu"))

    assert_saving_changes_nothing(Masked(), torch.randn(4, 3, 5))


def test_frozen_layers() -> None:
    model = network()
    kn.freeze(model)
    assert_saving_changes_nothing(model, torch.randn(2, 3, 8, 8))


def test_autocast() -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    other = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = outcome(model, x)
        with kn.save_memory(other):
            assert_same_bits(outcome(other, x), expected)


@pytest.mark.parametrize("longest", [0, -1, 65, 1.5, True, "4", None, 10**30])
def test_a_wrong_longest(longest: Any) -> None:
    model = network()
    with pytest.raises(ValueError, match="save_memory: longest is an integer from 1 to 64; got"):
        kn.save_memory(model, longest=longest)
    assert not model._forward_hooks


def test_a_wrong_model() -> None:
    with pytest.raises(TypeError, match="save_memory"):
        kn.save_memory([network()])


def test_in_place_layers() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
            self.bn1, self.bn2 = kn.BatchNorm2d(4), kn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.bn1(self.conv1(x), activation="leaky_relu", inplace=True)
            return self.conv3(F.relu_(self.bn2(self.conv2(y), activation=None)))

    assert_saving_changes_nothing(InPlace(), torch.randn(2, 3, 8, 8))


def test_layers_without_weight_or_statistics() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), kn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 1),
        kn.BatchNorm2d(4, track_running_stats=False, bias=False), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    assert_saving_changes_nothing(model, torch.randn(2, 3, 8, 8))
    assert_saving_changes_nothing(model.eval(), torch.randn(2, 3, 8, 8))
