"""What freezing refuses, and what it leaves then; what assert_frozen finds."""

import pytest
import torch
from control.freezing_parts import freeze_and_give
from control.models import PATHS, Block
from torch import nn

import keelnorm as kn
from keelnorm.control import Frozen, assert_frozen, freeze, frozen, unfreeze


@pytest.mark.parametrize("function", [freeze, unfreeze, frozen, assert_frozen])
def test_errors(function):
    model = Block(2, "torch")
    with pytest.raises(ValueError, match=r"where='layer9\.\*' matches no batch norm.*'norm', 'last\.0'"):
        function(model, where=["norm", "layer9.*"])
    with pytest.raises(ValueError, match="The model has none"):
        function(nn.Linear(3, 3), where="bn")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got 3 \(int\)"):
        function(3)
    for where, came in (([3], r"3 \(int\)"), (3, r"3 \(int\)"), (b"norm", r"110 \(int\)"), (model.norm, "BatchNorm2d")):
        with pytest.raises(TypeError, match=rf"{function.__name__}: where takes a pattern .* got {came}"):
            function(model, where=where)
    with pytest.raises(
        TypeError, match=rf"{function.__name__}: where is called with a path and its layer, but .* does not take these"
    ):
        function(model, where=lambda path: True)
    with pytest.raises(ValueError, match=rf"{function.__name__}: where selects no batch norm\. .*'norm', 'last\.0'"):
        function(model, where=lambda path, layer: False)
    with pytest.raises(ValueError, match=rf"{function.__name__}: where=\[\] has no pattern"):
        function(model, where=[])
    assert frozen(model) == dict.fromkeys(PATHS, Frozen(statistics=False, affine=False))


@pytest.mark.parametrize("library", [nn, kn], ids=["torch", "keelnorm"])
def test_no_running_statistics(library):
    model = nn.Sequential(library.BatchNorm1d(3), library.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"freeze: 1 has no running statistics .*statistics=False"):
        freeze(model)
    assert frozen(model)["0"] == Frozen(statistics=False, affine=False)
    assert freeze(model, statistics=False) == ["0", "1"]
    assert freeze(model, where="0") == ["0"]
    with pytest.raises(
        AssertionError, match=r"1 of 2 batch norms are not frozen: 1 \(statistics: there are no running"
    ):
        assert_frozen(model)


def test_a_lazy_layer_has_nothing_to_freeze_yet():
    layer = nn.LazyBatchNorm1d()
    with pytest.raises(ValueError, match="the layer itself is lazy"):
        freeze(layer)
    layer(torch.randn(4, 3))
    freeze(layer)
    assert_frozen(layer.train())


class Stubborn(nn.BatchNorm2d):
    """Its train() raises when it is told to."""

    raises = False

    def train(self, mode=True):
        super().train(mode)
        if self.raises:
            raise RuntimeError("no")
        return self


def all_that_freezing_touches(model):
    """Of each module: what is set on it, the mode that is remembered, and what its parameters require and have."""
    names = ("train", "reset_running_stats", "training", "_frozen_parameters")
    return [
        (
            {name: value for name, value in vars(module).items() if name in names},
            getattr(vars(module).get("train"), "mode", None),
            [(parameter.requires_grad, id(parameter.grad)) for parameter in module.parameters()],
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("function", [freeze, unfreeze])
@pytest.mark.parametrize("before", [{}, {"affine": False}, {"affine": True}], ids=["thawed", "in part", "frozen"])
def test_nothing_stays_half_done(function, before):
    # A split layer asks the layers in it for the mode that it is asked for.
    model = nn.Sequential(nn.BatchNorm2d(3), kn.SplitBatchNorm(3), Stubborn(3), nn.BatchNorm2d(3))
    if before:
        freeze(model, **before)
    if function is unfreeze and not before:
        freeze(model, where="2")  # or the stubborn layer would not be asked for anything
    for parameter in model.parameters():
        parameter.grad = torch.ones(3)
    expected = all_that_freezing_touches(model.train())
    vars(model[2])["raises"] = True
    with pytest.raises(RuntimeError, match="no"):
        function(model)
    assert all_that_freezing_touches(model) == expected


def test_an_assignment_to_training_is_found():
    layer = freeze_and_give(nn.BatchNorm1d(3))
    layer.training = True
    with pytest.raises(AssertionError, match="training was set to True by assignment"):
        assert_frozen(layer)
    freeze(layer)
    assert_frozen(layer)
