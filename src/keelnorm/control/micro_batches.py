"""Batch normalization of micro-batches by the moments of them all, at each place where a step has one."""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from keelnorm import functional
from keelnorm.engine.activations import resolve
from keelnorm.engine.arguments import State, check_arguments
from keelnorm.engine.layout import counted, per_channel, reduced_dims
from keelnorm.engine.masking import take_mask
from keelnorm.functional import Options, layer_batch_norm
from keelnorm.moments import Moments, broadcast_weight, compute_dtype
from keelnorm.nn._shared.normalize import normalize


class Call(NamedTuple):
    """What a batch normalization was asked."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    state: State
    options: Options
    ranks: tuple[int, ...] | None = None
    too_few: str = "error"

    def checked(self) -> Call:
        """The call, after a look at whether it is legal; one value per channel is enough here."""
        x, state = self.x, self.state
        check_arguments(state.what, x, self.residual, self.weight, self.bias, state, self.ranks, "others")
        if self.options.mask is None:
            return self
        return self._replace(state=take_mask(state, self.options.mask, self.options.padding, x, "skip"))

    def counts(self) -> Tensor | None:
        """Which values count, broadcastable against x; None for all."""
        return None if self.state.mask is None else self.state.mask.unsqueeze(1)

    def moments(self) -> Moments:
        """Those of the values that count."""
        options = self.options
        return functional.moments(self.x.detach(), self.state.mask, options.sample_weight, options.weighting)

    def normalized(self, mean: Tensor, var: Tensor) -> Tensor:
        """The result by these moments."""
        x, residual, weight, bias, state, options, *_ = self
        act, counts = resolve(state.what, options.activation), self.counts()
        if counts is None:
            return normalize(x, mean, var, weight, bias, state.eps, residual, act)
        values, added = counted(counts, x), None if residual is None else counted(counts, residual)
        y = normalize(values, mean, var, weight, bias, state.eps, added, act)
        return counted(counts, y, x if state.keep else None)


class Site:
    """One use of a layer by the step.

    Args:
        moments: Of its inputs in all micro-batches, as far as known; they normalize.
    """

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self.leaves = [moments.mean.clone(), moments.var_or_zero]
        self.derivatives = [torch.zeros_like(leaf) for leaf in self.leaves]

    def term(self, call: Call) -> Tensor:
        """What a micro-batch adds to the loss by way of mean and variance, save a constant."""
        by_mean, by_var = self.derivatives
        x, counts, weights = call.x, call.counts(), call.options.sample_weight
        dtype, dims = compute_dtype(x), reduced_dims(x)
        centered = x.to(dtype) - per_channel(self.moments.mean, x).to(dtype)
        centered = centered if counts is None else counted(counts, centered)
        often = 1 if weights is None else broadcast_weight(call.state.what, weights, x).to(dtype)
        sums = by_mean * (often * centered).sum(dims) + by_var * (often * centered.square()).sum(dims)
        return (sums / self.moments.count.where(self.moments.count > 0, 1)).sum()


class Watch(TorchFunctionMode):
    """Sees every batch normalization by a batch, whoever calls it: a layer's forward, or a patch around that.

    Args:
        normalize: What is called in its place.
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
    x, _, _, weight, bias, training, momentum, eps, *_ = bound.arguments.values()
    given = {name: value for name, value in bound.arguments.items() if name in Options._fields}
    state = State(None, None, None, training, False, momentum, eps)
    return Call(x, bound.arguments.get("residual"), weight, bias, state, Options(**given))
