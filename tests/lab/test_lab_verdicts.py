import math

import pytest

from keelnorm.lab.reading.verdicts import MEANING, Finding, speedup_finding, verdict
from keelnorm.measure.statistics import Interval, speedup

UP, DOWN, BOTH = Interval(2.0, 1.0, 3.0, 5), Interval(-2.0, -3.0, -1.0, 5), Interval(0.0, -1.0, 1.0, 5)


def finding(effect, **how):
    return Finding("q", "w", effect, 0.0, **how)


@pytest.mark.parametrize(
    ("effect", "how", "outcome"),
    [
        (UP, {}, "supports"),
        (DOWN, {}, "contradicts"),
        (BOTH, {}, "not resolved"),
        (UP, {"larger": False}, "contradicts"),
        (DOWN, {"larger": False}, "supports"),
        (UP, {"bound": "at least"}, "supports"),
        (DOWN, {"bound": "at least"}, "not resolved"),  # a lower bound says nothing about how large it is
        (UP, {"bound": "at most"}, "not resolved"),
        (DOWN, {"bound": "at most"}, "contradicts"),
        (UP, {"bound": "unknown"}, "not resolved"),
        (Interval(2.0, -math.inf, math.inf, 1), {}, "not resolved"),
        (Interval(math.nan, math.nan, math.nan, 3), {}, "not resolved"),
    ],
)
def test_an_outcome_follows_from_the_whole_interval(effect, how, outcome):
    assert finding(effect, **how).outcome == outcome


@pytest.mark.parametrize(
    ("effects", "expected"),
    [
        ([UP], "holds"),
        ([UP, UP], "holds"),
        ([UP, DOWN], "depends"),
        ([UP, BOTH], "depends"),
        ([DOWN, BOTH], "does not hold"),
        ([DOWN], "does not hold"),
        ([BOTH, BOTH], "not resolved"),
        ([], "no answer"),
    ],
)
def test_a_verdict_follows_from_the_outcomes(effects, expected):
    assert verdict([finding(effect) for effect in effects]) == expected
    # What stands beside doesn't count.
    assert verdict([*map(finding, effects), finding(DOWN, decisive=False), finding(UP, decisive=False)]) == expected
    assert expected in MEANING


def test_texts_have_signs_units_and_bounds():
    assert finding(UP).text() == "+2.0 [1.0, 3.0] points"
    assert finding(DOWN).text() == "-2.0 [-3.0, -1.0] points"
    assert Finding("q", "w", UP, 1.0, unit="×", bound="at least").text() == "≥ ×2.0 [1.0, 3.0]"


def test_a_speedup_that_never_arrives_is_a_bound():
    gain = speedup([10.0, 12.0, 11.0], [None, None, None], 100.0)
    made = speedup_finding("steps", "w", gain)
    assert made.text().startswith("≥ ×")
    assert made.outcome == "supports"
    nowhere = speedup_finding("steps", "w", speedup([None] * 3, [None] * 3, 100.0))
    assert nowhere.text() == "not reached by either"
    assert nowhere.outcome == "not resolved"
