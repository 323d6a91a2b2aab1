"""The same bits for any number of threads and from run to run, in both layouts and on every path."""

from __future__ import annotations

import pytest
import torch
from support.cases import LARGE_SHAPES, Options, layouts_of, make_problem
from support.forcing import NATIVE
from support.operators import NONE, OPERATORS, RELU, operators
from support.runs import by_keelnorm, run

# What is large enough for several threads (see kSerialBelow in problem.h), on every path through the kernels: blocks
# of channels, segments of planes, one channel, chunks of rows, few rows.
SHAPES = (*LARGE_SHAPES, (3, 1, 22003), (9, 80, 7, 7), (2, 3, 7, 29, 29), (4000, 9), (3, 11000))
CASES = [
    pytest.param(shape, layout, id=f"{'x'.join(map(str, shape))}-{layout}")
    for shape in SHAPES
    for layout in layouts_of(shape)
]
CHOICES = [
    Options(training, activation, residual)
    for training in (True, False)
    for activation, residual in ((None, False), ("relu", False), ("relu", True))
]


def names_of_different(runs):
    """Which quantities are not the same to the bit in all runs."""
    return [name for name in runs[0] if any(not torch.equal(runs[0][name], other[name]) for other in runs[1:])]


@pytest.mark.parametrize("kernel", NATIVE, indirect=True)
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_bits_do_not_depend_on_threads_or_runs(kernel, shape, layout):
    for options in CHOICES:
        problem = make_problem(shape, options).laid_out(layout)
        runs = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(run(problem, by_keelnorm))
        assert not names_of_different(runs), options


@pytest.mark.parametrize("kernel", NATIVE, indirect=True)
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_bits_of_the_four_operators(kernel, shape, layout):
    problem = make_problem(shape, Options(True, "relu", True)).laid_out(layout)
    four = operators(kernel)
    mean, rstd = four.stats(problem.x, None)[0], torch.ones(shape[1], dtype=torch.float64)
    normalization = (mean, rstd, problem.weight, problem.bias)
    arguments = {
        "stats": (problem.x, None),
        "apply": (problem.x, *normalization, problem.residual, *RELU),
        "grad_stats": (problem.dy, problem.x, *normalization, None, None, *RELU),
        "grad_input": (
            problem.dy,
            problem.x,
            *normalization,
            None,
            None,
            torch.randn(2, shape[1], dtype=torch.float64),
            *RELU,
        ),
        "invert": (problem.x, torch.stack([mean, rstd, rstd]), problem.weight, problem.bias, *NONE),
    }
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append({name: getattr(four, name)(*arguments[name]) for name in OPERATORS})
    assert not names_of_different(runs)


@pytest.mark.parametrize("kernel", ["reference"], indirect=True)
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_of_the_reference_do_not_depend_on_runs(kernel, threads):
    """Its sums are torch's own, which depend on the number of threads where a whole tensor is summed."""
    torch.set_num_threads(threads)
    for shape in ((3, 1, 22003), (9, 80, 7, 7)):
        problem = make_problem(shape, Options(True, "relu", True))
        assert not names_of_different([run(problem, by_keelnorm) for _ in range(3)])
