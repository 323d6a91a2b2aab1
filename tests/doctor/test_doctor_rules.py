"""Each rule on its own examples: it speaks on the sick, its remedy silences it, and it is silent on the healthy."""

from __future__ import annotations

import pytest

from keelnorm.doctor.case_check import check_healthy, check_sick
from keelnorm.doctor.registry import own_rules

RULES = list(own_rules().values())
SICK = [pytest.param(rule, make, id=f"{rule.id}-{make.__name__}") for rule in RULES for make in rule.sick]
HEALTHY = [pytest.param(rule, make, id=f"{rule.id}-{make.__name__}") for rule in RULES for make in rule.healthy]


@pytest.mark.parametrize(("rule", "make"), SICK)
def test_a_sick_case_is_found_and_cured(rule, make):
    check_sick(rule, make)


@pytest.mark.parametrize(("rule", "make"), HEALTHY)
def test_a_healthy_case_is_left_alone(rule, make):
    check_healthy(rule, make)
