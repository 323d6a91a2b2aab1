"""Compare the results of a peer with the definition in float64, before it is timed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from keelnorm.bench import definition
from keelnorm.bench.definition import Quantity
from keelnorm.bench.peers import Built, Given
from keelnorm.bench.problem import EPS, MOMENTUM, Problem


class WrongResultError(ValueError):
    """The results are not those of batch normalization."""


def expect(problem: Problem, phase: str) -> dict[str, Quantity]:
    """Compute the right results of a phase: `training` or `inference`."""
    relu = problem.case.activation == "relu"
    if phase == "inference":
        return definition.inference(problem.x.detach(), problem.residual, problem.state, eps=EPS, relu=relu)
    return definition.training(
        problem.x.detach(),
        problem.residual,
        problem.dy,
        problem.state,
        eps=EPS,
        momentum=MOMENTUM,
        relu=relu,
    )


def allowed_eps(samples: int, dtype: torch.dtype = torch.float32) -> float:
    """The error a right peer may have, in units of the dtype's epsilon.

    The rounding error of a plain sum of M terms in the working precision is a random walk of sqrt(M)
    steps. An error beyond that, and a few roundings of the elementwise arithmetic, is a mistake. Half
    precision is computed in float32 and rounded once for each of batch norm, add and ReLU.

    Args:
        samples: M, the samples per channel.
        dtype: The dtype of the result.
    """
    working = 32.0 + math.sqrt(samples)
    if dtype.itemsize < 4:
        return 4.0 + working * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    return working


def check(problem: Problem, built: Built, phase: str, expected: dict[str, Quantity]) -> float:
    """Run one phase, compare all its results, and return the largest error.

    Args:
        problem: The tensors.
        built: The peer.
        phase: `training` or `inference`.
        expected: What `expect` gave.

    Returns:
        The error in units of the dtype's epsilon, relative to each result's magnitude.

    Raises:
        WrongResultError: a result has another shape or dtype, or differs by more than rounding.
    """
    found = _run(problem, built, phase)
    worst = 0.0
    for name, quantity in expected.items():
        actual = found[name]
        dtype = problem.x.dtype if actual.dim() > 1 else problem.state["weight"].dtype
        if actual.shape != quantity.value.shape or actual.dtype != dtype:
            came = f"{tuple(actual.shape)} {actual.dtype}"
            wanted = f"{tuple(quantity.value.shape)} {dtype}"
            raise WrongResultError(f"{name} is {came}, should be {wanted}")
        limit = allowed_eps(problem.samples, dtype)
        if name in ("dweight", "dbias"):  # torch rounds some of them to the dtype of x in between
            rounding = torch.finfo(problem.x.dtype).eps / torch.finfo(dtype).eps
            limit = max(limit, allowed_eps(problem.samples, problem.x.dtype) * rounding)
        error = _error_eps(actual, quantity)
        if not error <= limit:  # NaN fails too
            raise WrongResultError(f"{name} is off by {error:.3g} eps, allowed {limit:.3g}")
        worst = max(worst, error)
    return worst


def _run(problem: Problem, built: Built, phase: str) -> dict[str, Tensor]:
    norm = built.norm
    if norm is None:
        raise TypeError("a peer with is_batch_norm must give its module")
    norm.load_state_dict(problem.state)
    norm.train(phase == "training")
    given = built.given or Given(problem.x, problem.residual, problem.dy)
    if phase == "inference":
        with torch.no_grad():
            residual = None if given.residual is None else given.residual.detach()
            return {"y": _dense(built.call(given.x.detach(), residual))}
    y = built.call(given.x, given.residual)
    names, inputs = gradient_inputs(problem, built)
    gradients = torch.autograd.grad(y, inputs, given.dy)
    found = dict(zip(names, map(_dense, gradients), strict=True))
    buffers = dict(norm.named_buffers())
    return found | {
        "y": _dense(y.detach()),
        "running_mean": buffers["running_mean"],
        "running_var": buffers["running_var"],
    }


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def gradient_inputs(problem: Problem, built: Built) -> tuple[list[str], list[Tensor]]:
    """The inputs of a peer that its backward computes gradients for, with the names of the gradients."""
    given = built.given or Given(problem.x, problem.residual, problem.dy)
    pairs: list[tuple[str, Tensor]] = [("dx", given.x)]
    if built.norm is not None:
        parameters = dict(built.norm.named_parameters())
        pairs += [("dweight", parameters["weight"]), ("dbias", parameters["bias"])]
        if given.residual is not None:
            pairs.append(("dresidual", given.residual))
    names, inputs = zip(*pairs, strict=True)
    return list(names), list(inputs)


def _error_eps(actual: Tensor, quantity: Quantity) -> float:
    if actual.numel() == 0:
        return 0.0
    error = (actual - quantity.value).abs_()
    if error.dim() > 1:
        error = error.amax((0, *range(2, error.dim())))
    epsilon, smallest = torch.finfo(actual.dtype).eps, torch.finfo(actual.dtype).tiny
    return float((error / (epsilon * quantity.scale).clamp_min(smallest)).amax())
