"""Arguments that lie in memory in other ways than x, and which gradients come back."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.accuracy import ONE_SIDED, Expected, errors_on
from support.cases import DENSE, EPS, LAYOUTS, MOMENTUM, Options, laid_out, make_problem
from support.definition import UNIT
from support.runs import by_keelnorm, run

import keelnorm as kn

SHAPE = (5, 18, 3, 7)


def check(problem):
    """Right up to rounding; an expanded gradient has equal values."""
    for name, error in errors_on([Expected(problem)], None, by_keelnorm).items():
        assert error <= ONE_SIDED, f"{name} is off by {error / UNIT:.1f} roundings, {problem.options}"


@pytest.mark.parametrize("layout_of_dy", [*LAYOUTS, "expanded", "one value"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_in_another_layout(kernel, layout, layout_of_dy):
    for activation, residual in itertools.product((None, "relu"), (False, True)):
        problem = make_problem(SHAPE, Options(True, activation, residual)).laid_out(layout)
        if layout_of_dy in LAYOUTS:
            dy = laid_out(problem.dy, layout_of_dy)
        elif layout_of_dy == "expanded":  # as after global pooling
            dy = torch.randn(*SHAPE[:2], 1, 1).expand(SHAPE)
        else:  # as after a sum
            dy = torch.tensor(0.7).expand(SHAPE)
        check(problem.replace(dy=dy))


@pytest.mark.parametrize("layout_of_residual", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_residual_in_another_layout(kernel, layout, layout_of_residual):
    for training, activation in itertools.product((True, False), (None, "relu")):
        problem = make_problem(SHAPE, Options(training, activation, True)).laid_out(layout)
        check(problem.replace(residual=laid_out(problem.residual, layout_of_residual)))


@pytest.mark.parametrize(
    "shape", [(5, 18), (5, 18, 7), SHAPE, (2, 3, 2, 5, 4), (3, 6, 1, 1), (1, 6, 4, 5), (4, 1, 3, 3)]
)
def test_results_lie_as_x(kernel, shape):
    told = [d for d, size in enumerate(shape) if size > 1]  # the stride of a dimension of one value says nothing
    for layout, training, residual in itertools.product((*DENSE, "sliced"), (True, False), (False, True)):
        problem = make_problem(shape, Options(training, "relu", residual)).laid_out(layout)
        found = run(problem, by_keelnorm)
        # As torch's: three dimensions have one memory format.
        kept = layout in DENSE and (layout == "contiguous" or len(shape) > 3)
        strides = problem.x.stride() if kept else torch.empty(shape).stride()
        for name in ("y", "dx"):
            assert [found[name].stride(d) for d in told] == [strides[d] for d in told], (name, layout)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_only_the_gradients_asked_for(kernel, training, activation, with_residual):
    """Each subset of the inputs gets the gradients it gets when all are asked for, and the others get none."""
    problem = make_problem(SHAPE, Options(training, activation, with_residual))
    everything = run(problem, by_keelnorm)
    inputs = {"dx": problem.x, "dweight": problem.weight, "dbias": problem.bias}
    if with_residual:
        inputs["dresidual"] = problem.residual
    for wanted in itertools.product((False, True), repeat=len(inputs)):
        leaves = {
            name: value.detach().clone().requires_grad_(want)
            for (name, value), want in zip(inputs.items(), wanted, strict=True)
        }
        y = kn.functional.batch_norm(
            leaves["dx"], problem.running_mean.clone(), problem.running_var.clone(), leaves["dweight"],
            leaves["dbias"], training, MOMENTUM, EPS, activation=activation, residual=leaves.get("dresidual"),
        )  # fmt: skip
        assert y.requires_grad == any(wanted)
        if not any(wanted):
            continue
        y.backward(problem.dy)
        for (name, leaf), want in zip(leaves.items(), wanted, strict=True):
            if want:
                assert torch.equal(leaf.grad, everything[name]), (name, wanted)
            else:
                assert leaf.grad is None, (name, wanted)


def test_absent_weight_and_bias(kernel):
    for weight, bias in itertools.product((True, False), repeat=2):
        problem = make_problem(SHAPE, Options(True, "relu"))
        given = {"weight": problem.weight if weight else None, "bias": problem.bias if bias else None}
        filled = (
            (given["weight"] if weight else torch.ones(18)).clone().requires_grad_(),
            (given["bias"] if bias else torch.zeros(18)).clone().requires_grad_(),
        )
        x, x_filled = (problem.x.clone().requires_grad_() for _ in range(2))
        y = kn.functional.batch_norm(x, None, None, training=True, activation="relu", **given)
        y_filled = kn.functional.batch_norm(x_filled, None, None, *filled, training=True, activation="relu")
        assert torch.equal(y, y_filled)
        y.backward(problem.dy)
        y_filled.backward(problem.dy)
        assert torch.equal(x.grad, x_filled.grad)
