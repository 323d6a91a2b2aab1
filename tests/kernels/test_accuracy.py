"""Forward, gradients and running statistics against the definition in float64: as accurate as torch's own operators.

``python -m tests.support.accuracy_table`` prints the ratios that are tested here.
"""

from __future__ import annotations

import pytest
import torch
from support.accuracy import LIMIT, Expected, errors_on, over, ratios, ratios_to_no_offset
from support.cases import DENSE, LARGE_SHAPES, OFFSETS, SHAPES, Options, all_options, layouts_of, make_problem
from support.forcing import KERNELS
from support.runs import by_keelnorm, by_torch, run


def cases(shapes):
    """Parameters of a test; a case is next to itself on another kernel, so that its right results are made once."""
    return [
        pytest.param(kernel, shape, layout, id=f"{kernel}-{'x'.join(map(str, shape))}-{layout}")
        for shape in shapes
        for layout in layouts_of(shape)
        for kernel in KERNELS
    ]


def assert_within(limit, ratios_of, choices):
    over_limit = [
        f"{name}: {ratio:.2f} times torch's error, {options}"
        for options in choices
        for name, ratio in ratios_of(options).items()
        if not ratio <= limit
    ]
    assert not over_limit, "\n".join(over_limit)


@pytest.mark.parametrize(("kernel", "shape", "layout"), cases((*SHAPES, *LARGE_SHAPES)), indirect=["kernel"])
def test_error_is_that_of_torch(kernel, shape, layout):
    assert_within(LIMIT, lambda options: ratios(shape, layout, options), all_options(shape))


@pytest.mark.parametrize(
    ("kernel", "shape", "layout"), cases([(5, 13, 3, 11), (64, 3, 2), (1, 17, 2053)]), indirect=["kernel"]
)
def test_an_offset_costs_no_digits(kernel, shape, layout):
    """Less than half a digit, that is, where torch's own error grows a thousandfold."""
    with_offset = all_options(shape, OFFSETS[1:])
    assert_within(10**0.5, lambda options: ratios_to_no_offset(shape, layout, options), with_offset)


@pytest.mark.parametrize(("kernel", "shape", "layout"), cases([(2, 64, 7, 7), (8, 18, 3, 7)]), indirect=["kernel"])
def test_error_with_an_expanded_gradient_is_that_of_torch(kernel, shape, layout):
    """As after global pooling: all positions of a plane have the same gradient, and roundings go one way."""

    def ratios_of(options):
        expected = []
        for seed in range(4):
            problem = make_problem(shape, options, seed).laid_out(layout)
            expected.append(Expected(problem.replace(dy=problem.dy[:, :, :1, :1].expand(shape))))
        return over(errors_on(expected, None, by_keelnorm), errors_on(expected, None, by_torch))

    assert_within(LIMIT, ratios_of, [Options()])


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", DENSE)
def test_gate_of_the_backward_is_that_of_the_forward(kernel, layout, training, offset):
    """Where rounding decides too: without a residual the backward finds from x the very values the forward wrote."""
    problem = make_problem((4, 21, 9, 9), Options(training, "relu", False, offset)).laid_out(layout)
    problem.dy.fill_(1)
    found = run(problem, by_keelnorm)
    open_gates = found["y"] > 0
    assert 0.3 < open_gates.float().mean() < 0.7
    assert torch.equal(found["dbias"], open_gates.sum((0, 2, 3)).float())
    if not training:
        assert torch.equal(found["dx"] != 0, open_gates)
