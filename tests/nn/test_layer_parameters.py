"""Parameters and buffers of other origin, dtype or layout than the constructor's."""

from typing import Any

import pytest
import torch
from nn.layer_pairs import CHANNELS, assert_near, assert_same_moments, assert_same_step, randomize, step, twin
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import keelnorm as kn

SHAPE = (4, CHANNELS, 3, 3)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def compare(layer, oracle, **keywords):
    for training in (True, False):
        layer.train(training), oracle.train(training)
        x, dy = torch.randn(SHAPE) + 1, torch.randn(SHAPE)
        assert_same_step(step(layer, x, dy), step(oracle, x.double(), dy.double()), **keywords)
        assert_same_moments(layer, oracle)


def test_replaced_parameters(backend):
    layer = kn.BatchNorm2d(CHANNELS)
    layer(torch.randn(SHAPE))
    layer.weight = nn.Parameter(torch.randn(CHANNELS))
    layer.bias = nn.Parameter(torch.randn(CHANNELS))
    compare(layer, twin(layer, nn.BatchNorm2d, CHANNELS))


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_one_parameter_missing(missing, backend):
    layer, oracle = randomize(kn.BatchNorm2d(CHANNELS)), nn.BatchNorm2d(CHANNELS).double()
    oracle.load_state_dict(layer.state_dict())
    setattr(layer, missing, None)
    setattr(oracle, missing, None)
    compare(layer, oracle)


def test_weight_as_a_plain_attribute(backend):
    """A tensor computed from others takes the parameter's place, and its gradient goes on."""
    layer = randomize(kn.BatchNorm2d(CHANNELS))
    oracle = twin(layer, nn.BatchNorm2d, CHANNELS)
    values = torch.randn(CHANNELS)
    sources = [values.clone().requires_grad_(), values.double().requires_grad_()]
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    for norm, source in zip((layer, oracle), sources, strict=True):
        del norm.weight
        norm.weight = source.exp()
        norm(x.to(source.dtype)).backward(dy.to(source.dtype))
    assert_near(sources[0].grad, sources[1].grad, units=32, scale=dy.abs().sum((0, 2, 3)).max().item())


class Squared(nn.Module):
    def forward(self, raw):
        return raw.square() + 0.1


@pytest.mark.parametrize(
    "register",
    [lambda norm: parametrize.register_parametrization(norm, "weight", Squared()), parametrizations.weight_norm],
    ids=["parametrization", "weight_norm"],
)
def test_parametrized_weight(register, backend):
    layer = randomize(kn.BatchNorm2d(CHANNELS))
    oracle = twin(layer, nn.BatchNorm2d, CHANNELS)
    register(layer), register(oracle)
    assert isinstance(layer, nn.BatchNorm2d)
    compare(layer, oracle)


