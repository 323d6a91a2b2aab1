"""Preflight of collectives: ranks compare what they are about to do, so that none waits for nothing."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist

from keelnorm.engine.collectives import explained
from keelnorm.engine.error_messages import describe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ENVIRONMENT_VARIABLE = "KEELNORM_SYNC_DEBUG"
_preflight = os.environ.get(ENVIRONMENT_VARIABLE, "") not in ("", "0")


def preflight(enabled: bool = True) -> None:
    """Compare the ranks before each collective of a synchronized layer, so that none waits for nothing.

    Before each collective of :class:`kn.SyncBatchNorm`, in the forward and in the backward, the ranks exchange which
    layer they are at, its channels, the dtype, training or frozen, and whether a gradient is wanted. Where these
    differ, every rank raises an error that names the layer and the rank, instead of waiting for a collective that does
    not come. A layer in evaluation takes part when autograd records it, so that a layer frozen on one rank alone is
    found; so evaluate under ``torch.no_grad()`` where only one rank evaluates.

    Args:
        enabled: On or off, on all ranks alike. The environment variable ``KEELNORM_SYNC_DEBUG=1`` turns it on at
            import.

    Cost:
        Two more collectives, of some hundred bytes, per collective: for finding a fault, not for training.

    Example:
        >>> preflight(True)
        >>> preflight(False)
    """
    global _preflight
    if not isinstance(enabled, bool):
        raise TypeError(f"preflight: enabled is True or False; got {describe(enabled)}")
    _preflight = enabled


def preflight_is_on() -> bool:
    """Return whether synchronized layers call :func:`agree`."""
    return _preflight


class Step(NamedTuple):
    """What a rank is about to do; an error names the fields that differ."""

    layer: str
    direction: str
    channels: int | str
    dtype: str
    mode: str
    gradient: bool

    def __str__(self) -> str:
        if not self.mode:  # moments, without a layer
            return f"{self.direction} of {self.channels} channels, {self.dtype}"
        wanted = "with" if self.gradient else "without"
        return (
            f"{self.direction} of {self.layer}, {self.channels} channels, {self.dtype}, {self.mode}, {wanted} a "
            "gradient for x"
        )


def agree(step: Step, group: ProcessGroup, what: str) -> None:
    """Raise a RuntimeError on every rank unless all are at the same step."""
    steps: list[Step] = [step] * dist.get_world_size(group)
    with explained(group, f"{what} (preflight, {step})"):
        dist.all_gather_object(steps, step, group=group)
    if all(other == step for other in steps):
        return
    ranks = dist.get_process_group_ranks(group)
    usual, _ = Counter(steps).most_common(1)[0]
    odd = [i for i, other in enumerate(steps) if other != usual]
    fields = [name for k, name in enumerate(Step._fields) if any(steps[i][k] != usual[k] for i in odd)]
    plans = "; ".join(f"rank {ranks[i]}: {other}" for i, other in enumerate(steps))
    raise RuntimeError(
        f"{what}: the ranks differ in {', '.join(fields)} at {steps[odd[0]].layer} of rank "
        f"{', '.join(str(ranks[i]) for i in odd)} ({plans}). All ranks have to call the same synchronized layers in "
        "the same order and mode"
    )
