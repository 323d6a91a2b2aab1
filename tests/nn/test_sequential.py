"""kn.Sequential is torch.nn.Sequential: names, state, indexing, copies; and computes the same."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from nn.layer_pairs import (
    assert_near,
    assert_same_moments,
    assert_same_step,
    assert_untouched,
    randomize,
    snapshot,
    step,
)
from torch import nn

import keelnorm as kn


def modules(norm, inplace=False):
    """Fused twice, and once not: between a batch norm and its ReLU nothing may stand."""
    return [
        nn.Conv2d(3, 4, 3, padding=1),
        norm(4),
        nn.ReLU(inplace=inplace),
        norm(4),
        nn.Dropout2d(0.0),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
        norm(2),
        nn.ReLU(),
    ]


def twins(**keywords):
    """A network of each library with the same state; torch's in float64."""
    ours = randomize(kn.Sequential(*modules(kn.BatchNorm2d, **keywords)))
    theirs = nn.Sequential(*modules(nn.BatchNorm2d)).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("inplace", [False, True])
def test_steps_agree_with_torch(inplace, backend):
    ours, theirs = twins(inplace=inplace)
    for training in (True, False, True):
        ours.train(training), theirs.train(training)
        x = torch.randn(3, 3, 5, 4)
        dy = torch.randn(3, 2, 5, 4)
        # Sums of up to 60 positions, through three normalizations.
        assert_same_step(step(ours, x, dy), step(theirs, x.double(), dy.double()), units=256, scale=32)
        assert_same_moments(ours, theirs, units=64)


def test_state_goes_both_ways():
    ours, theirs = kn.Sequential(*modules(kn.BatchNorm2d)), nn.Sequential(*modules(nn.BatchNorm2d))
    for source, target in ((ours, theirs), (theirs, ours)):
        state = randomize(source).state_dict()
        assert str(target.load_state_dict(state)) == "<All keys matched successfully>"
        assert_untouched(target, state)
    assert repr(ours) == repr(theirs)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]


def test_is_a_sequential():
    net = kn.Sequential(*modules(kn.BatchNorm2d))
    assert isinstance(net, nn.Sequential)
    assert type(net[1:3]) is kn.Sequential
    assert (len(net), type(net[-1])) == (9, nn.ReLU)
    assert list(net) == [net[i] for i in range(9)]


def test_names_from_an_ordered_dict():
    layers = OrderedDict(conv=nn.Conv2d(3, 4, 1), norm=kn.BatchNorm2d(4), act=nn.ReLU())
    net = kn.Sequential(layers)
    assert [name for name, _ in net.named_children()] == ["conv", "norm", "act"]
    assert "norm.running_mean" in net.state_dict()
    assert (net(torch.randn(2, 3, 4, 4)) >= 0).all()


def test_empty():
    x = torch.randn(2, 3)
    assert kn.Sequential()(x) is x


def test_input_other_than_a_tensor():
    """Whatever the first module takes."""

    class Pick(nn.Module):
        def forward(self, pair):
            return pair["x"]

    x = torch.randn(4, 3)
    net = kn.Sequential(Pick(), kn.BatchNorm1d(3), nn.ReLU())
    assert torch.equal(net({"x": x}), kn.BatchNorm1d(3)(x, activation="relu"))


@pytest.mark.parametrize(
    "copies", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_copies(copies, backend):
    net, _ = twins()
    duplicate = copies(net)
    assert type(duplicate) is kn.Sequential
    x = torch.randn(3, 3, 5, 4)
    before = snapshot(net)
    y = duplicate(x)
    assert_untouched(net, before)
    assert torch.equal(net(x), y)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.append(nn.ReLU()),
        lambda net: net.insert(1, nn.ReLU()),
        lambda net: net.extend([nn.BatchNorm1d(4) if type(net) is nn.Sequential else kn.BatchNorm1d(4), nn.ReLU()]),
        lambda net: net.__delitem__(1),
        lambda net: net.__setitem__(1, nn.Tanh()),
        lambda net: net.pop(1),
        lambda net: net[::2],
        lambda net: net[:1],
        lambda net: net * 2,
        lambda net: net + net,
    ],
    ids=["append", "insert", "extend", "delete", "set", "pop", "stride", "slice", "repeat", "add"],
)
def test_changed_later(change, backend):
    """The modules of the moment count, not those of the construction."""
    ours = kn.Sequential(kn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
    theirs = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = change(ours) or ours, change(theirs) or theirs
    if not isinstance(ours, nn.Sequential):  # pop returns the module it took
        assert isinstance(ours, nn.ReLU)
        return
    x = torch.randn(8, 4) + 1
    assert_near(ours(x), theirs(x), units=64)
    assert [type(module) for module in ours if not isinstance(module, nn.BatchNorm1d)] == [
        type(module) for module in theirs if not isinstance(module, nn.BatchNorm1d)
    ]


def test_an_error_changes_nothing(backend):
    net = kn.Sequential(kn.BatchNorm2d(4), nn.ReLU())
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"x has 3 channels"):
        net(torch.randn(2, 3, 4, 4))
    assert_untouched(net, before)
