"""How a batch enters the running statistics, on every kernel."""

from __future__ import annotations

import pytest
import torch
from support.cases import DENSE, laid_out
from support.definition import UNIT, moments

import keelnorm as kn

CHANNELS = 19


def batches(layout):
    """Batches of different sizes and means."""
    for n, mean in ((2, 0.0), (5, 300.0), (3, -7.0)):
        yield laid_out(torch.randn(n, CHANNELS, 3, 5) + mean, layout)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.5, None])
@pytest.mark.parametrize("layout", DENSE)
def test_update(kernel, layout, momentum):
    """running = (1 - momentum)·running + momentum·batch with the unbiased variance; None averages over all batches."""
    layer = kn.BatchNorm(CHANNELS, momentum=momentum)
    mean, var = torch.zeros(CHANNELS, dtype=torch.float64), torch.ones(CHANNELS, dtype=torch.float64)
    for i, x in enumerate(batches(layout)):
        layer(x)
        count, (batch_mean, batch_var) = x.numel() // CHANNELS, moments(x)
        factor = 1 / (i + 1) if momentum is None else momentum
        mean = (1 - factor) * mean + factor * batch_mean
        var = (1 - factor) * var + factor * batch_var * count / (count - 1)
        assert layer.num_batches_tracked.item() == i + 1
    # Each of the three updates rounds what it leaves, and the batch's own mean, 300 at most.
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=4 * UNIT, atol=4 * UNIT * 300)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=16 * UNIT, atol=0)


@pytest.mark.parametrize("layout", DENSE)
def test_evaluation_leaves_them_alone(kernel, layout):
    layer = kn.BatchNorm(CHANNELS).eval()
    torch.nn.init.normal_(layer.running_mean)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for x in batches(layout):
        layer(x.requires_grad_()).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_without_them_the_batch_normalizes(kernel):
    layer = kn.BatchNorm(CHANNELS, track_running_stats=False)
    (x, *_) = batches("contiguous")
    assert torch.equal(layer(x), layer.eval()(x))


def test_backward_does_not_update(kernel):
    layer = kn.BatchNorm(CHANNELS)
    (x, *_) = batches("contiguous")
    y = layer(x.requires_grad_())
    before = layer.running_mean.clone(), layer.running_var.clone()
    y.sum().backward()
    assert torch.equal(layer.running_mean, before[0])
    assert torch.equal(layer.running_var, before[1])
    assert layer.num_batches_tracked.item() == 1
