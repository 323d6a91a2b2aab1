"""The four operators of a back end with one signature: the native ones, and those of the reference module."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from evenkeel.kernels import reference

OPERATORS = ("stats", "apply", "grad_stats", "grad_input")


def _reference_stats(x: Tensor) -> Tensor:
    found = reference.stats(x)
    return torch.stack([found.mean, found.var])


def _reference_grad_stats(*arguments: Any) -> Tensor:
    return torch.stack(reference.grad_stats(*arguments))


def _reference_grad_input(*arguments: Any) -> Tensor:
    *others, means, activation = arguments
    return reference.grad_input(*others, None if means is None else tuple(means), activation)


def operators(kernel: str) -> SimpleNamespace:
    """stats(x) -> (mean, var); apply(...) -> y; grad_stats(...) -> (Σg, Σg·xhat); grad_input(...) -> dx.

    Two rows of C values stand for two vectors; arguments are those of the schemas in evenkeel/ops.py.
    """
    if kernel == "reference":
        return SimpleNamespace(
            stats=_reference_stats,
            apply=reference.apply,
            grad_stats=_reference_grad_stats,
            grad_input=_reference_grad_input,
        )
    return SimpleNamespace(**{name: getattr(torch.ops.evenkeel, name) for name in OPERATORS})
