"""How a batch's moments enter the running ones, in plain torch; the native kernels do the same."""

from __future__ import annotations

import torch
from torch import Tensor

from evenkeel.arguments import State


def update_running(state: State, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
    """running = (1 − momentum)·running + momentum·batch, with the unbiased variance.

    A channel whose moments are not finite stays as it is and is counted in ``state.skipped``; so does one of fewer than
    two values, which has no variance to learn from. Nothing waits for a value.

    Args:
        mean, var: Of the batch, (C,), the variance biased; or (D, C), a row for each domain.
        count: Values per channel: a number, or a tensor () or as mean.
    """
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
        for running, batch in ((state.running_mean, mean), (state.running_var, unbiased)):
            wide = running.to(batch.dtype)
            running.copy_(torch.where(taken, (1 - factor) * wide + factor * batch, wide))
