"""Train the weights and biases of batch norms for low entropy of the predictions (TENT)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from keelnorm.engine.error_messages import describe
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.surgery.observation.nested_tensors import main_output
from keelnorm.surgery.snapshot import training_only
from keelnorm.surgery.statistics.collect import RunBatch, StartPass, normalizing_with_batch

#: Makes an optimizer for a list of parameters.
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def minimize_entropy(
    model: nn.Module,
    targets: list[BatchNormBase],
    forward: RunBatch,
    start: StartPass,
    optimizer: bool | MakeOptimizer,
) -> None:
    """Train weights and biases for one step per batch, with layers normalizing with the batch.

    No other parameter changes or gets a gradient.

    Raises:
        ValueError: The layers have no weight and bias.
        TypeError: The model returns no logits.
    """
    trained = list(dict.fromkeys(p for layer in targets for p in (layer.weight, layer.bias) if p is not None))
    if not trained:
        raise ValueError(
            "adapt: entropy=True trains weights and biases, but the batch norms have none; leave entropy out"
        )
    make: MakeOptimizer = (lambda p: torch.optim.Adam(p, lr=1e-3)) if optimizer is True else optimizer  # type: ignore[assignment]
    steps = make(trained)
    with training_only(trained, model), normalizing_with_batch(targets), torch.enable_grad():
        for batch in start():
            steps.zero_grad()
            _entropy(_logits(forward(batch))).backward()
            steps.step()


def _entropy(logits: Tensor) -> Tensor:
    """The mean over samples of −Σ p·log p."""
    log = logits.log_softmax(1)
    return -(log.exp() * log).sum(1).mean()


def _logits(output: Any) -> Tensor:
    logits = main_output(output)
    if logits is None or logits.dim() < 2 or logits.shape[1] < 2:
        raise TypeError(
            "adapt: entropy needs logits (N, classes, *), returned alone, first in a tuple or as .logits; got "
            f"{describe(output)}. Pass forward=lambda model, batch: ... that returns the logits"
        )
    return logits
