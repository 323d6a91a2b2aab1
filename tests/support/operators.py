"""The operators of a back end with one signature: the native ones, and those of the reference module."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from keelnorm.engine.activations import NAMED, Activation
from keelnorm.engine.kernels import reference

OPERATORS = ("stats", "apply", "grad_stats", "grad_input", "invert")

#: What the operators take for an activation: code, a, b.
NONE = (0, 0.0, 0.0)
RELU = (1, 0.0, 0.0)


def activation_of(name: str | None) -> tuple[int, float, float]:
    """Code, a and b of an activation by its name."""
    return NAMED[name][1:]


def _reference_stats(x: Tensor, mask: Tensor | None = None) -> Tensor:
    found = reference.stats(x, mask)
    return torch.stack([found.mean, found.var])


def _with_activation(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    *others, code, a, b = arguments
    return *others, Activation("", code, a, b)


def _reference_apply(*arguments: Any) -> Tensor:
    return reference.apply(*_with_activation(arguments))


def _reference_grad_stats(*arguments: Any) -> Tensor:
    return torch.stack(reference.grad_stats(*_with_activation(arguments)))


def _reference_invert(y: Tensor, saved: Tensor, weight: Any, bias: Any, code: int, a: float, b: float) -> Tensor:
    return reference.invert(y, saved[0], saved[2], weight, bias, Activation("", code, a, b))


def _reference_grad_input(*arguments: Any) -> Tensor:
    *others, means, act = _with_activation(arguments)
    return reference.grad_input(*[*others, None if means is None else tuple(means), act])


def operators(kernel: str) -> SimpleNamespace:
    """stats(x, mask) -> (mean, var); apply(...) -> y; grad_stats(...) -> (Σg, Σg·xhat); grad_input(...) -> dx;
    invert(...) -> x.

    Two rows of C values stand for two vectors; arguments are those of the schemas in keelnorm/engine/ops.py.
    """
    if kernel == "reference":
        return SimpleNamespace(
            stats=_reference_stats,
            apply=_reference_apply,
            grad_stats=_reference_grad_stats,
            grad_input=_reference_grad_input,
            invert=_reference_invert,
        )
    return SimpleNamespace(**{name: getattr(torch.ops.keelnorm, name) for name in OPERATORS})
