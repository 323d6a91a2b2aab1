"""The running statistics of a step that a gradient scaler skips are those of before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import keelnorm as kn


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


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, kn.BatchNorm1d])
def test_a_skipped_step_counts_for_nothing(kind):
    model = a_model(kind)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu")
    with kn.follow_scaler(model, scaler) as paths:
        step(model, scaler, optimizer)
    assert paths == ["1", "3"]
    before, parameters = copy.deepcopy(model.state_dict()), [p.clone() for p in model.parameters()]
    assert before["1.num_batches_tracked"] == before["3.num_batches_tracked"] == 1
    scale = scaler.get_scale()
    with kn.follow_scaler(model, scaler):
        step(model, scaler, optimizer, factor=float("inf"))
    assert scaler.get_scale() < scale
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    if kind is kn.BatchNorm1d:
        assert model[1].skipped_updates.tolist() == model[3].skipped_updates.tolist() == [1] * 4
    with kn.follow_scaler(model, scaler):
        step(model, scaler, optimizer)
    assert model[1].num_batches_tracked == 2
    assert not torch.equal(before["1.running_mean"], model[1].running_mean)


def test_a_channel_is_counted_once():
    """The first layer has itself left out what is not finite, and the block does not count that channel again."""
    model = nn.Sequential(kn.BatchNorm1d(4))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu")
    with kn.follow_scaler(model, scaler):
        step(model, scaler, optimizer, poison=float("nan"))
    assert model[0].skipped_updates.tolist() == [1] * 4
    assert model[0].running_mean.tolist() == [0.0] * 4


def test_an_exception_counts_for_nothing_too():
    model, scaler = a_model(kn.BatchNorm1d), torch.amp.GradScaler("cpu")
    before = copy.deepcopy(model.state_dict())

    def fail():
        with kn.follow_scaler(model, scaler):
            model(torch.randn(8, 4))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_some_layers():
    model, scaler = a_model(nn.BatchNorm1d), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with kn.follow_scaler(model, scaler, where="1"):
        step(model, scaler, optimizer, factor=float("inf"))
    assert (model[1].num_batches_tracked, model[3].num_batches_tracked) == (0, 1)


class Two:
    """Two models with an optimizer each, and one scaler; the first one's gradients overflow where it is said."""

    def __init__(self, kind, fused=False):
        self.models = [a_model(kind) for _ in range(2)]
        self.optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, fused=fused) for model in self.models]
        self.scaler = torch.amp.GradScaler("cpu")

    def step(self, factor):
        for model, optimizer, by in zip(self.models, self.optimizers, (factor, 1.0), strict=True):
            optimizer.zero_grad()
            self.scaler.scale(model(torch.randn(8, 4)).square().sum() * by).backward()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "found by its parameters"])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, kn.BatchNorm1d])
def test_several_optimizers_with_one_scaler(kind, given, fused):
    """The scale falls for the one that is skipped; the model of the other has stepped, and keeps its batch."""
    two = Two(kind, fused)
    skipped, stepped = two.models
    optimizers = two.optimizers if given else [None, None]
    before = [parameter.clone() for parameter in stepped.parameters()]
    with (
        kn.follow_scaler(skipped, two.scaler, optimizers[0]),
        kn.follow_scaler(stepped, two.scaler, optimizers[1]),
    ):
        two.step(float("inf"))
    assert not all(torch.equal(a, b) for a, b in zip(before, stepped.parameters(), strict=True))
    assert (skipped[1].num_batches_tracked, stepped[1].num_batches_tracked) == (0, 1)
    with (
        kn.follow_scaler(skipped, two.scaler, optimizers[0]),
        kn.follow_scaler(stepped, two.scaler, optimizers[1]),
    ):
        two.step(1.0)
    assert (skipped[1].num_batches_tracked, stepped[1].num_batches_tracked) == (1, 2)


@pytest.mark.parametrize("kind", [nn.LazyBatchNorm1d, kn.LazyBatchNorm1d])
def test_the_first_forward_of_a_lazy_layer(kind):
    model, scaler = nn.Sequential(kind()), torch.amp.GradScaler("cpu")
    for factor, count in ((float("inf"), 0), (1.0, 1)):
        with kn.follow_scaler(model, scaler) as paths:
            loss = model(torch.randn(8, 4)).square().sum() * factor
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert paths == ["0"]
        assert model[0].num_batches_tracked == count
        assert bool((model[0].running_mean == 0).all()) is (count == 0)


def test_what_was_pooled_is_forgotten_too():
    model, scaler = a_model(kn.BatchNorm1d), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with kn.accumulate_statistics(model) as accumulated:
        for factor in (1.0, float("inf")):
            with kn.follow_scaler(model, scaler, optimizer):
                step(model, scaler, optimizer, factor)
            assert accumulated.moments["1"].count == 8
    assert model[1].num_batches_tracked == 1


def test_no_scaler():
    with (
        pytest.raises(TypeError, match="must be a gradient scaler with get_scale"),
        kn.follow_scaler(nn.Linear(1, 1), 3),
    ):
        pass
    for wrong in ("1", torch.amp.GradScaler("cpu")):
        with (
            pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer or None"),
            kn.follow_scaler(nn.Linear(1, 1), torch.amp.GradScaler("cpu"), wrong),
        ):
            pass
