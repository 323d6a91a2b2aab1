"""Batch normalization in x's own memory: y overwrites x, and the backward rebuilds x from y.

    x = mean + (act⁻¹(y) − bias)/(weight·rstd)        act: none, leaky_relu, elu

The backward keeps y, weight, bias and (mean, var, rstd), and nothing else of x's size. The error of the rebuilt x, in
standard deviations, is |bias/weight| roundings of y, or exp(−v)/|weight| where elu saturates; where y overflows, x is
lost. The few channels whose error is too large keep a copy of their x, so that gradients are right for every weight,
zero included.

Source:
    Rota Bulò, Porzi, Kontschieder (2018), "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs",
    arXiv:1712.02616, section 3; there |weight| + eps takes the weight's place, here the weight stays what it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from keelnorm.engine import composite, dispatch, fallback
from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import Kept, Needs, State
from keelnorm.engine.fast_operators import mark_updated, run_fast
from keelnorm.engine.kernels import reference
from keelnorm.engine.layout import reduced_dims, require_memory
from keelnorm.engine.recomputation import is_second_run
from keelnorm.engine.torch_internals import is_batched_gradient, is_transformed, plain_apply
from keelnorm.moments import wide_dtype

#: The largest error of the rebuilt x: 64 roundings, in standard deviations; 8 for the half-precision dtypes.
_ROUNDINGS = {torch.float32: 64.0, torch.float64: 64.0}
_HALF_ROUNDINGS = 8.0
#: The same for elu, where only the lowest values are affected: exp(−v)/|weight|, so v ≥ -4.9 for a weight of 1.
_ELU_ROUNDINGS = 128.0
#: The smallest weight to divide by.
_TINY = 1e-20


def batch_norm_(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: State, act: Activation) -> Tensor:
    """Overwrite x by ``act(bn(x))`` and return it; arguments are taken to be legal, see arguments.check_inplace.

    Under torch.compile, torch.func and forward-mode derivatives, and for subclasses, the result is a new tensor.
    """
    if torch.compiler.is_compiling() or is_transformed() or type(x) not in dispatch.PLAIN:
        return dispatch.batch_norm(x, None, weight, bias, state, act)
    if state.update and is_second_run():
        state = state._replace(update=False)
    tensors = [t for t in (x, weight, bias) if t is not None]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        _forward(x, weight, bias, state, act)
        return x
    if any(t.is_inference() for t in tensors):
        dispatch.refuse_inference(state.what)
    what = "a leaf that requires a gradient" if x.requires_grad and x.is_leaf else "a view of another tensor"
    if x._is_view() or (x.requires_grad and x.is_leaf):
        raise RuntimeError(
            f"{state.what}: inplace=True overwrites x, which must not be {what}; use inplace=False, or clone x first"
        )
    return _apply(x, weight, bias, state, act)  # type: ignore[no-any-return]


class _InplaceBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, state: State, act: Activation
    ) -> Tensor:
        running = {"running_mean": state.running_mean, "running_var": state.running_var}
        require_memory(state.what, x=x, weight=weight, bias=bias, **running)
        lost = _lost_channels(x, weight, bias, state, act)
        kept = None if lost is None else x.index_select(1, lost)
        saved = _forward(x, weight, bias, state, act)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, weight, bias, saved, lost, kept)
        ctx.what, ctx.training, ctx.eps, ctx.act = state.what, state.training, state.eps, act
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, saved, lost, kept = ctx.saved_tensors
        act = ctx.act
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{ctx.what}: there is no second derivative through inplace=True (create_graph=True asks for one): the "
                "backward rebuilds x from y, and how x came about is lost. Use inplace=False"
            )
        with torch.no_grad():
            x = _invert(y, saved, weight, bias, act)
            if lost is not None:
                x.index_copy_(1, lost, kept)
        needed = ctx.needs_input_grad[:3]
        kept = Kept(
            x=x, saved=saved, weight=weight, bias=bias if act.code else None, y=None, residual=None,
            training=ctx.training, act=act,
        )  # fmt: skip
        if is_transformed() or is_batched_gradient(dy):  # a batch of gradients
            found = composite.backward(dy, kept, ctx.eps)
            gradients: tuple[Tensor | None, ...] = (found[0], *found[2:])
        else:
            need_x, need_weight, need_bias = needed
            gradients = _backward(dy, kept, Needs(x=need_x, residual=False, weight=need_weight, bias=need_bias))
        return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None


_apply = plain_apply(_InplaceBatchNorm)


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: State, act: Activation) -> Tensor:
    """Return (mean, var, rstd) as one (3, C) tensor; x becomes y, and the running statistics are updated."""
    saved: Tensor | None = run_fast(
        "inplace_", x, x, weight, bias, state.running_mean, state.running_var, state.num_batches_tracked,
        state.training, state.update and state.sink is None, state.momentum, state.eps, act.code, act.a, act.b,
        state.counts(), check=(state.what, x, None, weight, bias, state),
    )  # fmt: skip
    if saved is not None:
        mark_updated(state if state.sink is None else state._replace(update=False), x)
        if state.sink is not None:
            fallback.fill_sink(x, saved, state)
        return saved
    with dispatch.unchanged(state):
        y, saved = fallback.forward(x, None, weight, bias, state, act)
        x.copy_(y)
        return saved


def _invert(y: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, act: Activation) -> Tensor:
    x: Tensor | None = run_fast("invert", y, y, saved, weight, bias, act.code, act.a, act.b)
    return reference.invert(y, saved[0], saved[2], weight, bias, act) if x is None else x


def _backward(dy: Tensor, kept: Kept, need: Needs) -> tuple[Tensor | None, ...]:
    """Return dx, dweight, dbias; dx in x's memory where kernels can."""
    x, act = kept.x, kept.act
    if need.x:
        found = run_fast(
            "backward_", x, dy, x, kept.saved, kept.weight, kept.bias, kept.training, act.code, act.a, act.b,
            need.weight, need.bias,
        )  # fmt: skip
        if found is not None:
            return x, *found
    dx, _, dweight, dbias = dispatch.backward(dy, kept, need)
    return dx, dweight, dbias


