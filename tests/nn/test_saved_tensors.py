"""What a forward keeps for its backward: exactly what the documentation says, counted by torch's own hooks."""

import pytest
import torch
from nn.layer_pairs import CHANNELS, randomize
from support.noted import noted
from torch import nn

import keelnorm as kn
from keelnorm.engine.activations import NAMED

SHAPE = (4, CHANNELS, 3, 3)
STATISTICS = (3, CHANNELS)
VECTOR = (CHANNELS,)


def kept(x, residual=None, **keywords):
    """The tensors that the layer saves, and its result."""
    layer = randomize(kn.BatchNorm2d(CHANNELS))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: noted(saved, t), lambda t: t):
        y = layer(x, residual, **keywords)
    return saved, y


def is_same(a, b):
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def inputs():
    return torch.randn(SHAPE, requires_grad=True) * 1, torch.randn(SHAPE, requires_grad=True) * 1


def split(saved):
    """Those of x's size, and the shapes of the others."""
    return [t for t in saved if t.dim() == len(SHAPE)], sorted(tuple(t.shape) for t in saved if t.dim() < len(SHAPE))


@pytest.mark.parametrize("activation", NAMED)
def test_without_a_residual(activation, backend):
    """x, weight and the statistics; with an activation bias, from which the value in front of it is recomputed."""
    x, _ = inputs()
    large, small = split(kept(x, activation=activation)[0])
    assert len(large) == 1
    assert is_same(large[0], x)
    assert small == sorted([STATISTICS, VECTOR, *([VECTOR] if activation else [])])


@pytest.mark.parametrize("activation", NAMED)
def test_with_a_residual(activation, backend):
    """And y for relu, the residual for the others; nothing more where there is no activation."""
    x, residual = inputs()
    saved, y = kept(x, residual, activation=activation)
    large, small = split(saved)
    wanted = {None: [x], "relu": [x, y]}.get(activation, [x, residual])
    assert len(large) == len(wanted)
    assert all(is_same(a, b) for a, b in zip(large, wanted, strict=True))
    assert small == sorted([STATISTICS, VECTOR, *([] if activation in (None, "relu") else [VECTOR])])


@pytest.mark.parametrize("activation", [None, "leaky_relu", nn.ELU(0.5)], ids=str)
def test_in_place(activation, backend):
    """y alone, which lies where x lay."""
    x, _ = inputs()
    layer = kn.BatchNorm2d(CHANNELS)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: noted(saved, t), lambda t: t):
        y = layer(x, activation=activation, inplace=True)
    large, small = split(saved)
    assert len(large) == 1
    assert is_same(large[0], y)
    assert y is x
    assert small == sorted([STATISTICS, VECTOR, VECTOR])


def test_in_place_with_a_weight_near_zero(backend):
    """One channel's x in addition, and its number."""
    x, _ = inputs()
    layer = kn.BatchNorm2d(CHANNELS)
    with torch.no_grad():
        layer.weight[2] = 0
    before = x.detach().clone()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: noted(saved, t), lambda t: t):
        layer(x, inplace=True)
    large, small = split(saved)
    assert [t.shape[1] for t in large] == [CHANNELS, 1]
    assert torch.equal(large[1], before[:, 2:3])
    assert (1,) in small
