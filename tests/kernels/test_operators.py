"""stats, apply, grad_stats and grad_input one by one against float64, and the fused operators against the four.

Bounds: a value that takes a few roundings of terms up to ``scale`` is right within 4·eps·scale. A sum of n floats in
float errs by a random walk of n roundings; the kernels add at most 128 floats so before they go on in double.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.cases import EPS, MOMENTUM, Options, laid_out, layouts_of, make_problem
from support.definition import UNIT, expect, moments, over, spread
from support.forcing import NATIVE
from support.operators import NONE, RELU, activation_of, operators

SHAPES = [
    (5, 19),
    (3, 16, 17),
    (1, 5, 129),
    (2, 131, 1),
    (5, 13, 3, 11),
    (2, 3, 3, 5, 2),
    (1, 1100, 2, 3),
    (1, 4, 16411),
]
CASES = [
    pytest.param(shape, layout, id=f"{'x'.join(map(str, shape))}-{layout}")
    for shape in SHAPES
    for layout in layouts_of(shape)
]
FEW = 8 * UNIT
SUM = math.sqrt(128) * UNIT


def within(found, expected, bound, scale):
    """found is expected within bound·scale, where scale has a value per channel."""
    if expected.dim() > 1:
        scale = spread(scale, expected.dim())
    return bool(((found.double() - expected).abs() <= bound * scale).all())


def statistics(problem, eps=EPS):
    """Mean and rstd as the operators take them."""
    options = problem.options
    mean, var = (
        moments(problem.x) if options.training else (problem.running_mean.double(), problem.running_var.double())
    )
    return mean, 1 / (var + eps).sqrt()


def largest(x):
    """The largest magnitude in each channel."""
    return x.abs().amax(over(x))


def terms(problem):
    """For y and dx the largest sum of magnitudes that is added up for a value, for each channel."""
    x, rank = problem.x.double(), problem.x.dim()
    mean, rstd = (spread(v, rank) for v in statistics(problem))
    slope = rstd * spread(problem.weight.double(), rank).abs()
    residual = 0 if problem.residual is None else problem.residual.double().abs()
    y = (x - mean).abs() * slope + spread(problem.bias.double(), rank).abs() + residual
    dy = problem.dy.double().abs()
    along = dy.mean(over(x)), (dy * ((x - mean) * rstd).abs()).mean(over(x))
    dx = slope * (dy + spread(along[0], rank) + ((x - mean) * rstd).abs() * spread(along[1], rank))
    return largest(y), largest(dx)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_stats(kernel, shape, layout, offset):
    x = laid_out(make_problem(shape, Options(offset=offset)).x, layout)
    mean, var = operators(kernel).stats(x, None)
    right_mean, right_var = moments(x)
    assert mean.dtype == var.dtype == torch.float64
    assert within(mean, right_mean, SUM, right_var.sqrt())
    assert within(var, right_var, SUM, right_var)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_apply(kernel, shape, layout, activation, residual):
    for training, offset in ((True, 0.0), (False, 1e6)):
        problem = make_problem(shape, Options(training, activation, residual, offset)).laid_out(layout)
        mean, rstd = statistics(problem)
        y = operators(kernel).apply(
            problem.x, mean, rstd, problem.weight, problem.bias, problem.residual, *activation_of(activation)
        )
        expected = expect(problem, eps=EPS, momentum=MOMENTUM)["y"].value
        assert within(y, expected, FEW, terms(problem)[0])


@pytest.mark.parametrize("gate", ["open", "from x", "from y"])
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_backward_operators(kernel, shape, layout, gate):
    """The sums, then dx from their means, or from fixed statistics where there are none."""
    options = Options(True, None if gate == "open" else "relu", gate == "from y", 0.0)
    for training, offset in ((True, 1e4), (False, 0.0)):
        problem = make_problem(shape, dataclasses.replace(options, training=training, offset=offset)).laid_out(layout)
        expected = expect(problem, eps=EPS, momentum=MOMENTUM)
        mean, rstd = statistics(problem)
        y = laid_out(expected["y"].value.float(), layout) if gate == "from y" else None
        affine = (problem.x, mean, rstd, problem.weight, problem.bias, y, None)
        activation = NONE if gate == "open" else RELU

        sums = operators(kernel).grad_stats(problem.dy, *affine, *activation)
        assert sums.dtype == torch.float64
        for found, name in zip(sums, ("dbias", "dweight"), strict=True):
            assert within(found, expected[name].value, SUM, expected[name].scale)

        count = problem.x.numel() // problem.x.shape[1]
        right = torch.stack([expected["dbias"].value, expected["dweight"].value]) / count
        dx = operators(kernel).grad_input(problem.dy, *affine, right if training else None, *activation)
        assert within(dx, expected["dx"].value, FEW, terms(problem)[1])


@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_weight_and_bias_are_optional(kernel, layout, affine):
    """Without them they are ones and zeros, to the bit."""
    problem = make_problem((3, 13, 3, 7), Options(True, "relu")).laid_out(layout)
    mean, rstd = statistics(problem)
    given = [value if wanted else None for value, wanted in zip((problem.weight, problem.bias), affine, strict=True)]
    filled = [
        value if wanted else neutral
        for value, wanted, neutral in zip(
            (problem.weight, problem.bias), affine, (torch.ones(13), torch.zeros(13)), strict=True
        )
    ]
    means = torch.randn(2, 13, dtype=torch.float64)
    four = operators(kernel)
    for name, before, after in (
        ("apply", (problem.x,), (None, *RELU)),
        ("grad_stats", (problem.dy, problem.x), (None, None, *RELU)),
        ("grad_input", (problem.dy, problem.x), (None, None, means, *RELU)),
    ):
        found = getattr(four, name)(*before, mean, rstd, *given, *after)
        assert torch.equal(found, getattr(four, name)(*before, mean, rstd, *filled, *after)), name


@pytest.mark.parametrize("kernel", NATIVE, indirect=True)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_fused_is_the_composition_of_the_four(kernel, shape, layout, activation, residual):
    for training in (True, False):
        problem = make_problem(shape, Options(training, activation, residual, 1e4 * training)).laid_out(layout)
        x, weight, bias, act = problem.x, problem.weight, problem.bias, activation_of(activation)
        running = (problem.running_mean, problem.running_var)
        four, fused = operators(kernel), torch.ops.keelnorm
        y, saved = fused.forward(x, problem.residual, weight, bias, *running, training, EPS, *act)
        mean, var, rstd = saved
        assert torch.equal(saved[:2], four.stats(x, None) if training else torch.stack(running).double())
        torch.testing.assert_close(rstd, 1 / (var + EPS).sqrt(), rtol=4 * torch.finfo(torch.float64).eps, atol=0)
        assert torch.equal(y, four.apply(x, mean, rstd, weight, bias, problem.residual, *act))

        kept = y if activation and residual else None
        dx, dresidual, dweight, dbias = fused.backward(
            problem.dy, x, saved, weight, bias, kept, None, training, *act, True, kept is not None, True, True
        )
        sums = four.grad_stats(problem.dy, x, mean, rstd, weight, bias, kept, None, *act)
        assert torch.equal(dbias, sums[0].float())
        assert torch.equal(dweight, sums[1].float())
        # One divides a sum by M, the other takes its mean: the same but for a rounding of the coefficients.
        means = sums / (x.numel() // x.shape[1]) if training else None
        wanted = four.grad_input(problem.dy, x, mean, rstd, weight, bias, kept, None, means, *act)
        assert within(dx, wanted.double(), FEW, terms(problem)[1])
        if kept is not None:
            assert torch.equal(dresidual, torch.where(y > 0, problem.dy, 0))


@pytest.mark.parametrize("kernel", NATIVE, indirect=True)
@pytest.mark.parametrize("momentum", [MOMENTUM, None])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_the_two_halves_are_the_whole(kernel, shape, layout, activation, residual, momentum):
    """measure_ and then finish give the same bits and the same running statistics as forward_."""
    for training in (True, False):
        problem = make_problem(shape, Options(training, activation, residual, 1e4 * training)).laid_out(layout)
        x, weight, bias, act = problem.x, problem.weight, problem.bias, activation_of(activation)
        fused, buffers = torch.ops.keelnorm, []
        for _ in range(2):
            counts = torch.zeros(3, x.shape[1], dtype=torch.int64)
            buffers.append([problem.running_mean.clone(), problem.running_var.clone(), torch.tensor(3), counts])
        how = training, True, momentum, EPS
        *running, counts = buffers[0]
        y, saved = fused.forward_(x, problem.residual, weight, bias, *running, *how, *act, counts)
        *running, counts = buffers[1]
        found = fused.measure_(x, *running, *how, counts)
        assert torch.equal(found, saved)
        assert torch.equal(fused.finish(x, found, weight, bias, problem.residual, *act), y)
        for one, other in zip(*buffers, strict=True):
            assert torch.equal(one, other)
