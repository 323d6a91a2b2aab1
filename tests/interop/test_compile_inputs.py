"""Compiled layers accept and refuse the same inputs as eager ones, with the same errors."""

import pytest
import torch
from interop.interop_models import SHAPE

import keelnorm as kn

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
native = kn.kernels.active() != "reference"


def compiled(layer):
    return torch.compile(layer, backend="aot_eager")


@pytest.mark.parametrize(
    ("x", "arguments", "words"),
    [
        (torch.ones(1, 3, 1, 1), {}, ("one value per channel has no variance", "(1, 3, 1, 1)")),
        (torch.ones(4, 3, 2), {}, ("4 dimensions", "(4, 3, 2)")),
        (torch.ones(SHAPE), {"activation": "prelu"}, ("activation", "'relu'", "'prelu'")),
    ],
    ids=["one value", "rank", "activation"],
)
def test_bad_calls(x, arguments, words):
    layer = kn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="BatchNorm2d") as caught:
        compiled(layer)(x, **arguments)
    assert all(word in str(caught.value) for word in words)
    assert layer.num_batches_tracked.item() == 0


def test_integers():
    with pytest.raises(TypeError, match="real floating-point"):
        compiled(kn.BatchNorm2d(3))(torch.ones(SHAPE, dtype=torch.int64))


def test_number_of_channels():
    layer = kn.BatchNorm2d(3).eval()
    with pytest.raises(ValueError, match="x has 5 channels"):
        compiled(layer)(torch.ones(4, 5, 2, 2))


def test_residual_of_another_shape():
    with pytest.raises(ValueError, match="residual must have x's shape"):
        compiled(kn.BatchNorm2d(3))(torch.ones(SHAPE), torch.ones(1, *SHAPE[1:]))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_empty_batch(training):
    layer = kn.BatchNorm2d(3).train(training)
    assert compiled(layer)(torch.ones(0, 3, 2, 2)).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_batch_changes_no_statistics(dtype):
    layer = kn.BatchNorm2d(3, dtype=dtype)
    compiled(layer)(torch.ones(0, 3, 2, 2, dtype=dtype))
    assert layer.num_batches_tracked.item() == 0


def test_non_contiguous_weight():
    x, weight = torch.randn(SHAPE), torch.randn(6)[::2]
    y = torch.compile(kn.functional.batch_norm, backend="aot_eager")(x, None, None, weight, training=True)
    torch.testing.assert_close(y, kn.functional.batch_norm(x, None, None, weight, training=True))


def test_negative_momentum_is_as_in_eager():
    layer, twin = kn.BatchNorm2d(3, momentum=-0.5), kn.BatchNorm2d(3, momentum=-0.5)
    x = torch.randn(SHAPE)
    compiled(layer)(x), twin(x)
    torch.testing.assert_close(layer.running_mean, twin.running_mean)


def transforms(layer):
    return {
        "grad": lambda x: torch.func.grad(lambda z: layer(z).square().sum())(x),
        "vmap": lambda x: torch.func.vmap(lambda z: layer(z))(x.unsqueeze(0))[0],
    }


@pytest.mark.parametrize(
    "transform",
    [
        "grad",
        "vmap",
    ],
)
def test_function_transforms_inside(transform):
    """Function transforms that Dynamo traces through torch's batch norm are traced through ours."""
    function = transforms(kn.BatchNorm2d(3).eval())[transform]
    theirs = transforms(torch.nn.BatchNorm2d(3).eval())[transform]
    x = torch.randn(SHAPE)
    expected = torch.compile(theirs, fullgraph=True, backend="aot_eager")(x)
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
