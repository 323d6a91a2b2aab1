"""A variant's layer in a state worth testing, one step of it, and how two steps are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from variants.variant import Variant


def layer_of(
    variant: Variant, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, steps: int = 2, **keywords: Any
) -> torch.nn.Module:
    """The variant's layer with parameters and running statistics that are not the initial ones.

    Args:
        steps: Training steps that it has behind it, so that a variant that remembers has something to remember.
    """
    layer = variant.make(shape[1], **keywords).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if layer.running_mean is not None:
            layer.running_mean.normal_(std=0.3)
            layer.running_var.uniform_(0.5, 2)
    for _ in range(steps):
        x = torch.randn(shape, dtype=dtype)
        run(layer, x, **variant.keywords(x))
    layer.zero_grad()
    return layer


@dataclass
class Outcome:
    """What a step gives: the output and every gradient by name, and the buffers after it."""

    y: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Tensor]:
        """The output and the gradients."""
        return {"y": self.y, **self.gradients}


def run(
    layer: torch.nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    call: Callable[..., Tensor] | None = None,
    **keywords: Any,
) -> Outcome:
    """A forward and a backward.

    Args:
        layer: Whose parameters and buffers are meant.
        call: What is called in the layer's place: a wrapper of it, or the oracle.
    """
    x = x.detach().requires_grad_()
    leaves = {"grad x": x} | {f"grad {name}": value for name, value in layer.named_parameters()}
    if residual is not None:
        keywords["residual"] = leaves["grad residual"] = residual.detach().requires_grad_()
    y = (layer if call is None else call)(x, **keywords)
    # A checkpoint may only run within a backward of all leaves, so not by torch.autograd.grad.
    for leaf in leaves.values():
        leaf.grad = None
    y.backward(gradient_for(y))
    gradients = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for name, leaf in leaves.items()
    }
    return Outcome(y.detach(), gradients, buffers_of(layer))


def gradient_for(y: Tensor) -> Tensor:
    """The same for every output of a shape, and exact in every dtype."""
    generator = torch.Generator().manual_seed(y.numel())
    return torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype)


def buffers_of(layer: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers, those that are not in the state_dict included."""
    return {name: buffer.detach().clone() for name, buffer in layer.named_buffers()}


def expected_of(variant: Variant, layer: torch.nn.Module, x: Tensor, **keywords: Any) -> Outcome:
    """The oracle's output and gradients in float64, for the layer as it is now."""
    twin = copy.deepcopy(layer).double()
    return run(twin, x.double(), call=lambda x, **keywords: variant.oracle(twin, x, **keywords), **keywords)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Fail unless all agree: to the bit, or within ``tolerance`` of each tensor's largest value (at least of 1)."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        other = expected[name]
        assert value.shape == other.shape, f"{name}: {tuple(value.shape)}, expected {tuple(other.shape)}"
        if tolerance == 0:
            assert value.dtype == other.dtype, name
            assert torch.equal(value, other), f"{name} differs"
            continue
        value, other = value.detach().double(), other.detach().double()
        if value.numel() == 0:
            continue
        error = (value - other).abs().max().item()
        allowed = tolerance * max(other.abs().max().item(), 1.0)
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"  # NaN fails too


def assert_same(found: Outcome, expected: Outcome, tolerance: float = 0.0) -> None:
    """Fail unless outputs, gradients and buffers agree, as :func:`assert_close` says."""
    assert_close(found.values, expected.values, tolerance)
    assert_close(found.buffers, expected.buffers, tolerance)
