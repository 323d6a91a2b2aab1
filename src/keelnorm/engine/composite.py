"""Batch normalization from torch's own differentiable operators, where a fused operator can't run.

Exported programs, tensor subclasses and compiled code without native kernels take :func:`torch_operators`; function
transforms (torch.func) and forward-mode derivatives take :func:`differentiable`; a backward that is itself
differentiated takes :func:`backward`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import Kept, State, refuse_derivative
from keelnorm.engine.layout import counted, dense, per_channel, reduced_dims
from keelnorm.engine.running_statistics import update_running
from keelnorm.engine.torch_internals import forward_ad_active, functorch_is_active
from keelnorm.moments import Moments, compute_dtype, wide_dtype


def torch_operators(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, state: State, act: Activation
) -> Tensor:
    """Return ``act(bn(x) + residual)`` from ``torch.nn.functional.batch_norm``; with a mask, from the formula."""
    if state.mask is not None or (state.training and x.numel() == x.shape[1] > 0):  # torch refuses one value
        return differentiable(x, residual, weight, bias, state, act)
    return _finish(_batch_norm(x, weight, bias, state), residual, act)


def differentiable(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, state: State, act: Activation
) -> Tensor:
    """Return ``act(bn(x) + residual)`` from the formula, right in every order and mode of differentiation.

    ``torch.nn.functional.batch_norm`` is not: several of its mixed higher derivatives in training are wrong. It only
    updates the running statistics here, which are not differentiated.
    """
    if forward_ad_active():
        for name, running in (("running_mean", state.running_mean), ("running_var", state.running_var)):
            if running is not None and forward_ad.unpack_dual(running).tangent is not None:
                refuse_derivative(state.what, name)
    x = dense(x)
    given, counts = x, None
    if state.mask is not None:
        counts = state.mask.unsqueeze(1)
        x = counted(counts, x)  # masked values may be NaN
    if state.training and state.update:
        if state.mask is None and state.sink is None and x.numel() > x.shape[1]:
            _batch_norm(x.detach(), None, None, state)
        else:
            _update(x.detach(), state)
    fixed = None
    if not state.training:
        assert state.running_mean is not None and state.running_var is not None
        wide = wide_dtype(x.device)
        fixed = state.running_mean.to(wide), (state.running_var.to(wide) + state.eps).rsqrt()
    xhat, _ = normalized(x, fixed, state.eps, counts)
    y = finished(scaled(xhat, weight, bias), x, residual, act)
    return y if counts is None else counted(counts, y, given if state.keep else None)


def backward(dy: Tensor, kept: Kept, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dresidual, dweight, dbias as differentiable functions of dy, x, weight, bias and residual.

    In training mean and variance are functions of x too; ``kept.saved`` is only used elsewhere.
    """
    x, weight, bias, residual, act = kept.x, kept.weight, kept.bias, kept.residual, kept.act
    dims, given, counts = reduced_dims(x), dy, None
    if kept.mask is not None:
        counts = kept.mask.unsqueeze(1)
        dy, x = counted(counts, dy), counted(counts, x)
        residual = None if residual is None else counted(counts, residual)
    xhat, rstd = normalized(x, None if kept.training else (kept.saved[0], kept.saved[2]), eps, counts)
    scale = rstd if weight is None else rstd * per_channel(weight.to(rstd.dtype), x)
    g = dy.to(torch.promote_types(xhat.dtype, dy.dtype))
    if act.code != 0:
        v = kept.y
        if v is None:
            v = scaled(xhat, weight, bias)
            v = v if residual is None else v + residual
        g = act.gradient(g, v).to(g.dtype)
    dbias, dweight = g.sum(dims), (g * xhat).sum(dims)
    dx = g * scale
    if kept.training:
        count = max(x.numel() // max(x.shape[1], 1), 1) if kept.mask is None else kept.mask.sum().clamp(min=1)
        dx = dx - scale * (per_channel(dbias, x) + xhat * per_channel(dweight, x)) / count
    dx = dx.to(x.dtype)
    if counts is not None:
        dx = counted(counts, dx, given if kept.keep else None)
    return dx, g.to(dy.dtype), dweight, dbias


def normalized(
    x: Tensor, fixed: tuple[Tensor, Tensor] | None, eps: float, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (x − mean)·rstd and rstd, the latter broadcastable, as differentiable functions.

    Args:
        fixed: Mean and rstd to use; None takes the batch's.
        counts: The mask, broadcastable to x.
    """
    dtype = compute_dtype(x)
    if fixed is None:
        moments = Moments.from_tensor(x, counts)
        mean, rstd = moments.mean, (moments.m2 / moments.count.clamp(min=1) + eps).rsqrt()
    else:
        mean, rstd = fixed
    rstd = per_channel(rstd.to(dtype), x)
    return centered(x, per_channel(mean, x)) * rstd, rstd


def centered(x: Tensor, mean: Tensor) -> Tensor:
    """Return x − mean in the compute dtype; the mean broadcasts to x."""
    dtype = compute_dtype(x)
    # Subtract the rounded mean first, which is exact for nearby x, and then the rest of the mean.
    center = mean.detach().to(dtype)
    return x.to(dtype) - center - (mean - center).to(dtype)


def scaled(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return xhat·weight + bias, with one value of each per channel."""
    y = xhat if weight is None else xhat * per_channel(weight.to(xhat.dtype), xhat)
    return y if bias is None else y + per_channel(bias.to(xhat.dtype), xhat)


def finished(y: Tensor, x: Tensor, residual: Tensor | None, act: Activation) -> Tensor:
    """Return act(y + residual), in the dtype that x and the residual have together."""
    y = _finish(y, residual, act)
    return y.to(x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))


def _finish(y: Tensor, residual: Tensor | None, act: Activation) -> Tensor:
    return act.forward(y if residual is None else y + residual)


def _update(x: Tensor, state: State) -> None:
    """Update the running statistics where torch's own function would refuse the call, or lacks the feature."""
    moments = Moments.from_tensor(x, None if state.mask is None else state.mask.unsqueeze(1))
    count = moments.count if moments.count.dim() == 0 else moments.count[0]
    if x.numel() > 0:
        update_running(state, moments.mean, moments.m2 / count.clamp(min=1), count)


def _batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, state: State) -> Tensor:
    """Call torch's own batch norm, and update the running statistics as ``state`` says."""
    running_mean, running_var, batches = state.running_mean, state.running_var, state.num_batches_tracked
    training, update, momentum, eps = state.training, state.update, state.momentum, state.eps
    if state.sink is not None and training and update:
        _update(x.detach(), state)
        update = False
    if not (training and update) or x.numel() == 0:
        if training and running_mean is not None and running_var is not None:
            # Copies take the update: a checkpoint's second run has to save as many tensors as the first.
            running_mean, running_var = running_mean.clone(), running_var.clone()
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, 0.0, eps)
    # Exported programs have only torch's own operators, and torch.func lets only these write to buffers.
    plain = torch.compiler.is_exporting() or functorch_is_active()
    if running_mean is None or running_var is None or (plain and momentum is not None):
        y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum or 0.0, eps)
        if batches is not None:
            batches.add_(1)
        return y
    if not plain and running_mean.dtype.itemsize < compute_dtype(x).itemsize:
        # torch rounds the batch's statistics before averaging: they would lose digits, or overflow.
        y = F.batch_norm(x, running_mean.clone(), running_var.clone(), weight, bias, True, 0.0, eps)
        _update(x.detach(), state)
        return y
    # momentum=1 writes the batch's own statistics, and update_running takes the finite ones.
    mean, unbiased = torch.zeros_like(running_mean), torch.zeros_like(running_var)
    y = F.batch_norm(x, mean, unbiased, weight, bias, True, 1.0, eps)
    if plain:
        assert batches is not None  # see check_arguments
        batches.add_(1)
        factor = (1 / batches.double()).to(mean.dtype)
        running_mean.add_((mean - running_mean) * factor)
        running_var.add_((unbiased - running_var) * factor)
        return y
    count = x.numel() // x.shape[1]
    update_running(state, mean, unbiased * ((count - 1) / count), count)
    return y
