"""What a batch normalization may be asked, and the errors for what it may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from evenkeel.activations import Activation
from evenkeel.errors import describe
from evenkeel.layout import is_dense
from evenkeel.moments import Moments


class State(NamedTuple):
    """What a layer keeps, and how this call uses it.

    Args:
        running_mean, running_var: Population moments, (C,), or None.
        num_batches_tracked: Number of updates so far, or None.
        training: Normalize with the batch's moments, else with the running ones.
        update: Let the batch's moments enter the running ones.
        momentum: Weight of the batch in the update; None averages over all batches.
        eps: Added to the variance.
        what: What was called, the first words of an error.
        skipped: Counts, per channel, the updates that were left out because the batch's moments were not finite; or
            None.
        mask: Which values count, (N, *S), or None.
        keep: Whether values that do not count stay as they are; else they come out as 0.
        sink: What takes the batch's moments where ``update`` is set, in place of the running ones; or None.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    training: bool
    update: bool
    momentum: float | None
    eps: float
    what: str = "batch_norm"
    skipped: Tensor | None = None
    mask: Tensor | None = None
    keep: bool = False
    sink: Callable[[Moments], None] | None = None


def check_arguments(
    what: str,
    x: Any,
    residual: Any,
    weight: Any,
    bias: Any,
    state: State,
    ranks: tuple[int, ...] | None = None,
    too_few: str = "error",
) -> None:
    """Raise a ValueError or TypeError that says what was asked, what came, what is legal and what to do.

    Args:
        what: What was called, the first words of the message.
        ranks: Legal numbers of dimensions of ``x``; None allows any from two on.
        too_few: What one value per channel is in training; an error unless the layer has another use for it.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{what}: x must be a tensor of shape (N, C, *S); got {describe(x)}")
    if x.dim() < 2 or (ranks is not None and x.dim() not in ranks):
        legal = "two or more" if ranks is None else " or ".join(map(str, ranks))
        raise ValueError(f"{what}: x must have {legal} dimensions, channels second; got {describe(x)}")
    if not x.is_floating_point():
        raise TypeError(
            f"{what}: x must be real floating-point; got {describe(x)}. Convert it first, as with x.float()"
        )
    channels = x.shape[1]
    vectors = {"weight": weight, "bias": bias, "running_mean": state.running_mean, "running_var": state.running_var}
    for name, value in vectors.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{what}: {name} must be a real floating-point tensor or None; got {describe(value)}")
        if value.shape != (channels,):
            raise ValueError(
                f"{what}: x has {channels} channels (dimension 1 of {tuple(x.shape)}), so {name} must have shape "
                f"({channels},); got {describe(value)}"
            )
        if value.device != x.device:
            raise ValueError(f"{what}: x is on {x.device}, so {name} must be there too; got {describe(value)}")
    batches = state.num_batches_tracked
    if batches is not None and batches.device != x.device:
        raise ValueError(
            f"{what}: x is on {x.device}, so num_batches_tracked must be there too; got {describe(batches)}"
        )
    if residual is not None:
        if not isinstance(residual, Tensor) or not residual.is_floating_point():
            raise TypeError(f"{what}: the residual must be a real floating-point tensor; got {describe(residual)}")
        if residual.shape != x.shape:
            raise ValueError(f"{what}: the residual must have x's shape {tuple(x.shape)}; got {describe(residual)}")
        if residual.device != x.device:
            raise ValueError(f"{what}: x is on {x.device}, so the residual must be too; got {describe(residual)}")
    if (state.running_mean is None) != (state.running_var is None):
        missing = "running_mean" if state.running_mean is None else "running_var"
        raise ValueError(f"{what}: running_mean and running_var come together or not at all; {missing} is None")
    if not state.training and state.running_mean is None:
        raise ValueError(f"{what}: inference needs running_mean and running_var; pass them, or set training=True")
    if not (state.eps > 0 or (state.eps == 0 and not state.training)):
        raise ValueError(f"{what}: eps must be positive (or 0, with running moments alone); got {state.eps!r}")
    averages = state.training and state.update and state.running_mean is not None and state.momentum is None
    if averages and state.num_batches_tracked is None:
        raise ValueError(
            f"{what}: momentum=None averages over all batches, which needs the layer's counter num_batches_tracked; "
            "give momentum a number, or use a layer that tracks running moments"
        )
    if state.training and x.numel() == channels > 0 and too_few == "error":
        moments = "evaluate with model.eval()" if state.running_mean is not None else "keep track_running_stats=True"
        raise ValueError(
            f"{what}: one value per channel has no variance, so the batch can't normalize it; got {describe(x)}. Use a "
            f"larger batch (drop_last=True drops a short last one), {moments}, or give "
            "ek.BatchNorm too_few='running' or 'skip'"
        )


def check_inplace(what: str, x: Tensor, residual: Any, act: Activation) -> None:
    """Raise a ValueError unless x's memory may take the result, and x can be told from it."""
    if residual is not None:
        raise ValueError(f"{what}: inplace=True goes without a residual; got {describe(residual)}")
    if not act.invertible:
        raise ValueError(
            f"{what}: inplace=True rebuilds x from the result, so the activation must be None, 'leaky_relu' with a "
            f"positive slope or 'elu' with a positive alpha; got {describe_activation(act)}"
        )
    if not is_dense(x):
        raise ValueError(
            f"{what}: inplace=True needs x contiguous or channels-last; got {describe(x)} with strides {x.stride()}. "
            "Use inplace=False, or copy x first"
        )


def describe_activation(act: Activation) -> str:
    """Its name, and its parameter where that may be what is wrong."""
    return f"{act.name!r} with {act.a:g}" if act.name in ("leaky_relu", "elu") else repr(act.name)
