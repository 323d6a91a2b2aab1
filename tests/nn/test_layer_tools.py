"""torch's own tools take a layer for what it is: an ordinary batch norm."""

import copy

import pytest
import torch
from nn.layer_pairs import CHANNELS, assert_near, assert_untouched, randomize, snapshot
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim import swa_utils

import keelnorm as kn

LAYERS = (kn.BatchNorm, kn.BatchNorm1d, kn.BatchNorm2d, kn.BatchNorm3d)


@pytest.mark.parametrize("layer_type", LAYERS)
@pytest.mark.parametrize("affine", [True, False])
def test_convert_sync_batchnorm(layer_type, affine):
    net = nn.Sequential(nn.Flatten(), randomize(layer_type(CHANNELS, eps=1e-3, momentum=0.3, affine=affine)))
    before = snapshot(net)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert type(converted[1]) is nn.SyncBatchNorm
    assert (converted[1].eps, converted[1].momentum, converted[1].affine) == (1e-3, 0.3, affine)
    assert_untouched(converted, before)


def test_converted_in_a_sequential_runs_its_activation():
    """Conversion swaps the layer and leaves the activation where it is: nothing is lost with the layer."""
    net = kn.Sequential(randomize(kn.BatchNorm2d(CHANNELS)), nn.ReLU()).eval()
    x = torch.randn(2, CHANNELS, 3, 3)
    expected = net(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert type(converted[0]) is nn.SyncBatchNorm
    assert_near(converted(x), expected)
    assert (converted(x) >= 0).all()


def test_fuse_conv_bn_eval(backend):
    conv, norm = nn.Conv2d(3, CHANNELS, 3), randomize(kn.BatchNorm2d(CHANNELS))
    net = nn.Sequential(conv, norm).eval()
    x = torch.randn(2, 3, 6, 6)
    fused = fuse_conv_bn_eval(conv, norm)
    assert_near(fused(x), net(x), units=64)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_update_bn(momentum, backend):
    """SWA's helper resets the moments, averages over all batches and puts momentum back."""

    def updated(norm):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, CHANNELS), randomize(norm(CHANNELS, momentum=momentum))).eval()
        swa_utils.update_bn([torch.randn(8, 3) for _ in range(4)], net)
        return net

    ours, theirs = updated(kn.BatchNorm1d), updated(nn.BatchNorm1d)
    assert ours[1].momentum == momentum
    assert not ours[1].training
    assert ours[1].num_batches_tracked.item() == 4
    for name, value in theirs[1].named_buffers():
        assert_near(getattr(ours[1], name).float(), value.float())


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_model(use_buffers):
    def averaged(norm):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, CHANNELS), norm(CHANNELS), nn.ReLU())
        average = swa_utils.AveragedModel(net, use_buffers=use_buffers)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(8, 3)).square().sum().backward()
            optimizer.step()
            average.update_parameters(net)
        return average.state_dict()

    ours, theirs = averaged(kn.BatchNorm1d), averaged(nn.BatchNorm1d)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert_near(ours[name].float(), expected.float(), units=256)


def test_parameters_are_found_by_name_and_type():
    """What weight-decay filters, freezing and initialization do."""
    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), kn.BatchNorm2d(CHANNELS))
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    assert norms == [net[1]]
    net.apply(lambda module: nn.init.zeros_(module.weight) if isinstance(module, nn.BatchNorm2d) else None)
    assert not net[1].weight.any()
    assert [name for name, _ in net[1].named_parameters()] == ["weight", "bias"]


def test_functional_call_takes_other_parameters_and_buffers(backend):
    layer, other = randomize(kn.BatchNorm2d(CHANNELS)), randomize(kn.BatchNorm2d(CHANNELS))
    before, state = snapshot(layer), snapshot(other)
    x = torch.randn(2, CHANNELS, 3, 3)
    y = torch.func.functional_call(layer, state, (x,), {"activation": "relu"})
    assert torch.equal(y, copy.deepcopy(other)(x, activation="relu"))
    assert_untouched(layer, before)
    assert state["num_batches_tracked"].item() == 3  # the given buffers are those that are updated
    assert not torch.equal(state["running_mean"], other.running_mean)
