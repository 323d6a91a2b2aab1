"""Views of any strides, offset and dtype, against torch's batch norm and the activation in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import keelnorm as kn

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: How many roundings of the dtype a result takes at most, of terms as large as what it is made of. Arithmetic on 16-bit
#: tensors is in float32, so that these round when they are written.
ROUNDINGS = {torch.float32: 16, torch.float64: 16, torch.bfloat16: 2, torch.float16: 2}
EPS = 1e-2


@dataclass(frozen=True)
class View:
    """How a tensor of a given shape lies in a larger one."""

    order: tuple[int, ...]  # of the dimensions in memory, the slowest first
    steps: tuple[int, ...]  # every how manieth value of a dimension is used
    skipped: tuple[int, ...]  # values of a dimension before the first that is used
    expanded: tuple[bool, ...]  # dimensions of stride 0

    def of(self, values: Tensor) -> Tensor:
        """The values (of expanded dimensions the first ones), in memory that is NaN everywhere else."""
        sizes = [
            1 if expanded else skipped + step * size
            for size, step, skipped, expanded in zip(values.shape, self.steps, self.skipped, self.expanded, strict=True)
        ]
        memory = values.new_full([sizes[d] for d in self.order], torch.nan)
        view = memory.permute([self.order.index(d) for d in range(values.dim())])
        for d, expanded in enumerate(self.expanded):
            if not expanded:
                view = view[(slice(None),) * d + (slice(self.skipped[d], None, self.steps[d]),)]
        first = tuple(slice(0, 1) if expanded else slice(None) for expanded in self.expanded)
        view.copy_(values[first])
        return view.expand(values.shape)


@st.composite
def views(draw: st.DrawFn, rank: int, expands: bool = False) -> View:
    def each(values: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.lists(values, min_size=rank, max_size=rank)))

    return View(
        order=tuple(draw(st.permutations(range(rank)))),
        steps=each(st.integers(1, 3)),
        skipped=each(st.integers(0, 2)),
        expanded=each(st.booleans()) if expands else (False,) * rank,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], View, View, View | None, int]:
    """A shape, how x, dy and the residual (or None) lie, and a seed."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=5)))
    if torch.Size(shape).numel() == shape[1]:  # training needs two values per channel
        shape = (2, *shape[1:])
    rank = len(shape)
    residual = draw(st.none() | views(rank, expands=True))
    return shape, draw(views(rank)), draw(views(rank, expands=True)), residual, draw(st.integers(0, 2**31))


def reference(x, residual, dy, weight, bias, activation):
    """y and the gradients, in float64. The values are those of the dtype."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    added = None if residual is None else residual.detach().double().requires_grad_()
    y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True, eps=EPS)
    if added is not None:
        y = y + added
    before = y
    if activation == "relu":
        y = y.relu()
    leaves += [] if added is None else [added]
    return before.detach(), [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_any_view(kernel, dtype, activation):
    @given(case=cases())
    def holds(case):
        shape, view_of_x, view_of_dy, view_of_residual, seed = case
        rng = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=rng).to(dtype)

        x, dy = view_of_x.of(normal(*shape)), view_of_dy.of(normal(*shape))
        residual = None if view_of_residual is None else view_of_residual.of(normal(*shape))
        of_parameters = torch.float64 if dtype is torch.float64 else torch.float32
        weight, bias = (torch.randn(shape[1], generator=rng).to(of_parameters) for _ in range(2))
        before, _ = reference(x, residual, dy, weight, bias, activation)
        # Where a rounding may turn the gate, x and the residual have no one derivative.
        unit = torch.finfo(dtype).eps
        if activation is not None:
            dy = torch.where(before.abs() <= 16 * unit, 0, dy.double()).to(dtype)
        _, wanted = reference(x, residual, dy, weight, bias, activation)

        given_ = [t.detach().requires_grad_() for t in (x, weight, bias)]
        added = None if residual is None else residual.detach().requires_grad_()
        y = kn.functional.batch_norm(
            given_[0], None, None, given_[1], given_[2], training=True, eps=EPS, activation=activation, residual=added
        )
        given_ += [] if added is None else [added]
        found = [y.detach(), *torch.autograd.grad(y, given_, dy)]
        over = [d for d in range(x.dim()) if d != 1]
        xhat = (x.double() - x.double().mean(over, keepdim=True)).abs()
        rstd = (xhat.square().mean(over) + EPS).rsqrt()
        largest = (xhat.amax(over) * rstd).clamp(min=1) * dy.double().abs().max()
        added_up = 0 if residual is None else residual.double().abs().max()
        scales = {
            "y": (xhat.amax(over) * rstd * weight.abs() + bias.abs() + added_up).max(),
            "dx": (3 * rstd * weight.abs() * largest * largest.clamp(min=1)).max(),
            "dweight": (largest * x.numel() / shape[1]).max(),
            "dbias": (largest * x.numel() / shape[1]).max(),
            "dresidual": dy.double().abs().max(),
        }
        for name, value, right in zip(scales, found, wanted, strict=False):
            of_parameter = name in ("dweight", "dbias")
            assert value.dtype == (of_parameters if of_parameter else dtype)
            roundings = ROUNDINGS[dtype] * (torch.finfo(of_parameters).eps if of_parameter else unit)
            assert ((value.double() - right).abs() <= roundings * scales[name]).all(), (name, case)

    holds()
