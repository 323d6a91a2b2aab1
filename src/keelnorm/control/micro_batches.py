"""Batch normalization of micro-batches with the moments of all of them, for each batch norm that a step calls."""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from keelnorm import functional
from keelnorm.engine.activations import resolve
from keelnorm.engine.arguments import Options, State, check_arguments
from keelnorm.engine.layout import counted, per_channel, reduced_dims
from keelnorm.engine.masking import take_mask
from keelnorm.functional import layer_batch_norm
from keelnorm.moments import Moments, broadcast_weight, compute_dtype
from keelnorm.nn._shared.normalize import normalize


class Call(NamedTuple):
    """The arguments of one batch normalization."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    state: State
    options: Options
    ranks: tuple[int, ...] | None = None
    too_few: str = "error"

    def checked(self) -> Call:
        """The call with its mask taken in; raise if it is not legal. One value per channel is legal here."""
        x, state = self.x, self.state
        check_arguments(state.what, x, self.residual, self.weight, self.bias, state, self.ranks, "others")
        if self.options.mask is None:
            return self
        return self._replace(state=take_mask(state, self.options, x, "skip"))

    def counts(self) -> Tensor | None:
        """Which values count, broadcastable to x; None for all."""
        return None if self.state.mask is None else self.state.mask.unsqueeze(1)

    def moments(self) -> Moments:
        """The moments of the values that count."""
        options = self.options
        return functional.moments(self.x.detach(), self.state.mask, options.sample_weight, options.weighting)

    def normalized(self, mean: Tensor, var: Tensor) -> Tensor:
        """The result with these moments."""
        x, residual, state, counts = self.x, self.residual, self.state, self.counts()
        act = resolve(state.what, self.options.activation)
        if counts is not None:
            x, residual = counted(counts, x), None if residual is None else counted(counts, residual)
        y = normalize(x, mean, var, self.weight, self.bias, state.eps, residual, act)
        return y if counts is None else counted(counts, y, self.x if state.keep else None)


class Site:
    """One use of a layer by the step.

    Args:
        moments: The moments, so far, of its inputs in all micro-batches; they normalize.
    """

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self.leaves = [moments.mean.clone(), moments.var_or_zero]
        self.derivatives = [torch.zeros_like(leaf) for leaf in self.leaves]

    def term(self, call: Call) -> Tensor:
        """What a micro-batch adds to the loss through mean and variance, up to a constant."""
        by_mean, by_var = self.derivatives
        x, counts, weights = call.x, call.counts(), call.options.sample_weight
        dtype, dims = compute_dtype(x), reduced_dims(x)
        centered = x.to(dtype) - per_channel(self.moments.mean, x).to(dtype)
        centered = centered if counts is None else counted(counts, centered)
        count = 1 if weights is None else broadcast_weight(call.state.what, weights, x).to(dtype)
        sums = by_mean * (count * centered).sum(dims) + by_var * (count * centered.square()).sum(dims)
        return (sums / self.moments.count.where(self.moments.count > 0, 1)).sum()


class Watch(TorchFunctionMode):
    """Replaces every batch normalization with a batch's moments, wherever it is called from.

    Args:
        normalize: Called instead, with the arguments.
    """

    def __init__(self, normalize: Any) -> None:
        super().__init__()
        self.normalize = normalize

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _call_of(function, args, kwargs or {})
        if call is not None and call.state.training:
            return self.normalize(call)
        return function(*args, **(kwargs or {}))


def _call_of(function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Call | None:
    if function is layer_batch_norm:
        call = Call(*args, **keywords)
        return call._replace(state=call.state._replace(running_mean=None, running_var=None, update=False))
    if function is not F.batch_norm and function is not functional.batch_norm:
        return None
    bound = signature(function).bind(*args, **keywords)
    bound.apply_defaults()
    given = bound.arguments
    options = Options(**{name: value for name, value in given.items() if name in Options._fields})
    state = State(training=given["training"], update=False, momentum=given["momentum"], eps=given["eps"])
    return Call(given["input"], given.get("residual"), given["weight"], given["bias"], state, options)
