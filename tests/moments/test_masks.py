"""Masked moments are the moments of the selected values."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from support.batches import full_mask, masks, values

import keelnorm as kn
from keelnorm import Moments

EPS = torch.finfo(torch.float64).eps


@given(data=st.data(), x=values())
def test_masked_moments_are_those_of_the_selected_values(data, x):
    mask = data.draw(masks(tuple(x.shape)))
    found, selected = Moments.from_tensor(x, mask), full_mask(mask, tuple(x.shape))
    assert found.count.tolist() == [selected[:, c].sum().item() for c in range(x.shape[1])]
    for c in range(x.shape[1]):
        chosen = x[:, c][selected[:, c]]
        if len(chosen) == 0:
            assert found.mean[c] == found.m2[c] == 0
            continue
        mean = chosen.mean()
        rounding = 64 * EPS * chosen.abs().max()
        m2 = (chosen - mean).square().sum()
        assert (found.mean[c] - mean).abs() <= rounding
        assert (found.m2[c] - m2).abs() <= 1e-12 * m2 + len(chosen) * rounding * (rounding + m2.sqrt())


@given(data=st.data(), x=values(), bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_what_the_mask_leaves_out_may_be_anything(data, x, bad):
    mask = data.draw(masks(tuple(x.shape)))
    filled = torch.where(full_mask(mask, tuple(x.shape)), x, bad)
    found, wanted = Moments.from_tensor(filled, mask), Moments.from_tensor(x, mask)
    for name in ("count", "mean", "m2"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))


def test_gradient_ignores_what_the_mask_leaves_out():
    x = torch.randn(3, 2, 4).requires_grad_()
    mask = torch.rand(3, 4) < 0.5
    filled = torch.where(mask.unsqueeze(1), x, torch.nan).detach().requires_grad_()
    for leaf in (x, filled):
        found = Moments.from_tensor(leaf, mask)
        (found.mean + found.var).sum().backward()
    assert torch.equal(x.grad, filled.grad)
    assert torch.equal(x.grad != 0, mask.unsqueeze(1).expand_as(x))


@pytest.mark.parametrize(
    "shape", [(4,), (4, 5, 6), (4, 3, 5, 6), (1, 3, 1, 1), (4, 1, 1, 1), (1, 1, 5, 6), (1, 1, 1, 1)]
)
def test_legal_shapes(shape):
    mask = torch.ones(shape, dtype=torch.bool)
    whole = Moments.from_tensor(torch.ones(4, 3, 5, 6))
    found = Moments.from_tensor(torch.ones(4, 3, 5, 6), mask)
    assert found.count.tolist() == [whole.count.item()] * 3
    assert torch.equal(found.mean, whole.mean)


def test_a_batch_of_no_samples():
    found = Moments.from_tensor(torch.ones(0, 3, 2), torch.ones(0, dtype=torch.bool))
    assert found.count.tolist() == [0, 0, 0]
    assert found.m2.tolist() == [0, 0, 0]


def test_all_of_a_mask_is_no_mask():
    x = torch.randn(5, 3, 4) + 1e6
    found, wanted = Moments.from_tensor(x, torch.ones(5, dtype=torch.bool)), Moments.from_tensor(x)
    assert found.count.tolist() == [20, 20, 20]
    for name in ("mean", "m2"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "shape", [(3,), (5,), (4, 3), (4, 6, 5), (4, 3, 5), (3, 1, 5, 6), (4, 2, 5, 6), (1, 4, 3, 5, 6), ()]
)
@pytest.mark.parametrize("function", [Moments.from_tensor, kn.functional.moments])
def test_shape_that_does_not_fit(function, shape):
    """The message says what came and what is legal."""
    with pytest.raises(ValueError, match="mask does not fit") as raised:
        function(torch.zeros(4, 3, 5, 6), torch.ones(shape, dtype=torch.bool))
    message = str(raised.value)
    assert f"got a bool tensor of shape {shape} on cpu" in message
    assert "x of shape (4, 3, 5, 6)" in message
    assert "Legal are (4,), (4, 5, 6), and 4 dimensions that broadcast" in message


@pytest.mark.parametrize(
    ("mask", "came"),
    [
        (torch.ones(4), "a float32 tensor of shape (4,)"),
        (torch.ones(4, dtype=torch.int64), "an int64 tensor of shape (4,)"),
        ([True] * 4, "[True, True, True, True] (list)"),
        (True, "True (bool)"),
    ],
)
def test_what_is_no_mask(mask, came):
    with pytest.raises(TypeError, match="a mask is a boolean tensor, True where a value counts") as raised:
        Moments.from_tensor(torch.zeros(4, 3), mask)
    assert came in str(raised.value)


def test_mask_on_another_device():
    with pytest.raises(ValueError, match=r"device of x, cpu; got a bool tensor .* on meta"):
        Moments.from_tensor(torch.zeros(4, 3), torch.ones(4, dtype=torch.bool, device="meta"))
