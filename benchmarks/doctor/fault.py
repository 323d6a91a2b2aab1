"""A fault that is put into a trained network, and what it may be put into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

#: Images (N, 3, 32, 32) and their classes (N,).
Batch = tuple[Tensor, Tensor]


@dataclass
class Patient:
    """A network that was trained a little, and what a user has beside it. A fault changes it.

    Args:
        model: A classifier of ten classes for images (N, 3, 32, 32), in training mode. Its batch norms are torch.nn's.
        optimizer: SGD with momentum over all parameters, or what a fault puts in its place.
        batches: What the doctor gets: a list of batches of 32 as in training, in random order, or what a fault puts in
            its place.
        loss: What the doctor gets for a training step: a module such as nn.CrossEntropyLoss(), called with the model's
            output and the classes; or a function ``loss(model, batch)``.
    """

    model: nn.Module
    optimizer: Optimizer
    batches: list[Batch]
    loss: nn.Module | Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Fault:
    """A fault.

    Args:
        name: In some words.
        put: ``put(patient, path)`` puts it into the patient. ``path`` is that of a batch norm, drawn at random, for a
            fault of one layer. It returns the paths of the batch norms at which a finding is right; empty where it is
            the model, the data or the optimizer that is wrong, and a finding anywhere is right.
        says: What a finding that is right speaks of, in some words, for the reader.
    """

    name: str
    put: Callable[[Patient, str], set[str]]
    says: str
