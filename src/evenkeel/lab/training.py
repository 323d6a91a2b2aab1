"""Training a stack: plain SGD, one learning rate a replica, evaluated along the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel.lab.data import Split
from evenkeel.lab.networks import Stack

Probe = Callable[[int, Stack], None]
"""Called with the number of steps taken and the stack, at every evaluation."""


@dataclass
class History:
    """What was seen while training R replicas; every list runs over `steps`, then over replicas.

    `loss` is the mean training loss since the evaluation before (empty at step 0). `test_batch` is the accuracy with
    the test batch's own moments in place of the running ones, which early in training are still on their way from
    (0, 1).
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


def losses(stack: Stack, images: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of each replica, (R,)."""
    each = F.cross_entropy(stack(images), labels.expand(stack.replicas, -1), reduction="none")
    return each.mean(dim=1)


def right(stack: Stack, images: Tensor, labels: Tensor) -> Tensor:
    """Whether each replica names each image's class, (R, n), in the stack's present mode.

    A replica that has diverged gives NaN for every class, and scores what a constant answer scores.
    """
    logits: Tensor = stack(images)
    return logits.argmax(dim=1) == labels


@torch.no_grad()
def descend(stack: Stack, rates: Tensor) -> None:
    """One step of gradient descent, each replica with its own rate; clears the gradients."""
    for parameter in stack.parameters():
        if parameter.grad is None:
            continue
        rows = parameter.view(stack.replicas, -1)
        rows.addcmul_(parameter.grad.view_as(rows), rates.view(-1, 1), value=-1.0)
        parameter.grad = None


@contextmanager
def batch_moments(model: nn.Module) -> Iterator[None]:
    """Normalize with the batch's moments inside, without gradients, and leave no trace in the model.

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


def plain(values: Tensor, digits: int) -> list[float | None]:
    """Numbers for the store; None for what is no number any more, such as the loss of a lost run."""
    rounded = (round(value, digits) for value in values.double().tolist())
    return [value if math.isfinite(value) else None for value in rounded]


@torch.no_grad()
def _evaluate(stack: Stack, split: Split, history: History) -> None:
    images = torch.cat([split.validation_x, split.test_x])
    labels = torch.cat([split.validation_y, split.test_y])
    stack.eval()
    validation, test = right(stack, images, labels).split([len(split.validation_y), len(split.test_y)], dim=1)
    stack.train()
    history.validation.append(_percent(validation))
    history.test.append(_percent(test))
    if next(stack.buffers(), None) is None:  # nothing depends on the batch
        history.test_batch.append(history.test[-1])
        return
    with batch_moments(stack):
        history.test_batch.append(_percent(right(stack, split.test_x, split.test_y)))


def _percent(hits: Tensor) -> list[float | None]:
    return plain(hits.float().mean(dim=1) * 100.0, 3)


def train(
    stack: Stack,
    split: Split,
    rates: Tensor,
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
        rates: (R,), each replica's learning rate.
        batch: samples in a batch.
        evaluate_at: numbers of steps after which to evaluate, ascending; the last ends the training.
        generator: draws the order of the samples.
        probe: called at each evaluation, to look at more.
    """
    history = History()
    marks = set(evaluate_at)
    steps = max(marks)
    stack.train()
    total = torch.zeros(stack.replicas)
    since = 0

    def look(step: int) -> None:
        nonlocal since
        history.steps.append(step)
        history.loss.append(plain(total / since, 5) if since else [])
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
        descend(stack, rates)
        total += loss.detach()
        since += 1
        if step in marks:
            look(step)
    return history
