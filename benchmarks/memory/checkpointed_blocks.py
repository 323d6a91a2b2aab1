"""Against activation checkpointing: as many blocks of the eager model as keep the same bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

import keelnorm as kn
from benchmarks.architectures import Architecture
from benchmarks.memory.interleaved_steps import choose_batch, interleaved, sampler
from benchmarks.memory.kept_bytes import learned, saved_bytes
from benchmarks.memory.memory_results import CHECKPOINTED, SAVED, Checkpointing
from benchmarks.memory.same_results import compare, outcome
from benchmarks.training_steps import gradient_step
from keelnorm.bench.peers import CannotError
from keelnorm.measure import timing

#: How much more than save_memory the checkpointed model may keep.
TOLERANCE = 0.05


def against_checkpointing(one: Architecture, seconds: float, rounds: int) -> Checkpointing:
    """Time steps of a converted model with `kn.save_memory` and of the eager one with checkpointed blocks.

    Args:
        one: The architecture.
        seconds: Time for all page settings together.
        rounds: The most rounds of a page setting.

    Raises:
        CannotError: Checkpointing keeps more than save_memory, however many blocks it takes.
        WrongResultError: The checkpointed model's outputs or gradients are not eager's.
    """
    eager = one.build().train()
    ours = learned(copy.deepcopy(eager), one.batch(2))
    batch = choose_batch(lambda samples: timing.seconds_per_call(gradient_step(ours, one.batch(samples))))
    x = one.batch(batch)
    target = saved_bytes(ours, x, save_memory=True)
    blocks = blocks_of(eager)

    def kept_with(count: int) -> int:
        with checkpointed(blocks[:count]):
            return saved_bytes(eager, x)

    count = fewest(kept_with, len(blocks), target * (1 + TOLERANCE))
    kept = {SAVED: target, CHECKPOINTED: kept_with(count)}
    _check_gradients(eager, blocks[:count], one)
    arms = {
        SAVED: sampler(gradient_step(ours, x), partial(kn.save_memory, ours)),
        CHECKPOINTED: sampler(gradient_step(eager, x), partial(checkpointed, blocks[:count])),
    }
    return Checkpointing(len(blocks), count, batch, kept, interleaved(arms, batch, seconds, rounds))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules with parameters that are called in sequence: the children of `nn.Sequential`, at any depth of these.

    In a ResNet these are the residual blocks of all stages, whatever the stages are called. The input of each is the
    output of the one before, so that checkpointing the first of them keeps their inputs alone.
    """
    found: dict[nn.Module, None] = {}

    def visit(module: nn.Module, *, in_sequence: bool) -> None:
        is_sequence = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        if in_sequence and not is_sequence:
            if any(True for _ in module.parameters()):
                found[module] = None
            return
        for child in module.children():
            visit(child, in_sequence=is_sequence)

    visit(model, in_sequence=False)
    return list(found)


@contextmanager
def checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, these modules keep their inputs alone, and run again in the backward."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class has its own


def fewest(kept_with: Callable[[int], int], most: int, limit: float) -> int:
    """The fewest blocks with which no more than the limit is kept; the more blocks, the less is kept.

    Args:
        kept_with: The bytes that are kept when so many blocks are checkpointed.
        most: How many blocks there are.
        limit: Bytes.

    Raises:
        CannotError: With all blocks more is kept.
    """
    if (least := kept_with(most)) > limit:
        raise CannotError(f"with all {most} blocks checkpointed {least / 1e6:.0f} MB are kept, not {limit / 1e6:.0f}")
    too_few, enough = -1, most
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if kept_with(middle) <= limit:
            enough = middle
        else:
            too_few = middle
    return enough


def _check_gradients(model: nn.Module, blocks: Sequence[nn.Module], one: Architecture) -> None:
    """Compare outputs and gradients; torch's batch norms update running statistics again in the second run."""
    x = one.batch(2)
    buffers = {name for name, _ in model.named_buffers()}
    expected = outcome(model, x)
    with checkpointed(blocks):
        found = outcome(model, x)
    for each in (expected, found):
        for name in buffers:
            del each[name]
    compare(expected, found, "a step", named=CHECKPOINTED)
