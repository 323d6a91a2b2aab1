"""The update of running statistics, in plain torch; the native kernels compute the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from keelnorm.engine.arguments import State
from keelnorm.engine.update_counts import AT, AVERAGED, SKIPPED
from keelnorm.moments import Moments, degrees_of_freedom

#: Computes the new running variance from the old one, the batch's biased and unbiased ones, and the batch's weight.
AveragedVar = Callable[[Tensor, Tensor, Tensor, "float | Tensor"], Tensor]


def averaged(running: Tensor, batch: Tensor, momentum: float | Tensor) -> Tensor:
    """Return (1 − momentum)·running + momentum·batch."""
    return (1 - momentum) * running + momentum * batch


def update_running(
    state: State,
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
    averaged_var: AveragedVar | None = None,
    squares: Tensor | None = None,
) -> None:
    """Update the running statistics: (1 − momentum)·running + momentum·batch, with the unbiased variance.

    A channel whose result is not finite keeps its statistics, and ``state.updates`` counts it. So does a channel of
    fewer than two values, which has no unbiased variance. There is no host synchronization. Where the state has a sink,
    the sink gets the moments instead.

    Args:
        mean, var: The batch's, (C,), the variance biased; or (D, C), a row for each domain.
        count: Values per channel, or their total weight: a number, or a tensor of shape () or the mean's.
        averaged_var: Another rule for the variance.
        squares: As in :class:`~keelnorm.Moments`, with the shape of ``count``.
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
            assert batches is not None  # see check_arguments
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
    """Return the number of batches in a cumulative average, before the next one; see :class:`UpdateCounts`."""
    return batches if counts is None else torch.where(counts[AT] == batches, counts[AVERAGED], batches)


def note_averaged(counts: Tensor, so_far: Tensor, taken: Tensor, batches: Tensor) -> None:
    """Count a batch in the average where it was taken, and note the number of batches."""
    counts[AVERAGED].copy_(so_far + taken)
    counts[AT] = batches
