"""Batch normalization with residual and activation, on whatever answers the call rightly.

:func:`batch_norm` takes the native operators where they apply, the reference back end elsewhere, and plain
differentiable torch (``composite``) where a transform asks for more than a backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from evenkeel import composite, kernels, ops
from evenkeel.arguments import ACTIVATIONS, State, check_arguments
from evenkeel.kernels import reference
from evenkeel.moments import wide_dtype

_NAMES = {code: name for name, code in ACTIVATIONS.items()}
_PLAIN = (Tensor, torch.nn.Parameter)


def batch_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, state: State, activation: int
) -> Tensor:
    """``act(bn(x) + residual)``; arguments are taken to be legal, see arguments.check_arguments."""
    if torch.compiler.is_compiling():
        return _traced(x, residual, weight, bias, state, activation)
    # A forward inside a backward is a checkpoint's second run: its batch has been counted.
    if state.update and torch._C._current_graph_task_id() != -1:
        state = state._replace(update=False)
    if _transformed():
        return composite.differentiable(x, residual, weight, bias, state, activation)
    if type(x) not in _PLAIN:
        return composite.torch_operators(x, residual, weight, bias, state, activation)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        if x.is_inference() or (weight is not None and weight.is_inference()):
            raise RuntimeError(
                f"{state.what}: a tensor that was made under torch.inference_mode can't be saved for the backward; "
                "clone it outside, or call the layer under torch.inference_mode or torch.no_grad"
            )
        return _apply(x, residual, weight, bias, state, activation)  # type: ignore[no-any-return]
    return _forward(x, residual, weight, bias, state, activation)[0]


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which see only torch's own operators."""
    if torch.compiler.is_compiling():  # the compiler differentiates what it traced, not this
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        state: State,
        activation: int,
    ) -> Tensor:
        y, saved = _forward(x, residual, weight, bias, state, activation)
        ctx.save_for_backward(x, weight, saved, *ops.gate_needs(activation, residual, bias, y))
        ctx.options = state.training, state.eps, activation, None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved, bias, y = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias, _, _ = ctx.needs_input_grad
        training, eps, activation, residual_dtype = ctx.options
        dresidual = dy
        if torch.is_grad_enabled() or _transformed():  # create_graph=True, or a derivative of the backward
            fixed = None if training else (saved[0], saved[2])
            dx, dresidual, dweight, dbias = composite.backward(dy, x, weight, bias, fixed, y, eps, activation)
        else:
            write_residual = need_residual and activation != 0
            dx, written, dweight, dbias = _backward(
                dy, x, saved, weight, bias, y, training, activation, need_x, write_residual, need_weight, need_bias
            )
            if write_residual:
                dresidual = written
        return (
            dx if need_x else None,
            dresidual.to(residual_dtype) if need_residual else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            None,
            None,
        )


# Function.apply without its preparations for torch.func, which batch_norm has ruled out: they cost as much as a kernel
# takes on a small tensor.
_apply = super(torch.autograd.Function, _BatchNorm).apply


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, state: State, activation: int
) -> tuple[Tensor, Tensor]:
    """y, and (mean, var, rstd) as one (3, C) tensor; the running moments are updated as ``state`` says."""
    running_mean, running_var, batches, training, update, momentum, eps, what = state
    if kernels.native_takes(x):
        try:
            result = torch.ops.evenkeel.forward_(
                x, residual, weight, bias, running_mean, running_var, batches, training, update, momentum, eps,
                activation,
            )  # fmt: skip
            if update and running_mean is not None:
                torch._C._increment_version([t for t in (running_mean, running_var, batches) if t is not None])
            return result  # type: ignore[no-any-return]
        except RuntimeError as error:
            if not _declined(error):
                raise
            check_arguments(what, x, residual, weight, bias, state, _NAMES[activation])
    return _reference_forward(x, residual, weight, bias, state, activation)


def _declined(error: RuntimeError) -> bool:
    """Whether the native operators declined a case before they wrote anything."""
    return "evenkeel: unsupported" in str(error) or isinstance(error, NotImplementedError)


def _reference_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, state: State, activation: int
) -> tuple[Tensor, Tensor]:
    if state.training:
        moments = reference.stats(x)
        # An empty batch has no variance; any will do for no values.
        mean, var = moments.mean, moments.m2 / moments.count.clamp(min=1)
    else:
        assert state.running_mean is not None and state.running_var is not None
        wide = wide_dtype(x.device)
        mean, var = state.running_mean.to(wide), state.running_var.to(wide)
    rstd = (var + state.eps).rsqrt()
    y = reference.apply(x, mean, rstd, weight, bias, residual, activation)
    if state.training and state.update and x.numel() > 0:
        update_running(state, mean, var, x.numel() // x.shape[1])
    return y, torch.stack([mean, var, rstd])


def update_running(state: State, mean: Tensor, var: Tensor, count: int) -> None:
    """running = (1 − momentum)·running + momentum·batch, with the unbiased variance."""
    with torch.no_grad():
        if state.num_batches_tracked is not None:
            state.num_batches_tracked.add_(1)
        if state.running_mean is None or state.running_var is None:
            return
        factor: float | Tensor
        if state.momentum is not None:
            factor = state.momentum
        else:
            assert state.num_batches_tracked is not None  # check_arguments saw to it
            factor = 1 / state.num_batches_tracked.to(mean.dtype)
        for running, batch in ((state.running_mean, mean), (state.running_var, var * (count / (count - 1)))):
            running.copy_((1 - factor) * running.to(batch.dtype) + factor * batch)


def _backward(
    dy: Tensor, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None, training: bool,
    activation: int, need_input: bool, need_residual: bool, need_weight: bool, need_bias: bool,
) -> tuple[Any, ...]:  # fmt: skip
    if kernels.native_takes(x):
        try:
            return torch.ops.evenkeel.backward(  # type: ignore[no-any-return]
                dy, x, saved, weight, bias, y, training, activation, need_input, need_residual, need_weight, need_bias
            )
        except RuntimeError as error:
            if not _declined(error):
                raise
    mean, _, rstd = saved
    sum_g, sum_gxhat = reference.grad_stats(dy, x, mean, rstd, weight, bias, y, activation)
    dx = dresidual = None
    if need_input:
        count = max(x.numel() // max(x.shape[1], 1), 1)
        means = (sum_g / count, sum_gxhat / count) if training else None
        dx = reference.grad_input(dy, x, mean, rstd, weight, bias, y, means, activation)
    if need_residual:
        assert y is not None
        dresidual = torch.where(y <= 0, 0, dy)
    return dx, dresidual, sum_gxhat, sum_g  # autograd gives the last two the dtypes of weight and bias


def _traced(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, state: State, activation: int
) -> Tensor:
    """Under torch.compile: the native operators as they are; elsewhere, and in torch.export, torch's own operators."""
    vectors = (weight, bias, state.running_mean, state.running_var)
    native = (
        kernels.native_enabled
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
        and x.numel() > 0
        and all(t is None or (t.dtype is torch.float32 and t.device.type == "cpu") for t in (x, residual, *vectors))
        and all(t is None or t.is_contiguous() for t in vectors)
    )
    if not native:
        return composite.torch_operators(x, residual, weight, bias, state, activation)
    y, saved = torch.ops.evenkeel.forward(
        x, residual, weight, bias, state.running_mean, state.running_var, state.training, state.eps, activation
    )
    if state.training and state.update:
        update_running(state, saved[0], saved[1], x.numel() // x.shape[1])
    return y  # type: ignore[no-any-return]
