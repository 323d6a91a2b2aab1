"""Modes that see every function or operator: a layer runs under them, and they see it."""

import pytest
import torch
from interop.interop_models import SHAPE, assert_same, step, twins
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import keelnorm as kn


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class SeenOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def compare(mode):
    """The same bits with and without the mode, in training and evaluation."""
    plain, other = twins()
    for training in (True, False):
        plain.train(training), other.train(training)
        x = torch.randn(SHAPE)
        expected = step(plain, x)
        with mode:
            found = step(other, x)
        assert_same(found, expected)


def test_function_mode():
    mode = SeenFunctions()
    compare(mode)
    assert mode.seen.count(kn.functional.layer_batch_norm) == 4  # two layers, twice


@pytest.mark.skipif(kn.kernels.active() == "reference", reason="the reference back end runs torch's operators")
def test_dispatch_mode():
    mode = SeenOperators()
    compare(mode)
    assert mode.seen.count(torch.ops.keelnorm.forward_.default) == 4
    assert mode.seen.count(torch.ops.keelnorm.backward.default) == 4


def test_default_device():
    compare(torch.device("cpu"))


def test_flop_counter():
    """Batch norm counts nothing, as torch's does, and hides nothing."""
    counts = []
    for block in twins(ours=False):
        counter = FlopCounterMode(display=False)
        with counter:
            step(block, torch.randn(SHAPE))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_profiler():
    layer = kn.BatchNorm2d(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(torch.randn(SHAPE)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    expected = "keelnorm::forward_" if kn.kernels.active() != "reference" else "aten::rsqrt"
    assert expected in names


def test_anomaly_detection():
    layer = kn.BatchNorm2d(3)
    x = torch.randn(SHAPE, requires_grad=True)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        layer(x, activation="relu").square().sum().backward()
    assert x.grad.isfinite().all()
