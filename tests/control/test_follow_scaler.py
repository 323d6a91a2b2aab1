"""The running moments of a step that a gradient scaler skips are those of before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import evenkeel as ek


def a_model(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), kind(4), nn.Linear(4, 4), kind(4, affine=False))


def step(model, scaler, optimizer, factor=1.0, poison=None):
    x = torch.randn(8, 4)
    if poison is not None:
        x[0, 0] = poison
    optimizer.zero_grad()
    scaler.scale(model(x).square().sum() * factor).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, ek.BatchNorm1d])
def test_a_skipped_step_counts_for_nothing(kind):
    model = a_model(kind)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu")
    with ek.follow_scaler(model, scaler) as paths:
        step(model, scaler, optimizer)
    assert paths == ["1", "3"]
    before, parameters = copy.deepcopy(model.state_dict()), [p.clone() for p in model.parameters()]
    assert before["1.num_batches_tracked"] == before["3.num_batches_tracked"] == 1
    scale = scaler.get_scale()
    with ek.follow_scaler(model, scaler):
        step(model, scaler, optimizer, factor=float("inf"))
    assert scaler.get_scale() < scale
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    if kind is ek.BatchNorm1d:
        assert model[1].skipped_updates.tolist() == model[3].skipped_updates.tolist() == [1] * 4
    with ek.follow_scaler(model, scaler):
        step(model, scaler, optimizer)
    assert model[1].num_batches_tracked == 2
    assert not torch.equal(before["1.running_mean"], model[1].running_mean)


def test_a_channel_is_counted_once():
    """The first layer has itself left out what is not finite, and the block does not count that channel again."""
    model = nn.Sequential(ek.BatchNorm1d(4))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu")
    with ek.follow_scaler(model, scaler):
        step(model, scaler, optimizer, poison=float("nan"))
    assert model[0].skipped_updates.tolist() == [1] * 4
    assert model[0].running_mean.tolist() == [0.0] * 4


def test_an_exception_counts_for_nothing_too():
    model, scaler = a_model(ek.BatchNorm1d), torch.amp.GradScaler("cpu")
    before = copy.deepcopy(model.state_dict())

    def fail():
        with ek.follow_scaler(model, scaler):
            model(torch.randn(8, 4))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_some_layers():
    model, scaler = a_model(nn.BatchNorm1d), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with ek.follow_scaler(model, scaler, where="1"):
        step(model, scaler, optimizer, factor=float("inf"))
    assert (model[1].num_batches_tracked, model[3].num_batches_tracked) == (0, 1)


def test_no_scaler():
    with (
        pytest.raises(TypeError, match="must be a gradient scaler with get_scale"),
        ek.follow_scaler(nn.Linear(1, 1), 3),
    ):
        pass
