"""``inplace=True``: y in x's memory, with the values, gradients and moments of the ordinary call."""

import copy

import pytest
import torch
from nn.layer_pairs import CHANNELS, assert_near, assert_same_moments, randomize, twin
from support.noted import noted
from torch import nn

import keelnorm as kn

SHAPE = (6, CHANNELS, 4, 5)
#: Those that can be undone, with torch's for the oracle.
ACTIVATIONS = {
    "None": (None, nn.Identity()),
    "leaky_relu": ("leaky_relu", nn.LeakyReLU()),
    "LeakyReLU(0.3)": (nn.LeakyReLU(0.3), nn.LeakyReLU(0.3)),
    "LeakyReLU(2.0)": (nn.LeakyReLU(2.0), nn.LeakyReLU(2.0)),
    "elu": ("elu", nn.ELU()),
    "ELU(0.3)": (nn.ELU(0.3), nn.ELU(0.3)),
}
asked = pytest.mark.parametrize(("activation", "module"), ACTIVATIONS.values(), ids=ACTIVATIONS)
trainings = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
layouts = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


def step(layer, activation, leaf, dy, **keywords):
    """Output and gradients, with x the result of an operation, as in a network."""
    layer.zero_grad()
    leaf = leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    x = leaf * 1
    y = layer(x, activation=activation, **keywords)
    kept = y.detach().clone()
    y.backward(dy)
    torch.testing.assert_close(y, kept, rtol=0, atol=0, equal_nan=True)  # the backward leaves y as it is
    return x, y, {"y": kept, "x": leaf.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def away_from_kink(oracle, x, dy):
    with torch.no_grad():
        return torch.where(copy.deepcopy(oracle)(x.double()).abs() < 1e-5, 0, dy)


@asked
@trainings
@layouts
def test_agrees_with_torch_in_float64(activation, module, training, memory_format, backend):
    """Values, gradients, moments; weights of either sign."""
    layer = randomize(kn.BatchNorm2d(CHANNELS)).train(training)
    with torch.no_grad():
        layer.weight[:2] = torch.tensor([-0.8, 1.2])
    oracle = twin(layer, nn.BatchNorm2d, CHANNELS)
    x = torch.randn(SHAPE).to(memory_format=memory_format)
    dy = away_from_kink(oracle, x, torch.randn(SHAPE))
    given, y, found = step(layer, activation, x, dy, inplace=True)
    assert y is given
    assert y.stride() == x.stride()
    x64 = x.double().requires_grad_()
    y64 = module(oracle(x64))
    y64.backward(dy.double())
    assert_near(found["y"], y64)
    # x comes back with an error of some roundings, 64 and more near the limit.
    assert_near(found["x"], x64.grad, units=256)
    for name, parameter in oracle.named_parameters():
        assert_near(found[name], parameter.grad, units=256, scale=dy.abs().sum((0, 2, 3)).max().item())
    assert_same_moments(layer, oracle)


@asked
@trainings
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(activation, module, training, dtype, backend):
    """The output's bits are those of the ordinary call; the gradients differ by roundings of y."""
    layer = randomize(kn.BatchNorm2d(CHANNELS)).to(dtype).train(training)
    other = copy.deepcopy(layer)
    x = torch.randn(SHAPE).to(dtype)
    dy = away_from_kink(twin(layer, nn.BatchNorm2d, CHANNELS), x, torch.randn(SHAPE).to(dtype))
    _, _, found = step(layer, activation, x, dy, inplace=True)
    _, _, expected = step(other, activation, x, dy)
    assert torch.equal(found["y"], expected["y"])
    for name, value in expected.items():
        assert found[name].dtype == dtype
        assert_near(found[name], value, units=64, scale=dy.float().abs().sum((0, 2, 3)).max().item())
    for a, b in zip(layer.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


@asked
@pytest.mark.parametrize("momentum", [0.1, None])
def test_state_is_updated_to_the_bit(activation, module, momentum, backend):
    """Running statistics, counter and version counters, over several batches."""
    layer = kn.BatchNorm2d(CHANNELS, momentum=momentum)
    other = copy.deepcopy(layer)
    for _ in range(3):
        x = torch.randn(SHAPE)
        versions = [buffer._version for buffer in layer.buffers()]
        y, expected = layer(x.clone(), activation=activation, inplace=True), other(x, activation=activation)
        assert torch.equal(y, expected)
        for before, (name, found), value in zip(versions, layer.named_buffers(), other.buffers(), strict=True):
            assert torch.equal(found, value), name
            assert found._version > before


@asked
@pytest.mark.parametrize("keywords", [{"affine": False}, {"track_running_stats": False}], ids=str)
def test_layers_without_parameters_or_moments(activation, module, keywords, backend):
    layer = kn.BatchNorm2d(CHANNELS, **keywords)
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    dy = away_from_kink(layer.double(), x, dy)
    layer.float()
    _, _, found = step(layer, activation, x, dy, inplace=True)
    _, _, expected = step(layer, activation, x, dy)
    for name, value in expected.items():
        assert_near(found[name], value, units=128, scale=dy.abs().sum((0, 2, 3)).max().item())


@asked
@trainings
@pytest.mark.parametrize("weight", [0.0, -0.0, 1e-30, -1e-12, 1e-3, torch.inf, torch.nan])
def test_a_weight_that_cannot_be_divided_by(activation, module, training, weight, backend):
    """That channel keeps its x; its gradients, and those of the others, are the ordinary ones."""
    layer = randomize(kn.BatchNorm2d(CHANNELS)).train(training)
    with torch.no_grad():
        layer.weight[:3] = torch.tensor([1.0, weight, -2.0])
        layer.bias[1] = 1.5
    other = copy.deepcopy(layer)
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    dy = away_from_kink(twin(layer, nn.BatchNorm2d, CHANNELS), x, dy)
    _, _, found = step(layer, activation, x, dy, inplace=True)
    _, _, expected = step(other, activation, x, dy)
    for name, value in expected.items():
        per_channel = (1,) if value.dim() == 1 else (0, 1)
        here = (slice(None),) * (len(per_channel) - 1) + (1,)
        torch.testing.assert_close(found[name][here], value[here], rtol=2e-5, atol=1e-5, equal_nan=True)
        others = (slice(None),) * (len(per_channel) - 1) + ([0, 2, 3, 4],)
        assert_near(found[name][others], value[others], units=512, scale=dy.abs().sum((0, 2, 3)).max().item())


@trainings
@pytest.mark.parametrize("sign", [1, -1])
def test_where_elu_saturates(training, sign, backend):
    """Far below zero elu(v) is -1 for every v, whichever sign the weight has; such channels keep their x."""
    layer = kn.BatchNorm1d(3).train(training)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, sign * 5.0, 1.0])), layer.bias.copy_(torch.tensor([0.0, -20.0, 0.5]))
    other = copy.deepcopy(layer)
    x, dy = torch.randn(64, 3), torch.randn(64, 3)
    x[0, 2] = -10.0 if training else 0.0  # an outlier alone
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: noted(saved, t), lambda t: t):
        layer((x * 1).requires_grad_().mul(1), activation="elu", inplace=True)
    assert [t.tolist() for t in saved if t.dtype == torch.int64] == [[1, 2] if training else [1]]
    layer.load_state_dict(other.state_dict())
    _, _, found = step(layer, "elu", x, dy, inplace=True)
    _, _, expected = step(other, "elu", x, dy)
    for name, value in expected.items():
        assert_near(found[name], value, units=256, scale=64.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@asked
@trainings
def test_without_gradients_x_is_overwritten(activation, module, training, mode, backend):
    layer = randomize(kn.BatchNorm2d(CHANNELS)).train(training)
    other = copy.deepcopy(layer)
    x = torch.randn(SHAPE)
    expected = other(x, activation=activation).detach()
    with mode():
        given = x.clone()
        y = layer(given, activation=activation, inplace=True)
    assert y is given
    assert torch.equal(y, expected)
    x.requires_grad_()
    with torch.no_grad():  # a leaf may be overwritten where nothing is recorded
        version = x._version
        other.load_state_dict(layer.state_dict())
        layer(x, activation=activation, inplace=True)
        assert x._version > version


def test_functional(backend):
    x, mean, var = torch.randn(SHAPE), torch.zeros(CHANNELS), torch.ones(CHANNELS)
    expected = kn.functional.batch_norm(x, mean.clone(), var.clone(), training=True, activation="elu")
    y = kn.functional.batch_norm(x, mean, var, training=True, activation="elu", inplace=True)
    assert y is x
    assert torch.equal(y, expected)
    assert not torch.equal(mean, torch.zeros(CHANNELS))


def test_an_empty_batch(backend):
    layer = kn.BatchNorm2d(CHANNELS)
    x = torch.zeros(0, CHANNELS, 2, 2, requires_grad=True)
    y = layer(x * 1, activation="elu", inplace=True)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.num_batches_tracked.item() == 0
