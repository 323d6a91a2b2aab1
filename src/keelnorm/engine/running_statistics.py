"""How a batch's moments enter the running ones, in plain torch; the native kernels do the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from keelnorm.engine.arguments import State
from keelnorm.engine.update_counts import AT, AVERAGED, SKIPPED
from keelnorm.moments import Moments, degrees_of_freedom

#: The running variance after the first, when a batch of these biased and unbiased ones enters with the weight given.
AveragedVar = Callable[[Tensor, Tensor, Tensor, "float | Tensor"], Tensor]


def averaged(running: Tensor, batch: Tensor, momentum: float | Tensor) -> Tensor:
    """(1 − momentum)·running + momentum·batch."""
    return (1 - momentum) * running + momentum * batch


def update_running(
    state: State,
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
    averaged_var: AveragedVar | None = None,
    squares: Tensor | None = None,
) -> None:
    """running = (1 − momentum)·running + momentum·batch, with the unbiased variance.

    A channel of which something that is not finite would be stored stays as it is, and ``state.updates`` counts it; one
    of fewer than two values, which has no variance to learn from, stays too. Nothing waits for a value. Where the state
    has a sink, that takes the moments and nothing changes here.

    Args:
        mean, var: Of the batch, (C,), the variance biased; or (D, C), a row for each domain.
        count: Values per channel, or their weight: a number, or a tensor () or as mean.
        averaged_var: How the variance enters, where that is not as the mean does and unbiased.
        squares: Of :class:`~keelnorm.Moments`; as ``count``.
    """
    if state.sink is not None:
        mean, var = mean.detach(), var.detach()
        number = count if isinstance(count, Tensor) else mean.new_full((), count)
        state.sink(Moments(number.to(mean.dtype), mean, var * number, squares))
        return
    enough: bool | Tensor = True
    correction: float | Tensor
    if isinstance(count, Tensor):
        count = count.to(mean.dtype)  # quotients of integers would be float32
        freedom = degrees_of_freedom(count, squares)
        enough = freedom > 0
        correction = count / freedom.where(enough, 1)
    elif count < 2:
        return
    else:
        correction = count / (count - 1)
    with torch.no_grad():
        batches, factor, so_far = state.num_batches_tracked, state.momentum, None
        running_mean, running_var = state.running_mean, state.running_var
        counts = None if state.updates is None or running_mean is None else state.updates.beside(running_mean)
        if factor is None and running_mean is not None:
            assert batches is not None  # check_arguments saw to it
            so_far = averaged_so_far(batches[..., None], counts)
        if batches is not None:
            batches.add_(enough.any(-1) if isinstance(enough, Tensor) and enough.dim() else enough)
        if running_mean is None or running_var is None:
            return
        weight = 1 / (so_far + 1).to(mean.dtype) if so_far is not None else factor
        assert weight is not None
        unbiased = var * correction
        old_mean, old_var = running_mean.to(mean.dtype), running_var.to(mean.dtype)
        new_mean = averaged(old_mean, mean, weight).to(running_mean.dtype)
        new_var = averaged_var(old_var, var, unbiased, weight) if averaged_var else averaged(old_var, unbiased, weight)
        new_var = new_var.to(running_var.dtype)
        finite = new_mean.isfinite() & new_var.isfinite()
        taken = finite & enough
        if counts is not None:
            counts[SKIPPED].add_(~finite & enough)
            if so_far is not None and batches is not None:
                note_averaged(counts, so_far, taken, batches[..., None])
        running_mean.copy_(torch.where(taken, new_mean, running_mean))
        running_var.copy_(torch.where(taken, new_var, running_var))


def averaged_so_far(batches: Tensor, counts: Tensor | None) -> Tensor:
    """How many batches a cumulative average is over, before the next one; see :class:`UpdateCounts`."""
    return batches if counts is None else torch.where(counts[AT] == batches, counts[AVERAGED], batches)


def note_averaged(counts: Tensor, so_far: Tensor, taken: Tensor, batches: Tensor) -> None:
    """Note that a batch has entered the average, where it was taken, and the number of batches with it."""
    counts[AVERAGED].copy_(so_far + taken)
    counts[AT] = batches
