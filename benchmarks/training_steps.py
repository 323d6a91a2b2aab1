"""Training steps of any network, whatever its outputs are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from keelnorm.surgery.observation.nested_tensors import tensors_in


def outputs_and_loss(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Run a forward; the outputs that have a gradient, and the sum of their mean squares."""
    outputs = [y for y in tensors_in(model(x)) if y.requires_grad]
    return outputs, sum((y.square().mean() for y in outputs), torch.zeros((), dtype=x.dtype))


def gradient_step(model: nn.Module, x: Tensor) -> Callable[[], Sequence[Tensor | None]]:
    """A step without an optimizer: forward, loss, and backward to the gradients of all parameters."""
    parameters = list(model.parameters())

    def step() -> Sequence[Tensor | None]:
        _, loss = outputs_and_loss(model, x)
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return step
