"""Runs a problem with keelnorm and with torch and returns the same quantities."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import keelnorm as kn

from .cases import EPS, MOMENTUM, Problem

#: (problem, x, residual, running_mean, running_var, weight, bias) -> y
Run = Callable[..., Tensor]


def by_keelnorm(
    problem: Problem, x: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """One fused call."""
    options = problem.options
    return kn.functional.batch_norm(
        x, mean, var, weight, bias, options.training, MOMENTUM, EPS, activation=options.activation, residual=residual
    )


def by_torch(
    problem: Problem, x: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Batch norm, addition and activation by torch's functions."""
    y = F.batch_norm(x, mean, var, weight, bias, problem.options.training, MOMENTUM, EPS)
    if residual is not None:
        y = y + residual
    return y.relu() if problem.options.activation == "relu" else y


def run(problem: Problem, batch_norm: Run) -> dict[str, Tensor]:
    """Forward and backward; every quantity of definition.expect."""
    leaves = {"dx": problem.x, "dresidual": problem.residual, "dweight": problem.weight, "dbias": problem.bias}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    running_mean, running_var = problem.running_mean.clone(), problem.running_var.clone()
    y = batch_norm(
        problem, leaves["dx"], leaves.get("dresidual"), running_mean, running_var, leaves["dweight"], leaves["dbias"]
    )
    gradients = torch.autograd.grad(y, list(leaves.values()), problem.dy)
    found = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
    if problem.options.training:
        found |= {"running_mean": running_mean, "running_var": running_var}
    return found
