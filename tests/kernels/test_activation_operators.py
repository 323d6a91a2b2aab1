"""apply, grad_stats, grad_input and invert with every activation, against float64 by torch's functions and autograd."""

from __future__ import annotations

import pytest
import torch
from support.activations import FUNCTIONS, kinks_of
from support.cases import DENSE, EPS, laid_out
from support.definition import UNIT, moments, over, spread
from support.forcing import NATIVE
from support.operators import activation_of, operators

from keelnorm.engine.activations import TABLE

SHAPES = [(5, 19), (3, 16, 17), (5, 13, 3, 11), (1, 4, 2053)]
CASES = [
    pytest.param(shape, layout, id=f"{'x'.join(map(str, shape))}-{layout}")
    for shape in SHAPES
    for layout in (DENSE if len(shape) > 2 else DENSE[:1])
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Case:
    """Tensors, and the right results for them in float64."""

    def __init__(self, shape, layout, name, residual, dtype=torch.float32, spread_of_v=4.0):
        self.code = activation_of(name)
        channels, rank = shape[1], len(shape)
        self.x = laid_out(torch.randn(shape).to(dtype), layout)
        self.residual = laid_out(torch.randn(shape).to(dtype), layout) if residual else None
        self.weight, self.bias = (spread_of_v * torch.randn(channels)).to(dtype), torch.randn(channels).to(dtype)
        mean, var = moments(self.x)
        self.mean, self.rstd = mean, (var + EPS).rsqrt()
        xhat = (self.x.double() - spread(self.mean, rank)) * spread(self.rstd, rank)
        v = xhat * spread(self.weight.double(), rank) + spread(self.bias.double(), rank)
        v = v if self.residual is None else v + self.residual.double()
        v.requires_grad_()
        self.y = FUNCTIONS[name](v)
        dy = torch.randn(shape).to(dtype)
        for kink in kinks_of(name):
            dy = torch.where((v.detach() - kink).abs() <= 64 * UNIT * (v.detach().abs() + 1), 0, dy)
        self.dy = laid_out(dy, layout)
        [self.g] = torch.autograd.grad(self.y, v, self.dy.double())
        self.xhat = xhat
        #: Rounding of the value before the activation, whose slope stays below about 1.1.
        self.rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 16 * torch.finfo(dtype).eps
        self.scale = v.detach().abs().amax(over(self.x)).clamp(min=1)

    def affine(self, name):
        y = self.y.detach().to(self.x.dtype) if name == "relu" and self.residual is not None else None
        residual = None if name == "relu" else self.residual
        return self.x, self.mean, self.rstd, self.weight, self.bias, y, residual


def assert_within(found, expected, bound):
    error = (found.double() - expected).abs()
    if expected.dim() > 1:
        bound = spread(bound, expected.dim())
    assert bool((error <= bound).all()), f"off by {(error / bound).max():.3g} times the bound"


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_apply_and_backward(kernel, shape, layout, name, residual):
    check(kernel, Case(shape, layout, name, residual), name)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("layout", DENSE)
def test_other_dtypes(kernel, layout, name, dtype, residual):
    check(kernel, Case((3, 5, 4, 7), layout, name, residual, dtype), name)


def check(kernel, case, name):
    four, dtype = operators(kernel), case.x.dtype
    y = four.apply(case.x, case.mean, case.rstd, case.weight, case.bias, case.residual, *case.code)
    assert y.dtype == dtype
    assert_within(y, case.y.detach(), 8 * case.rounding * case.scale)

    sums = four.grad_stats(case.dy, *case.affine(name), *case.code)
    count = case.x.numel() // case.x.shape[1]
    right = torch.stack([case.g.sum(over(case.x)), (case.g * case.xhat).sum(over(case.x))])
    # g has the rounding of v times the derivative's own slope, which stays below 1; it is never rounded to x's dtype.
    wide = 16 * torch.finfo(torch.float64).eps if dtype == torch.float64 else UNIT
    size = case.dy.double().abs().amax(over(case.x)) * case.xhat.abs().amax(over(case.x)).clamp(min=1)
    assert_within(sums, right, 32 * wide * count**0.5 * case.scale * size)

    dx = four.grad_input(case.dy, *case.affine(name), right / count, *case.code)
    assert dx.dtype == dtype
    rank = case.x.dim()
    slope = spread(case.weight.double() * case.rstd, rank)
    wanted = slope * (case.g - spread(right[0] / count, rank) - case.xhat * spread(right[1] / count, rank))
    bound = (case.weight.double() * case.rstd).abs() * case.scale * size
    assert_within(dx, wanted, 32 * case.rounding * bound + torch.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", [(0, 0.0, 0.0), (3, 0.01, 0.0), (3, 2.0, 0.0), (4, 1.0, 0.0), (4, 0.3, 0.0)], ids=str)
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
def test_invert_undoes_apply(kernel, layout, code, dtype, affine):
    """Up to the rounding of y, which the inverse magnifies: by exp(−v) for elu, by bias/weight for all."""
    x = laid_out((100 + torch.randn(3, 7, 5, 4)).to(dtype), layout)
    weight = torch.tensor([1.0, -1.0, 0.5, -2.0, 1.5, 0.7, -0.3]).to(dtype) if affine else None
    bias = torch.linspace(-0.5, 0.5, 7).to(dtype) if affine else None
    mean, var = moments(x)
    saved = torch.stack([mean, var, (var + EPS).rsqrt()])
    four = operators(kernel)
    y = four.apply(x, mean, saved[2], weight, bias, None, *code)
    found = four.invert(y, saved, weight, bias, *code)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    assert found.stride() == x.stride()
    largest = y.double().abs().amax(over(y)).clamp(min=1)
    slopes = saved[2] if weight is None else saved[2] * weight.double()
    lowest = ((x.double() - spread(mean, 4)) * spread(slopes, 4)).amin(over(x))
    magnified = (1 - lowest).exp() if code[0] == 4 else largest
    bound = torch.finfo(dtype).eps * (4 * magnified * largest / slopes.abs() + 200)
    assert_within(found, x.double(), bound)


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_stats(kernel, layout, dtype):
    """Over the values that count; the others may be anything."""
    x = laid_out((3 + torch.randn(4, 5, 6, 7)).to(dtype), layout)
    mask = torch.rand(4, 6, 7) < 0.4
    right_mean, right_var = moments(x.movedim(1, -1)[mask])
    x.masked_fill_(~mask.unsqueeze(1), torch.nan)
    mean, var = operators(kernel).stats(x, mask)
    assert_within(mean, right_mean, 32 * UNIT * right_var.sqrt())
    assert_within(var, right_var, 32 * UNIT * right_var)


@pytest.mark.parametrize("kernel", NATIVE, indirect=True)
@pytest.mark.parametrize("code", [-1, len(TABLE), 2**40])
def test_an_unknown_code_is_refused(kernel, code):
    x, vector = torch.randn(4, 3), torch.ones(3, dtype=torch.float64)
    four = operators(kernel)
    with pytest.raises(RuntimeError, match="unsupported: activation"):
        four.apply(x, vector, vector, None, None, None, code, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="unsupported: activation"):
        four.grad_stats(x, x, vector, vector, None, None, None, None, code, 0.0, 0.0)
    four.stats(x, None)  # the fixture expects a call


@pytest.mark.parametrize("name", [row.name for row in TABLE if row.inverse is None])
def test_an_activation_without_an_inverse_is_not_inverted(kernel, name):
    x, saved = torch.randn(4, 3), torch.ones(3, 3, dtype=torch.float64)
    four = operators(kernel)
    with pytest.raises((RuntimeError, ValueError), match=r"unsupported: activation|has no inverse"):
        four.invert(x, saved, None, None, *activation_of(name))
    four.stats(x, None)
