"""Batch normalization with residual and activation, on whatever answers the call rightly.

:func:`batch_norm` takes the fast operators where they apply, the reference back end elsewhere, and plain
differentiable torch (``composite``) where a transform asks for more than a backward.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from keelnorm.engine import composite, ops
from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import State, check_arguments
from keelnorm.engine.kernels import reference, registry, triton
from keelnorm.engine.layout import counted, dense
from keelnorm.engine.recomputation import is_second_run
from keelnorm.engine.rollback import Unchanged
from keelnorm.engine.running_statistics import update_running
from keelnorm.engine.update_counts import COUNTS
from keelnorm.moments import wide_dtype

_UNSUPPORTED = "keelnorm: unsupported: "
_log = logging.getLogger("keelnorm")
#: What the fast operators have declined for in this process, and said so.
_declined_for: set[str] = set()

#: Tensors that are nothing but memory.
PLAIN = (Tensor, torch.nn.Parameter)


def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    state: State,
    act: Activation,
    saved: Tensor | None = None,
) -> Tensor:
    """``act(bn(x) + residual)``; arguments are taken to be legal, see arguments.check_arguments.

    Args:
        saved: What :func:`measure` has found for x, which then normalizes; nothing is updated.
    """
    if torch.compiler.is_compiling():
        return _traced(x, residual, weight, bias, state, act)
    if state.update and is_second_run():
        state = state._replace(update=False)
    # What transformed() asks, without a second look at the compiler.
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        with unchanged(state):
            return composite.differentiable(x, residual, weight, bias, state, act)
    if type(x) not in PLAIN:
        with unchanged(state):
            return composite.torch_operators(x, residual, weight, bias, state, act)
    if not x.is_contiguous():
        x = dense(x)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        if (
            x.is_inference()
            or (weight is not None and weight.is_inference())
            or (residual is not None and act.code > 1 and residual.is_inference())  # see ops.gate_needs
        ):
            refuse_inference(state.what)
        return _apply(x, residual, weight, bias, saved, state, act)  # type: ignore[no-any-return]
    return forward(x, residual, weight, bias, saved, state, act)[0]


def measure(x: Tensor, state: State) -> Tensor:
    """Mean, variance and 1/√(var + eps) that normalize x, as one (3, C) tensor; the running statistics are updated.

    The first half of :func:`batch_norm`, whose second half takes the result as ``saved``.

    Args:
        x: A plain tensor, contiguous or channels-last.
        state: Without a mask.
    """
    if state.update and is_second_run():
        state = state._replace(update=False)
    running_mean, running_var, batches, training, update, momentum, eps, _, _, _, _, sink = state
    x = x.detach()
    fast = registry.operators(x)
    if fast is not None:
        try:
            saved: Tensor = fast.measure_(
                x, running_mean, running_var, batches, training, update and sink is None, momentum, eps, state.counts()
            )
            if sink is None:
                mark_updated(state)
            else:
                fill_sink(x, saved, state)
            return saved
        except RuntimeError as error:
            if not declined(error):
                raise
            announce_declined(error)
    with torch.no_grad(), unchanged(state):
        saved, count = _reference_measure(x, state)
        _reference_update(x, saved, count, state)
    return saved


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which see only torch's own operators."""
    if torch.compiler.is_compiling():  # the compiler differentiates what it traced, not this
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def refuse_inference(what: str) -> NoReturn:
    """Raise because of a tensor that the backward will need, and that was made under torch.inference_mode."""
    raise RuntimeError(
        f"{what}: a tensor that was made under torch.inference_mode can't be saved for the backward; "
        "clone it outside, or call the layer under torch.inference_mode or torch.no_grad"
    )


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        saved: Tensor | None,
        state: State,
        act: Activation,
    ) -> Tensor:
        y, saved = forward(x, residual, weight, bias, saved, state, act)
        ctx.save_for_backward(x, weight, saved, *ops.gate_needs(act.code, residual, bias, y), state.mask)
        ctx.options = state.training, state.eps, act, None if residual is None else residual.dtype, state.keep
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved, bias, y, residual, mask = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
        training, eps, act, residual_dtype, keep = ctx.options
        dresidual = dy
        if torch.is_grad_enabled() or transformed():  # create_graph=True, or a derivative of the backward
            fixed = None if training else (saved[0], saved[2])
            dx, dresidual, dweight, dbias = composite.backward(
                dy, x, weight, bias, fixed, y, residual, eps, act, mask, keep
            )
        else:
            write_residual = need_residual and act.code != 0
            dx, written, dweight, dbias = backward(
                dy, x, saved, weight, bias, y, residual, training, act, need_x, write_residual, need_weight, need_bias,
                mask, keep,
            )  # fmt: skip
            if write_residual:
                dresidual = written
            if need_residual and mask is not None:
                dresidual = counted(mask.unsqueeze(1), dresidual)
        return (
            dx if need_x else None,
            dresidual.to(residual_dtype) if need_residual else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            None,
            None,
            None,
        )


