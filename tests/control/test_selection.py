"""Which layers are meant, by every function that takes them; and models that have none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import keelnorm as kn

SCALER = torch.amp.GradScaler("cpu", enabled=False)


def enter(context):
    with context:
        pass


#: Functions that would do nothing, and say nothing, on a model without batch norms.
QUIET = {
    "freeze": kn.freeze,
    "unfreeze": kn.unfreeze,
    "assert_frozen": kn.assert_frozen,
    "pause_statistics": lambda model, **options: enter(kn.pause_statistics(model, **options)),
    "accumulate_statistics": lambda model, **options: enter(kn.accumulate_statistics(model, **options)),
    "follow_scaler": lambda model, **options: enter(kn.follow_scaler(model, SCALER, **options)),
    "MomentumSchedule": lambda model, **options: kn.MomentumSchedule(model, lambda step: 0.5, **options),
}
X = torch.randn(4, 2)
#: Functions that say what they did, with the number that says so.
TELLING = {
    "convert": (lambda model: kn.convert(model), "batch norms"),
    "revert": (lambda model: kn.revert(model), "layers"),
    "fold": (lambda model: kn.fold(model, X), "folded"),
    "recalibrate": (lambda model: kn.recalibrate(model, [X]), "layers"),
    "adapt": (lambda model: kn.adapt(model, [X]), "layers"),
    "reset_adaptation": (lambda model: kn.reset_adaptation(model), "layers"),
    "prepare_export": (lambda model: kn.prepare_export(model), "batch norms"),
}


@pytest.mark.parametrize("name", [*QUIET, "sync_statistics"])
def test_a_model_without_batch_norms_is_an_error_where_nothing_would_say_so(name):
    function = QUIET.get(name, kn.sync_statistics)
    with pytest.raises(ValueError, match=f"{name}: there is no batch norm in Sequential"):
        function(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))


@pytest.mark.parametrize("name", TELLING)
def test_reports_say_that_there_is_none(name):
    function, number = TELLING[name]
    _, report = function(nn.Sequential(nn.Linear(2, 2)).eval())
    assert report.summary[number] == 0
    assert list(report.rows) == []


def test_what_is_right_without_batch_norms_is_done():
    model = nn.Sequential(nn.Linear(2, 1))
    assert kn.frozen(model) == {}
    loss = kn.backward_as_one_batch(model, lambda x: model(x).sum(), X.split(2))
    torch.testing.assert_close(loss, model(X).sum().detach())
    torch.testing.assert_close(model[0].weight.grad, X.sum(0, keepdim=True))


@pytest.mark.parametrize("name", QUIET)
def test_where_takes_a_pattern_several_or_a_function(name):
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3))
    kn.freeze(model)
    for where in ("0", ["1", "0"], iter(["0"]), lambda path, layer: layer.num_features == 2):
        QUIET[name](model, where=where)
        kn.freeze(model)
    for wrong, error in (
        (3, TypeError),
        ([3], TypeError),
        (lambda path: True, TypeError),
        ([], ValueError),
        ("2", ValueError),
    ):
        with pytest.raises(error, match=f"{name}: where"):
            QUIET[name](model, where=wrong)
    assert kn.frozen(model) == dict.fromkeys(("0", "1"), (True, True))


def test_fold_takes_patterns_that_come_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    for where in (iter(["1"]), lambda path, layer: path == "1"):
        _, report = kn.fold(model, X, where=where)
        assert [(row["path"], row["into"]) for row in report.rows] == [("1", "0")]
