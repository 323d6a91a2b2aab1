"""Correct p-values for the number of tests, over all rules, layers and channels of a diagnosis."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from keelnorm.doctor.finding import Finding

#: The probability that a healthy model gets any finding by chance, over all tests.
LEVEL = 0.05


def corrected(findings: Iterable[Finding], tests: int, level: float = LEVEL) -> list[Finding]:
    """Keep the findings that hold among so many tests, with corrected p-values; facts are kept as they are.

    Holm's method: with p-values in ascending order, the i-th of m tests is multiplied by m − i + 1, and never falls
    below the one before it. The probability of keeping any false finding is then at most ``level``, however the tests
    depend on each other.

    Args:
        findings: The findings of all rules. The p-value of one is that of a single test.
        tests: The number of tests that were made, m; at least that of the findings with a p-value.
        level: The largest corrected p-value that is kept.

    Example:
        >>> found = [Finding("KN201", "warning", (path,), "", p_value=p) for path, p in (("a", 2**-20), ("b", 2**-8))]
        >>> [(one.layers, one.p_value) for one in corrected(found, 128)]
        [(('a',), 0.0001220703125)]

    Source:
        Holm (1979), "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6.
    """
    findings = list(findings)
    tested = sorted((one for one in findings if one.p_value is not None), key=_p_value)
    tests = max(tests, len(tested))
    kept: dict[int, Finding] = {}
    largest = 0.0
    for index, finding in enumerate(tested):
        largest = max(largest, min(1.0, _p_value(finding) * (tests - index)))
        if largest > level:
            break
        kept[id(finding)] = replace(finding, p_value=largest)
    return [kept.get(id(one), one) for one in findings if one.p_value is None or id(one) in kept]


def _p_value(finding: Finding) -> float:
    assert finding.p_value is not None
    return finding.p_value
