"""Lazy layers against torch.nn's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

import keelnorm as kn
from keelnorm.nn.lazy import LazyBatchNorm, LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d

#: (lazy, what it becomes, torch's, shapes)
LAYERS = (
    (LazyBatchNorm1d, kn.BatchNorm1d, nn.LazyBatchNorm1d, ((4, 5), (4, 5, 3))),
    (LazyBatchNorm2d, kn.BatchNorm2d, nn.LazyBatchNorm2d, ((4, 5, 3, 2),)),
    (LazyBatchNorm3d, kn.BatchNorm3d, nn.LazyBatchNorm3d, ((4, 5, 3, 2, 2),)),
)
CASES = [(*names, shape) for *names, shapes in LAYERS for shape in shapes]
each = pytest.mark.parametrize(("kind", "becomes", "theirs", "shape"), CASES)


@each
def test_the_first_forward_makes_the_layer(kind: Any, becomes: Any, theirs: Any, shape: tuple[int, ...]) -> None:
    layer, reference, ordinary = kind(momentum=0.3), theirs(momentum=0.3), becomes(5, momentum=0.3)
    assert isinstance(layer, theirs)
    assert isinstance(layer.weight, UninitializedParameter)
    assert isinstance(layer.running_var, UninitializedBuffer)
    x = torch.randn(shape)
    y = layer(x)
    torch.testing.assert_close(y, reference(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(y, ordinary(x))
    assert type(layer) is becomes
    assert layer.num_features == 5
    assert repr(layer) == repr(ordinary)
    assert list(layer.state_dict()) == list(reference.state_dict())
    torch.testing.assert_close(layer.state_dict(), reference.state_dict(), rtol=1e-5, atol=1e-6)
    x = torch.randn(shape)
    assert torch.equal(layer(x), ordinary(x))
    assert torch.equal(layer.running_var, ordinary.running_var)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 5, 3, 2), (4, 5, 2, 2, 2, 2)])
def test_any_rank(shape: tuple[int, ...]) -> None:
    layer: nn.Module = LazyBatchNorm()
    x = torch.randn(shape)
    assert torch.equal(layer(x), kn.BatchNorm(5)(x))
    assert type(layer) is kn.BatchNorm


def test_the_first_call_takes_all_arguments() -> None:
    layer, ordinary = LazyBatchNorm2d(), kn.BatchNorm2d(5)
    x, residual = torch.randn(2, 4, 5, 3, 3).unbind()
    assert torch.equal(layer(x, residual, activation="relu"), ordinary(x, residual, activation="relu"))
    assert torch.equal(LazyBatchNorm2d()(input=x, activation="silu"), kn.BatchNorm2d(5)(x, activation="silu"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"activation": "rectified"},
        {"residual": torch.zeros(4, 5, 1, 1)},
        {"mask": torch.ones(3, dtype=torch.bool)},
        {"sample_weight": -torch.ones(4)},
        {"padding": "middle"},
        {"input": torch.zeros(1, 5, 1, 1)},
        {"input": torch.zeros(4, 5, 2, 2).to_sparse()},
        {"inplace": True, "activation": "relu"},
        {"hx": None},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_first_call_that_raises_leaves_it_lazy(wrong: dict[str, object]) -> None:
    layer = LazyBatchNorm2d()
    with pytest.raises((TypeError, ValueError)):
        layer(**({"input": torch.randn(4, 5, 2, 2)} | wrong))
    assert type(layer) is LazyBatchNorm2d
    assert isinstance(layer.weight, UninitializedParameter)
    x = torch.randn(4, 7, 2, 2)
    expected = kn.BatchNorm2d(7)(x)
    assert torch.equal(layer(x, activation=None), expected)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize(
    "keywords",
    [
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"bias": False},
        {"dtype": torch.float64},
        {"eps": 0.1, "momentum": None},
    ],
    ids=str,
)
def test_arguments_of_the_constructor(keywords: dict[str, object]) -> None:
    layer, ordinary = LazyBatchNorm1d(**keywords), kn.BatchNorm1d(5, **keywords)
    x = torch.randn(6, 5, dtype=keywords.get("dtype"))
    assert torch.equal(layer(x), ordinary(x))
    assert repr(layer) == repr(ordinary)
    assert layer.state_dict().keys() == ordinary.state_dict().keys()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, ordinary.state_dict()[name]), name
        assert value.dtype == ordinary.state_dict()[name].dtype, name


def test_state_dicts_as_in_torch() -> None:
    filled = kn.BatchNorm1d(5)
    filled(torch.randn(7, 5))
    lazy = LazyBatchNorm1d()
    assert isinstance(lazy.state_dict()["weight"], UninitializedParameter)

    lazy.load_state_dict(filled.state_dict())  # initialized into lazy: the shapes come with it
    x = torch.randn(6, 5)
    assert torch.equal(lazy.eval()(x), filled.eval()(x))
    assert [type(lazy), lazy.num_features] == [kn.BatchNorm1d, 5]

    still_lazy = LazyBatchNorm1d()
    still_lazy.load_state_dict(LazyBatchNorm1d().state_dict())  # lazy into lazy: nothing
    assert isinstance(still_lazy.running_mean, UninitializedBuffer)

    with pytest.raises(RuntimeError, match="uninitialized"):  # lazy into initialized
        kn.BatchNorm1d(5).load_state_dict(LazyBatchNorm1d().state_dict())

    nn.LazyBatchNorm1d().load_state_dict(filled.state_dict())  # and torch's takes ours


def test_a_loaded_size_is_held() -> None:
    lazy = LazyBatchNorm1d()
    lazy.load_state_dict(kn.BatchNorm1d(5).state_dict())
    with pytest.raises(ValueError, match="x has 6 channels"):
        lazy(torch.randn(4, 6))
    assert lazy.num_features == 5


@pytest.mark.parametrize(
    ("kind", "x", "error", "message"),
    [
        (LazyBatchNorm2d, torch.randn(4, 5), ValueError, r"LazyBatchNorm2d: .* 4 dimensions.*shape \(4, 5\)"),
        (LazyBatchNorm1d, torch.randn(4, 5, 2, 2), ValueError, "2 or 3 dimensions"),
        (LazyBatchNorm, torch.randn(4), ValueError, "two or more dimensions"),
        (LazyBatchNorm1d, torch.ones(4, 5, dtype=torch.int64), TypeError, "floating-point.*int64"),
        (LazyBatchNorm1d, None, TypeError, "got None"),
    ],
)
def test_a_first_input_without_channels(kind: Any, x: object, error: type[Exception], message: str) -> None:
    layer = kind()
    with pytest.raises(error, match=message):
        layer(x)
    assert type(layer) is kind
    assert layer.has_uninitialized_params()


def test_copies_and_pickles() -> None:
    x = torch.randn(4, 5)
    lazy = pickle.loads(pickle.dumps(LazyBatchNorm1d()))  # deepcopy of uninitialized buffers is an error in torch
    assert torch.equal(lazy(x), kn.BatchNorm1d(5)(x))
    layer = LazyBatchNorm1d()
    layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is kn.BatchNorm1d
        assert torch.equal(twin.eval()(x), layer.eval()(x))


def test_within_a_model_it_trains() -> None:
    model = kn.Sequential(nn.LazyLinear(6), LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(2))
    x = torch.randn(8, 3)
    model(x)
    assert type(model[1]) is kn.BatchNorm1d
    before = model[1].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)


def test_in_evaluation_the_running_statistics_stay() -> None:
    layer = LazyBatchNorm1d().eval()
    layer(torch.randn(1, 5))
    assert torch.equal(layer.running_mean, torch.zeros(5))
    assert layer.num_batches_tracked == 0
