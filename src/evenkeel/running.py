"""How a batch's moments enter the running ones, in plain torch; the native kernels do the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evenkeel.arguments import State
from evenkeel.moments import Moments

#: The running variance after the first, when a batch of these biased and unbiased ones enters with the weight given.
AveragedVar = Callable[[Tensor, Tensor, Tensor, "float | Tensor"], Tensor]


def averaged(running: Tensor, batch: Tensor, momentum: float | Tensor) -> Tensor:
    """(1 − momentum)·running + momentum·batch."""
    return (1 - momentum) * running + momentum * batch


def update_running(
    state: State, mean: Tensor, var: Tensor, count: int | Tensor, averaged_var: AveragedVar | None = None
) -> None:
    """running = (1 − momentum)·running + momentum·batch, with the unbiased variance.

    A channel whose moments are not finite stays as it is and is counted in ``state.skipped``; so does one of fewer than
    two values, which has no variance to learn from. Nothing waits for a value. Where the state has a sink, that takes
    the moments and nothing changes here.

    Args:
        mean, var: Of the batch, (C,), the variance biased; or (D, C), a row for each domain.
        count: Values per channel: a number, or a tensor () or as mean.
        averaged_var: How the variance enters, where that is not as the mean does and unbiased.
    """
    if state.sink is not None:
        mean, var = mean.detach(), var.detach()
        number = count if isinstance(count, Tensor) else mean.new_full((), count)
        state.sink(Moments(number.to(mean.dtype), mean, var * number))
        return
    if not isinstance(count, Tensor) and count < 2:
        return
    if isinstance(count, Tensor):
        count = count.to(mean.dtype)  # quotients of integers would be float32
    enough = count > 1
    with torch.no_grad():
        batches = state.num_batches_tracked
        if batches is not None:
            batches.add_(enough.any(-1) if isinstance(enough, Tensor) and enough.dim() else enough)
        if state.running_mean is None or state.running_var is None:
            return
        factor: float | Tensor
        if state.momentum is not None:
            factor = state.momentum
        else:
            assert batches is not None  # check_arguments saw to it
            factor = 1 / batches.clamp(min=1).to(mean.dtype)[..., None]
        finite = mean.isfinite() & var.isfinite()
        if state.skipped is not None:
            state.skipped.add_(~finite)
        taken = finite & enough
        unbiased = var * (count / (count - 1).clamp(min=1) if isinstance(count, Tensor) else count / (count - 1))
        old_mean, old_var = (running.to(mean.dtype) for running in (state.running_mean, state.running_var))
        new_var = averaged_var(old_var, var, unbiased, factor) if averaged_var else averaged(old_var, unbiased, factor)
        state.running_mean.copy_(torch.where(taken, averaged(old_mean, mean, factor), old_mean))
        state.running_var.copy_(torch.where(taken, new_var, old_var))
