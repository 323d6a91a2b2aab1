"""``inplace=True`` where y, or x as rebuilt from it, leaves the range of the dtype: gradients as out of place."""

import copy

import pytest
import torch
from support.noted import noted
from torch import nn

import keelnorm as kn

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACTIVATIONS = (None, "leaky_relu", nn.LeakyReLU(3.0), "elu", nn.ELU(3.0))
asked = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
trainings = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def step(layer, x, dy, activation, inplace):
    """y, its gradients, and the indices of the channels that kept their x."""
    layer = copy.deepcopy(layer)
    saved: list[torch.Tensor] = []
    leaf = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: noted(saved, t), lambda t: t):
        y = layer(leaf.clone(), activation=activation, inplace=inplace)
    kept = [c for t in saved if t.dtype == torch.int64 for c in t.tolist()]
    return y.detach().clone(), torch.autograd.grad(y, [leaf, *layer.parameters()], dy), kept


def check(layer, x, dy, activation):
    """y to the bit, every gradient finite and near to the ordinary call's. Returns the channels that kept x, and y."""
    y, found, kept = step(layer, x, dy, activation, True)
    right_y, right, _ = step(layer, x, dy, activation, False)
    assert torch.equal(y, right_y)
    # Rounding y may cost so many roundings of x, which the sums of as many terms as there are see all.
    roundings = 64 * torch.finfo(x.dtype).eps
    for value, wanted in zip(found, right, strict=True):
        assert wanted.isfinite().all(), "the case is no good"
        by_channel = [value.double(), wanted.double()]
        if value.dim() > 1:
            by_channel = [t.movedim(1, 0).flatten(1) for t in by_channel]
            scale = by_channel[1].abs().amax(1, keepdim=True)
        else:
            scale = dy.double().abs().sum((0, 2, 3))
        assert ((by_channel[0] - by_channel[1]).abs() <= roundings * scale).all()
    return kept, y


def layer_of(dtype, channels=3):
    """Parameters in float32, as under autocast, or in float64."""
    return kn.BatchNorm2d(channels, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


@asked
@dtypes
@trainings
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_y_overflows(memory_format, training, dtype, activation, backend):
    """By the weight, and by the bias on top of it; the third channel is an ordinary one."""
    largest = torch.finfo(dtype).max
    layer = layer_of(dtype).train(training)
    with torch.no_grad():
        layer.weight[:2] = torch.tensor([0.6, 0.3], dtype=torch.float64) * largest
        layer.bias[1] = 0.8 * largest
    x = torch.randn(16, 3, 4, 4).to(dtype).to(memory_format=memory_format)
    kept, y = check(layer, x, (torch.randn(x.shape) / 1024).to(dtype), activation)
    assert kept == [0, 1]
    assert y[:, 0].isinf().any()
    assert y[:, 1].isinf().any()


@asked
@dtypes
def test_running_statistics_that_do_not_fit(dtype, activation, backend):
    """In evaluation the batch may be anywhere: all of a channel, or one value of it."""
    layer = layer_of(dtype).eval()
    x = torch.randn(16, 3, 4, 4)
    with torch.no_grad():
        x[0, 0, 0, 0] = 3e4
        x[:, 1] += 3e4
        layer.weight[:2] = torch.finfo(dtype).max / 1e4
    kept, y = check(layer, x.to(dtype), (torch.randn(x.shape) / 1024).to(dtype), activation)
    assert kept == [0, 1]
    assert y[:, :2].isinf().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_x_is_the_largest_number(dtype, backend):
    """What y's rounding adds to x must not make it infinite: nothing is kept, and the gradients are finite."""
    largest = torch.finfo(dtype).max
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        layer = layer_of(dtype, 1)
        with torch.no_grad():
            layer.bias.copy_(14 * torch.rand(1, generator=generator) - 7)
        x = (largest * (1 - torch.rand(16, 1, 4, 4, dtype=torch.float64, generator=generator) / 50)).to(dtype)
        x[:4] = largest
        _, found, kept = step(layer, x, torch.randn(x.shape, generator=generator).to(dtype), None, True)
        assert kept == []
        assert all(value.isfinite().all() for value in found)


@asked
@trainings
def test_an_ordinary_layer_keeps_nothing(training, activation, backend):
    layer = kn.BatchNorm2d(8).train(training)
    x = torch.randn(32, 8, 28, 28).clamp(-3, 3).half()  # elu saturates below
    assert step(layer, x, torch.ones_like(x), activation, True)[2] == []


# ---- the same kind: float16 between two passes


@pytest.mark.parametrize(("activation", "at"), [("gelu", 1.4), ("silu", 2.4), (nn.LeakyReLU(3.0), -2.0)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_the_gradient_behind_the_activation_overflows(memory_format, residual, activation, at, backend):
    """Where act′ is above 1; dx is finite, because it is multiplied by a small weight."""
    layer = kn.BatchNorm2d(2)
    with torch.no_grad():
        layer.weight.fill_(1 / 16), layer.bias.fill_(at)
    x = torch.randn(16, 2, 4, 4).half().to(memory_format=memory_format)
    dy = torch.randn(16, 2, 4, 4).half()
    dy[3, 0] = 62000.0
    added = torch.zeros_like(x) if residual else None
    found = []
    for dtype in (torch.float16, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        y = copy.deepcopy(layer).to(torch.promote_types(dtype, torch.float32))(
            leaf, added if added is None else added.to(dtype), activation=activation
        )
        found.append(torch.autograd.grad(y, leaf, dy.to(dtype))[0].double())
    assert found[0].isfinite().all()
    torch.testing.assert_close(*found, rtol=0, atol=16 * torch.finfo(torch.float16).eps * found[1].abs().max().item())
