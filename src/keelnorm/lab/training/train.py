"""Training a stack: gradient descent, a learning rate for each replica, evaluated along the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import keelnorm as kn
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.lab.data import Split
from keelnorm.lab.training.stacks import Stack

Probe = Callable[[int, Stack], None]
"""Called with the number of steps taken and the stack."""
CHUNK = 1000
"""Samples that are evaluated at a time."""


@dataclass
class History:
    """What was seen while training R replicas; every list runs over `steps`, then over replicas.

    `loss` is the mean training loss since the evaluation before (empty at step 0). `test_batch` is the accuracy with
    the test batch's own moments in place of running statistics, which start at (0, 1) and lag early in training.
    """

    steps: list[int] = field(default_factory=list)
    loss: list[list[float | None]] = field(default_factory=list)
    validation: list[list[float | None]] = field(default_factory=list)
    test: list[list[float | None]] = field(default_factory=list)
    test_batch: list[list[float | None]] = field(default_factory=list)


def batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches of indices: epochs in random order, the remainder of an epoch left out."""
    if not 0 < size <= count:
        raise ValueError(f"a batch of {size} can't be drawn from {count} samples")
    taken, order = count, torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if taken + size > count:
            order, taken = torch.randperm(count, generator=generator), 0
        yield order[taken : taken + size]
        taken += size


def losses(stack: Stack, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of each replica, (R,)."""
    logits: Tensor = stack(x)
    each = F.cross_entropy(logits.flatten(0, 1), y.repeat(stack.replicas), reduction="none")
    return each.view(stack.replicas, -1).mean(dim=1)


def correct(stack: Stack, x: Tensor, y: Tensor, chunk: int = CHUNK) -> Tensor:
    """Whether each replica classifies each sample correctly, (R, n), in the stack's present mode.

    A replica that has diverged gives NaN for every class, and scores what a constant answer scores. `chunk` samples go
    through at a time: in training mode it is the batch whose moments normalize.
    """
    parts = [
        stack(samples).argmax(dim=2) == labels for samples, labels in zip(x.split(chunk), y.split(chunk), strict=True)
    ]
    return torch.cat(parts, dim=1)


@dataclass
class Descent:
    """Gradient descent on a stack, each replica with its own rates: SGD as in `torch.optim.SGD`.

    Args:
        rates: (R,), the learning rates.
        momentum: (R,) or one for all; 0 without.
        weight_decay: (R,) or one for all, added to the gradient (L2); of the weights alone, or of γ and β with them
            where `decay_affine`.
    """

    rates: Tensor
    momentum: Tensor | float = 0.0
    weight_decay: Tensor | float = 0.0
    decay_affine: bool = False
    _velocity: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, stack: Stack) -> None:
        """One step with the gradients that are there; clears them."""
        weights = set(stack.weights)
        for parameter in stack.parameters():
            if parameter.grad is None:
                continue
            rows = parameter.view(stack.replicas, -1)
            move = parameter.grad.view_as(rows)
            decays = self.decay_affine or parameter in weights
            if decays and _used(self.weight_decay):
                move = move + _column(self.weight_decay) * rows
            if _used(self.momentum):
                before = self._velocity.get(parameter)
                move = move.clone() if before is None else before * _column(self.momentum) + move
                self._velocity[parameter] = move
            rows.addcmul_(move, self.rates.view(-1, 1), value=-1.0)
            parameter.grad = None


def _used(amount: Tensor | float) -> bool:
    return isinstance(amount, Tensor) or amount != 0.0


def _column(amount: Tensor | float) -> Tensor | float:
    return amount.view(-1, 1) if isinstance(amount, Tensor) else amount


def statistics_paused(stack: Stack) -> AbstractContextManager[object]:
    """Update no running statistics inside the block; arms without batch norm have none."""
    has_some = any(isinstance(module, BatchNormBase) for module in stack.modules())
    return kn.pause_statistics(stack) if has_some else nullcontext()


@contextmanager
def batch_moments(model: nn.Module) -> Iterator[None]:
    """Normalize with the batch's moments inside the block, without gradients; the model is left as it was.

    Works for any normalization that keeps its state in buffers: they are put back on the way out.
    """
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    mode = model.training
    model.train()
    try:
        with torch.no_grad():
            yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)
        model.train(mode)


def rounded(values: Tensor, digits: int) -> list[float | None]:
    """Rounded numbers for the store; None for those that are not finite, as the loss of a run that diverged."""
    rounded = (round(value, digits) for value in values.double().tolist())
    return [value if math.isfinite(value) else None for value in rounded]


@torch.no_grad()
def _evaluate(stack: Stack, split: Split, history: History) -> None:
    x = torch.cat([split.validation_x, split.test_x])
    y = torch.cat([split.validation_y, split.test_y])
    stack.eval()
    validation, test = correct(stack, x, y).split([len(split.validation_y), len(split.test_y)], dim=1)
    stack.train()
    history.validation.append(percent(validation))
    history.test.append(percent(test))
    if next(stack.buffers(), None) is None:  # nothing depends on the batch
        history.test_batch.append(history.test[-1])
        return
    with batch_moments(stack):
        history.test_batch.append(percent(correct(stack, split.test_x, split.test_y)))


def percent(hits: Tensor) -> list[float | None]:
    """(R, n) of correct or not -> the accuracy of each replica in percent."""
    return rounded(hits.float().mean(dim=1) * 100.0, 3)


def train(
    stack: Stack,
    split: Split,
    descent: Descent | Tensor,
    *,
    batch: int,
    evaluate_at: Sequence[int],
    generator: torch.Generator,
    probe: Probe | None = None,
) -> History:
    """Train a stack and return what was seen.

    Args:
        stack: R replicas, in place.
        split: the data; all replicas see the same batches in the same order.
        descent: how a step is made; a tensor (R,) of learning rates is plain gradient descent.
        batch: samples in a batch.
        evaluate_at: numbers of steps after which to evaluate, ascending; the last ends the training.
        generator: draws the order of the samples.
        probe: called at each evaluation, to look at more.
    """
    descent = Descent(descent) if isinstance(descent, Tensor) else descent
    history = History()
    marks = set(evaluate_at)
    steps = max(marks)
    stack.train()
    total = torch.zeros(stack.replicas)
    since = 0

    def look(step: int) -> None:
        nonlocal since
        history.steps.append(step)
        history.loss.append(rounded(total / since, 5) if since else [])
        total.zero_()
        since = 0
        _evaluate(stack, split, history)
        if probe is not None:
            probe(step, stack)

    if 0 in marks:
        look(0)
    order = batches(len(split.train_y), batch, steps, generator)
    for step, chosen in enumerate(order, start=1):
        loss = losses(stack, split.train_x[chosen], split.train_y[chosen])
        loss.sum().backward()
        descent.step(stack)
        total += loss.detach()
        since += 1
        if step in marks:
            look(step)
    return history
