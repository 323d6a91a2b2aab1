"""The tensors of a case: the same values for every peer and in every layout."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from keelnorm.bench import definition
from keelnorm.bench.cases import Case, Shape

EPS = 1e-5
MOMENTUM = 0.1


@dataclass
class Problem:
    """Inputs of one case; `x` and `residual` are leaves that require gradients."""

    case: Case
    x: Tensor
    residual: Tensor | None
    dy: Tensor
    state: dict[str, Tensor]  # as in torch.nn.BatchNorm*.state_dict()

    @property
    def samples(self) -> int:
        """M, the samples per channel."""
        return self.case.shape.samples


@lru_cache(maxsize=1)
def _draw(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator(device).manual_seed(zlib.crc32(shape.name.encode()))

    def normal(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=generator, device=device)

    def between(low: float, high: float) -> Tensor:
        return torch.rand(channels, generator=generator, device=device) * (high - low) + low

    channels = shape.dims[1]
    per_channel = (1, channels, *(1 for _ in shape.dims[2:]))
    x = normal(*shape.dims)
    x.mul_(between(0.5, 2.0).view(per_channel)).add_(between(-1.0, 1.0).view(per_channel))
    state = {
        "weight": between(0.5, 1.5),
        "bias": between(-0.5, 0.5),
        "running_mean": between(-0.5, 0.5),
        "running_var": between(0.5, 1.5),
        "num_batches_tracked": torch.tensor(0, device=device),
    }
    return x, normal(*shape.dims), normal(*shape.dims), state


def _gradient(case: Case, dy: Tensor, formats: tuple[torch.memory_format, torch.memory_format]) -> Tensor:
    """Lay out dy as it arrives; `formats` are the input's memory format and the other one."""
    if case.gradient == "expanded":
        return dy[:, :, :1, :1].clone().expand_as(dy)
    return dy.clone(memory_format=formats[case.gradient == "other"])


def make_problem(case: Case, device: str = "cpu") -> Problem:
    """Draw a case's tensors: equal for every layout of a shape, and for every run on a kind of device."""
    x, residual, dy, state = _draw(case.shape, device)
    formats = (torch.contiguous_format, torch.channels_last)
    if case.layout == "channels_last":
        formats = formats[::-1]
    dtype: torch.dtype = getattr(torch, case.dtype)

    def placed(values: Tensor) -> Tensor:
        return values.to(dtype, copy=True, memory_format=formats[0])

    problem = Problem(
        case=case,
        x=placed(x),
        residual=placed(residual) if case.has_residual else None,
        dy=_gradient(case, dy.to(dtype), formats),
        state={name: value.clone() for name, value in state.items()},
    )
    if case.activation is not None:
        if case.gradient == "expanded":
            definition.leave_kink(problem.x, problem.residual, state, EPS)
        else:
            definition.clear_kink(problem.x, problem.residual, problem.dy, state, EPS)
    for tensor in (problem.x, problem.residual):
        if tensor is not None:
            tensor.requires_grad_()
    return problem
