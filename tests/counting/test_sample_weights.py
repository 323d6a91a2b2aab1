"""layer(x, sample_weight=...): a value counts as often as its weight says."""

from __future__ import annotations

import pytest
import torch

import evenkeel as ek


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 2, 2)], ids=str)
def test_weights_of_whole_numbers_are_repetitions(shape):
    x = torch.randn(shape, dtype=torch.float64)
    times = torch.tensor([1, 3, 0, 2, 1, 1])
    repeated = x.repeat_interleave(times, 0)
    layer, other = (ek.BatchNorm(3, dtype=torch.float64) for _ in range(2))
    y, expected = layer(x, sample_weight=times.double()), other(repeated)
    torch.testing.assert_close(y.repeat_interleave(times, 0), expected)
    torch.testing.assert_close(layer.running_mean, other.running_mean)
    torch.testing.assert_close(layer.running_var, other.running_var)


def test_gradients():
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, 5, dtype=torch.float64)
    layer = ek.BatchNorm1d(3, dtype=torch.float64, track_running_stats=False)
    assert torch.autograd.gradcheck(lambda x: layer(x, sample_weight=weight, activation="silu", residual=x), x)


def test_ones_are_no_weights_and_a_mask_takes_them_away():
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    mask = torch.rand(4, 5) < 0.7
    layer, other = (ek.BatchNorm1d(3, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(layer(x, sample_weight=torch.ones(4).double()), other(x))
    torch.testing.assert_close(layer(x, sample_weight=torch.ones(4, 5).double(), mask=mask), other(x, mask=mask))
    torch.testing.assert_close(layer.running_var, other.running_var)


def test_weights_of_nothing_change_nothing():
    layer = ek.BatchNorm1d(3)
    y = layer(torch.randn(4, 3), sample_weight=torch.zeros(4))
    assert y.isfinite().all()
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_var, torch.ones(3))
