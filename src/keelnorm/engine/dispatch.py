"""Batch normalization with residual and activation: which implementation answers a call.

The fast operators do where they take the call, the reference operators elsewhere, and plain differentiable torch
(``composite``) where a transform asks for more than a backward.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from keelnorm.engine import composite, fallback, ops, saved_outputs
from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import Kept, Needs, State
from keelnorm.engine.fast_operators import mark_updated, run_fast
from keelnorm.engine.kernels import registry, triton
from keelnorm.engine.layout import counted, dense, pad_
from keelnorm.engine.recomputation import is_second_run
from keelnorm.engine.rollback import Unchanged
from keelnorm.engine.running_statistics import update_running
from keelnorm.engine.torch_internals import functorch_is_active, is_transformed, plain_apply, transforms_active

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
    """Return ``act(bn(x) + residual)``; arguments are taken to be legal, see arguments.check_arguments.

    Args:
        saved: What :func:`measure` found for x, which then normalizes; nothing is updated.
    """
    if torch.compiler.is_compiling():
        return _traced(x, residual, weight, bias, state, act)
    if state.update and is_second_run():
        state = state._replace(update=False)
    if transforms_active():
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
    """Return (mean, var, rstd) that normalize x, as one (3, C) tensor, and update the running statistics.

    The first half of :func:`batch_norm`, whose second half takes the result as ``saved``.

    Args:
        x: A plain tensor, contiguous or channels-last.
        state: Without a mask.
    """
    if state.update and is_second_run():
        state = state._replace(update=False)
    x = x.detach()
    saved: Tensor | None = run_fast(
        "measure_", x, x, state.running_mean, state.running_var, state.num_batches_tracked, state.training,
        state.update and state.sink is None, state.momentum, state.eps, state.counts(),
    )  # fmt: skip
    if saved is not None:
        _note_update(x, saved, state)
        return saved
    with torch.no_grad(), unchanged(state):
        saved, count = fallback.statistics(x, state)
        fallback.update(x, saved, count, state)
    return saved


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
        y, saved, by_reference = forward(x, residual, weight, bias, saved, state, act)
        if saved_outputs.calls:
            note_output(y, x, residual, weight, bias, saved, state, act, by_reference)
        ctx.save_for_backward(x, weight, saved, *ops.gate_needs(act.code, residual, bias, y), state.mask)
        ctx.training, ctx.eps, ctx.act, ctx.keep = state.training, state.eps, act, state.keep
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved, bias, y, residual, mask = ctx.saved_tensors
        kept = Kept(
            x=x, saved=saved, weight=weight, bias=bias, y=y, residual=residual, training=ctx.training, act=ctx.act,
            mask=mask, keep=ctx.keep,
        )  # fmt: skip
        need = Needs(*ctx.needs_input_grad[:4])
        dx, dresidual, dweight, dbias = gradients(dy, kept, need, ctx.eps)
        if need.residual and mask is not None:
            dresidual = counted(mask.unsqueeze(1), dresidual)
        return (
            dx if need.x else None,
            dresidual.to(ctx.residual_dtype) if need.residual else None,
            dweight if need.weight else None,
            dbias if need.bias else None,
            None,
            None,
            None,
        )


def gradients(dy: Tensor, kept: Kept, need: Needs, eps: float) -> tuple[Any, ...]:
    """Return dx, dresidual, dweight, dbias, as far as they are needed, and differentiable where that is asked for."""
    if torch.is_grad_enabled() or is_transformed():  # create_graph=True, or a derivative of the backward
        return composite.backward(dy, kept, eps)
    written = need.residual and kept.act.code != 0
    dx, dresidual, dweight, dbias = backward(dy, kept, need._replace(residual=written))
    return dx, dresidual if written else dy, dweight, dbias


_apply = plain_apply(_BatchNorm)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor | None,
    state: State,
    act: Activation,
) -> tuple[Tensor, Tensor, bool]:
    """Return y, (mean, var, rstd) as one (3, C) tensor, and whether the reference ran, without a graph.

    Unless statistics are given, the running statistics are updated as ``state`` says.
    """
    check = (state.what, x, residual, weight, bias, state)
    if saved is not None:
        y = run_fast("finish", x, x, saved, weight, bias, residual, act.code, act.a, act.b, check=check)
        if y is not None:
            if state.mask is not None:
                pad_(state.mask.unsqueeze(1), y, x if state.keep else None)
            return y, saved, False
    else:
        result = run_fast(
            "forward_", x, x, residual, weight, bias, state.running_mean, state.running_var, state.num_batches_tracked,
            state.training, state.update and state.sink is None, state.momentum, state.eps, act.code, act.a, act.b,
            state.counts(), state.mask, state.keep, check=check,
        )  # fmt: skip
        if result is not None:
            _note_update(x, result[1], state)
            return *result, False
    with unchanged(state):
        return *fallback.forward(x, residual, weight, bias, state, act, saved), True


def note_output(
    y: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, saved: Tensor,
    state: State, act: Activation, by_reference: bool,
) -> None:  # fmt: skip
    """Note how y is computed, so that it need not be kept for the backward; see `engine.saved_outputs`.

    Args:
        by_reference: Whether the reference computed y: a fast operator would give other last bits.
    """
    # Copies, of C values each: a wrapper may free the parameters before the backward, or an optimizer change them.
    scale = None if weight is None else weight.detach().clone()
    shift = None if bias is None else bias.detach().clone()
    mask = state.mask  # held as x is, since code may write to it
    state = state._replace(update=False, num_batches_tracked=None, updates=None, mask=None, sink=None)

    def make(x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        masked = state._replace(mask=mask)
        if by_reference:  # also where other kernels have been chosen since
            return fallback.forward(x, residual, scale, shift, masked, act, saved)[0]
        return forward(x, residual, scale, shift, saved, masked, act)[0]

    saved_outputs.note(y, make, x, residual, mask)


def _note_update(x: Tensor, saved: Tensor, state: State) -> None:
    """Do what a fast operator leaves to its caller: autograd is told what it wrote, or the sink takes the moments."""
    if state.sink is None:
        mark_updated(state)
    else:
        fallback.fill_sink(x, saved, state)


def unchanged(state: State) -> AbstractContextManager[None]:
    """Inside, an exception leaves the buffers of a state as they were."""
    if not state.update or torch.compiler.is_compiling():
        return nullcontext()
    return Unchanged((state.running_mean, state.running_var, state.num_batches_tracked, state.counts()))


def backward(dy: Tensor, kept: Kept, need: Needs) -> tuple[Any, ...]:
    """Return dx, dresidual, dweight, dbias, as far as they are needed."""
    act = kept.act
    found = run_fast(
        "backward", kept.x, dy, kept.x, kept.saved, kept.weight, kept.bias, kept.y, kept.residual, kept.training,
        act.code, act.a, act.b, *need, kept.mask, kept.keep,
    )  # fmt: skip
    return fallback.backward(dy, kept, need) if found is None else found


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
        and not functorch_is_active()
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
