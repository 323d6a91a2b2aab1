"""Batch normalization of consecutive groups of samples, each with its own moments.

The native operators process all groups and write into one result. Otherwise each group is normalized by itself, and the
results are concatenated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from keelnorm.engine import composite, dispatch, ops, saved_outputs
from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import Kept, Needs, State
from keelnorm.engine.fast_operators import attempt, mark_updated
from keelnorm.engine.kernels import registry
from keelnorm.engine.layout import dense, is_channels_last
from keelnorm.engine.recomputed_steps import joined
from keelnorm.engine.torch_internals import is_transformed, plain_apply
from keelnorm.functional import moments as moments_of
from keelnorm.moments import Moments


class Groups(NamedTuple):
    """Consecutive groups of samples, and how the running statistics learn from them.

    Args:
        sizes: The samples per group, equal except for the last; their sum is N, and each of the two groups or more has
            two values per channel or more.
        pooled: Whether one update takes the merged moments of all groups; else one group after the other updates.
    """

    sizes: list[int]
    pooled: bool


def merge_rows(rows: Moments) -> Moments:
    """Merge rows of moments, count (R, 1) and mean and m2 (R, C), at once, as :meth:`Moments.merge` does one by one."""
    count = rows.count.sum()
    mean = (rows.count * rows.mean).sum(0) / count.clamp(min=1)
    return Moments(count, mean, (rows.m2 + rows.count * (rows.mean - mean).square()).sum(0))


def normalize_groups(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: Groups,
    state: State,
    act: Activation,
) -> tuple[Tensor, Moments | None]:
    """Compute ``act(bn(x) + residual)``, where each group of consecutive samples is normalized by itself.

    If ``state.update`` is set, the native operators update the running statistics.

    Returns:
        y, and the moments of the groups in rows; None if the running statistics have been updated already.
    """
    sizes = groups.sizes
    if _native(x):
        inputs = [t for t in (x, residual, weight, bias) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs) and any(t.is_inference() for t in inputs):
            dispatch.refuse_inference(state.what)
        found = attempt(_apply, dense(x), residual, weight, bias, groups, state, act)
        if found is not None:
            y, saved = found
            return y, None if state.update else _rows(saved, sizes, x)
    xs = x.split(sizes)
    residuals = [None] * len(xs) if residual is None else residual.split(sizes)
    alone = state._replace(update=False)
    ys = [dispatch.batch_norm(*each, weight, bias, alone, act) for each in zip(xs, residuals, strict=True)]
    parts = [moments_of(each.detach()) for each in xs]
    stacked = [torch.stack(values) for values in zip(*((m.count, m.mean, m.m2) for m in parts), strict=True)]
    y = ys[0] if len(ys) == 1 else joined(_joined_last if is_channels_last(x) else _joined, ys)
    return y, Moments(stacked[0][:, None], *stacked[1:])


def _joined(*ys: Tensor) -> Tensor:
    return torch.cat(ys)


def _joined_last(*ys: Tensor) -> Tensor:
    """Concatenate in memory that is channels-last, as the groups' is."""
    return torch.cat([y.movedim(1, -1) for y in ys]).movedim(-1, 1)


def _rows(saved: Tensor, sizes: list[int], x: Tensor) -> Moments:
    mean, var, _ = saved.view(len(sizes), 3, -1).unbind(1)
    count = mean.new_tensor(sizes)[:, None] * x[0, 0].numel()
    return Moments(count, mean, var * count)


def _native(x: Tensor) -> bool:
    return (
        type(x) in dispatch.PLAIN
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not is_transformed()
        and registry.operators(x) is torch.ops.keelnorm  # other operators have none for groups
    )


class _Groups(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: Groups,
        state: State,
        act: Activation,
    ) -> tuple[Tensor, Tensor]:
        y, saved = torch.ops.keelnorm.forward_groups_(
            x, residual, weight, bias, state.running_mean, state.running_var, state.num_batches_tracked,
            len(groups.sizes), groups.sizes[0], groups.pooled, state.update, state.momentum, state.eps, act.code, act.a,
            act.b, state.counts(),
        )  # fmt: skip
        mark_updated(state)
        if saved_outputs.calls:
            _note(y, x, residual, weight, bias, saved, groups.sizes[0], state, act)
        ctx.save_for_backward(x, weight, saved, *ops.gate_needs(act.code, residual, bias, y))
        ctx.mark_non_differentiable(saved)
        ctx.sizes, ctx.eps, ctx.act = groups.sizes, state.eps, act
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y, saved

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, weight, saved, bias, y, residual = ctx.saved_tensors
        needs, sizes, act = Needs(*ctx.needs_input_grad[:4]), ctx.sizes, ctx.act
        write_residual = needs.residual and act.code != 0
        if torch.is_grad_enabled() or is_transformed():  # create_graph=True, or a derivative of the backward
            given = ([None] * len(sizes) if t is None else t.split(sizes) for t in (dy, x, y, residual))
            kept = Kept(x=x, saved=saved, weight=weight, bias=bias, y=y, residual=residual, training=True, act=act)
            parts = [
                composite.backward(dy_of, kept._replace(x=x_of, y=y_of, residual=residual_of), ctx.eps)
                for dy_of, x_of, y_of, residual_of in zip(*given, strict=True)
            ]
            dxs, dresiduals, dweights, dbiases = zip(*parts, strict=True)
            grads = [torch.cat(dxs), torch.cat(dresiduals), sum(dweights), sum(dbiases)]
        else:
            grads = list(
                torch.ops.keelnorm.backward_groups(
                    dy, x, saved, weight, bias, y, residual, len(sizes), sizes[0], act.code, act.a, act.b, needs.x,
                    write_residual, needs.weight, needs.bias,
                )
            )  # fmt: skip
            if needs.residual and not write_residual:
                grads[1] = dy
        found = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        if found[1] is not None:
            found[1] = found[1].to(ctx.residual_dtype)
        return (*found, None, None, None)


_apply = plain_apply(_Groups)


def _note(
    y: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, saved: Tensor,
    size: int, state: State, act: Activation,
) -> None:  # fmt: skip
    """Note how y is computed, so that it need not be kept for the backward; see `dispatch.note_output`."""
    scale = None if weight is None else weight.detach().clone()
    shift = None if bias is None else bias.detach().clone()
    shape, strides = y.shape, y.stride()
    state = State(training=True, update=False, momentum=None, eps=state.eps, what=state.what)

    def make(x: Tensor, residual: Tensor | None) -> Tensor:
        y = x.new_empty_strided(shape, strides)
        groups = saved.split(3)
        for i, found in enumerate(groups):
            part = slice(i * size, None if i + 1 == len(groups) else (i + 1) * size)
            beside = None if residual is None else residual[part]
            y[part] = dispatch.forward(x[part], beside, scale, shift, found, state, act)[0]
        return y

    saved_outputs.note(y, make, x, residual)
