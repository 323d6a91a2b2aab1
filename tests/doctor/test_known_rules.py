"""Rules of other packages, and the choice among rules."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import keelnorm as kn
from keelnorm.doctor import known_rules
from keelnorm.doctor.known_rules import all_rules, own_rules


class Point:
    """A stand-in for an entry point."""

    def __init__(self, name, found):
        self.name, self.value, self._found = name, f"other.{name}", found

    def load(self):
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


@pytest.fixture
def points(monkeypatch):
    """Sets the entry points that other packages have."""

    def set_points(**found):
        made = [Point(name, value) for name, value in found.items()]
        monkeypatch.setattr(known_rules, "entry_points", lambda group: made if group == "keelnorm.doctor" else [])

    return set_points


def other(number=1):
    rule = own_rules()["KN103"]

    def check(evidence):
        return [replace(one, rule=f"XY{number}") for one in rule.check(evidence)]

    return replace(rule, id=f"XY{number}", name=f"other-{number}", check=check, fix=None)


def model():
    return nn.Sequential(nn.BatchNorm1d(3, momentum=0.99), nn.ReLU())


def test_rules_of_other_packages_run(points):
    module: Any = ModuleType("other.rules")
    module.RULE = other(2)
    points(one=other(1), two=module, more=[other(3), other(4)])
    assert list(all_rules().rules)[-4:] == ["XY1", "XY2", "XY3", "XY4"]
    diagnosis = kn.diagnose(model(), select="XY")
    assert sorted(diagnosis.rules) == ["XY1", "XY2", "XY3", "XY4"]
    assert kn.diagnose(model(), select="other-3").rules.keys() == {"XY3"}
    assert len(diagnosis.to_sarif()["runs"][0]["tool"]["driver"]["rules"]) == 4


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (ImportError("no module named other"), "ImportError: no module named other"),
        (replace(own_rules()["KN103"], id="XY1"), "ValueError: there is a rule XY1 or 'momentum' already"),
        (own_rules()["KN103"], "ValueError: there is a rule KN103 or 'momentum' already"),
        (7, "TypeError: it gives 7 (int); a keelnorm.doctor.Rule, or a module that sets RULE, is legal"),
        (ModuleType("empty"), "TypeError: it gives <module 'empty'> (module); a keelnorm.doctor.Rule"),
    ],
)
def test_an_entry_point_that_fails_is_named_and_the_others_run(found, says, points):
    points(bad=found, good=other(9))
    diagnosis = kn.diagnose(model())
    assert "XY9" in diagnosis.rules
    [note] = diagnosis.notes
    assert note.startswith(f"The rules of the entry point 'bad' (other.bad) were left out: {says}")


def test_a_rule_speaks_for_itself_alone(points):
    points(bad=replace(other(), check=own_rules()["KN103"].check))
    reason = kn.diagnose(model(), select="XY1").skipped["XY1"]
    assert reason == "it raised ValueError: it gave a finding of the rule KN103 for the layers ('0',)"


def test_own_rules_are_found_by_themselves():
    rules = own_rules()
    assert list(rules) == sorted(rules)
    assert len({rule.name for rule in rules.values()}) == len(rules)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": "kn1"}, "id must be capitals and digits, such as 'KN101'; got 'kn1'"),
        ({"name": "Two Words"}, "name must be words in small letters with hyphens; got 'Two Words'"),
        ({"severity": "bad"}, r"severity must be one of \('info', 'warning', 'error'\); got 'bad'"),
        ({"sick": ()}, "a rule has at least one sick and one healthy example"),
        ({"healthy": ()}, "a rule has at least one sick and one healthy example"),
    ],
)
def test_a_rule_that_is_not_legal(change, says):
    with pytest.raises(ValueError, match=says):
        replace(own_rules()["KN103"], **change)


def test_rules_can_be_checked_by_their_authors():
    kn.doctor.check_rule(other())
    with pytest.raises(AssertionError, match="XY1 on _usual: nothing was found"):
        kn.doctor.check_rule(replace(other(), sick=own_rules()["KN103"].healthy))
