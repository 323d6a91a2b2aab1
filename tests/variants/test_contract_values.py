"""The contract: outputs and gradients of every variant, against its formula in plain torch."""

import copy

import pytest
import torch
from variants.collected import for_each, for_each_shape, largest_rank, small
from variants.contract import assert_close, assert_same, expected_of, layer_of, run

training = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
#: Of each tensor's largest value.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}


def has_channels_last(variant, shape):
    """Whether torch has a channels-last format for the shape, and it differs from the contiguous one."""
    return len(shape) in (4, 5)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def is_channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


@training
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@for_each_shape()
def test_formula(variant, shape, dtype, training):
    """Output and every gradient; of a new layer, and of one that has steps behind it."""
    for steps in (0, 2):
        layer = layer_of(variant, shape, dtype, steps).train(training)
        x = torch.randn(shape, dtype=dtype) * 1.5 + 0.5
        keywords = variant.keywords(x)
        expected = expected_of(variant, layer, x, **keywords)
        found = run(layer, x, **keywords)
        assert found.y.dtype == dtype
        assert_close(found.values, expected.values, TOLERANCES[dtype])


@training
@for_each()
def test_narrow_dtypes(variant, training):
    """Parameters and arithmetic stay float32: the output is off by its own rounding, and so is x's gradient."""
    for dtype in variant.dtypes:
        layer = layer_of(variant, largest_rank(variant), torch.float32).train(training)
        x = torch.randn(largest_rank(variant)).to(dtype)
        keywords = variant.keywords(x)
        expected = expected_of(variant, layer, x, **keywords)
        found = run(layer, x, **keywords)
        assert found.y.dtype == found.gradients["grad x"].dtype == dtype
        assert_close(found.values, expected.values, 2 * torch.finfo(dtype).eps)


@training
@for_each_shape(where=has_channels_last)
def test_channels_last(variant, shape, training):
    """The output keeps the layout, and nothing else changes."""
    layer = layer_of(variant, shape).train(training)
    twin = copy.deepcopy(layer)
    x, residual = torch.randn(2, *shape, dtype=torch.float64)
    assert not is_channels_last(x)
    keywords = variant.keywords(x)
    found = run(layer, channels_last(x), channels_last(residual), activation="relu", **keywords)
    assert is_channels_last(found.y)
    assert_same(found, run(twin, x, residual, activation="relu", **keywords), 1e-10)


def sliced(shape):
    return torch.randn(shape[0], 2 * shape[1], *shape[2:], dtype=torch.float64)[:, ::2]


def every_other_sample(shape):
    return torch.randn(2 * shape[0], *shape[1:], dtype=torch.float64)[::2]


def transposed(shape):
    return torch.randn(*reversed(shape), dtype=torch.float64).permute(*reversed(range(len(shape))))


@training
@pytest.mark.parametrize("view", [sliced, every_other_sample, transposed])
@for_each_shape()
def test_strided_views(variant, shape, view, training):
    layer = layer_of(variant, shape).train(training)
    twin = copy.deepcopy(layer)
    x = view(shape)
    assert not x.is_contiguous()
    expected = run(twin, x.contiguous(), **variant.keywords(x))
    assert_same(run(layer, x, **variant.keywords(x)), expected, 1e-10)


@training
@pytest.mark.parametrize("activation", ["relu", "silu"])
@for_each_shape()
def test_residual_and_activation(variant, shape, activation, training):
    """``act(bn(x) + residual)``, as the two would be written behind the layer."""
    layer = layer_of(variant, shape).train(training)
    twin = copy.deepcopy(layer)
    x, residual = torch.randn(2, *shape, dtype=torch.float64)
    keywords = variant.keywords(x)

    def written_out(x, residual, **keywords):
        return getattr(torch.nn.functional, activation)(twin(x, **keywords) + residual)

    expected = run(twin, x, residual, call=written_out, **keywords)
    assert_same(run(layer, x, residual, activation=activation, **keywords), expected, 1e-10)


@for_each()
def test_activation_without_residual(variant):
    shape = small(variant)
    layer = layer_of(variant, shape)
    twin = copy.deepcopy(layer)
    x = torch.randn(shape, dtype=torch.float64)
    keywords = variant.keywords(x)
    expected = run(twin, x, call=lambda x, **keywords: torch.tanh(twin(x, **keywords)), **keywords)
    assert_same(run(layer, x, activation="tanh", **keywords), expected, 1e-10)


@training
@for_each()
def test_gradcheck(variant, training):
    """The backward is the derivative of the forward, for a layer that each evaluation finds in the same state."""
    shape = small(variant)
    layer = layer_of(variant, shape).train(training)
    x = torch.randn(shape, dtype=torch.float64)
    keywords = variant.keywords(x)
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(copy.deepcopy(layer), given, (x,), keywords)

    parameters = [value.detach().clone().requires_grad_() for value in layer.parameters()]
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *parameters))


@training
@for_each_shape()
def test_affine_false(variant, shape, training):
    """No parameters, and the formula without them."""
    layer = layer_of(variant, shape, affine=False).train(training)
    assert layer.weight is None
    assert layer.bias is None
    x = torch.randn(shape, dtype=torch.float64)
    keywords = variant.keywords(x)
    expected = expected_of(variant, layer, x, **keywords)
    assert_close(run(layer, x, **keywords).values, expected.values, 1e-10)


@training
@for_each_shape()
def test_track_running_stats_false(variant, shape, training):
    """No running statistics: the batch normalizes in evaluation too."""
    layer = layer_of(variant, shape, track_running_stats=False).train(training)
    assert layer.running_mean is None
    assert layer.running_var is None
    assert layer.num_batches_tracked is None
    x = torch.randn(shape, dtype=torch.float64)
    keywords = variant.keywords(x)
    expected = expected_of(variant, layer, x, **keywords)
    assert_close(run(layer, x, **keywords).values, expected.values, 1e-10)


@training
@for_each()
def test_eps(variant, training):
    """An eps that is no rounding error reaches the formula."""
    shape = small(variant)
    layer = layer_of(variant, shape, eps=0.5).train(training)
    x = torch.randn(shape, dtype=torch.float64)
    keywords = variant.keywords(x)
    expected = expected_of(variant, layer, x, **keywords)
    assert_close(run(layer, x, **keywords).values, expected.values, 1e-10)
