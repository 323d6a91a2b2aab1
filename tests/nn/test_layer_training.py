"""A layer behaves as torch.nn's in training and evaluation, over many steps and however it is set up."""

import math
from typing import Any

import pytest
import torch
from nn.layer_pairs import (
    CHANNELS,
    PAIR_IDS,
    PAIRS,
    assert_near,
    assert_same_moments,
    assert_same_step,
    assert_untouched,
    randomize,
    snapshot,
    step,
    twin,
)
from torch import nn

import keelnorm as kn

pairs = pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS, ids=PAIR_IDS)
SETTINGS = [
    {},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False, "momentum": None},
    {"eps": 0.5},
]
settings = pytest.mark.parametrize(
    "keywords", SETTINGS, ids=lambda keywords: ",".join(f"{k}={v}" for k, v in keywords.items()) or "default"
)


def compare_steps(layer, oracle, shape, count=3):
    for _ in range(count):
        x, dy = torch.randn(shape) + 1, torch.randn(shape)
        assert_same_step(step(layer, x, dy), step(oracle, x.double(), dy.double()))
        assert_same_moments(layer, oracle)


@settings
@pairs
def test_steps_agree_with_torch_in_float64(ours, theirs, shape, keywords, backend):
    """Training, evaluation, training again; gradients and buffers after each step."""
    layer = randomize(ours(CHANNELS, **keywords))
    oracle = twin(layer, theirs, CHANNELS, **keywords)
    for training in (True, False, True):
        layer.train(training), oracle.train(training)
        compare_steps(layer, oracle, shape)


def test_any_rank(backend):
    """kn.BatchNorm takes every rank from two on; torch has the same for rank 5."""
    layer = randomize(kn.BatchNorm(CHANNELS))
    oracle = twin(layer, nn.BatchNorm1d, CHANNELS)
    for shape in ((7, 5), (3, 5, 4), (3, 5, 4, 3), (2, 5, 3, 2, 3), (2, 5, 2, 1, 3, 2)):
        x, dy = torch.randn(shape), torch.randn(shape)
        found = step(layer, x, dy)
        expected = step(oracle, x.double().flatten(2), dy.double().flatten(2)) if len(shape) > 2 else None
        expected = expected or step(oracle, x.double(), dy.double())
        expected = {name: v.view(shape) if name in "xy" else v for name, v in expected.items()}
        assert_same_step(found, expected)
    assert_same_moments(layer, oracle)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_many_steps_of_training_stay_together(momentum, backend):
    """200 steps of gradient descent in float32 are as near to float64 as torch's own are."""
    torch.manual_seed(3)
    batches = [(torch.randn(16, 6) * 3 + 5, torch.randn(16, 4)) for _ in range(200)]

    def train(norm, dtype):
        torch.manual_seed(4)
        net = nn.Sequential(nn.Linear(6, 8), norm(8, momentum=momentum), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.5)
        for x, target in batches:
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x.to(dtype)), target.to(dtype)).backward()
            optimizer.step()
        return net

    exact = train(nn.BatchNorm1d, torch.float64).state_dict()
    theirs = train(nn.BatchNorm1d, torch.float32).state_dict()
    ours = train(kn.BatchNorm1d, torch.float32).state_dict()
    assert ours["1.num_batches_tracked"].item() == 200
    for name, expected in exact.items():
        reach = (theirs[name].double() - expected.double()).abs().max().item()
        error = (ours[name].double() - expected.double()).abs().max().item()
        floor = 16 * torch.finfo(torch.float32).eps * expected.double().abs().max().item()
        assert error <= 4 * max(reach, floor), name


@pairs
def test_settings_changed_later(ours, theirs, shape, backend):
    """Attributes are read at every call, as torch does."""
    layer = randomize(ours(CHANNELS))
    oracle = twin(layer, theirs, CHANNELS)
    changes: list[dict[str, Any]] = [
        {"momentum": 0.7},
        {"track_running_stats": False},
        {"training": False},
        {"track_running_stats": True},
        {"momentum": None},
        {"eps": 0.3},
        {"training": True},
    ]
    for change in changes:
        for name, value in change.items():
            setattr(layer, name, value)
            setattr(oracle, name, value)
        compare_steps(layer, oracle, shape, count=2)


