"""Fixes: what is safe is applied, all of it or none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import keelnorm as kn
from keelnorm.doctor.case_check import fingerprint
from keelnorm.doctor.known_rules import own_rules


def network():
    return nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, momentum=0.99), nn.ReLU(),
        nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2),
    )  # fmt: skip


def batches():
    return list(torch.randn(64, 3).split(16))


def test_it_says_what_it_did_and_reports_the_rest():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    diagnosis = kn.diagnose(model, optimizer=optimizer, select="KN1", fix=True)
    assert [(one.finding.rule, one.done) for one in diagnosis.fixed] == [
        ("KN103", "momentum was set from 0.99 to 0.01"),
        ("KN102", "4 of its parameters were moved to a group without weight decay"),
    ]
    assert diagnosis.findings == ()
    assert "Fixed KN103 momentum in 1: momentum was set from 0.99 to 0.01." in str(diagnosis).splitlines()
    assert kn.diagnose(model).findings == ()


def test_without_fix_nothing_changes():
    case = kn.doctor.Case(network())
    before = fingerprint(case)
    assert kn.diagnose(case.model).fixed == ()
    assert fingerprint(case) == before


def test_silenced_and_known_findings_are_not_fixed(tmp_path):
    model = network()
    assert kn.diagnose(model, silence="KN103", fix=True).fixed == ()
    kn.diagnose(model).write_baseline(tmp_path / "b.json")
    assert kn.diagnose(model, baseline=tmp_path / "b.json", fix=True).fixed == ()
    assert model[1].momentum == 0.99


def test_broken_layers_are_recalibrated_together():
    """The second layer's input comes through the first: recalibrated alone, it would get NaN."""
    model = network().eval()
    data = batches()
    for layer, rest in ((model[1], "running_mean"), (model[4], "running_var")):
        getattr(layer, rest)[2] = float("nan")
    diagnosis = kn.diagnose(model, data, fix=True, select="KN109")
    assert [one.finding.layers for one in diagnosis.fixed] == [("1",), ("4",)]
    wanted, _ = kn.recalibrate(network_like(model), data)
    for index in (1, 4):
        torch.testing.assert_close(model[index].running_mean, wanted[index].running_mean)
        torch.testing.assert_close(model[index].running_var, wanted[index].running_var)


def network_like(model):
    other = network().eval()
    parameters = {name: value for name, value in model.state_dict().items() if "running" not in name}
    other.load_state_dict(parameters, strict=False)
    return other


def test_nothing_is_recalibrated_without_data():
    model = network().eval()
    model[1].running_mean[0] = float("nan")
    diagnosis = kn.diagnose(model, fix=True, select="KN109")
    assert (diagnosis.fixed, [one.layers for one in diagnosis.findings]) == ((), [("1",)])


def test_a_schedule_would_not_follow_a_new_group():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert kn.diagnose(model, optimizer=optimizer, select="KN102", fix=True).fixed == ()
    assert len(optimizer.param_groups) == 1


def test_an_optimizer_keeps_its_state():
    model = network()
    optimizer = torch.optim.Adam(model.named_parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(8, 3)).sum().backward()
    optimizer.step()
    state = dict(optimizer.state)
    kn.diagnose(model, optimizer=optimizer, select="KN102", fix=True)
    assert dict(optimizer.state) == state
    decayed, other = optimizer.param_groups
    assert other["param_names"] == ["1.weight", "1.bias", "4.weight", "4.bias"]
    assert (decayed["weight_decay"], other["weight_decay"], other["lr"]) == (0.1, 0.0, 0.1)
    assert [id(one) for group in optimizer.param_groups for one in group["params"]] == [
        id(dict(model.named_parameters())[name]) for group in optimizer.param_groups for name in group["param_names"]
    ]
    optimizer.step()


def test_a_group_of_batch_norms_alone_loses_its_decay():
    model = network()
    groups = [{"params": model[1].parameters()}, {"params": [model[0].weight], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.1)
    [fixed] = kn.diagnose(model, optimizer=optimizer, select="KN102", fix=True).fixed
    assert fixed.done == "the weight decay of its group was set to 0"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_after_an_error_nothing_is_fixed(monkeypatch):
    def broken(model, finding, evidence):
        model[1].half()
        model[1].weight.data.zero_()
        kn.freeze(model)
        evidence.optimizer.param_groups[0]["params"].clear()
        evidence.optimizer.param_groups[0]["lr"] = 7.0
        evidence.optimizer.param_groups.append({"params": []})
        raise ZeroDivisionError("by zero")

    rules = dict(own_rules())
    rules["KN111"] = replace(rules["KN111"], fix=broken)
    monkeypatch.setattr("keelnorm.doctor.known_rules.own_rules", lambda: rules)
    model = network()
    model[4].weight.data[1] = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    case = kn.doctor.Case(model, optimizer=optimizer)
    before = fingerprint(case)
    with pytest.raises(ZeroDivisionError):
        kn.diagnose(model, optimizer=optimizer, fix=True)
    assert fingerprint(case) == before
    assert model.train()[1].training
