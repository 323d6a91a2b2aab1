"""Silenced rules and the baseline file."""

from __future__ import annotations

import json

import pytest
from torch import nn

import keelnorm as kn


def network(*momenta):
    return nn.Sequential(*(nn.BatchNorm1d(3, momentum=momentum) for momentum in momenta), nn.ReLU())


def found(findings):
    return [(one.rule, *one.layers) for one in findings]


@pytest.mark.parametrize(
    "silence",
    [
        {"KN103": "1"}, {"momentum": ["1"]}, "KN103:1", ["momentum:1"], ("KN101", "KN103:1"), {"KN1": "1"},
        "KN101:0, KN103:1",
    ],
)  # fmt: skip
def test_a_rule_is_silent_for_a_layer(silence):
    diagnosis = kn.diagnose(network(0.99, 0.99), silence=silence)
    assert found(diagnosis.findings) == [("KN103", "0")]
    assert found(diagnosis.silenced) == [("KN103", "1")]
    assert "1 more silenced." in str(diagnosis)


def test_patterns_are_those_of_where():
    inner = nn.Sequential(nn.Sequential(network(1.0, 1.0)), network(1.0))
    assert found(kn.diagnose(inner, silence="KN103:0.*").findings) == [("KN103", "1.0")]
    assert found(kn.diagnose(inner, silence="KN103:0").findings) == [("KN103", "1.0")]
    assert found(kn.diagnose(inner, silence="KN103").findings) == []


def test_a_silence_without_use_is_noted():
    assert kn.diagnose(network(0.1), silence="KN103:0").notes == ["silence='KN103:0' covers no finding."]


def test_a_finding_of_several_layers_is_silenced_by_all_of_them():
    model = network(0.1, 0.1).eval()
    assert found(kn.diagnose(model).findings) == [("KN108", "0", "1")]
    assert found(kn.diagnose(model, silence="KN108:0").findings) == [("KN108", "0", "1")]
    assert found(kn.diagnose(model, silence="KN108:?").findings) == []


def test_only_new_findings_are_reported(tmp_path):
    file = tmp_path / "sub" / "baseline.json"
    kn.diagnose(network(0.99, 0.1)).write_baseline(file)
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "version": 1, "findings": [{"rule": "KN103", "layers": ["0"], "severity": "warning"}],
    }  # fmt: skip
    diagnosis = kn.diagnose(network(0.99, 0.99), baseline=file)
    assert (found(diagnosis.findings), found(diagnosis.known)) == ([("KN103", "1")], [("KN103", "0")])
    assert "1 more in the baseline." in str(diagnosis)
    diagnosis.write_baseline(file)
    assert not kn.diagnose(network(0.99, 0.99), baseline=str(file)).findings


def test_a_part_of_what_was_known_is_known(tmp_path):
    file = tmp_path / "baseline.json"
    kn.diagnose(network(0.1, 0.1, 0.1).eval()).write_baseline(file)
    fewer = network(0.1, 0.1).eval()
    assert found(kn.diagnose(fewer, baseline=file).known) == [("KN108", "0", "1")]
    more = network(0.1, 0.1, 0.1, 0.1).eval()
    assert found(kn.diagnose(more, baseline=file).findings) == [("KN108", "0", "1", "2", "3")]


def test_what_has_become_worse_is_new(tmp_path):
    file = tmp_path / "baseline.json"
    kn.diagnose(network(0.99)).write_baseline(file)
    worse = kn.diagnose(network(0.0), baseline=file)
    assert [(one.rule, one.severity) for one in worse.findings] == [("KN103", "error")]
    milder = kn.diagnose(network(0.75), baseline=file)
    assert (milder.findings, found(milder.known)) == ((), [("KN103", "0")])


def test_silenced_findings_are_not_in_the_baseline(tmp_path):
    file = tmp_path / "baseline.json"
    kn.diagnose(network(0.99, 0.99), silence="KN103:0").write_baseline(file)
    assert [one["layers"] for one in json.loads(file.read_text(encoding="utf-8"))["findings"]] == [["1"]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'version'"),
        ('{"version": 2, "findings": []}', "its version is 2, and 1 is known"),
        ('{"version": 1, "findings": [{"rule": "KN101", "layers": [], "severity": "bad"}]}', "no severity 'bad'"),
        ('{"version": 1, "findings": [{"rule": "KN101"}]}', "KeyError"),
        ('{"version": 1, "findings": 3}', "TypeError"),
    ],
)
def test_a_file_that_is_no_baseline(text, says, tmp_path):
    file = tmp_path / "baseline.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"diagnose: .*baseline.json is no baseline: .*{says}"):
        kn.diagnose(network(0.1), baseline=file)
