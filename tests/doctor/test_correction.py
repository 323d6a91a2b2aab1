"""Corrected p-values: Holm's method, and the probability of a false finding in a healthy model."""

from __future__ import annotations

import numpy as np
import pytest

from keelnorm.doctor.correction import LEVEL, corrected
from keelnorm.doctor.finding import Finding


def finding(p, layer="0"):
    return Finding("KN201", "warning", (layer,), "It drifts.", p_value=p)


def by_definition(values, tests):
    """Holm's adjusted p-values: the largest of (m − j + 1)·p_(j) over j ≤ i."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = dict.fromkeys(order, 0.0)
    for rank, i in enumerate(order):
        found[i] = max(min(1.0, (tests - j) * values[order[j]]) for j in range(rank + 1))
    return [found[i] for i in range(len(values))]


@pytest.mark.parametrize("tests", [5, 40])
def test_it_is_holms_method(tests):
    generator = np.random.default_rng(3)
    for _ in range(50):
        values = list(generator.uniform(0, 0.03, size=5))
        wanted = [p for p in by_definition(values, tests) if p <= LEVEL]
        kept = corrected([finding(p, str(i)) for i, p in enumerate(values)], tests)
        assert [one.p_value for one in kept] == pytest.approx(wanted)
        assert [one.layers for one in kept] == sorted(one.layers for one in kept)  # in their order


def test_facts_stay():
    fact = Finding("KN101", "info", ("0",), "It is so.")
    assert corrected([fact, finding(0.5), fact], 1000) == [fact, fact]


def test_equal_p_values():
    kept = corrected([finding(1e-6, "a"), finding(1e-6, "b")], 10)
    assert [one.p_value for one in kept] == pytest.approx([1e-5, 1e-5])


def test_more_findings_than_tests_count_as_tests():
    assert corrected([finding(0.02, str(i)) for i in range(4)], 0) == []


@pytest.mark.parametrize("tests", [1, 30, 1000])
@pytest.mark.parametrize("dependence", [0.0, 0.9])
def test_a_healthy_model_has_a_false_finding_at_most_so_often(tests, dependence):
    """Each test has a uniform p-value under "healthy"; channels of a layer depend on each other."""
    from math import erfc, sqrt

    models = 2000
    generator = np.random.default_rng(7)
    shared, own = generator.normal(size=(models, 1)), generator.normal(size=(models, tests))
    z = sqrt(dependence) * shared + sqrt(1 - dependence) * own
    smallest = [erfc(float(value) / sqrt(2)) / 2 for value in z.max(1)]
    false = sum(bool(corrected([finding(p)], tests)) for p in smallest)
    bound = LEVEL * models + 3.3 * sqrt(LEVEL * (1 - LEVEL) * models)  # 99.95 % of a binomial count
    assert false <= bound
    if not dependence:
        assert false >= LEVEL * models - 3.3 * sqrt(LEVEL * (1 - LEVEL) * models)  # and not needlessly rarer
