"""Laws of batch normalization in training, for a layer on every kernel.

x has integer values, so that shifting and scaling it is exact and what differs is the rounding of the layer alone.
"""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from support.cases import DENSE, laid_out
from support.definition import UNIT, over, spread

import keelnorm as kn

EPS = 1e-12
#: Of values that are a few roundings of terms up to a scale; the variance is a sum of up to a hundred terms.
BOUND = 16 * UNIT

seeds = st.integers(0, 2**32 - 1)
layouts = st.sampled_from((*DENSE, "transposed"))


@st.composite
def batches(draw):
    """Integers of a random shape (N, C, *S), no channel of which is constant."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6))
    values = draw(hnp.arrays("int16", shape, elements=st.integers(-1000, 1000), fill=st.nothing()))
    x = torch.from_numpy(values).float()
    assume(bool((x.amax(over(x)) > x.amin(over(x))).all()))
    return laid_out(x, draw(layouts))


def layer_of(x, seed=0):
    """A layer in training with random weight and bias."""
    torch.manual_seed(seed)
    layer = kn.BatchNorm(x.shape[1], eps=EPS)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    return layer


def scale_of(layer, x):
    """The largest magnitude that enters an output: xhat stays below √M."""
    count = x.numel() // x.shape[1]
    return layer.weight.abs() * count**0.5 + layer.bias.abs()


def assert_same(found, wanted, scale):
    assert bool(((found - wanted).abs() <= BOUND * spread(scale, wanted.dim())).all())


@given(x=batches(), seed=seeds)
def test_order_of_samples_does_not_matter(kernel, x, seed):
    layer, order = layer_of(x, seed), torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        assert_same(layer(x[order]), layer(x)[order], scale_of(layer, x))


@given(x=batches(), seed=seeds, exponent=st.integers(-12, 12))
def test_positive_scale_of_x_does_not_matter(kernel, x, seed, exponent):
    layer = layer_of(x, seed)
    with torch.no_grad():
        assert_same(layer(x * 2.0**exponent), layer(x), scale_of(layer, x))


@given(x=batches(), seed=seeds)
def test_negative_scale_turns_the_sign(kernel, x, seed):
    layer = layer_of(x, seed)
    with torch.no_grad():
        bias = spread(layer.bias, x.dim())
        assert_same(layer(-x) - bias, bias - layer(x), 2 * scale_of(layer, x))


@pytest.mark.parametrize("largest", [10, 10_000, 16_000_000])
@given(data=st.data(), x=batches(), seed=seeds)
def test_shift_of_x_does_not_matter(kernel, largest, data, x, seed):
    """Up to 16 million, below which float32 holds every integer, and a deviation is a few units in the last place."""
    shifts = data.draw(hnp.arrays("int32", x.shape[1], elements=st.integers(-largest, largest)))
    layer = layer_of(x, seed)
    with torch.no_grad():
        shifted = x + spread(torch.from_numpy(shifts).float(), x.dim())
        assert_same(layer(shifted), layer(x), scale_of(layer, x))


@given(x=batches(), seed=seeds)
def test_output_has_mean_bias_and_deviation_weight(kernel, x, seed):
    layer = layer_of(x, seed)
    with torch.no_grad():
        y = layer(x).double()
        scale = scale_of(layer, x).double()
        mean = y.mean(over(y))
        deviation = (y - spread(mean, y.dim())).square().mean(over(y)).sqrt()
        assert bool(((mean - layer.bias).abs() <= BOUND * scale).all())
        assert bool(((deviation - layer.weight.abs()).abs() <= BOUND * scale).all())


@pytest.mark.parametrize("activation", [None, "relu"])
@given(x=batches(), seed=seeds)
def test_gradient_has_no_mean_and_no_part_along_xhat(kernel, activation, x, seed):
    layer = layer_of(x, seed)
    leaf = x.clone().requires_grad_()
    y = layer(leaf, activation=activation)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    (dx,) = torch.autograd.grad(y, leaf, dy)
    wide = x.double()
    mean = wide.mean(over(x))
    rstd = 1 / (wide - spread(mean, x.dim())).square().mean(over(x)).sqrt()
    xhat = (wide - spread(mean, x.dim())) * spread(rstd, x.dim())
    # dx is weight·rstd times terms up to |g|, mean|g| and |xhat|·mean|g·xhat|; M of them are added.
    count = x.numel() // x.shape[1]
    terms = rstd * layer.weight.abs() * (1 + count) * dy.abs().amax(over(x)) * count
    assert bool((dx.sum(over(x), dtype=torch.float64).abs() <= BOUND * terms).all())
    assert bool(((dx * xhat).sum(over(x)).abs() <= BOUND * terms * count**0.5).all())
