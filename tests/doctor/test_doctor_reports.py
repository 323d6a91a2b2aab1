"""The table in the terminal, plain values, and SARIF."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from rich.console import Console
from torch import nn

import keelnorm as kn
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.known_rules import own_rules


def network(layers=12):
    parts = [(f"block{i}", nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=0.99))) for i in range(layers)]
    model = nn.Sequential()
    for name, part in parts:
        model.add_module(name, part)
    part[1].running_var[1] = float("nan")
    return model


def test_the_table():
    number = sum(name.startswith("KN1") for name in own_rules())
    assert str(kn.diagnose(network(2).eval(), select="KN1")).splitlines() == [
        f"diagnose: 1 error, 1 warning, 3 infos in 2 batch norms, {number - 2} rules run",
        "",
        "error    KN109 broken-statistics  block1.1",
        "         The running variance of BatchNorm1d 'block1.1' is NaN or infinite, in 1",
        "         of 3 channels.",
        "           kn.recalibrate(model, batches, where='block1.1')",
        "",
        "warning  KN103 momentum  2 layers",
        "         BatchNorm1d 'block0.1' has momentum 0.99: each batch replaces 0.99 of",
        "         the running statistics; what Keras calls 0.99 is 0.01 here.",
        "         The same in block1.1.",
        "           model.get_submodule('block0.1').momentum = 0.01",
        "",
        "info     KN101 bias-in-front  2 layers",
        "         Linear 'block0.0' has a bias of 3 values, which BatchNorm1d 'block0.1'",
        "         behind it subtracts again.",
        "         The same in block1.1.",
        "           layer, norm = model.get_submodule('block0.0'), model.get_submodule('block0.1')",
        "           norm.running_mean -= layer.bias.detach()  # evaluation stays as it is",
        "           layer.bias = None  # before the optimizer is made; in the model's code: bias=False",
        "",
        "info     KN108 untrained-statistics  block0.1",
        "         No batch norm has seen a batch; 1 in evaluation, with mean 0 and",
        "         variance 1.",
        "           kn.recalibrate(model, batches)",
        "",
        "info     KN113 at-the-output  block1.1",
        "         The model returns the output of BatchNorm1d 'block1.1': in training it",
        "         depends on the other samples of the batch.",
        "           model.set_submodule('block1.1', nn.Identity())  # if these are logits or predictions",
        "",
        "Not run: KN102 (needs optimizer=).",
        "Not run: KN115 (needs batches=).",
    ]


def test_what_wraps_has_80_columns():
    lines = str(kn.diagnose(network(40), silence="KN101:block3*")).splitlines()
    assert all(len(line) <= 80 or line.startswith(" " * 11) for line in lines)
    [named] = [line for line in lines if line.endswith("more.")][:1]
    assert "and 31 more." in named


def test_nothing_found():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    assert str(kn.diagnose(model, select="KN103")) == "diagnose: nothing found in 1 batch norm, 1 rule run"


def test_a_p_value_is_shown():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    diagnosis = kn.diagnose(model, select="KN103")
    for p_value, told in ((3.2e-3, "p = 0.0032"), (3.2e-9, "p < 1e-06"), (0.0, "p < 1e-06")):
        finding = Finding("KN103", "warning", ("0",), "It drifts.", p_value=p_value)
        shown = kn.doctor.Diagnosis((finding,), diagnosis.rules, diagnosis.layers)
        assert f"         It drifts. ({told})" in str(shown).splitlines()


def test_a_terminal_shows_the_same_with_styles():
    diagnosis = kn.diagnose(network(3))
    plain, styled = io.StringIO(), io.StringIO()
    Console(file=plain, width=200).print(diagnosis)
    Console(file=styled, width=200, force_terminal=True, color_system="standard").print(diagnosis)
    assert [line.rstrip() for line in plain.getvalue().splitlines()] == str(diagnosis).splitlines()
    without = re.sub(r"\x1b\[[\d;]*m", "", styled.getvalue())
    assert without != styled.getvalue()
    assert [line.rstrip() for line in without.splitlines()] == str(diagnosis).splitlines()


def test_plain_values_are_json():
    model = network(2)
    diagnosis = kn.diagnose(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), fix=True)
    plain = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    assert plain == diagnosis.to_dict()
    assert (plain["operation"], plain["worst"], plain["layers"]) == ("diagnose", "error", ["block0.1", "block1.1"])
    assert [one["rule"] for one in plain["findings"]] == [one.rule for one in diagnosis.findings]
    assert plain["findings"][0]["name"] == "broken-statistics"
    assert plain["findings"][0]["evidence"]["smallest"] is None  # JSON has no NaN
    assert {one["done"] for one in plain["fixed"]} == {
        "momentum was set from 0.99 to 0.01",
        "4 of its parameters were moved to a group without weight decay",
    }
    assert plain["facts"][0] == {
        "path": "block0.1", "kind": "BatchNorm1d", "channels": 3, "mode": "train", "momentum": 0.99, "eps": 1e-5,
        "batches": 0, "before": ["Linear 'block0.0'"], "after": ["Linear 'block1.0'"], "gamma": 1.0,
    }  # fmt: skip


def test_sarif():
    diagnosis = kn.diagnose(network(3), silence="KN101:block0*")
    log = json.loads(json.dumps(diagnosis.to_sarif(("nets/model.py", 12)), allow_nan=False))
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-schema-2.1.0.json")
    [run] = log["runs"]
    driver = run["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("keelnorm doctor", kn.__version__)
    assert [rule["id"] for rule in driver["rules"]] == list(diagnosis.rules)
    for rule in driver["rules"]:
        assert rule["defaultConfiguration"]["level"] in ("note", "warning", "error")
        assert rule["shortDescription"]["text"]
        assert rule["help"]["markdown"]
    assert len(run["results"]) == len(diagnosis.findings) + len(diagnosis.silenced)
    for result in run["results"]:
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        [place] = result["locations"]
        assert place["physicalLocation"] == {
            "artifactLocation": {"uri": "nets/model.py"}, "region": {"startLine": 12},
        }  # fmt: skip
        assert place["logicalLocations"]
    first = run["results"][0]
    assert (first["ruleId"], first["level"]) == ("KN109", "error")
    assert first["message"]["text"].startswith("The running variance of BatchNorm1d 'block2.1' is NaN")
    assert first["locations"][0]["logicalLocations"] == [{"fullyQualifiedName": "block2.1", "kind": "object"}]
    assert [one["ruleId"] for one in run["results"] if "suppressions" in one] == ["KN101"]
    prints = [json.dumps(one["partialFingerprints"]) for one in run["results"]]
    assert len(set(prints)) == len(prints)
    again = kn.diagnose(network(3)).to_sarif()["runs"][0]["results"]
    assert json.dumps(again[0]["partialFingerprints"]) == prints[0]
    assert "physicalLocation" not in again[0]["locations"][0]


def test_the_whole_model_has_no_logical_location():
    rules = own_rules()
    shown = kn.doctor.Diagnosis((Finding("KN115", "warning", (), "It is small."),), rules, ("0",))
    [result] = shown.to_sarif()["runs"][0]["results"]
    assert "locations" not in result
    assert "warning  KN115 small-ranks  the model" in str(shown)


def test_a_severity_that_is_none():
    diagnosis = kn.diagnose(network(2))
    with pytest.raises(ValueError, match="severity must be one of"):
        diagnosis.at_least("bad")