def _lost_channels(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, state: State, act: Activation
) -> Tensor | None:
    """Return the indices of the channels whose x can't be rebuilt exactly enough; None where there are none."""
    if x.numel() == 0 or x.is_meta:
        return None
    saturates = act.name == "elu"
    wide = wide_dtype(x.device)
    scale = x.new_ones(x.shape[1], dtype=wide) if weight is None else weight.to(wide)
    shift = torch.zeros_like(scale) if bias is None else bias.to(wide)
    size, slope = scale.abs(), act.a if act.code else 1.0
    numbers = torch.finfo(x.dtype)
    # Among denormal numbers the rounding error is absolute, not relative.
    least = max(_TINY, numbers.smallest_normal / 8)
    found = (size * _ROUNDINGS.get(x.dtype, _HALF_ROUNDINGS) >= shift.abs()) & (size * min(1.0, slope) >= least)
    # No value is farther from the mean of M values than √M standard deviations.
    farthest: float | Tensor = math.sqrt(x.numel() // x.shape[1])
    if saturates or not state.training:
        mean, rstd, farthest = _statistics(x, state)
    # Half, because the kernels' own roundings come on top. Comparisons with NaN are false.
    found &= max(1.0, slope) * (size * farthest + shift.abs()) <= numbers.max / 2
    if saturates:
        dims = reduced_dims(x)
        lowest = torch.where(scale >= 0, x.amin(dims), x.amax(dims)).to(wide)
        lowest = (lowest - mean) * rstd * scale + shift
        found &= (-lowest).exp() <= _ELU_ROUNDINGS * size
    lost = (~found).nonzero().flatten()
    return lost if lost.numel() else None


def _statistics(x: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
    """Return the forward's mean and rstd, and how far values can be from the mean, in standard deviations."""
    found = run_fast("stats", x, x, None)
    if found is None:
        moments = reference.stats(x)
        found = moments.mean, moments.var
    batch_mean, batch_var = found
    mean, var = batch_mean, batch_var
    if not state.training:
        assert state.running_mean is not None and state.running_var is not None
        mean, var = state.running_mean.to(mean.dtype), state.running_var.to(mean.dtype)
    rstd = (var + state.eps).rsqrt()
    return mean, rstd, ((batch_mean - mean).abs() + (batch_var * (x.numel() // x.shape[1])).sqrt()) * rstd
