"""Entropy minimization over the weights and biases of batch norms (TENT)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.engine.error_messages import describe
from keelnorm.surgery.statistics.collect import Begin, by_the_batch

#: Makes an optimizer of a list of parameters.
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def minimize_entropy(
    model: nn.Module,
    targets: list[_BatchNorm],
    call: Callable[[Any], Any],
    begin: Begin,
    optimizer: bool | MakeOptimizer,
) -> None:
    """One step for each batch, the layers normalizing with its moments; no other parameter changes or gets a gradient.

    Raises:
        ValueError: the layers have no weight and bias.
        TypeError: the model returns no logits.
    """
    trained = list(dict.fromkeys(p for layer in targets for p in (layer.weight, layer.bias) if p is not None))
    if not trained:
        raise ValueError("adapt: entropy trains weights and biases, and the batch norms have none; leave entropy out")
    make: MakeOptimizer = (lambda p: torch.optim.Adam(p, lr=1e-3)) if optimizer is True else optimizer  # type: ignore[assignment]
    steps = make(trained)
    with ExitStack() as stack, by_the_batch(targets), torch.enable_grad():
        for parameter in model.parameters():
            stack.callback(_restore, parameter, parameter.requires_grad, parameter.grad)
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        for batch in begin():
            steps.zero_grad()
            _entropy(_logits(call(batch))).backward()  # type: ignore[no-untyped-call]
            steps.step()


def _entropy(logits: Tensor) -> Tensor:
    """The mean over samples of −Σ p·log p."""
    log = logits.log_softmax(1)
    return -(log.exp() * log).sum(1).mean()


def _logits(output: Any) -> Tensor:
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[1] < 2:
        raise TypeError(
            "adapt: entropy needs logits (N, classes, *), returned alone, first in a tuple or as .logits; got "
            f"{describe(output)}. Give forward=lambda model, batch: ..., which returns them"
        )
    return output


def _restore(parameter: nn.Parameter, requires_grad: bool, grad: Tensor | None) -> None:
    parameter.requires_grad_(requires_grad)
    parameter.grad = grad
