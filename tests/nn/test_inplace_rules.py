"""``inplace=True`` and autograd's rules: what may change meanwhile, what is refused, where it has no effect."""

import pytest
import torch
from nn.layer_pairs import CHANNELS, assert_near, randomize
from torch import nn

import keelnorm as kn

SHAPE = (6, CHANNELS, 4, 5)
trainings = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def in_place(activation="leaky_relu"):
    layer = randomize(kn.BatchNorm2d(CHANNELS))
    leaf = torch.randn(SHAPE, requires_grad=True)
    return layer, leaf, layer(leaf * 1, activation=activation, inplace=True)


@pytest.mark.parametrize("modified", ["y", "weight", "bias"])
def test_modification_before_the_backward_is_an_error(modified, backend):
    layer, _, y = in_place()
    with torch.no_grad():
        {"y": y, **dict(layer.named_parameters())}[modified].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_activation_in_place_on_the_result_is_an_error(backend):
    _, _, y = in_place(None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nn.functional.relu_(y).sum().backward()


def test_an_input_that_another_backward_needs_is_an_error(backend):
    """As with every operation in place: the sigmoid has saved its result."""
    leaf = torch.randn(SHAPE, requires_grad=True)
    y = kn.BatchNorm2d(CHANNELS)(leaf.sigmoid(), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_between_convolutions(backend):
    """The commonest use, against the same network out of place."""
    convs = nn.Conv2d(3, CHANNELS, 3), nn.Conv2d(CHANNELS, 2, 3)
    layer = randomize(kn.BatchNorm2d(CHANNELS))
    x = torch.randn(4, 3, 9, 9)
    results = []
    for inplace in (True, False):
        for module in (*convs, layer):
            module.zero_grad()
        convs[1](layer(convs[0](x), activation="leaky_relu", inplace=inplace)).square().sum().backward()
        # The first bias has no effect, and its gradient is what rounding leaves.
        results.append([p.grad.clone() for p in (convs[0].weight, *convs[1].parameters(), *layer.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4 * expected.abs().max().item())


def test_backward_twice(backend):
    layer, leaf, y = in_place("elu")
    dy = torch.randn(SHAPE)
    inputs = [leaf, *layer.parameters()]
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    for a, b in zip(torch.autograd.grad(y, inputs, dy), first, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x weight", "weight bias"])
def test_gradients_go_where_they_are_required(wanted, backend):
    layer, leaf, y = in_place()
    dy = torch.randn(SHAPE)
    everything = dict(
        zip(("x", "weight", "bias"), torch.autograd.grad(y, [leaf, *layer.parameters()], dy), strict=True)
    )
    tensors = {"x": leaf, "weight": layer.weight, "bias": layer.bias}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in wanted.split())
    layer(leaf * 1, activation="leaky_relu", inplace=True).backward(dy)
    for name, tensor in tensors.items():
        if name in wanted.split():
            torch.testing.assert_close(tensor.grad, everything[name], rtol=0, atol=0)
        else:
            assert tensor.grad is None


def test_batched_gradients(backend):
    """is_grads_batched runs the backward under vmap."""
    layer, leaf, y = in_place()
    directions = torch.randn(3, *SHAPE)
    inputs = [leaf, *layer.parameters()]
    expected = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in directions]
    found = torch.autograd.grad(y, inputs, directions, is_grads_batched=True)
    for value, parts in zip(found, zip(*expected, strict=True), strict=True):
        assert_near(value, torch.stack(parts), units=64, scale=directions.abs().sum((1, 3, 4)).max().item())


@trainings
def test_a_second_derivative_is_refused(training, backend):
    layer = randomize(kn.BatchNorm2d(CHANNELS)).train(training)
    leaf = torch.randn(SHAPE, requires_grad=True)
    y = layer(leaf * 1, inplace=True)
    with pytest.raises(RuntimeError, match="BatchNorm2d: there is no second derivative through inplace=True"):
        torch.autograd.grad(y.sum(), leaf, create_graph=True)


# ---- what is refused, with nothing changed

LEGAL = "None, 'leaky_relu' with a positive slope or 'elu' with a positive alpha"
NOT_INVERTIBLE = ("relu", "silu", nn.LeakyReLU(0.0), nn.LeakyReLU(-0.1), nn.ELU(0.0), nn.ELU(-1.0), nn.ReLU6())


def refused(error, words, x, *arguments, **keywords):
    layer = kn.BatchNorm2d(CHANNELS)
    before = x.detach().clone()
    with pytest.raises(error) as caught:
        layer(x, *arguments, inplace=True, **keywords)
    assert "BatchNorm2d: " in str(caught.value)
    assert words in str(caught.value)
    assert torch.equal(x, before)
    assert layer.num_batches_tracked.item() == 0
    assert torch.equal(layer.running_mean, torch.zeros(CHANNELS))


@pytest.mark.parametrize("activation", NOT_INVERTIBLE, ids=str)
def test_activations_that_cannot_be_undone(activation, backend):
    refused(ValueError, LEGAL, torch.randn(SHAPE), activation=activation)


def test_residual(backend):
    refused(ValueError, "without a residual", torch.randn(SHAPE), torch.randn(SHAPE))


@pytest.mark.parametrize(
    "x",
    [torch.randn(6, CHANNELS, 4, 10)[..., ::2], torch.randn(1, CHANNELS, 4, 5).expand(SHAPE)],
    ids=["strided", "expanded"],
)
def test_memory_that_is_not_dense(x, backend):
    refused(ValueError, "needs x contiguous or channels-last", x)


def test_a_leaf(backend):
    refused(RuntimeError, "must not be a leaf that requires a gradient", torch.randn(SHAPE, requires_grad=True))


def test_a_view(backend):
    refused(RuntimeError, "must not be a view", torch.randn(SHAPE, requires_grad=True).mul(1).view(SHAPE))


def test_a_tensor_made_in_inference_mode(backend):
    with torch.inference_mode():
        x = torch.randn(SHAPE)
    refused(RuntimeError, "inference_mode", x)


# ---- where it has no effect


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
def test_function_transforms_and_forward_mode():
    """The ordinary path: the same values, and x stays."""
    layer = randomize(kn.BatchNorm2d(CHANNELS)).eval()
    x = torch.randn(SHAPE)
    kept = x.clone()

    def loss(x, inplace):
        return layer(x, activation="leaky_relu", inplace=inplace).square().sum()

    assert torch.equal(torch.func.grad(loss)(x, True), torch.func.grad(loss)(x, False))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.randn(SHAPE))
        y = layer(dual, inplace=True)
        assert y is not dual
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None
    assert torch.equal(x, kept)
