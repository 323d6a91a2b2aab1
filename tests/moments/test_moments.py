"""Moments of a tensor against numpy, its properties, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from support.batches import values
from support.cases import DENSE, LAYOUTS, laid_out
from support.definition import moments, over
from support.forcing import NATIVE

import keelnorm as kn
from keelnorm import Moments

EPS64 = torch.finfo(torch.float64).eps


@given(x=values())
def test_variances_are_those_of_numpy(x):
    found = Moments.from_tensor(x)
    axes = tuple(over(x))
    array = x.numpy()
    count = x.numel() // x.shape[1]
    # The mean is rounded where the values are large, which moves a variance by its square and no more.
    rounding = np.square(64 * EPS64 * np.abs(array).max())
    np.testing.assert_allclose(found.mean, array.mean(axes), rtol=64 * EPS64)
    np.testing.assert_allclose(found.var, array.var(axes), rtol=1e-12, atol=rounding)
    if count > 1:
        np.testing.assert_allclose(found.var_unbiased, array.var(axes, ddof=1), rtol=1e-12, atol=2 * rounding)
    else:
        assert found.var_unbiased.isnan().all()


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_large_mean_costs_no_digits(dtype, layout, offset):
    """The values are what their dtype made of them; their moments are then exact up to the summation's rounding."""
    if dtype in (torch.float16, torch.bfloat16):
        offset = offset / 1e5  # as far as these dtypes still see a deviation
    x = laid_out((torch.randn(7, 5, 6, 4, dtype=torch.float64) + offset).to(dtype), layout)
    found, (mean, var) = Moments.from_tensor(x), moments(x)
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    assert found.mean.dtype == found.m2.dtype == found.count.dtype == torch.float64
    assert bool(((found.mean - mean).abs() <= 8 * unit * var.sqrt() + 8 * EPS64 * mean.abs()).all())
    assert bool(((found.var - var).abs() <= 8 * unit * var).all())


@pytest.mark.parametrize("layout", DENSE)
def test_on_kernels(kernel, layout):
    """keelnorm.functional.moments takes the kernels in use."""
    x = laid_out(torch.randn(7, 5, 6, 4) + 1e6, layout)
    found, (mean, var) = kn.functional.moments(x), moments(x)
    assert found.count.item() == 7 * 6 * 4
    assert bool(((found.mean - mean).abs() <= 1e-6 * var.sqrt()).all())
    assert bool(((found.var - var).abs() <= 1e-6 * var).all())
    assert bool((found.var_unbiased * (7 * 24 - 1) - found.m2).abs().max() <= 1e-12 * found.m2.max())


def assert_scaled_moments(function, scale):
    """Also where the squares of the deviations are no float32."""
    x = scale * torch.randn(7, 5, 6)
    found, (mean, var) = function(x), moments(x)
    assert bool(((found.mean - mean).abs() <= 1e-6 * var.sqrt()).all())
    assert bool(((found.var - var).abs() <= 1e-6 * var).all())


@pytest.mark.parametrize("scale", [1e-15, 1e15, 1e18, 1e-40, 1e-30, 1e-22, 1e20, 1e30])
def test_scales(scale):
    assert_scaled_moments(Moments.from_tensor, scale)


@pytest.mark.parametrize("kernel", NATIVE, indirect=True)
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-22, 1e-15, 1e15, 1e18, 1e20, 1e30])
def test_scales_on_kernels(kernel, scale):
    assert_scaled_moments(kn.functional.moments, scale)


def test_functional_takes_a_mask_and_a_gradient():
    x, mask = torch.randn(4, 3, 5), torch.tensor([True, False, True, True])
    with_mask, wanted = kn.functional.moments(x, mask), Moments.from_tensor(x[mask])
    torch.testing.assert_close(with_mask.m2, wanted.m2, rtol=1e-6, atol=0)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(kn.functional.moments(x).mean.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 1 / 20))
    with torch.no_grad():
        assert not kn.functional.moments(x).mean.requires_grad


@pytest.mark.parametrize("masked", [False, True])
def test_is_differentiable(masked):
    x = (torch.randn(4, 2, 3, dtype=torch.float64) + 100).requires_grad_()
    mask = torch.rand(4, 3) < 0.6 if masked else None

    def mean_and_var(x):
        found = Moments.from_tensor(x, mask)
        return found.mean, found.var, found.merge(Moments.from_tensor(2 * x)).var_unbiased

    assert torch.autograd.gradcheck(mean_and_var, x)
    assert torch.autograd.gradgradcheck(mean_and_var, x)


def test_one_value_and_none():
    one, none = Moments.from_tensor(torch.full((1, 2), 7.0)), Moments.from_tensor(torch.empty(0, 2, 3))
    assert one.mean.tolist() == [7, 7]
    assert one.var.tolist() == [0, 0]
    assert one.var_unbiased.isnan().all()
    assert none.count.item() == 0
    assert none.mean.tolist() == none.m2.tolist() == [0, 0]
    assert none.var.isnan().all()
    assert none.var_unbiased.isnan().all()
    assert Moments.from_tensor(torch.empty(3, 0, 2)).mean.shape == (0,)


def test_constant_channels_have_no_variance():
    x = torch.tensor([0.1, -3e7, 1e-30]).expand(17, 3)
    found = Moments.from_tensor(x)
    assert torch.equal(found.mean, x[0].double())
    assert found.m2.tolist() == [0, 0, 0]


def test_nan_and_infinity_stay_in_their_channel():
    x = torch.randn(6, 4, 3)
    clean = Moments.from_tensor(x)
    for bad in (torch.nan, torch.inf, -torch.inf):
        y = x.clone()
        y[2, 1, 0] = bad
        found = Moments.from_tensor(y)
        assert found.var[1].isnan()
        for name in ("mean", "m2"):
            assert torch.equal(getattr(found, name)[[0, 2, 3]], getattr(clean, name)[[0, 2, 3]])


def test_repr_says_how_much_there_is():
    x = torch.zeros(4, 2)
    assert repr(Moments.from_tensor(x)) == "Moments(channels=2, count=4, device=cpu)"
    mask = torch.tensor([[True, False]]).expand(4, 2)
    assert repr(Moments.from_tensor(x, mask)) == "Moments(channels=2, count=[4.0, 0.0], device=cpu)"


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ([1.0], TypeError, r"\(N, C, \*S\).*\[1\.0\] \(list\)"),
        (torch.zeros(2, 3, dtype=torch.int32), TypeError, r"int32 tensor of shape \(2, 3\).*x\.float\(\)"),
        (torch.zeros(2, 3, dtype=torch.complex64), TypeError, "complex64"),
        (torch.zeros(3), ValueError, r"\(N, C, \*S\).*shape \(3,\)"),
        (torch.tensor(1.0), ValueError, r"shape \(\)"),
    ],
)
@pytest.mark.parametrize("function", [Moments.from_tensor, kn.functional.moments])
def test_what_is_not_legal(function, x, error, words):
    with pytest.raises(error, match=words):
        function(x)


@pytest.mark.parametrize("masked", [False, True])
def test_under_vmap(masked):
    x, mask = torch.randn(3, 5, 2, 4), torch.arange(5) > 1 if masked else None

    def moments(x):
        found = kn.functional.moments(x, mask)
        return found.count, found.mean, found.m2

    found = torch.func.vmap(moments)(x)
    for index, part in enumerate(x):
        for batched, value in zip(found, moments(part), strict=True):
            torch.testing.assert_close(batched[index], value)
