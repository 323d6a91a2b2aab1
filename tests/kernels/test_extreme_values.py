"""NaN and infinity as in torch; very large, very small, constant, sparse and coarse values."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.accuracy import ONE_SIDED, Expected, errors_on
from support.cases import DENSE, EPS, MOMENTUM, Options, laid_out, make_problem
from support.definition import UNIT, expect, rms, spread
from support.runs import by_keelnorm, by_torch, run

import keelnorm as kn

SHAPE = (6, 5, 7, 9)
BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


def kinds(x):
    """What each value is: finite (0), NaN, or an infinity of either sign."""
    return torch.where(x.isnan(), 2.0, torch.where(x.isinf(), x.sign(), 0.0))


@pytest.mark.parametrize("where", ["x", "dy", "residual"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("layout", DENSE)
def test_nan_and_infinity_are_those_of_torch_and_stay_in_their_channel(kernel, layout, bad, where):
    for training, activation in itertools.product((True, False), (None, "relu")):
        clean = make_problem(SHAPE, Options(training, activation, where == "residual")).laid_out(layout)
        spoilt = getattr(clean, where).clone()
        spoilt[2, 1, 3, 4] = BAD[bad]
        problem = clean.replace(**{where: spoilt})
        found, torchs, wanted = run(problem, by_keelnorm), run(problem, by_torch), run(clean, by_keelnorm)
        for name, value in found.items():
            if where == "x" and training and name in ("running_mean", "running_var"):
                assert value.isfinite().all(), name  # torch's would be spoilt for good
                continue
            # Where infinite terms are added, their order decides between an infinity and NaN.
            if name == "dx" and where == "x" and not training:
                continue  # see the next test
            elementwise = name in ("y", "dresidual") or (name == "dx" and not training)
            what = kinds if elementwise else torch.isfinite
            assert torch.equal(what(value), what(torchs[name])), (name, problem.options)
            others = (slice(None),) * (value.dim() > 1) + ([0, 2, 3, 4],)
            assert torch.equal(value[others], wanted[name][others]), (name, problem.options)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("layout", DENSE)
def test_gradient_with_fixed_statistics_does_not_depend_on_x(kernel, layout, bad):
    problem = make_problem(SHAPE, Options(training=False)).laid_out(layout)
    wanted = run(problem, by_keelnorm)["dx"]
    problem.x[2, 1, 3, 4] = BAD[bad]
    assert torch.equal(run(problem, by_keelnorm)["dx"], wanted)


def test_activation_lets_nan_through(kernel):
    x = torch.tensor([[1.0, torch.nan], [-2.0, 3.0], [0.5, 1.0]])
    mean, var = torch.zeros(2), torch.ones(2)
    for residual in (None, torch.zeros_like(x)):
        y = kn.functional.batch_norm(x, mean, var, activation="relu", residual=residual)
        assert y[0, 1].isnan()
        assert y[1, 0] == 0
        assert torch.equal(y[:, 0] > 0, x[:, 0] > 0)


@pytest.mark.parametrize("layout", DENSE)
def test_activation_is_closed_at_zero(kernel, layout):
    """Where the value in front of ReLU is 0 or -0, the gradient is 0, as in torch."""
    x = laid_out(torch.tensor([1.0, 0.0, -0.0, -1.0]).repeat(6).view(2, 3, 4), layout)
    mean, var, dy = torch.zeros(3), torch.ones(3) - EPS, torch.ones_like(x)
    for residual in (None, torch.zeros_like(x)):
        leaves = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
        y = kn.functional.batch_norm(
            leaves[0], mean, var, activation="relu", residual=leaves[1] if residual is not None else None
        )
        for gradient in torch.autograd.grad(y, leaves, dy):
            assert torch.equal(gradient != 0, x > 0)


@pytest.mark.parametrize("value", [0.1, -3e7, 1e-30, 1e15, 123456.7, 0.0])
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("shape", [(3, 5), (1, 5, 7), SHAPE, (1, 5, 13200)])
def test_constant_channels_give_the_bias(kernel, shape, layout, value):
    problem = make_problem(shape, Options())
    problem = problem.replace(x=torch.full(shape, value)).laid_out(layout)
    found, right = run(problem, by_keelnorm), expect(problem, eps=EPS, momentum=MOMENTUM)
    assert torch.equal(found["y"], spread(problem.bias, len(shape)).expand(shape))
    assert torch.equal(found["dweight"], torch.zeros(shape[1]))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(found[name].double(), right[name].value, rtol=UNIT, atol=0)
    assert bool((rms(found["dx"] - right["dx"].value) <= 4 * UNIT * right["dx"].scale).all())


def sparse(shape, rng):
    """Zeros, and one in fifty values far off."""
    return torch.where(torch.rand(shape, generator=rng) < 0.02, 1e3 * torch.randn(shape, generator=rng), 0)


def padded(shape, rng):
    """A large mean with a border of zeros."""
    x = torch.zeros(shape)
    x[..., 1:-1] = 300 + torch.randn(shape, generator=rng)[..., 1:-1]
    return x


def rectified(shape, rng):
    """Half of the values zero."""
    return torch.randn(shape, generator=rng).relu()


def coarse(shape, rng):
    """The grey values of a picture."""
    return torch.randint(0, 256, shape, generator=rng).float()


def outlier(shape, rng):
    """The first value is a million standard deviations away from the other values."""
    x = torch.randn(shape, generator=rng)
    x[0].view(shape[1], -1)[:, 0] = 1e6
    return x


def scaled(factor):
    def scaled_values(shape, rng):
        return factor * torch.randn(shape, generator=rng)

    return scaled_values


DATA = {
    **{data.__name__: data for data in (sparse, padded, rectified, coarse, outlier)},
    **{f"times {factor:g}": scaled(factor) for factor in (1e-40, 1e-15, 1e15, 1e18)},
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("layout", DENSE)
def test_peculiar_data_costs_no_digits(kernel, layout, data):
    rng = torch.Generator().manual_seed(0)
    cases = [
        Expected(make_problem(shape, Options(), seed).replace(x=DATA[data](shape, rng)))
        for shape, seeds in (((4, 12, 9, 11), 10), ((2, 16, 40, 50), 3))
        for seed in range(seeds)
    ]
    for name, error in errors_on(cases, layout, by_keelnorm).items():
        assert error <= ONE_SIDED, f"{name} is off by {error / UNIT:.1f} roundings"


def assert_right_output(problem, layout):
    right = expect(problem, eps=EPS, momentum=MOMENTUM)["y"]
    y = kn.functional.batch_norm(laid_out(problem.x, layout), None, None, problem.weight, problem.bias, training=True)
    assert bool((rms(y - right.value) <= 4 * UNIT * right.scale).all())


@pytest.mark.parametrize("layout", DENSE)
def test_deviations_whose_squares_exceed_float32(kernel, layout):
    problem = make_problem(SHAPE, Options())
    assert_right_output(problem.replace(x=1e30 * problem.x), layout)


@pytest.mark.parametrize("layout", DENSE)
def test_deviations_whose_squares_exceed_float32_and_whose_sum_is_zero(kernel, layout):
    problem = make_problem(SHAPE, Options())
    half = torch.randint(0, 2, (3, *SHAPE[1:])) * 2.0 - 1
    assert_right_output(problem.replace(x=torch.cat([half, -half]) * 2.0**100), layout)
