"""Cases and values of PyTorch's own tests of batch norm (test/test_nn.py), restated for keelnorm's layers."""

import math
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from nn.layer_pairs import PAIR_IDS, PAIRS, assert_near, randomize, snapshot, twin
from torch import nn
from torch.autograd import gradcheck

import keelnorm as kn

LAYERS = [(ours, shape) for ours, _, shape in PAIRS]
EVERY_LAYER = pytest.mark.parametrize(("make", "shape"), LAYERS, ids=PAIR_IDS)
CHANNELS = 5


@EVERY_LAYER
def test_cumulative_average_is_the_mean_of_the_batches(make, shape, backend):
    layer = make(CHANNELS, momentum=None)
    batches = torch.rand(2, *shape).unbind()
    alone = []
    for x in batches:
        layer.reset_running_stats()
        assert torch.equal(layer.running_mean, torch.zeros(CHANNELS))
        assert torch.equal(layer.running_var, torch.ones(CHANNELS))
        layer(x)
        alone.append((layer.running_mean.clone(), layer.running_var.clone()))
    layer.reset_running_stats()
    for x in batches:
        layer(x)
    assert layer.num_batches_tracked == 2
    for i, buffer in enumerate((layer.running_mean, layer.running_var)):
        assert_near(buffer, (alone[0][i].double() + alone[1][i].double()) / 2)


