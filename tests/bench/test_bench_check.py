"""The definition agrees with autograd through the formula, and the check finds what is wrong."""

import dataclasses

import pytest
import torch
from torch import nn

from keelnorm.bench import definition
from keelnorm.bench.cases import LAYOUTS, VARIANTS, Case, Shape
from keelnorm.bench.correctness import WrongResultError, check, expect
from keelnorm.bench.peers import PEERS, Built
from keelnorm.bench.problem import EPS, MOMENTUM, make_problem

SHAPES = [(4, 6, 5, 3), (8, 16, 4, 4), (7, 5), (3, 4, 9), (2, 3, 1, 1)]


def problem_of(dims=(4, 6, 5, 3), layout="contiguous", variant="bn_add_relu"):
    return make_problem(Case(Shape("small", dims), layout, variant))


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("block_elements", [1, definition.BLOCK_ELEMENTS])
def test_definition_is_autograd_of_the_formula(dims, variant, block_elements, monkeypatch):
    monkeypatch.setattr(definition, "BLOCK_ELEMENTS", block_elements)
    problem = problem_of(dims, variant=variant)
    view = (1, -1, *(1 for _ in dims[2:]))
    axes = (0, *range(2, len(dims)))
    leaves = {"dx": problem.x, "dweight": problem.state["weight"], "dbias": problem.state["bias"]}
    if problem.residual is not None:
        leaves["dresidual"] = problem.residual
    leaves = {name: value.detach().double().requires_grad_() for name, value in leaves.items()}
    x = leaves["dx"]
    mean, var = x.mean(axes), x.var(axes, unbiased=False)
    y = (x - mean.view(view)) / (var.view(view) + EPS).sqrt() * leaves["dweight"].view(view)
    y = y + leaves["dbias"].view(view) + leaves.get("dresidual", 0.0)
    y = y if variant == "bn" else y.relu()
    gradients = torch.autograd.grad(y, list(leaves.values()), problem.dy.double())
    wanted = dict(zip(leaves, gradients, strict=True)) | {
        "y": y,
        "running_mean": (1 - MOMENTUM) * problem.state["running_mean"] + MOMENTUM * mean,
        "running_var": (1 - MOMENTUM) * problem.state["running_var"] + MOMENTUM * x.var(axes),
    }
    found = expect(problem, "training")
    assert found.keys() == wanted.keys()
    for name, quantity in found.items():
        torch.testing.assert_close(quantity.value.double(), wanted[name].double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dims", SHAPES)
def test_eager_passes(dims, variant):
    for layout in Shape("small", dims).layouts:
        problem = problem_of(dims, layout, variant)
        built = PEERS["eager"].build(problem)
        for phase in ("training", "inference"):
            assert check(problem, built, phase, expect(problem, phase)) < 32


def test_every_layout_has_the_same_values():
    first, second = (problem_of(layout=layout) for layout in LAYOUTS)
    for name in ("x", "residual", "dy"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert second.x.is_contiguous(memory_format=torch.channels_last)
    assert second.dy.is_contiguous(memory_format=torch.channels_last)


def test_no_gradient_where_rounding_decides():
    problem = problem_of((16, 8, 32, 32))
    z = expect(dataclasses.replace(problem, case=dataclasses.replace(problem.case, variant="bn_relu")), "training")
    y = z["y"].value
    undecided = (y > 0) & (y < definition.KINK / 2)
    assert undecided.any()
    assert (problem.dy[undecided] == 0).all()
    assert (problem.dy == 0).float().mean() < 1e-3


class Scale(torch.autograd.Function):
    """The identity, with a gradient that is off by one part in a thousand."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.001


def broken_output(norm, x):
    return norm(x) * 1.001


def broken_gradient(norm, x):
    return norm(Scale.apply(x))


def broken_running_mean(norm, x):
    y = norm(x)
    norm.running_mean.data.mul_(1.01)
    return y


def biased_running_var(norm, x):
    before = norm.running_var.clone()
    y = norm(x)
    biased = x.detach().var((0, 2, 3), unbiased=False)
    norm.running_var.data.copy_(torch.lerp(before, biased, MOMENTUM))
    return y


def double_output(norm, x):
    return norm(x).double()


def one_nan(norm, x):
    y = norm(x)
    return y.masked_fill(y == y.amax(), float("nan"))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (broken_output, "y is off"),
        (broken_gradient, "dx is off"),
        (broken_running_mean, "running_mean is off"),
        (biased_running_var, "running_var is off"),
        (double_output, "float64"),
        (one_nan, "y is off by nan"),
    ],
)
def test_wrong_results_are_found(call, name):
    problem = problem_of(variant="bn")
    norm = nn.BatchNorm2d(6, eps=EPS, momentum=MOMENTUM)
    built = Built(lambda x, _: call(norm, x), norm)
    with pytest.raises(WrongResultError, match=name):
        check(problem, built, "training", expect(problem, "training"))


def test_a_peer_without_a_module_is_refused():
    problem = problem_of(variant="bn")
    with pytest.raises(TypeError, match="must give its module"):
        check(problem, Built(lambda x, _: x), "training", {})
