"""Whether `kn.save_memory` changes a bit of a model's results."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import keelnorm as kn
from benchmarks.architectures import Architecture
from benchmarks.training_steps import outputs_and_loss
from keelnorm.bench.correctness import WrongResultError
from keelnorm.engine.fusion.call import all_sizes_wait

#: Samples in the batch that is compared.
SAMPLES = 2


def check_bits(one: Architecture) -> None:
    """Compare training steps of a converted model with and without `kn.save_memory`, bit for bit.

    Three steps: one in which its layers learn what follows them, one that is fused wherever it can be, also on small
    tensors, and one as a user runs it.

    Raises:
        WrongResultError: An output, a gradient or a buffer differs.
    """
    model, _ = kn.convert(one.build().train())
    other = copy.deepcopy(model)
    x = one.batch(SAMPLES)
    with kn.save_memory(other):
        with all_sizes_wait():
            for step in ("the first step", "a step that is fused"):
                compare(outcome(model, x), outcome(other, x), step)
        compare(outcome(model, x), outcome(other, x), "a step")


def outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after a training step, by name; random numbers are the same at every call."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        outputs, loss = outputs_and_loss(model, x)
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    found = {f"output {number}": y.detach() for number, y in enumerate(outputs)}
    found |= {f"the gradient of {name}": g for name, g in zip(named, gradients, strict=True) if g is not None}
    return found | {name: value.clone() for name, value in model.named_buffers()}


def compare(expected: dict[str, Tensor], found: dict[str, Tensor], step: str, *, named: str = "save_memory") -> None:
    """Raise for the first tensor that differs in a bit.

    Args:
        expected: By name.
        found: The same of the other arm.
        step: What was run, for the message.
        named: The other arm's name.

    Raises:
        WrongResultError: One differs, or there are others.
    """
    if expected.keys() != found.keys():
        raise WrongResultError(f"{step} has other tensors with {named}: {sorted(expected.keys() ^ found.keys())[:3]}")
    for name, value in expected.items():
        if not _same_bits(value, found[name]):
            off = (value.double() - found[name].double()).abs().max() if value.shape == found[name].shape else torch.nan
            raise WrongResultError(f"{name} of {step} differs with {named}, by {float(off):.2g} at most")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    first, second = (t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)
