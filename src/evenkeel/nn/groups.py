"""Batch normalization of consecutive groups of samples, each by its own moments.

Two ways, chosen by layout. Contiguous values of many positions, (N, C, *S), are N·C rows of S values in memory: the
kernels see N·C channels of one sample, their moments merge to those of the groups, and no value is copied. Elsewhere
(channels-last, few positions) each group is a batch normalization, in place on a copy that stands where its result
belongs: that is faster than to copy the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evenkeel import composite, fused, inplace, kernels, ops
from evenkeel.activations import NAMED, Activation
from evenkeel.arguments import State
from evenkeel.functional import moments as moments_of
from evenkeel.layout import dense
from evenkeel.moments import Moments, compute_dtype

#: Fewer values in a row than this, and what each row costs (its mean and so on, in float64) outweighs the copies.
LEAST_ROW = 128
_RELU = NAMED["relu"].code


def merge_rows(rows: Moments, groups: Tensor | None = None, number: int = 1) -> Moments:
    """Merge moments that stand in rows, as :meth:`Moments.merge` does, all at once.

    Args:
        rows: count (R, 1), mean and m2 (R, C).
        groups: Which of ``number`` groups each row belongs to, shape (R,); None merges all rows to one.

    Returns:
        count (number, 1), mean and m2 (number, C); without groups count () and (C,).
    """
    if groups is None:
        count = rows.count.sum()
        mean = (rows.count * rows.mean).sum(0) / count.clamp(min=1)
        return Moments(count, mean, (rows.m2 + rows.count * (rows.mean - mean).square()).sum(0))
    zeros = rows.mean.new_zeros(number, rows.mean.shape[1])
    count = rows.count.new_zeros(number, 1).index_add(0, groups, rows.count)
    mean = zeros.index_add(0, groups, rows.count * rows.mean) / count
    return Moments(count, mean, zeros.index_add(0, groups, rows.m2 + rows.count * (rows.mean - mean[groups]).square()))


def normalize_groups(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, sizes: list[int], state: State,
    act: Activation,
) -> tuple[Tensor, Moments]:  # fmt: skip
    """``act(bn(x) + residual)`` with each group of samples normalized by itself, and the groups' moments in rows.

    Args:
        sizes: Samples per group; their sum is N, and each has two values per channel (or there is one group).
        state: For its eps; the running moments are left alone.
    """
    plain = type(x) in fused.PLAIN and not torch.compiler.is_compiling() and not fused.transformed()
    if not plain or len(sizes) == 1 or x.numel() == 0:
        xs = x.split(sizes)
        residuals = [None] * len(xs) if residual is None else residual.split(sizes)
        ys = [fused.batch_norm(*each, weight, bias, state, act) for each in zip(xs, residuals, strict=True)]
        parts = [moments_of(each.detach()) for each in xs]
        stacked = [torch.stack(values) for values in zip(*((m.count, m.mean, m.m2) for m in parts), strict=True)]
        return ys[0] if len(ys) == 1 else torch.cat(ys), Moments(stacked[0][:, None], *stacked[1:])
    y, mean, var = _Groups.apply(dense(x), residual, weight, bias, sizes, state, act)
    count = (mean.new_tensor(sizes) * x[0, 0].numel())[:, None]
    return y, Moments(count, mean, var * count)


class _Groups(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        sizes: list[int],
        state: State,
        act: Activation,
    ) -> tuple[Tensor, Tensor, Tensor]:
        by_rows = _in_rows(x, residual, act)
        ctx.kind = _by_rows if by_rows else _by_groups
        y, saved = (_forward_rows if by_rows else _forward_groups)(x, residual, weight, bias, sizes, state, act)
        ctx.save_for_backward(x, weight, saved, *ops.gate_needs(act.code, residual, bias, y))
        ctx.options = sizes, state.eps, act, None if residual is None else residual.dtype
        mean, var = saved[:, 0].clone(), saved[:, 1].clone()
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, saved, bias, y, residual = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        sizes, eps, act, residual_dtype = ctx.options
        if torch.is_grad_enabled() or fused.transformed():  # create_graph=True, or a derivative of the backward
            given = ([None] * len(sizes) if t is None else t.split(sizes) for t in (dy, x, y, residual))
            parts = [
                composite.backward(dy_g, x_g, weight, bias, None, y_g, residual_g, eps, act)
                for dy_g, x_g, y_g, residual_g in zip(*given, strict=True)
            ]
            dxs, dresiduals, dweights, dbiases = zip(*parts, strict=True)
            grads = (torch.cat(dxs), torch.cat(dresiduals), sum(dweights), sum(dbiases))
        else:
            grads = ctx.kind(dy, x, saved, weight, bias, y, residual, sizes, act, needs)
        found = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        if found[1] is not None:
            found[1] = found[1].to(residual_dtype)
        return (*found, None, None, None)


# ---- group by group


def _forward_groups(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, sizes: list[int], state: State,
    act: Activation,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and mean, var and rstd of each group as one (G, 3, C) tensor."""
    y = torch.empty_like(x, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    saved = []
    residuals = [None] * len(sizes) if residual is None else residual.split(sizes)
    for x_g, residual_g, y_g in zip(x.split(sizes), residuals, y.split(sizes), strict=True):
        if residual_g is None:
            saved.append(inplace._forward(y_g.copy_(x_g), weight, bias, state, act))
        else:
            result, moments = fused._forward(x_g, residual_g, weight, bias, state, act)
            y_g.copy_(result)
            saved.append(moments)
    return y, torch.stack(saved)


def _by_groups(
    dy: Tensor, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None,
    residual: Tensor | None, sizes: list[int], act: Activation, needs: tuple[bool, ...],
) -> tuple[Any, ...]:  # fmt: skip
    need_x, need_residual, need_weight, need_bias = needs
    write_residual = need_residual and act.code != 0
    dx = torch.empty_like(x) if need_x else None
    dresidual = torch.empty_like(dy) if write_residual else dy
    dweight = dbias = None
    given = ([None] * len(sizes) if t is None else t.split(sizes) for t in (dy, x, y, residual, dx, dresidual))
    for (dy_g, x_g, y_g, residual_g, dx_g, dresidual_g), saved_g in zip(zip(*given, strict=True), saved, strict=True):
        if need_x and residual_g is None and y_g is None and not write_residual:
            found_x, found_weight, found_bias = inplace._backward(
                dy_g, dx_g.copy_(x_g), saved_g, weight, bias, True, act, True, need_weight, need_bias
            )
        else:
            found_x, found_residual, found_weight, found_bias = fused.backward(
                dy_g, x_g, saved_g, weight, bias, y_g, residual_g, True, act, need_x, write_residual, need_weight,
                need_bias,
            )  # fmt: skip
        if need_x and found_x is not dx_g:
            dx_g.copy_(found_x)
        if write_residual:
            dresidual_g.copy_(found_residual)
        if need_weight:
            dweight = found_weight if dweight is None else dweight + found_weight
        if need_bias:
            dbias = found_bias if dbias is None else dbias + found_bias
    return dx, dresidual, dweight, dbias


# ---- all at once, a row of S values being a channel


def _in_rows(x: Tensor, residual: Tensor | None, act: Activation) -> bool:
    return (
        kernels.native_takes(x)
        and x.is_contiguous()
        and x[0, 0].numel() >= LEAST_ROW
        # The residual's gradient is then dy, or dy where y is positive, without another look at x.
        and (residual is None or (residual.dtype == x.dtype and act.code in (0, _RELU)))
    )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(1, -1, x[0, 0].numel())


def _of_samples(values: Tensor, sizes: list[int]) -> Tensor:
    """Values of the groups (G, C) as those of the rows (N·C,)."""
    return values.repeat_interleave(torch.tensor(sizes, device=values.device), 0).flatten()


def _affine_rows(x: Tensor, vector: Tensor | None) -> Tensor | None:
    return (
        None
        if vector is None
        else vector.to(torch.promote_types(vector.dtype, compute_dtype(x))).expand(x.shape[0], -1).reshape(-1)
    )


def _forward_rows(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, sizes: list[int], state: State,
    act: Activation,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    values, length = _rows(x), x[0, 0].numel()
    mean, var = torch.ops.evenkeel.stats(values, None).view(2, *x.shape[:2])
    rows = Moments(mean.new_full((len(mean), 1), length), mean, var * length)
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    moments = merge_rows(rows, index, len(sizes))
    rstd = (moments.var + state.eps).rsqrt()
    y = torch.ops.evenkeel.apply(
        values, _of_samples(moments.mean, sizes), _of_samples(rstd, sizes), _affine_rows(x, weight),
        _affine_rows(x, bias), None if residual is None else _rows(residual), act.code, act.a, act.b,
    )  # fmt: skip
    return y.view(x.shape), torch.stack((moments.mean, moments.var, rstd), 1)


def _by_rows(
    dy: Tensor, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None,
    residual: Tensor | None, sizes: list[int], act: Activation, needs: tuple[bool, ...],
) -> tuple[Any, ...]:  # fmt: skip
    if y is not None:  # ReLU after a residual
        dy, act = act.gradient(dy, y), NAMED[None]
    mean, _, rstd = (_of_samples(values, sizes) for values in saved.unbind(1))
    given = (_rows(dy), _rows(x), mean, rstd, _affine_rows(x, weight), _affine_rows(x, bias), None, None)
    options = act.code, act.a, act.b
    sums = torch.ops.evenkeel.grad_stats(*given, *options).view(2, *x.shape[:2])
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    of_groups = sums.new_zeros(2, len(sizes), x.shape[1]).index_add(1, index, sums)
    dx = None
    if needs[0]:
        count = sums.new_tensor(sizes)[:, None] * x[0, 0].numel()
        means = torch.stack([_of_samples(values, sizes) for values in of_groups / count])
        dx = torch.ops.evenkeel.grad_input(*given, means, *options).view(x.shape)
    dbias, dweight = of_groups.sum(1)
    return dx, dy, dweight, dbias