@EVERY_LAYER
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("tracks", [True, False], ids=["running", "batch"])
def test_evaluation_twice_gives_the_same_and_changes_nothing(make, shape, affine, tracks, backend):
    layer = make(CHANNELS, affine=affine, track_running_stats=tracks).eval()
    before = snapshot(layer)
    x, dy = torch.rand(shape, requires_grad=True), torch.rand(shape)
    results = []
    for _ in range(2):
        x.grad = None
        y = layer(x)
        y.backward(dy)
        results.append((y.detach(), x.grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    assert all(torch.equal(before[name], value) for name, value in snapshot(layer).items())
    if tracks:  # new running statistics are those of the standard normal distribution
        assert_near(results[0][0], x.detach().double() / math.sqrt(1 + 1e-5))


@EVERY_LAYER
def test_training_updates_statistics_and_evaluation_does_not(make, shape, backend):
    layer = make(CHANNELS)
    seen = [snapshot(layer)]
    for training in (True, True, False):
        layer.train(training)(torch.rand(shape))
        seen.append(snapshot(layer))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        start, once, twice, evaluated = (state[name] for state in seen)
        assert not torch.equal(start, once)
        assert not torch.equal(once, twice)
        assert torch.equal(twice, evaluated)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradient_of_the_function_in_counted_numbers(training, backend):
    batch, channels, positions = 4, 5, 6
    x = torch.arange(batch * channels * positions, dtype=torch.float64).sin().reshape(batch, channels, positions)
    weight = torch.arange(1.0, channels + 1, dtype=torch.float64)
    bias = torch.arange(0.0, channels, dtype=torch.float64)
    mean, var = 1 + torch.arange(channels, dtype=torch.float64), 2 + torch.arange(channels, dtype=torch.float64)

    def function(x, weight, bias):
        return kn.functional.batch_norm(x, mean.clone(), var.clone(), weight, bias, training)

    assert gradcheck(function, [t.requires_grad_() for t in (x, weight, bias)])


@pytest.mark.parametrize("shape", [(2, 64, 50, 50), (4, 8, 10, 10), (1, 1, 4, 4), (4, 1, 9, 9), (1, 9, 5, 5)])
def test_channels_last_gives_what_contiguous_gives(shape, backend):
    layer = randomize(kn.BatchNorm2d(shape[1]))
    oracle = twin(layer, nn.BatchNorm2d, shape[1])
    x = torch.randint(1, 10, shape).float().contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randint(1, 10, shape).float().contiguous(memory_format=torch.channels_last)
    x64 = x.detach().double().contiguous().requires_grad_()
    y, y64 = layer(x), oracle(x64)
    y.backward(dy), y64.backward(dy.double().contiguous())
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    # Whole numbers from 1 to 9: sums have terms of their size, and 1/√var scales what comes back.
    assert_near(y, y64, scale=9)
    assert_near(x.grad, x64.grad, scale=9 * float(oracle.weight.detach().abs().max()))
    for parameter, expected in zip(layer.parameters(), oracle.parameters(), strict=True):
        assert_near(parameter.grad, expected.grad, scale=9.0 * x.numel() / shape[1])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("shape", "order"), [((6, 2, 3, 1), (0, 2, 1, 3)), ((4, 5, 6, 7), (0, 3, 1, 2)), ((5, 6, 4, 3), (1, 0, 3, 2))]
)
def test_permuted_input_gives_what_a_contiguous_one_gives(shape, order, training, backend):
    """The last batch is also a slice whose first dimension does not begin at its storage."""
    base = torch.arange(math.prod(shape), dtype=torch.float32).sin().reshape(shape)
    x = base.permute(order)[1:]
    layers = [randomize(kn.BatchNorm2d(x.shape[1])) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    results = []
    for layer, value in zip(layers, (x, x.contiguous()), strict=True):
        leaf = value.detach().requires_grad_()
        y = layer.train(training)(leaf)
        y.backward(torch.ones_like(y).cumsum(0))
        results.append((y, leaf.grad, layer.weight.grad, layer.running_var))
    for strided, contiguous in zip(*results, strict=True):
        assert_near(strided, contiguous.detach().double(), scale=8)


@pytest.mark.parametrize("which", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("wrong", [1, 2, 4, 9])
def test_vectors_of_another_length_are_refused(which, wrong):
    """Ten samples of three channels; torch's cases are lengths that do not fit the channels."""
    vectors = {name: torch.rand(3) for name in ("running_mean", "running_var", "weight", "bias")}
    vectors[which] = torch.rand(wrong)
    with pytest.raises((RuntimeError, ValueError), match=which):
        kn.functional.batch_norm(torch.rand(10, 3), training=True, **vectors)


# torch's rules for forward-mode derivatives load some that go through torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("tangents", [(0, 1), (0, 2), (0, 1, 2)])
def test_forward_gradients_of_running_statistics_are_refused(tangents):
    """As torch: they are not differentiable where the input is."""
    given = torch.randn(3, 2), torch.randn(2), torch.rand(2)
    with fwAD.dual_level():
        x, mean, var = (fwAD.make_dual(t, torch.rand_like(t)) if i in tangents else t for i, t in enumerate(given))
        with pytest.raises(RuntimeError, match="not differentiable in its running statistics"):
            kn.functional.batch_norm(x, mean, var, training=False, momentum=0.2)


def test_buffers_stay_where_tracking_is_turned_off():
    layer = kn.BatchNorm1d(4)
    layer.track_running_stats = False
    before = snapshot(layer)
    layer(torch.rand(32, 4))
    assert all(torch.equal(before[name], value) for name, value in snapshot(layer).items())


def test_state_without_the_counter_of_batches_loads_as_torch_loads_it():
    """Version 1 of the state had no num_batches_tracked; a state without a version keeps the counter."""
    layer, theirs = kn.BatchNorm2d(3), nn.BatchNorm2d(3)
    for one in (layer, theirs):
        one.running_var = torch.rand(3, generator=torch.Generator().manual_seed(0))
        one.num_batches_tracked = torch.tensor(10)
        state: Any = one.state_dict()
        assert state["num_batches_tracked"] == 10
        without = type(state)((name, value) for name, value in state.items() if name != "num_batches_tracked")
        if hasattr(state, "_metadata"):
            without._metadata = state._metadata
        with pytest.raises(RuntimeError, match="num_batches_tracked"):
            one.load_state_dict(without)
        without._metadata[""]["version"] = 1
        one.load_state_dict(without)
        assert torch.equal(one.running_var, without["running_var"])
    assert layer.num_batches_tracked == theirs.num_batches_tracked


@EVERY_LAYER
def test_one_value_per_channel_is_refused_in_training_only(make, shape):
    layer = make(CHANNELS)
    one = torch.rand(1, CHANNELS, *[1] * (len(shape) - 2))
    before = snapshot(layer)
    with pytest.raises(ValueError, match="one value per channel"):
        layer(one)
    assert all(torch.equal(before[name], value) for name, value in snapshot(layer).items())
    assert layer.eval()(one).shape == one.shape


@EVERY_LAYER
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_empty_batch_has_empty_gradients(make, shape, training, backend):
    layer = make(CHANNELS).train(training)
    x = torch.rand(0, *shape[1:], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert torch.equal(layer.weight.grad, torch.zeros(CHANNELS))
    assert torch.equal(layer.bias.grad, torch.zeros(CHANNELS))


@pytest.mark.parametrize("shape", [(4,), (2, 4, 3, 3), (2, 3, 4, 5, 6)], ids=str)
def test_each_class_refuses_other_ranks_as_torch_does(shape):
    ranks = {kn.BatchNorm1d: (2, 3), kn.BatchNorm2d: (4,), kn.BatchNorm3d: (5,)}
    for make, legal in ranks.items():
        if len(shape) not in legal:
            with pytest.raises(ValueError, match=r"must have .*dimensions"):
                make(4)(torch.rand(shape))


def test_synchronized_layers_are_put_in_everywhere_with_the_same_state():
    model = nn.Sequential(kn.BatchNorm1d(4), nn.Sequential(kn.BatchNorm2d(4), kn.BatchNorm3d(4)), nn.Linear(2, 2))
    for part in model.modules():
        if isinstance(part, kn.BatchNorm):
            randomize(part)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    converted = kn.SyncBatchNorm.convert_sync_batchnorm(model)
    kinds = [type(part) for part in converted.modules()]
    assert kinds.count(kn.SyncBatchNorm) == 3
    assert kinds.count(nn.Linear) == 1
    assert all(torch.equal(state[name], value) for name, value in converted.state_dict().items())
