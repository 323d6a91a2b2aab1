"""Moments of values with weights: their definition, and that merging adds the weights and their squares up."""

from __future__ import annotations

import pytest
import torch

from keelnorm import Moments
from keelnorm.functional import moments

WEIGHTINGS = ["frequency", "importance"]


def assert_same(found, wanted):
    for name in ("count", "mean", "m2", "var", "var_unbiased"):
        ours, expected = (getattr(m, name).expand_as(m.mean) for m in (found, wanted))
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)


def weighted(weighting, samples=12, scale=1.0):
    x, w = torch.randn(samples, 3, 4) + 5, torch.rand(samples, 4) * scale
    w[0] = 0
    return x, w, Moments.from_tensor(x, sample_weight=w, weighting=weighting)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_definition(weighting, scale):
    x, w, found = weighted(weighting, scale=scale)
    values, w = x.double().movedim(1, -1).flatten(0, 1), w.double().flatten()
    mean = w @ values / w.sum()
    m2 = w @ (values - mean) ** 2
    freedom = w.sum() - (1 if weighting == "frequency" else w @ w / w.sum())
    torch.testing.assert_close(found.count, w.sum())
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.var, m2 / w.sum())
    expected = m2 / freedom if freedom > 0 else torch.full((3,), torch.nan).double()
    torch.testing.assert_close(found.var_unbiased, expected, equal_nan=True)
    assert_same(moments(x, sample_weight=w.view(12, 4), weighting=weighting), found)


@pytest.mark.parametrize("scale", [0.01, 1.0])  # parts of less than one value in all
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_any_partition_is_the_whole(weighting, scale):
    x, w, whole = weighted(weighting, scale=scale)
    parts = [
        Moments.from_tensor(a, sample_weight=b, weighting=weighting)
        for a, b in zip(x.split([1, 2, 4, 5]), w.split([1, 2, 4, 5]), strict=True)
    ]
    assert_same(Moments.merge_all([parts[2], Moments.empty(3), *parts[:2], parts[3]]), whole)


def test_values_without_weights_weigh_one():
    """Moments of plain values merge with those of either kind of weights."""
    x, _, importance = weighted("importance")
    plain = Moments.from_tensor(x)
    ones = Moments.from_tensor(x, sample_weight=torch.ones(12), weighting="importance")
    assert_same(plain, ones)
    assert_same(plain.merge(importance), importance.merge(ones))
    assert plain.squares is None
    assert plain.merge(plain).squares is None


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_masks_take_weights_away(weighting):
    x, w, _ = weighted(weighting)
    mask = torch.rand(12, 4) < 0.6
    poisoned = torch.where(mask.unsqueeze(1), x, torch.nan)
    found = Moments.from_tensor(poisoned, mask, sample_weight=w, weighting=weighting)
    assert_same(found, Moments.from_tensor(x, sample_weight=w * mask, weighting=weighting))
    per_channel = torch.rand(12, 3, 4) < 0.6
    found = Moments.from_tensor(x, per_channel, sample_weight=w, weighting=weighting)
    for c in range(3):
        alone = Moments.from_tensor(x[:, c : c + 1], sample_weight=w * per_channel[:, c], weighting=weighting)
        torch.testing.assert_close(found.mean[c], alone.mean[0])
        torch.testing.assert_close(found.var_unbiased[c], alone.var_unbiased[0])


def test_nothing_and_one_value():
    x = torch.randn(3, 2)
    nothing = Moments.from_tensor(x, sample_weight=torch.zeros(3), weighting="importance")
    assert_same(nothing.merge(Moments.from_tensor(x)), Moments.from_tensor(x))
    for weight in (0.3, 1.0, 7.7):
        one = Moments.from_tensor(x, sample_weight=torch.tensor([0.0, weight, 0.0]), weighting="importance")
        assert one.var_unbiased.isnan().all()
        assert one.var.abs().max().item() < 1e-12


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_illegal_weights(value):
    with pytest.raises(ValueError, match="must not be negative, infinite or NaN"):
        Moments.from_tensor(torch.randn(2, 3), sample_weight=torch.tensor([1.0, value]))
    with pytest.raises(TypeError, match="floating-point"):
        Moments.from_tensor(torch.randn(2, 3), sample_weight=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"must have shape \(2,\)"):
        Moments.from_tensor(torch.randn(2, 3), sample_weight=torch.ones(3))
