"""The arguments of a batch normalization: the bundles that carry them, and the errors for illegal ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypeAlias, get_args

import torch
from torch import Tensor

from keelnorm.engine.activations import Activation, ActivationLike
from keelnorm.engine.error_messages import describe
from keelnorm.engine.layout import check_kind, is_dense, require_memory
from keelnorm.engine.update_counts import UpdateCounts

if TYPE_CHECKING:
    from keelnorm.moments import Moments, Weighting

#: What errors call the function; layers are called by their class.
FUNCTION = "batch_norm"

Padding: TypeAlias = Literal["zero", "keep"]
PADDINGS = get_args(Padding)


class State(NamedTuple):
    """A layer's running statistics and options, and how this call uses them.

    Args:
        training: Normalize with the batch's statistics, else with the running statistics.
        update: Update the running statistics with the batch's.
        momentum: Weight of the batch in the update; None averages over all batches.
        eps: Added to the variance.
        running_mean, running_var: The running statistics, (C,), or None.
        num_batches_tracked: Number of updates so far, or None.
        what: What was called, the first words of an error.
        updates: The layer's update counts, such as updates skipped because the result was not finite; or None.
        mask: True for the values that count, (N, *S), or None.
        keep: Whether masked values pass through unchanged; else they become 0.
        sink: What takes the batch's moments where ``update`` is set, instead of the running statistics; or None.
    """

    training: bool
    update: bool
    momentum: float | None
    eps: float
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    what: str = FUNCTION
    updates: UpdateCounts | None = None
    mask: Tensor | None = None
    keep: bool = False
    sink: Callable[[Moments], None] | None = None

    def counts(self) -> Tensor | None:
        """Return the tensor of update counts, for an operator that updates the running statistics; else None."""
        updates = self.updates
        if updates is None or not self.update or self.sink is not None or self.running_mean is None:
            return None
        return updates.beside(self.running_mean) if updates.tensor is None else updates.tensor


class Options(NamedTuple):
    """The options of a call; see :func:`keelnorm.functional.batch_norm`."""

    activation: ActivationLike = None
    inplace: bool = False
    mask: Tensor | None = None
    sample_weight: Tensor | None = None
    weighting: Weighting = "frequency"
    padding: Padding = "zero"


class Kept(NamedTuple):
    """What a forward keeps for its backward.

    Args:
        x: The input, of shape (N, C, *S).
        saved: (mean, var, rstd) that normalized it, (3, C).
        weight, bias: The layer's; the bias only where the activation's derivative needs it.
        y, residual: Where the derivative needs them, see `ops.gate_needs`.
        training: Whether mean and variance are the batch's, and so depend on x.
        act: The activation.
        mask, keep: As in :class:`State`.
    """

    x: Tensor
    saved: Tensor
    weight: Tensor | None
    bias: Tensor | None
    y: Tensor | None
    residual: Tensor | None
    training: bool
    act: Activation
    mask: Tensor | None = None
    keep: bool = False


class Needs(NamedTuple):
    """Which gradients a backward is asked for."""

    x: bool
    residual: bool
    weight: bool
    bias: bool


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
    """Raise an error that says what was asked, what came, what is legal and what to do.

    Args:
        what: What was called, the first words of the message.
        ranks: Legal numbers of dimensions of ``x``; None allows any from two on.
        too_few: The policy for one value per channel in training; "error" raises.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes, devices or numbers do not fit.
        RuntimeError: a tensor's memory is gone, or a running statistic requires a gradient.
    """
    _check_input(what, x, ranks)
    vectors = {"weight": weight, "bias": bias, "running_mean": state.running_mean, "running_var": state.running_var}
    _check_vectors(what, x, {name: value for name, value in vectors.items() if value is not None})
    if state.num_batches_tracked is not None:
        check_counter(what, state.num_batches_tracked, x.device)
    if residual is not None:
        _check_residual(what, x, residual)
    _check_state(what, state)
    if state.training and x.numel() == x.shape[1] > 0 and too_few == "error":
        moments = "evaluate with model.eval()" if state.running_mean is not None else "keep track_running_stats=True"
        raise ValueError(
            f"{what}: one value per channel has no variance, so the batch can't normalize it; got {describe(x)}. Use a "
            f"larger batch (drop_last=True drops a short last one), {moments}, or give "
            "kn.BatchNorm too_few='running' or 'skip'"
        )
    if x.is_cpu:  # the operators for GPUs look for themselves
        require_memory(what, x=x, residual=residual, num_batches_tracked=state.num_batches_tracked, **vectors)


def _check_input(what: str, x: Any, ranks: tuple[int, ...] | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{what}: x must be a tensor of shape (N, C, *S); got {describe(x)}")
    check_kind(what, "x", x)
    if x.dim() < 2 or (ranks is not None and x.dim() not in ranks):
        legal = "two or more" if ranks is None else " or ".join(map(str, ranks))
        raise ValueError(f"{what}: x must have {legal} dimensions, channels second; got {describe(x)}")
    if not x.is_floating_point():
        remedy = "Normalize x.real and x.imag" if x.is_complex() else "Convert it first, as with x.float()"
        raise TypeError(f"{what}: x must be real floating-point; got {describe(x)}. {remedy}")


def _check_vectors(what: str, x: Tensor, given: dict[str, Any]) -> None:
    """Check weight, bias and running statistics, as far as they are given."""
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{what}: {name} must be a real floating-point tensor or None; got {describe(value)}")
        check_kind(what, name, value)
        if value.device != x.device:
            raise ValueError(f"{what}: x is on {x.device}, so {name} must be there too; got {describe(value)}")
        if name.startswith("running") and value.requires_grad and torch.is_grad_enabled():
            refuse_derivative(what, name)
    channels, shapes = x.shape[1], {value.shape for value in given.values()}
    if len(shapes) == 1 and value.dim() == 1:
        # All vectors agree, so it is x that does not fit.
        check_channels(what, x, len(value), ", ".join(given) if what == FUNCTION else "the layer")
    for name, value in given.items():
        if value.shape != (channels,):
            raise ValueError(
                f"{what}: x has {channels} channels (dimension 1 of {tuple(x.shape)}), so {name} must have shape "
                f"({channels},); got {describe(value)}"
            )


def _check_residual(what: str, x: Tensor, residual: Any) -> None:
    if not isinstance(residual, Tensor) or not residual.is_floating_point():
        raise TypeError(f"{what}: the residual must be a real floating-point tensor; got {describe(residual)}")
    check_kind(what, "the residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"{what}: the residual must have x's shape {tuple(x.shape)}; got {describe(residual)}")
    if residual.device != x.device:
        raise ValueError(f"{what}: x is on {x.device}, so the residual must be too; got {describe(residual)}")


def _check_state(what: str, state: State) -> None:
    """Check that running statistics, eps and momentum suffice for what the call does."""
    if (state.running_mean is None) != (state.running_var is None):
        missing = "running_mean" if state.running_mean is None else "running_var"
        raise ValueError(f"{what}: running_mean and running_var come together or not at all; {missing} is None")
    if not state.training and state.running_mean is None:
        raise ValueError(f"{what}: inference needs running_mean and running_var; pass them, or set training=True")
    updates = state.training and state.update
    check_numbers(what, state.eps, state.momentum, state.training, updates)
    if updates and state.running_mean is not None and state.momentum is None and state.num_batches_tracked is None:
        raise ValueError(
            f"{what}: momentum=None averages over all batches, which needs the layer's counter num_batches_tracked; "
            "give momentum a number, or use a layer that tracks running statistics"
        )


def refuse_derivative(what: str, name: str) -> NoReturn:
    """Raise because a running statistic requires a gradient, or has a tangent."""
    raise RuntimeError(
        f"{what}: batch normalization is not differentiable in its running statistics, so {name} must not require a "
        "gradient or have a tangent; detach it"
    )


def check_channels(what: str, x: Tensor, channels: int, owner: str = "the layer") -> None:
    """Raise a ValueError unless x has as many channels as their owner."""
    if x.shape[1] == channels:
        return
    hint = ""
    if x.dim() > 2 and x.shape[-1] == channels:
        hint = ". Its last dimension fits: if x is (N, *S, C), give x.movedim(-1, 1)"
    raise ValueError(
        f"{what}: x has {x.shape[1]} channels (dimension 1 of {tuple(x.shape)}), and {owner} {channels}; "
        f"got {describe(x)}{hint}"
    )


def check_counter(what: str, batches: Any, device: torch.device) -> None:
    """Raise unless ``batches`` is an integer tensor on the device."""
    if not isinstance(batches, Tensor) or batches.is_complex() or batches.dtype == torch.bool:
        raise TypeError(f"{what}: num_batches_tracked must be an int64 tensor; got {describe(batches)}")
    check_kind(what, "num_batches_tracked", batches)
    if batches.device != device:
        raise ValueError(f"{what}: x is on {device}, so num_batches_tracked must be there too; got {describe(batches)}")


def check_numbers(what: str, eps: Any, momentum: Any, training: bool, update: bool) -> None:
    """Raise unless eps is positive and momentum finite, as far as the call uses them."""
    try:
        scales = eps > 0 or (eps == 0 and not training)
        averages = not update or momentum is None or momentum - momentum == 0
    except TypeError:
        raise TypeError(
            f"{what}: eps and momentum must be numbers; got {describe(eps)} and {describe(momentum)}"
        ) from None
    if not scales:
        raise ValueError(f"{what}: eps must be positive (or 0, with running statistics alone); got {eps!r}")
    if not averages:
        raise ValueError(f"{what}: momentum must be finite, or None for the average of all batches; got {momentum!r}")


def check_inplace(what: str, x: Tensor, residual: Any, act: Activation) -> None:
    """Raise a ValueError unless the result may overwrite x, and x can be rebuilt from it."""
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
    """Return an activation's name, with its parameter where that may be the fault."""
    return f"{act.name!r} with {act.a:g}" if act.name in ("leaky_relu", "elu") else repr(act.name)
