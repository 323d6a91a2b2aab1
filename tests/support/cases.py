"""Test cases of batch normalization: shapes, layouts, options, and their tensors."""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .definition import UNIT, moments, spread

Shape = tuple[int, ...]

DENSE = ("contiguous", "channels_last")
VIEWS = ("sliced", "transposed")
LAYOUTS = (*DENSE, *VIEWS)

#: Lengths around the vectors of 4, 8 and 16 floats.
AROUND_VECTORS = (3, 4, 5, 7, 8, 9, 15, 16, 17)

SHAPES: tuple[Shape, ...] = (
    # one value per channel: inference only
    (1, 5),
    (1, 3, 1, 1),
    # a row per sample
    (2, 1),
    (5, 19),
    (64, 3),
    # around the vector width, in both directions
    *((3, width, width) for width in AROUND_VECTORS),
    # around several vectors abreast
    (2, 3, 63),
    (2, 65, 2),
    (1, 5, 129),
    (2, 131, 1),
    # one sample, one channel, one position, primes
    (1, 6, 3, 3),
    (3, 1, 5, 7),
    (4, 1),
    (7, 5, 1, 1),
    (3, 7, 1, 1, 1),
    (5, 13, 3, 11),
    (2, 3, 3, 5, 2),
    (3, 18, 2, 3, 3),
    # many samples of planes shorter than a vector
    (500, 6, 2),
    # many channels with small planes
    (5, 67, 7, 7),
    # more than 64 channels in a block
    (1, 1100, 2, 3),
)
#: Enough values for several threads. A plane or row longer than what is summed in float at once, planes and rows cut
#: into segments and chunks, and few channels with many positions.
LARGE_SHAPES: tuple[Shape, ...] = ((1, 17, 2053), (40, 1030), (1, 4, 16411))
#: Views are copied to a dense layout first, so a few of them are enough.
VIEW_SHAPES: tuple[Shape, ...] = ((5, 19), (3, 9, 17), (5, 13, 3, 11), (2, 3, 3, 5, 2))

OFFSETS = (0.0, 1e4, 1e6)
EPS = 1e-5
MOMENTUM = 0.1


def layouts_of(shape: Shape) -> tuple[str, ...]:
    """The layouts in which a shape is tried; shapes of rank 2 have only one dense layout."""
    dense = DENSE if len(shape) > 2 else DENSE[:1]
    return (*dense, *(VIEWS if shape in VIEW_SHAPES else ()))


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in memory of their own: dense in one of two orders, a slice of more, or transposed."""
    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        order = list(reversed(range(values.dim())))
        return values.permute(order).contiguous().permute(order)
    if layout == "sliced":
        wider = values.new_full([size + 2 for size in values.shape], math.nan)
        view = wider[tuple(slice(1, 1 + size) for size in values.shape)]
        view.copy_(values)
        return view
    raise ValueError(f"layout is one of {', '.join(LAYOUTS)}; got {layout!r}")


@dataclass(frozen=True)
class Options:
    """Options of a call. ``offset`` is the mean of x, in standard deviations."""

    training: bool = True
    activation: str | None = None
    residual: bool = False
    offset: float = 0.0

    def __str__(self) -> str:
        words = ["training" if self.training else "inference", *([self.activation] if self.activation else [])]
        return " ".join([*words, *(["residual"] if self.residual else []), f"offset={self.offset:g}"])


def all_options(shape: Shape, offsets: tuple[float, ...] = OFFSETS) -> list[Options]:
    """Every combination that is legal for the shape: training needs two values per channel."""
    trainings = (True, False) if math.prod(shape) > shape[1] else (False,)
    return [Options(*choice) for choice in itertools.product(trainings, (None, "relu"), (False, True), offsets)]


@dataclass(frozen=True)
class Problem:
    """The tensors of one batch normalization, float32; x, the residual and dy lie in one layout."""

    options: Options
    x: Tensor
    residual: Tensor | None
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def replace(self, **fields: Tensor | None) -> Problem:
        """The same problem with other tensors for those named."""
        return dataclasses.replace(self, **fields)

    def laid_out(self, layout: str) -> Problem:
        """The same values in another layout."""
        residual = None if self.residual is None else laid_out(self.residual, layout)
        return self.replace(x=laid_out(self.x, layout), dy=laid_out(self.dy, layout), residual=residual)


def make_problem(shape: Shape, options: Options, seed: int = 0) -> Problem:
    """Random tensors, the same for the same arguments.

    dy is zero where the value before the activation is so near to zero that rounding may decide on its sign, so that
    a gate that rounding turned does not pass for an error of the gradients.
    """
    rng = torch.Generator().manual_seed(zlib.crc32(repr((shape, options, seed)).encode()))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng)

    channels = shape[1]
    deviation = spread(torch.exp2(2 * torch.rand(channels, generator=rng) - 1), len(shape))
    center = spread(options.offset * torch.sign(normal(channels)), len(shape))
    x = deviation * (center + normal(*shape))
    weight, bias = normal(channels), normal(channels)
    running_mean = (deviation * center).flatten() + normal(channels)
    running_var = torch.exp2(2 * torch.rand(channels, generator=rng) - 1)
    residual = normal(*shape) if options.residual else None
    dy = normal(*shape)

    if options.activation is not None:
        mean, var = moments(x) if options.training else (running_mean.double(), running_var.double())
        scale = spread(weight / torch.sqrt(var + EPS), len(shape))
        added = spread(bias, len(shape)) + (0 if residual is None else residual)
        value = (x.double() - spread(mean, len(shape))) * scale + added
        rounding = 8 * UNIT * ((x.abs() + spread(mean, len(shape)).abs()) * scale.abs() + added.abs())
        dy = torch.where(value.abs() <= rounding, 0, dy)
    return Problem(options, x, residual, dy, weight, bias, running_mean, running_var)
