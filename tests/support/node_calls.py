"""Calls that autograd's node in C++ runs, and the same calls by Python's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import keelnorm as kn
from keelnorm.engine.kernels.cpu import autograd_node


class Seen(TorchFunctionMode):
    """Sees each call of a function of torch, as modes of the user's and of keelnorm's own control do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Yield, for each call that reaches the node, whether it took the call."""
    taken: list[bool] = []
    run = autograd_node.run
    assert run is not None

    def noted(*arguments: Any) -> Any:
        y = run(*arguments)
        taken.append(y is not NotImplemented)
        return y

    with monkeypatch.context() as patch:
        patch.setattr(autograd_node, "run", noted)
        yield taken


@contextmanager
def in_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(autograd_node, "run", None)
        yield


def layer_for(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    layer = kn.BatchNorm(shape[1], **options).to(dtype)
    if layer.affine:
        nn.init.normal_(layer.weight)
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    layer(torch.randn(shape).to(dtype))
    return layer


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    wanted = [t for t in inputs if t.requires_grad]
    return list(torch.autograd.grad(y, wanted, dy, retain_graph=True)) if wanted else []


def everything(layer: nn.Module, x: Tensor, residual: Tensor | None, activation: Any) -> list[Any]:
    """The result, gradients and state of a call of a copy of the layer."""
    layer = copy.deepcopy(layer)
    y = layer(x, residual, activation=activation)
    inputs = [t for t in (x, residual, layer.weight, layer.bias) if t is not None]
    found = [y.detach(), *gradients(y, inputs)] if y.requires_grad else [y]
    return [*found, *(b for b in layer.buffers()), layer.update_counts()]


def same(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert a.stride() == b.stride()
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
