"""The processes of torch.distributed: who computes together, and what is said when one of them does not come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def group_of(process_group: ProcessGroup | None, what: str) -> ProcessGroup | None:
    """The group whose ranks compute together, or None where this process computes alone.

    Args:
        process_group: None for all ranks.
        what: What was called, the first words of an error.

    Raises:
        ValueError: this process is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group is None else process_group
    ranks = dist.get_world_size(group)
    if ranks < 0:
        raise ValueError(
            f"{what}: rank {dist.get_rank()} is not in the process_group that it was given; each rank needs a group "
            "that it belongs to, or None for all ranks"
        )
    return group if ranks > 1 else None


def gather(packed: Tensor, group: ProcessGroup, what: str) -> Tensor:
    """Every rank's ``packed``, of the same shape on all of them, stacked in the ranks' order."""
    gathered = packed.new_empty((dist.get_world_size(group), *packed.shape))
    with explained(group, what):
        dist.all_gather(list(gathered.unbind()), packed.contiguous(), group=group)
    return gathered


def add_up(packed: Tensor, group: ProcessGroup, what: str) -> Tensor:
    """The sum of every rank's ``packed``, which stays."""
    total = packed.clone(memory_format=torch.contiguous_format)
    with explained(group, what):
        dist.all_reduce(total, group=group)
    return total


@contextmanager
def explained(group: ProcessGroup, what: str) -> Iterator[None]:
    """Say what a failing collective was for; torch's own error is the cause."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what}: rank {dist.get_rank()} could not exchange with its process group, ranks "
            f"{dist.get_process_group_ranks(group)}: one of them died, raised an error, or took another way "
            "through the model. EVENKEEL_SYNC_DEBUG=1 on all ranks finds the layer where their ways part"
        ) from error