def test_tracking_turned_off_leaves_moments_and_still_evaluates_with_them(backend):
    layer: Any = randomize(kn.BatchNorm2d(CHANNELS))
    layer.track_running_stats = False
    before = snapshot(layer)
    x = torch.randn(3, CHANNELS, 4, 3)
    layer(x)
    assert_untouched(layer, before)
    layer.eval()
    expected = nn.functional.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    assert_near(layer(x), expected)


def test_tracking_turned_on_without_buffers(backend):
    """As in torch: there is nothing to update, so batches normalize in both modes."""
    layer, oracle = (
        kn.BatchNorm1d(CHANNELS, track_running_stats=False),
        nn.BatchNorm1d(CHANNELS, track_running_stats=False).double(),
    )
    for norm in (layer, oracle):
        norm.track_running_stats, norm.momentum = True, None
    compare_steps(layer, oracle, (7, CHANNELS))
    compare_steps(layer.eval(), oracle.eval(), (7, CHANNELS))


def test_negative_momentum_means_what_it_means_in_torch():
    layer = randomize(kn.BatchNorm1d(CHANNELS, momentum=-0.5))
    compare_steps(layer, twin(layer, nn.BatchNorm1d, CHANNELS, momentum=-0.5), (7, CHANNELS))


def test_cumulative_average_without_a_counter_is_as_torch_or_refused(backend):
    """torch leaves the moments alone; keelnorm refuses, and leaves them alone too."""
    layer = randomize(kn.BatchNorm1d(CHANNELS, momentum=None))
    layer.num_batches_tracked = None
    before = snapshot(layer)
    with pytest.raises((RuntimeError, ValueError), match="num_batches_tracked"):
        layer(torch.randn(7, CHANNELS))
    assert_untouched(layer, before)


empty_batches = pytest.mark.parametrize("shape", [(0, CHANNELS, 4, 3), (3, CHANNELS, 0, 2)])
activations = pytest.mark.parametrize("activation", [None, "relu"])


@activations
@pytest.mark.parametrize("training", [True, False])
@empty_batches
def test_empty_batch(shape, training, activation, backend):
    """The result is empty and the statistics stay as they were (torch counts the batch)."""
    layer = randomize(kn.BatchNorm2d(CHANNELS)).train(training)
    before = snapshot(layer)
    x = torch.empty(shape, requires_grad=True)
    y = layer(x, x, activation=activation)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    y.sum().backward()
    assert x.grad.shape == shape
    assert_untouched(layer, before)


@activations
@pytest.mark.parametrize(
    "training",
    [
        True,
        False,
    ],
)
@empty_batches
def test_empty_batch_gives_parameters_no_gradient(shape, training, activation, backend):
    layer = randomize(kn.BatchNorm2d(CHANNELS)).train(training)
    layer(torch.empty(shape), activation=activation).sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros(CHANNELS)), name


@pytest.mark.parametrize(
    "training",
    [
        True,
        False,
    ],
)
@pytest.mark.parametrize("shape", [(4, 0), (4, 0, 3)])
def test_no_channels(shape, training, backend):
    """Nothing is asked for, and nothing comes back."""
    assert kn.BatchNorm(0).train(training)(torch.empty(shape)).shape == shape


def test_variance_of_two_values(backend):
    """The smallest legal batch: the running variance takes the unbiased value, twice the biased one."""
    layer = kn.BatchNorm1d(1, momentum=1.0)
    layer(torch.tensor([[1.0], [4.0]]))
    assert layer.running_mean.item() == 2.5
    assert math.isclose(layer.running_var.item(), 4.5, rel_tol=1e-6)


def test_one_value_per_channel_evaluates(backend):
    layer = randomize(kn.BatchNorm2d(CHANNELS)).eval()
    x = torch.randn(1, CHANNELS, 1, 1)
    oracle = twin(layer, nn.BatchNorm2d, CHANNELS)
    assert_near(layer(x), oracle(x.double()))
