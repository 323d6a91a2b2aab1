"""Batch normalization by the mean absolute deviation and by the range: what is special to them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from keelnorm.nn.l1 import L1BatchNorm, RangeBatchNorm

LAYERS = (L1BatchNorm, RangeBatchNorm)


def l1_scale(values: Tensor) -> Tensor:
    """Hoffer et al. (2018): √(π/2)·‖x − mean‖₁/n, of each row."""
    return math.sqrt(math.pi / 2) * (values - values.mean(1, keepdim=True)).abs().mean(1)


def range_scale(values: Tensor) -> Tensor:
    """Banner et al. (2018): range(x − mean)/√(2·ln n), of each row."""
    return (values.max(1).values - values.min(1).values) / math.sqrt(2 * math.log(values.shape[1]))


SCALES = {L1BatchNorm: l1_scale, RangeBatchNorm: range_scale}


def rows(x: Tensor) -> Tensor:
    return x.movedim(1, 0).flatten(1)


@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_formula(kind: type[nn.Module]) -> None:
    layer = kind(3, eps=1e-30, dtype=torch.float64)
    x = torch.randn(7, 3, 5, dtype=torch.float64) * torch.tensor([[0.1], [1.0], [30.0]]) + 5
    expected = (rows(x) - rows(x).mean(1, keepdim=True)) / SCALES[kind](rows(x))[:, None]
    torch.testing.assert_close(rows(layer(x)), expected)


def test_l1_of_gaussian_values_is_plain_batch_normalization_in_the_limit() -> None:
    for count in (100, 1600, 25600, 409600):
        deviation = L1BatchNorm(4)(torch.randn(count, 4)).std(0, correction=0)  # 1 for plain batch normalization
        assert (deviation - 1).abs().max() < 1.5 / math.sqrt(count)


def test_the_range_of_gaussian_values_lies_between_one_and_two_deviations() -> None:
    ratios = []
    for count in (50, 5000, 500000):
        ratios.append(1 / RangeBatchNorm(1)(torch.randn(count, 1)).std().item())
    assert 1 < ratios[0] < ratios[1] < ratios[2] < 2, ratios


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_var_is_the_square_of_the_scale(kind: type[nn.Module], momentum: float | None) -> None:
    layer = kind(3, momentum=momentum, dtype=torch.float64)
    var = torch.ones(3, dtype=torch.float64)
    for step in range(1, 4):
        x = torch.randn(6, 3, 4, dtype=torch.float64) * step
        layer(x)
        share = 1 / step if momentum is None else momentum
        unbiased = 24 / 23 if kind is L1BatchNorm else 1
        var = (1 - share) * var + share * SCALES[kind](rows(x)) ** 2 * unbiased
    torch.testing.assert_close(layer.running_var, var)
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    mean = layer.running_mean
    expected = (x - mean[:, None]) / (var + layer.eps).sqrt()[:, None]
    torch.testing.assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_tool_that_takes_the_buffers_is_right(kind: type[nn.Module]) -> None:
    """torch's folding into a convolution knows nothing of these layers."""
    conv, layer = nn.Conv2d(2, 3, 3), kind(3)
    x = torch.randn(4, 2, 8, 8)
    for _ in range(3):
        layer(conv(x))
    model = nn.Sequential(conv, layer).eval()
    torch.testing.assert_close(fuse_conv_bn_eval(conv, layer)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_derivatives(kind: type[nn.Module]) -> None:
    layer = kind(3, track_running_stats=False, dtype=torch.float64)
    x = torch.randn(5, 3, 3, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    inputs = (x, torch.randn(3).double().requires_grad_(), torch.randn(3).double().requires_grad_())
    assert torch.autograd.gradcheck(forward, inputs)
    assert torch.autograd.gradgradcheck(forward, inputs)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_constant_channel(kind: type[nn.Module]) -> None:
    layer = kind(2)
    x = torch.randn(6, 2)
    x[:, 1] = 3.0
    x.requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert torch.equal(y[:, 1], torch.zeros(6))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", LAYERS)
def test_an_infinite_value_reaches_its_own_channel_alone(kind: type[nn.Module]) -> None:
    layer = kind(3)
    x = torch.randn(6, 3)
    x[2, 1] = torch.inf
    layer(x)
    assert layer.running_var[1] == 1
    assert layer.running_mean[1] == 0
    assert (layer.running_var != 1)[[0, 2]].all()


@pytest.mark.parametrize("kind", LAYERS)
def test_an_empty_batch_changes_nothing(kind: type[nn.Module]) -> None:
    layer = kind(3)
    assert layer(torch.zeros(0, 3, 4)).shape == (0, 3, 4)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_var, torch.ones(3))


def test_l1_with_a_mask() -> None:
    layer, packed = (L1BatchNorm(3, dtype=torch.float64) for _ in range(2))
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    valid = torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]
    x = torch.where(valid[:, None], x, torch.nan).requires_grad_()
    y = layer(x, mask=valid)
    expected = packed(x.detach().movedim(1, -1)[valid])
    torch.testing.assert_close(y.movedim(1, -1)[valid], expected)
    assert (y.movedim(1, -1)[~valid] == 0).all()
    torch.testing.assert_close(layer.running_var, packed.running_var)
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()


def test_l1_with_nothing_valid_changes_nothing() -> None:
    layer = L1BatchNorm(3)
    y = layer(torch.full((4, 3), torch.nan), mask=torch.zeros(4, dtype=torch.bool))
    assert torch.equal(y, torch.zeros(4, 3))
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_var, torch.ones(3))


def test_range_refuses_a_mask() -> None:
    with pytest.raises(ValueError, match="RangeBatchNorm: a mask has no meaning"):
        RangeBatchNorm(3)(torch.randn(4, 3), mask=torch.ones(4, dtype=torch.bool))
