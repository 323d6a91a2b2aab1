"""Tensors whose storage was freed, given to layers: an error that names them, and nothing changed."""

from __future__ import annotations

import pytest
import torch

import keelnorm as kn

CHANNELS = 5


def free(t):
    t.untyped_storage().resize_(0)


@pytest.mark.parametrize("keywords", [{}, {"inplace": True}, {"mask": torch.ones(6, dtype=torch.bool)}], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "running_mean", "running_var"])
def test_a_layer(name, training, keywords, backend):
    layer = kn.BatchNorm2d(CHANNELS).train(training)
    x = torch.randn(6, CHANNELS, 3, 3)
    given = {"x": x, **dict(layer.named_parameters()), **dict(layer.named_buffers())}
    before = {key: t.clone() for key, t in given.items() if key != name}
    free(given[name])
    leaf = x if name == "x" else x * 1
    with pytest.raises(RuntimeError, match=f"the memory of {name} is gone"):
        layer(leaf, **keywords)
    for key, t in before.items():
        assert torch.equal(given[key], t), key


def test_a_mask():
    mask = torch.ones(6, dtype=torch.bool)
    free(mask)
    with pytest.raises(RuntimeError, match="the memory of mask is gone"):
        kn.BatchNorm1d(CHANNELS)(torch.randn(6, CHANNELS), mask=mask)
    with pytest.raises(RuntimeError, match="the memory of mask is gone"):
        kn.functional.moments(torch.randn(6, CHANNELS), mask)


def test_between_forward_and_backward():
    """As sharded training does that gathers parameters late."""
    layer = kn.BatchNorm1d(CHANNELS)
    x = torch.randn(6, CHANNELS, requires_grad=True)
    y = layer(x * 1, activation="relu")
    kept = layer.weight.detach().clone()
    free(layer.weight)
    with pytest.raises(RuntimeError, match="the memory of weight is gone"):
        y.sum().backward(retain_graph=True)
    assert x.grad is None
    layer.weight.untyped_storage().resize_(4 * CHANNELS)
    layer.weight.data.copy_(kept)
    y.sum().backward()
    assert x.grad is not None
