"""Each rule on its own examples: it speaks on the sick, its remedy silences it, and it is silent on the healthy."""

from __future__ import annotations

import re

import pytest

import keelnorm as kn
from keelnorm.doctor import case_check
from keelnorm.doctor.finding import SEVERITIES
from keelnorm.doctor.fixes import apply_fixes
from keelnorm.doctor.known_rules import own_rules

RULES = list(own_rules().values())
SICK = [pytest.param(rule, make, id=f"{rule.id}-{make.__name__}") for rule in RULES for make in rule.sick]
HEALTHY = [pytest.param(rule, make, id=f"{rule.id}-{make.__name__}") for rule in RULES for make in rule.healthy]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)


@pytest.mark.parametrize(("rule", "make"), SICK)
def test_a_sick_case_is_found_and_cured(rule, make):
    findings = case_check.check_sick(rule, make)
    for finding in findings:
        assert re.fullmatch(r"([A-Zγβ]|kn\.).*[.]", finding.message), "a message is a sentence"
        assert finding.p_value is None or 0 <= finding.p_value <= 1
        assert all(isinstance(value, float | int | str | bool | None) for value in finding.evidence.values())


@pytest.mark.parametrize(("rule", "make"), HEALTHY)
def test_a_healthy_case_is_left_alone(rule, make):
    case_check.check_healthy(rule, make)


@rules
def test_diagnose_finds_what_the_rule_finds(rule):
    cases = [make() for make in rule.sick]
    for case in (case for case in cases if case.ranks == 1):
        diagnosis = kn.diagnose(
            case.model, case.batches, example=case.example, loss=case.loss, optimizer=case.optimizer, select=rule.id
        )
        assert {path for finding in diagnosis.findings for path in finding.layers} == set(case.layers)
        assert list(diagnosis.rules) == [rule.id]


@rules
def test_some_example_is_as_severe_as_the_rule(rule):
    found = {finding.severity for make in rule.sick for finding in rule.check(case_check.evidence_of(make()))}
    assert max(SEVERITIES.index(one) for one in found) == SEVERITIES.index(rule.severity)


@rules
def test_a_fix_repairs_some_example(rule):
    if rule.fix is None:
        return
    fixed = 0
    for make in rule.sick:
        evidence = case_check.evidence_of(make())
        fixed += len(apply_fixes(list(rule.check(evidence)), {rule.id: rule}, evidence))
    assert fixed


@rules
def test_a_rule_says_everything_in_sentences(rule):
    for name in ("summary", "statistic", "threshold", "source", "explanation", "remedy"):
        text = getattr(rule, name)
        assert len(text) > 15, f"{rule.id} {name}: {text}"
        assert text.endswith((".", ")")), f"{rule.id} {name}: {text}"
        assert "  " not in text, f"{rule.id} {name}: {text}"


def test_the_numbers_are_of_their_groups():
    """KN1 needs the model and what comes with it, KN2 batches, KN3 a training step."""
    assert all(re.fullmatch(r"KN[123]\d\d", rule.id) for rule in RULES)
    for rule in RULES:
        needs = set(rule.needs)
        assert bool(needs & {"batch", "data"}) == rule.id.startswith("KN2") or rule.id == "KN115"
        assert ("step" in needs) == rule.id.startswith("KN3")
    assert len(RULES) >= 36


def test_a_rule_that_does_not_hold_is_noticed():
    """The check itself: a rule that finds too little, too much or elsewhere, or that changes the model."""
    [rule] = [rule for rule in RULES if rule.id == "KN103"]
    healthy, sick = rule.healthy[0], rule.sick[0]
    with pytest.raises(AssertionError, match="nothing was found"):
        case_check.check_sick(rule, healthy)
    with pytest.raises(AssertionError, match=r"momentum 0\.99"):
        case_check.check_healthy(rule, sick)

    def elsewhere():
        case = sick()
        return kn.doctor.Case(case.model, ("0",))

    with pytest.raises(AssertionError, match=r"found at \['1'\], and is at \['0'\]"):
        case_check.check_sick(rule, elsewhere)

    def changes(evidence):
        evidence.layers[0].module.note = "was here"
        return rule.check(evidence)

    with pytest.raises(AssertionError, match="it changed 1: mode, hooks and attributes"):
        case_check.check_sick(replaced(rule, check=changes), sick)
    with pytest.raises(AssertionError, match="after the remedy it still says"):
        case_check.check_sick(replaced(rule, check=useless(rule)), sick)


def useless(rule):
    def check(evidence):
        return [replaced(finding, remedy=("pass",)) for finding in rule.check(evidence)]

    return check


def replaced(thing, **changes):
    from dataclasses import replace

    return replace(thing, **changes)
