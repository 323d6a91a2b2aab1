"""Frozen layers stay as they are, whatever the training loop does."""

import copy
import io
import pickle

import pytest
import torch
from control.freezing_parts import every_kind, train
from control.models import PATHS, Block, buffers, data, same
from torch import nn
from torch.nn.utils import parametrize

import keelnorm as kn
from keelnorm.control import Frozen, assert_frozen, freeze, frozen, unfreeze


@pytest.fixture
def warm(rank, kind):
    """A model that has seen data, with an optimizer's momentum to come."""
    model = Block(rank, kind)
    train(model, rank, 3)
    return model


@every_kind
def test_a_hundred_steps_change_nothing(warm, rank):
    before = buffers(warm)
    norms = [warm.norm, warm.last[0]]
    parameters = [p.clone() for norm in norms for p in norm.parameters()]
    other = warm.first.weight.clone()
    assert freeze(warm) == PATHS
    train(warm, rank, 100)
    assert same(buffers(warm), before)
    assert all(torch.equal(p, q) for p, q in zip(parameters, [p for n in norms for p in n.parameters()], strict=True))
    assert not torch.equal(warm.first.weight, other)
    assert_frozen(warm)
    unfreeze(warm)
    train(warm, rank, 1)
    assert not same(buffers(warm), before)
    assert not torch.equal(parameters[0], norms[0].weight)


@every_kind
def test_an_optimizer_with_momentum_and_old_gradients(warm, rank):
    """Freezing between backward and step: neither the gradient nor the momentum moves a frozen parameter."""
    optimizer = torch.optim.SGD(warm.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        warm(data(rank)).square().mean().backward()
        optimizer.step()
    before = warm.norm.weight.clone()
    freeze(warm, statistics=False)
    optimizer.step()
    assert torch.equal(warm.norm.weight, before)


@every_kind
def test_it_normalizes_with_the_running_statistics(warm, rank):
    x = data(rank)
    expected = warm.eval()(x)
    freeze(warm.train())
    assert torch.equal(warm.train()(x), expected)
    assert warm.training
    assert not warm.norm.training


@every_kind
def test_statistics_alone(warm, rank):
    before = buffers(warm)
    freeze(warm, affine=False)
    weight = warm.norm.weight.clone()
    train(warm, rank, 2)
    assert same(buffers(warm), before)
    assert not torch.equal(warm.norm.weight, weight)
    assert frozen(warm) == dict.fromkeys(PATHS, Frozen(statistics=True, affine=False))


@every_kind
def test_affine_alone(warm, rank):
    before = buffers(warm)
    freeze(warm, statistics=False)
    weight = warm.norm.weight.clone()
    train(warm, rank, 2)
    assert not same(buffers(warm), before)
    assert torch.equal(warm.norm.weight, weight)
    assert warm.norm.weight.grad is None
    assert frozen(warm) == dict.fromkeys(PATHS, Frozen(statistics=False, affine=True))


@every_kind
def test_state_dict_stays(warm):
    before = {name: value.clone() for name, value in warm.state_dict().items()}
    freeze(warm)
    after = warm.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def copies_of(model):
    def saved(model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved(model)]


@every_kind
def test_copies_are_frozen_by_themselves(warm, rank):
    freeze(warm)
    for other in copies_of(warm):
        assert_frozen(other)
        before = buffers(other)
        train(other, rank, 2)
        assert same(buffers(other), before)
        assert other.norm.train() is other.norm
        unfreeze(other)
        assert other.norm.training
        assert other.norm.weight.requires_grad
        assert_frozen(warm)
        train(other, rank, 1)
        assert not same(buffers(other), before)


@every_kind
def test_twice_is_once(warm):
    freeze(warm)
    freeze(warm)
    assert_frozen(warm)
    unfreeze(warm)
    assert frozen(warm) == dict.fromkeys(PATHS, Frozen(statistics=False, affine=False))
    assert unfreeze(warm) == PATHS
    assert "train" not in vars(warm.norm)
    assert "reset_running_stats" not in vars(warm.norm)


@every_kind
@pytest.mark.parametrize("asked", [True, False])
def test_the_mode_after_unfreezing_is_the_one_last_asked_for(warm, asked):
    freeze(warm.train(not asked))
    unfreeze(warm)
    assert warm.norm.training is not asked
    freeze(warm)
    freeze(warm.train(asked))
    unfreeze(warm)
    assert warm.norm.training is asked


@every_kind
def test_what_was_off_before_stays_off(warm):
    warm.norm.weight.requires_grad_(False)
    freeze(warm)
    unfreeze(warm, statistics=False)
    assert [p.requires_grad for p in warm.norm.parameters()] == [False, True]
    assert frozen(warm)["norm"] == Frozen(statistics=True, affine=False)
    assert all(p.requires_grad for p in warm.first.parameters())


def test_a_parameter_that_trains_again_is_frozen_by_a_second_call():
    layer = nn.BatchNorm1d(3)
    freeze(layer)
    layer.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match=r"the layer itself \(affine: weight with requires_grad=True\)"):
        assert_frozen(layer)
    freeze(layer)
    assert_frozen(layer)
    unfreeze(layer)
    assert layer.weight.requires_grad
    assert layer.bias.requires_grad


def test_a_parametrized_weight():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = kn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "weight", Double())
    freeze(layer)
    assert not layer.weight.requires_grad
    unfreeze(layer)
    assert layer.weight.requires_grad


def test_where():
    model = nn.ModuleDict({"stem": Block(2, "torch"), "stem2": Block(2, "keelnorm")})
    everything = ["stem.norm", "stem.last.0", "stem2.norm", "stem2.last.0"]
    assert freeze(model) == everything
    unfreeze(model)
    assert freeze(model, where="stem") == ["stem.norm", "stem.last.0"]
    assert [f.statistics for f in frozen(model).values()] == [True, True, False, False]
    assert freeze(model, where="*.norm") == ["stem.norm", "stem2.norm"]
    assert freeze(model, where=["stem2.l*", "stem.norm"]) == ["stem.norm", "stem2.last.0"]
    assert_frozen(model, where=["stem", "stem2"])
    assert unfreeze(model, where="stem?.*") == ["stem2.norm", "stem2.last.0"]
    assert frozen(model, where="stem2.norm") == {"stem2.norm": Frozen(statistics=False, affine=False)}
    assert freeze(model["stem"].norm) == [""]


def test_a_layer_in_two_places_is_meant_by_either_path():
    model = nn.ModuleDict()
    model["a"] = model["b"] = nn.BatchNorm1d(3)
    assert freeze(model) == ["a"]
    assert unfreeze(model, where="b") == ["b"]
    assert frozen(model) == {"a": Frozen(statistics=False, affine=False)}
