"""Collectives of torch.distributed: which ranks take part, and the errors when one of them does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from keelnorm.engine.preflight import Step


def group_of(process_group: ProcessGroup | None, what: str) -> ProcessGroup | None:
    """Return the group whose ranks compute together, or None where this process computes alone.

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


def gather(packed: Tensor, group: ProcessGroup, what: str, step: Callable[[], Step] | None = None) -> Tensor:
    """Return every rank's ``packed``, (k, C), stacked in the order of ranks."""
    check_alike(packed, group, what, step)
    gathered = packed.new_empty((dist.get_world_size(group), *packed.shape))
    with explained(group, what):
        dist.all_gather(list(gathered.unbind()), packed.contiguous(), group=group)
    return gathered


def add_up(packed: Tensor, group: ProcessGroup, what: str, step: Callable[[], Step] | None = None) -> Tensor:
    """Return the sum of every rank's ``packed``, (k, C), which is left unchanged."""
    check_alike(packed, group, what, step)
    total = packed.clone(memory_format=torch.contiguous_format)
    with explained(group, what):
        dist.all_reduce(total, group=group)
    return total


def check_alike(packed: Tensor, group: ProcessGroup, what: str, step: Callable[[], Step] | None) -> None:
    """Raise a RuntimeError on every rank unless ``packed``, (k, C), has the same size and dtype on all of them.

    Gloo ends a process that receives more than it expects; one that receives less computes with uninitialized memory.
    Only the CPU's tensors are compared: elsewhere the host would have to wait for the result.

    Args:
        what: What was called, the first words of an error.
        step: What this rank is doing, for an error.
    """
    if not packed.is_cpu:
        return
    size = torch.tensor([packed.numel(), packed.element_size()])
    ends = torch.cat([size, -size])
    with explained(group, what):
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    if ends.tolist() == [*size.tolist(), *(-size).tolist()]:
        return
    from keelnorm.engine.preflight import Step, agree

    dtype = str(packed.dtype).removeprefix("torch.")
    agree(Step(what, "exchange", packed.shape[1], dtype, "", False) if step is None else step(), group, what)
    raise RuntimeError(f"{what}: the ranks exchange {dtype} values of different sizes; this one {tuple(packed.shape)}")


@contextmanager
def explained(group: ProcessGroup, what: str) -> Iterator[None]:
    """Replace the error of a failing collective by one that says what it was for; torch's own is the cause."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what}: rank {dist.get_rank()} could not exchange with its process group, ranks "
            f"{dist.get_process_group_ranks(group)}: one of them died, raised an error, or called other "
            "layers. KEELNORM_SYNC_DEBUG=1 on all ranks finds the layer at which they differ"
        ) from error
