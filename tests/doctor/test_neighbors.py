"""What stands beside each batch norm, from a run and from the order of a Sequential."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import keelnorm as kn
from keelnorm.doctor.case_check import evidence_of


def beside(model, example=None):
    """The surroundings of each batch norm, by path."""
    evidence = evidence_of(kn.doctor.Case(model, example=example))
    return {layer.path: layer.beside for layer in evidence.layers}


def names(neighbors):
    return [one.name for one in neighbors]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3)
        self.second, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.25)

    def forward(self, x):
        y = self.conv(x)
        z = F.relu(self.norm(y)) + y
        return self.second(self.drop(z).transpose(1, 2).transpose(1, 2))


def test_a_run_shows_layers_and_functions():
    found = beside(nn.Sequential(Block(), nn.Flatten()), torch.zeros(2, 3, 4))
    first, second = found["0.norm"], found["0.second"]
    assert names(first.before) == ["Conv1d '0.conv'"]
    assert first.before[0].function == "conv1d"
    assert (first.alone, names(first.after), first.returned, first.dropouts) == (False, ["relu"], False, ())
    assert (names(second.before), second.alone) == (["transpose"], True)
    assert [(one.name, one.rate, one.path) for one in second.dropouts] == [("Dropout '0.drop'", 0.25, "0.drop")]
    assert second.returned  # through a Flatten
    assert all(one.observed for one in found.values())


def test_layers_stand_in_the_order_of_their_calls():
    class Reverse(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.last(self.first(x))

    assert list(beside(Reverse())) == ["last", "first"]
    assert list(beside(Reverse(), torch.zeros(2, 3))) == ["first", "last"]


def test_two_calls_have_two_neighbors():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.one, self.two = nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.norm(self.two(self.norm(self.one(x))))

    found = beside(Shared(), torch.zeros(2, 3))["norm"]
    assert (found.calls, names(found.before)) == (2, ["Linear 'one'", "Linear 'two'"])


@pytest.mark.parametrize("sequential", [nn.Sequential, kn.Sequential])
def test_the_order_of_a_sequence_shows_it_too(sequential):
    inner = sequential(nn.Linear(3, 4), nn.Identity(), nn.BatchNorm1d(4), nn.ReLU())
    model = sequential(inner, nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Flatten())
    static, run = beside(model), beside(model, torch.zeros(2, 3))
    for path in ("0.2", "3"):
        one, other = static[path], run[path]
        assert not one.observed
        assert names(one.before) == names(other.before)
        assert one.before[0].function == other.before[0].function == "linear"
        assert (one.returned, one.dropouts) == (other.returned, other.dropouts)
    assert [one.path for one in static["3"].dropouts] == ["1"]
    assert static["3"].returned


def test_other_containers_show_nothing_without_a_run():
    class Own(nn.Sequential):
        def forward(self, x):
            return x

    assert beside(Own(nn.Linear(3, 3), nn.BatchNorm1d(3)))["1"] is None
    assert beside(nn.ModuleList([nn.Linear(3, 3), nn.BatchNorm1d(3)]))["1"] is None
    norm = nn.BatchNorm1d(3)
    assert beside(nn.Sequential(nn.Linear(3, 3), norm, nn.ReLU(), norm))["1"] is None


def test_what_an_inner_model_returns_is_not_the_output():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.ReLU())
    assert not beside(model)["0.1"].returned
    assert not beside(model, torch.zeros(2, 3))["0.1"].returned


def test_a_parametrized_layer_is_a_layer():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3))
    assert names(beside(model, torch.zeros(2, 3))["1"].before) == ["ParametrizedLinear '0'"]


def test_a_dropout_reaches_over_one_sum():
    class Residual(nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.norm, self.drop, self.conv = nn.BatchNorm1d(3), nn.Dropout(rate), nn.Conv1d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.drop(self.norm(x).relu())) + x

    found = beside(nn.Sequential(Residual(0.5), Residual(0.0), Residual(0.0)), torch.zeros(2, 3, 4))
    assert [len(one.dropouts) for one in found.values()] == [0, 1, 0]


def test_a_dropout_that_is_off_in_the_run_is_seen():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop_rate, self.norm = 0.3, nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(F.dropout(x, self.drop_rate, self.training))

    [found] = beside(Functional(), torch.zeros(2, 3))["norm"].dropouts
    assert (found.rate, found.is_layer, found.attribute) == (0.3, False, "drop_rate")