# Function.apply without its preparations for torch.func, which batch_norm has ruled out: they cost as much as a kernel
# takes on a small tensor.
_apply = super(torch.autograd.Function, _BatchNorm).apply


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor | None,
    state: State,
    act: Activation,
) -> tuple[Tensor, Tensor]:
    """y, and (mean, var, rstd) as one (3, C) tensor.

    Unless the latter is given, the running statistics are updated as ``state`` says.
    """
    running_mean, running_var, batches, training, update, momentum, eps, what, _, mask, keep, sink = state
    fast = registry.operators(x)
    if fast is not None:
        try:
            if saved is not None:
                return fast.finish(x, saved, weight, bias, residual, act.code, act.a, act.b), saved
            result = fast.forward_(
                x, residual, weight, bias, running_mean, running_var, batches, training, update and sink is None,
                momentum, eps, act.code, act.a, act.b, state.counts(), mask, keep,
            )  # fmt: skip
            if sink is None:
                mark_updated(state)
            else:
                fill_sink(x, result[1], state)
            return result  # type: ignore[no-any-return]
        except RuntimeError as error:
            if not declined(error):
                raise
            check_arguments(what, x, residual, weight, bias, state)
            announce_declined(error)
    with unchanged(state):
        return reference_forward(x, residual, weight, bias, state, act, saved)


def fill_sink(x: Tensor, saved: Tensor, state: State) -> None:
    """Give the sink what a fast operator, which knows of none, has found."""
    count = x.numel() // max(x.shape[1], 1) if state.mask is None else state.mask.sum()
    _reference_update(x, saved, count, state)


def mark_updated(state: State, *others: Tensor) -> None:
    """Tell autograd what a fast operator has overwritten: updated running statistics, and others."""
    changed = [*others]
    if state.update and state.running_mean is not None:
        counts = None if state.updates is None else state.updates.tensor
        for buffer in (state.running_mean, state.running_var, state.num_batches_tracked, counts):
            if buffer is not None and not buffer.is_inference():
                changed.append(buffer)
    torch._C._increment_version(changed)


def declined(error: RuntimeError) -> bool:
    """Whether the fast operators declined a case before they wrote anything."""
    return _UNSUPPORTED in str(error) or isinstance(error, NotImplementedError)


def announce_declined(error: RuntimeError) -> None:
    """Say once for each argument that the reference back end runs because of it.

    (x alone: it is empty. The counts: the reference puts them right, so that it runs this once.)
    """
    reason = str(error).partition(_UNSUPPORTED)[2].partition("\n")[0].strip()
    if reason and reason not in ("x", COUNTS) and reason not in _declined_for:
        _declined_for.add(reason)
        _log.warning(
            "the fast kernels do not take this dtype or layout of %s: the reference back end runs, which is slower",
            reason,
        )


def unchanged(state: State) -> AbstractContextManager[None]:
    """Inside, an exception leaves the buffers of a state as they were."""
    if not state.update or torch.compiler.is_compiling():
        return nullcontext()
    return Unchanged((state.running_mean, state.running_var, state.num_batches_tracked, state.counts()))