def test_non_contiguous_parameters_and_buffers(backend):
    """Views into other tensors are read and updated in place; their neighbours are left alone."""
    layer = randomize(kn.BatchNorm2d(CHANNELS))
    oracle = twin(layer, nn.BatchNorm2d, CHANNELS)
    store = {}
    for name in ("running_mean", "running_var"):
        store[name] = torch.full((CHANNELS, 2), 7.0)
        view = store[name][:, 0].copy_(getattr(layer, name))
        setattr(layer, name, view)
    pair = torch.randn(CHANNELS, 2)
    pair[:, 0] = layer.weight.detach()
    layer.weight = nn.Parameter(pair[:, 0])
    assert not layer.weight.is_contiguous()
    compare(layer, oracle)
    for name, both in store.items():
        assert torch.equal(both[:, 0], getattr(layer, name))
        assert torch.equal(both[:, 1], torch.full((CHANNELS,), 7.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_dtype_and_memory_format(dtype, memory_format, backend):
    """The layer moved with ``to``; the output has x's dtype and layout."""
    layer = randomize(kn.BatchNorm2d(CHANNELS)).to(dtype=dtype, memory_format=memory_format)
    oracle = twin(layer, nn.BatchNorm2d, CHANNELS)
    x = torch.randn(SHAPE).to(dtype=dtype, memory_format=memory_format)
    dy = torch.randn(SHAPE).to(dtype=dtype, memory_format=memory_format)
    found, expected = step(layer, x, dy), step(oracle, x.double(), dy.double())
    for result in (found["y"], found["x"]):
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=memory_format)
    assert {layer.running_mean.dtype, layer.running_var.dtype, layer.weight.dtype} == {dtype}
    assert layer.num_batches_tracked.dtype == torch.int64
    assert_same_step(found, expected)
    assert_same_moments(layer, oracle)


@pytest.mark.parametrize("method", ["half", "bfloat16", "double", "float"])
def test_conversion_methods(method):
    dtypes = [
        {name: value.dtype for name, value in getattr(norm(CHANNELS), method)().state_dict().items()}
        for norm in (kn.BatchNorm2d, nn.BatchNorm2d)
    ]
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("state_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=name_of)
def test_x_and_state_of_different_dtypes(x_dtype, state_dtype, training, backend):
    """Where torch takes the combination, the dtypes are torch's; everywhere the values are right."""
    layer = randomize(kn.BatchNorm2d(CHANNELS)).to(state_dtype).train(training)
    oracle = twin(layer, nn.BatchNorm2d, CHANNELS)
    theirs = nn.BatchNorm2d(CHANNELS).to(state_dtype).train(training)
    x, dy = torch.randn(SHAPE).to(x_dtype), torch.randn(SHAPE)
    expected = step(oracle, x.double(), dy.to(x_dtype).double())
    computed_in = torch.promote_types(x_dtype, torch.float32)
    found = step(layer, x, dy.to(x_dtype))
    assert_same_step(found, expected, computed_in=computed_in)
    assert_same_moments(layer, oracle, computed_in=computed_in)
    try:
        assert theirs(x).dtype == found["y"].dtype
    except RuntimeError as refused:  # torch does not take every combination
        assert "dtype" in str(refused) or "scalar type" in str(refused)  # noqa: PT017


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    ("x_dtype", "residual_dtype"),
    [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
    ids=str,
)
def test_residual_of_another_dtype(x_dtype, residual_dtype, activation, backend):
    """The result has the dtype that adding the two has in torch; each gradient has its tensor's."""
    layer = randomize(kn.BatchNorm2d(CHANNELS))
    oracle = twin(layer, nn.BatchNorm2d, CHANNELS)
    x = torch.randn(SHAPE).to(x_dtype).requires_grad_()
    residual = torch.randn(SHAPE).to(residual_dtype).requires_grad_()
    y = layer(x, residual, activation=activation)
    assert y.dtype == torch.promote_types(x_dtype, residual_dtype)
    x64, residual64 = (t.detach().double().requires_grad_() for t in (x, residual))
    y64 = oracle(x64) + residual64
    y64 = y64.relu() if activation else y64
    dy = torch.randn_like(y)
    y.backward(dy), y64.backward(dy.double())
    assert (x.grad.dtype, residual.grad.dtype) == (x_dtype, residual_dtype)
    assert_near(y, y64, units=32 * torch.finfo(x_dtype).eps / torch.finfo(y.dtype).eps)
    assert_near(residual.grad, residual64.grad)
    assert_near(x.grad, x64.grad, units=32)


class Tagged(torch.Tensor):
    """A subclass that lets every function run and keeps its type, as torch's do by default."""


class Counting(torch.Tensor):
    """A subclass that sees which functions are called on it."""

    seen: list[Any] = []  # noqa: RUF012 - shared on purpose

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("subclass", [Tagged, Counting, nn.Parameter])
def test_x_of_a_subclass(subclass, backend):
    layer = randomize(kn.BatchNorm2d(CHANNELS))
    oracle = twin(layer, nn.BatchNorm2d, CHANNELS)
    data, residual = torch.randn(SHAPE), torch.randn(SHAPE)
    x = nn.Parameter(data) if subclass is nn.Parameter else data.clone().as_subclass(subclass).requires_grad_()
    Counting.seen.clear()
    y = layer(x, residual, activation="relu")
    assert type(y) is (torch.Tensor if subclass is nn.Parameter else subclass)
    assert (kn.functional.layer_batch_norm in Counting.seen) is (subclass is Counting)
    x64 = data.double().requires_grad_()
    y64 = (oracle(x64) + residual).relu()
    dy = torch.randn(SHAPE)
    y.backward(dy), y64.backward(dy.double())
    assert_near(y.as_subclass(torch.Tensor), y64)
    assert_near(x.grad.as_subclass(torch.Tensor), x64.grad, units=32)
    assert_same_moments(layer, oracle)


def test_functional_calls_torch_function_of_any_argument():
    weight = torch.ones(CHANNELS).as_subclass(Counting)
    Counting.seen.clear()
    y = kn.functional.batch_norm(torch.randn(SHAPE), None, None, weight, training=True)
    assert kn.functional.batch_norm in Counting.seen
    assert type(y) is Counting
