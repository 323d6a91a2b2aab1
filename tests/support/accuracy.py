"""The error of a run against the definition, relative to what bounds rounding errors."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .cases import EPS, LARGE_SHAPES, MOMENTUM, Options, Problem, Shape, make_problem
from .definition import UNIT, Quantity, expect, spread
from .runs import Run, by_keelnorm, by_torch, run

#: Error of keelnorm over error of torch, at most.
LIMIT = 1.5
#: The smallest error that counts: half a unit roundoff of the natural scale, in float32.
FLOOR = UNIT / 2
#: Up to this many values are added in float before they go on in double.
SUMMED_IN_FLOAT = 16
#: Where values are on a grid, or equal, roundings go one way instead of canceling. A sum of n values is then off by up
#: to half a rounding of the partial sum each time, which is half of the whole in the mean.
ONE_SIDED = SUMMED_IN_FLOAT / 4 * UNIT
#: Number of channels over which errors are averaged to reduce chance: a rounding of a channel's coefficients is
#: shared by all its values.
_CHANNELS = 128


def seeds_of(shape: Shape) -> range:
    """More seeds for shapes with few channels."""
    return range(max(2, min(4 if shape in LARGE_SHAPES else 12, _CHANNELS // shape[1])))


class Expected:
    """A problem, its right results, and the natural scale of each error."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._quantities = {
            name: (quantity.value, 1 / _scale(quantity))
            for name, quantity in expect(problem, eps=EPS, momentum=MOMENTUM).items()
        }

    def squares(self, found: dict[str, Tensor]) -> dict[str, tuple[float, int]]:
        """The sum and the number of squared errors of each quantity, in units of the channel's natural scale."""
        if found.keys() != self._quantities.keys():
            raise ValueError(f"expected {', '.join(self._quantities)}; found {', '.join(found)}")
        return {
            name: (torch.linalg.vector_norm((found[name] - value) * per_scale).item() ** 2, value.numel())
            for name, (value, per_scale) in self._quantities.items()
        }


def _scale(quantity: Quantity) -> Tensor:
    """The natural scale, in a shape that fits the value; where the right result is zero, no error is allowed."""
    scale = quantity.scale.clamp(min=torch.finfo(torch.float64).tiny)
    return scale if quantity.value.dim() == 1 else spread(scale, quantity.value.dim())


@functools.lru_cache(maxsize=400)
def _expected(shape: Shape, options: Options, seed: int) -> Expected:
    return Expected(make_problem(shape, options, seed))


def errors_on(cases: Iterable[Expected], layout: str | None, batch_norm: Run) -> dict[str, float]:
    """For each quantity the root mean square of its error, in units of its natural scale, over all values.

    With None for the layout the tensors stay as they are.
    """
    totals: dict[str, list[tuple[float, int]]] = {}
    for expected in cases:
        problem = expected.problem
        found = run(problem if layout is None else problem.laid_out(layout), batch_norm)
        for name, square in expected.squares(found).items():
            totals.setdefault(name, []).append(square)
    return {name: math.sqrt(sum(s for s, _ in parts) / sum(n for _, n in parts)) for name, parts in totals.items()}


def errors(shape: Shape, layout: str, options: Options, batch_norm: Run) -> dict[str, float]:
    """The errors on random data of several seeds."""
    return errors_on((_expected(shape, options, seed) for seed in seeds_of(shape)), layout, batch_norm)


@functools.cache
def torch_errors(shape: Shape, layout: str, options: Options) -> dict[str, float]:
    """The errors of torch's own operators on the same data in the same layout."""
    return errors(shape, layout, options, by_torch)


def over(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    """For each quantity one error over another, or over the floor where that is below it."""
    return {name: ours[name] / max(theirs[name], FLOOR) for name in ours}


def ratios(shape: Shape, layout: str, options: Options) -> dict[str, float]:
    """The errors of the kernels in use over torch's."""
    return over(errors(shape, layout, options, by_keelnorm), torch_errors(shape, layout, options))


def ratios_to_no_offset(shape: Shape, layout: str, options: Options) -> dict[str, float]:
    """The errors of the kernels in use over torch's on data without an offset of the mean."""
    without = dataclasses.replace(options, offset=0.0)
    return over(errors(shape, layout, options, by_keelnorm), torch_errors(shape, layout, without))