def reference_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    state: State,
    act: Activation,
    saved: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    given = saved is not None
    count: int | Tensor = 0
    if saved is None:
        saved, count = _reference_measure(x, state)
    mean, _, rstd = saved.unbind()
    if state.mask is None:
        y = reference.apply(x, mean, rstd, weight, bias, residual, act)
    else:
        counts = state.mask.unsqueeze(1)
        y = reference.apply(counted(counts, x), mean, rstd, weight, bias, residual, act)
        y = counted(counts, y, x if state.keep else None)
    if not given:
        _reference_update(x, saved, count, state)
    return y, saved


def _reference_measure(x: Tensor, state: State) -> tuple[Tensor, int | Tensor]:
    """(mean, var, rstd), and the number of values per channel."""
    count: int | Tensor = x.numel() // max(x.shape[1], 1)
    if state.training:
        moments = reference.stats(x, state.mask)
        if state.mask is not None:
            count = state.mask.sum()
        # An empty batch has no variance; any will do for no values.
        mean, var = moments.mean, moments.m2 / moments.count.clamp(min=1)
    else:
        assert state.running_mean is not None and state.running_var is not None
        wide = wide_dtype(x.device)
        mean, var = state.running_mean.to(wide), state.running_var.to(wide)
    return torch.stack([mean, var, (var + state.eps).rsqrt()]), count


def _reference_update(x: Tensor, saved: Tensor, count: int | Tensor, state: State) -> None:
    if state.training and state.update and x.numel() > 0:
        update_running(state, saved[0], saved[1], count)


def backward(
    dy: Tensor, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None,
    residual: Tensor | None, training: bool, act: Activation, need_input: bool, need_residual: bool, need_weight: bool,
    need_bias: bool, mask: Tensor | None = None, keep: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """dx, dresidual, dweight, dbias, as far as they are needed; from what ``ops.gate_needs`` left."""
    fast = registry.operators(x)
    if fast is not None:
        try:
            return fast.backward(  # type: ignore[no-any-return]
                dy, x, saved, weight, bias, y, residual, training, act.code, act.a, act.b, need_input, need_residual,
                need_weight, need_bias, mask, keep,
            )  # fmt: skip
        except RuntimeError as error:
            if not declined(error):
                raise
            announce_declined(error)
    count: int | Tensor = max(x.numel() // max(x.shape[1], 1), 1)
    given_dy, counts = dy, None
    if mask is not None:
        counts, count = mask.unsqueeze(1), mask.sum().clamp(min=1)
        dy, x = counted(counts, dy), counted(counts, x)
        residual = None if residual is None else counted(counts, residual)
    mean, _, rstd = saved
    given = (dy, x, mean, rstd, weight, bias, y, residual)
    sum_g, sum_gxhat = reference.grad_stats(*given, act)
    dx = None
    if need_input:
        dx = reference.grad_input(*given, (sum_g / count, sum_gxhat / count) if training else None, act)
        if counts is not None:
            dx = counted(counts, dx, given_dy if keep else None)
    dresidual = reference.grad_residual(*given, act) if need_residual else None
    return dx, dresidual, sum_gxhat, sum_g  # autograd gives the last two the dtypes of weight and bias


def _traced(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, state: State, act: Activation
) -> Tensor:
    """Under torch.compile: the fast operators as they are; elsewhere, and in torch.export, torch's own operators."""
    vectors = (weight, bias, state.running_mean, state.running_var)
    legal = registry.DTYPES if x.device.type == "cpu" else triton.DTYPES
    fast = (
        registry.in_compiled_code(x.device)
        and state.mask is None
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
        and x.dtype in legal
        and x.numel() > 0
        and (residual is None or residual.dtype is x.dtype)
        and all(t is None or t.device == x.device for t in (residual, *vectors))
        and all(
            t is None or (t.dtype in (torch.float32, torch.float64, x.dtype) and t.is_contiguous()) for t in vectors
        )
    )
    if not fast:
        return composite.torch_operators(x, residual, weight, bias, state, act)
    y, saved = torch.ops.keelnorm.forward(
        dense(x), residual, weight, bias, state.running_mean, state.running_var, state.training, state.eps,
        act.code, act.a, act.b,
    )  # fmt: skip
    if state.training and state.update:
        update_running(state, saved[0], saved[1], x.numel() // x.shape[1])
    return y  # type: ignore[no-any-return]
