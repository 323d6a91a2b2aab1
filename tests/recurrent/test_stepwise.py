"""StepwiseBatchNorm by itself: against torch.nn.BatchNorm1d, one for each step."""

from __future__ import annotations

import pytest
import torch

from keelnorm.nn.recurrent.stepwise import StepwiseBatchNorm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("momentum", [0.2, None])
def test_like_one_batch_norm_per_step(momentum: float | None, bias: bool) -> None:
    layer = StepwiseBatchNorm(4, 3, momentum=momentum, gamma=0.7, bias=bias, dtype=torch.float64)
    peers = [torch.nn.BatchNorm1d(4, momentum=momentum, dtype=torch.float64) for _ in range(3)]
    for peer in peers:
        torch.nn.init.constant_(peer.weight, 0.7)
    for t in (0, 1, 0, 2, 1, 0):
        x = (3 + 2 * torch.randn(5, 4, dtype=torch.float64)).requires_grad_()
        residual = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        y = layer(x, residual, step=t, activation="tanh")
        expected = torch.tanh(peers[t](x) + residual)
        torch.testing.assert_close(y, expected)
        weight = torch.randn_like(y)
        for a, b in zip(
            torch.autograd.grad(y, [x, residual, layer.weight], weight),
            torch.autograd.grad(expected, [x, residual, peers[t].weight], weight),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    for t, peer in enumerate(peers):
        torch.testing.assert_close(layer.running_mean[t], peer.running_mean)
        torch.testing.assert_close(layer.running_var[t], peer.running_var)
        assert layer.num_batches_tracked[t].item() == peer.num_batches_tracked.item()
    layer.eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    for t in range(5):
        torch.testing.assert_close(layer(x, step=t), peers[min(t, 2)].eval()(x))


def test_training_beyond_max_length_takes_the_batch_and_keeps_nothing() -> None:
    layer = StepwiseBatchNorm(4, 2, gamma=1.0)
    x = 5 + torch.randn(64, 4)
    y = layer(x, step=7)
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))
    assert layer.num_batches_tracked.sum() == 0
    assert layer.running_mean.abs().max() == 0


def test_parameters_and_reset() -> None:
    layer = StepwiseBatchNorm(4, 2, bias=False)
    assert list(layer.state_dict()) == ["weight", "running_mean", "running_var", "num_batches_tracked"]
    assert layer.weight.unique().tolist() == pytest.approx([0.1])
    layer(torch.randn(5, 4), step=1)
    torch.nn.init.ones_(layer.weight)
    layer.reset_parameters()
    assert layer.weight.unique().tolist() == pytest.approx([0.1])
    assert layer.running_mean.abs().max() == 0
    assert layer.num_batches_tracked.sum() == 0
    assert repr(layer).startswith("StepwiseBatchNorm(4, max_length=2")


def test_other_floating_types() -> None:
    layer = StepwiseBatchNorm(4, 2)
    x = 3 + torch.randn(50, 4)
    for dtype in (torch.bfloat16, torch.float16):
        y = layer(x.to(dtype), step=0)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), layer(x.to(dtype).float(), step=0), rtol=0.01, atol=0.01)
    assert layer.running_mean.dtype == torch.float32
