"""Recomputed outputs, and code between a batch norm and the reader of its output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.saving import (
    Parts,
    assert_saving_changes_nothing,
    network,
)

import keelnorm as kn


def residual_changed(m: Parts, x: torch.Tensor) -> torch.Tensor:
    identity = m.conv(x)
    out = m.bn(m.conv(x)) + identity
    identity.mul_(0.5)  # an addition keeps nothing
    return m.last(F.relu(out)) + identity


def bias_changed(m: Parts, x: torch.Tensor) -> torch.Tensor:
    y = m.bn(m.conv(x))
    with torch.no_grad():
        m.bn.bias.add_(1)
    return m.last(F.silu(y))


def complex_view(m: Parts, x: torch.Tensor) -> torch.Tensor:
    z = torch.view_as_complex(m.bn(m.conv(x)).unflatten(3, (-1, 2)))
    return m.last(torch.view_as_real(z * z.conj() * z).flatten(3))


def negative_view(m: Parts, x: torch.Tensor) -> torch.Tensor:
    z = torch.view_as_complex(m.bn(m.conv(x)).unflatten(3, (-1, 2)))
    return m.last((z.conj().imag * z.conj().imag).repeat_interleave(2, 3))


def read_through_data(m: Parts, x: torch.Tensor) -> torch.Tensor:
    y = m.bn(m.conv(x), activation="relu")
    alias = y.data
    y.mul_(3)
    return m.last(alias)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("code", [residual_changed, bias_changed, complex_view, negative_view, read_through_data])
def test_code_between(code: Callable[..., torch.Tensor], training: bool) -> None:
    torch.manual_seed(0)
    model, _ = kn.convert(Parts(code))
    x = torch.randn(2, 3, 8, 8)
    model.train(training)
    for _ in range(3):
        model(x).sum().backward()
    assert_saving_changes_nothing(model, x)


def test_a_reader_that_changes_what_it_was_given_is_torchs_error() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(y)
            return y * y

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            (y,) = ctx.saved_tensors
            return y.mul_(2 * g)

    def code(m: Parts, x: torch.Tensor) -> torch.Tensor:
        y = m.bn(m.conv(x), activation="relu")
        read = m.last(y)
        return read + Square.apply(y)

    model, x = Parts(code), torch.randn(2, 3, 8, 8)
    for saves in (False, True):
        handle = kn.save_memory(model) if saves else None
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            model(x).sum().backward()
        if handle is not None:
            handle.undo()


def test_the_backward_takes_the_reference_where_the_forward_did() -> None:
    model, x = network("gelu"), torch.randn(2, 3, 8, 8)
    other = copy.deepcopy(model)
    with kn.kernels.use("reference"):
        expected = model(x)
        with kn.save_memory(other):
            found = other(x)
    expected.sum().backward()
    found.sum().backward()
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
