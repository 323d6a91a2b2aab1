import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from keelnorm.measure.statistics import Interval, difference, first_crossing, geometric_mean, mean, ratio, speedup

samples = st.lists(st.floats(0.1, 1000.0), min_size=2, max_size=20).filter(lambda values: np.ptp(values) > 1e-3)


@given(samples)
def test_mean_is_scipys_t_interval(values):
    expected = stats.ttest_1samp(values, 0.0)
    low, high = expected.confidence_interval(0.95)
    found = mean(values)
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), low, high), rel=1e-9, abs=1e-9)
    assert found.n == len(values)


@given(st.lists(st.tuples(st.floats(0.1, 100.0), st.floats(0.1, 100.0)), min_size=3, max_size=12))
def test_difference_is_scipys_paired_test(pairs):
    first, second = zip(*pairs, strict=True)
    gaps = np.subtract(first, second)
    if np.ptp(gaps) < 1e-3:
        return
    low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
    found = difference(first, second)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-8, abs=1e-8)


@given(samples)
def test_geometric_mean_is_the_mean_of_the_logarithm(values):
    low, high = stats.ttest_1samp(np.log(values), 0.0).confidence_interval(0.95)
    found = geometric_mean(values)
    assert found.value == pytest.approx(stats.gmean(values))
    assert math.log(found.low) == pytest.approx(low, abs=1e-9)
    if high < 700:
        assert math.log(found.high) == pytest.approx(high, abs=1e-9)


def test_ratio_is_paired():
    # The pairs agree on a factor of two although the values spread over a decade.
    found = ratio([2.0, 20.0, 8.0], [1.0, 10.0, 4.0])
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_one_value_has_no_interval_and_none_is_refused():
    alone = mean([3.0])
    assert (alone.low, alone.high) == (-math.inf, math.inf)
    assert alone.text() == "3.0 [one seed]"
    assert not alone.excludes(0.0)
    with pytest.raises(ValueError, match="at least one"):
        mean([])


def test_pairs_of_different_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("interval", "digits", "text"),
    [
        (Interval(2.345, 1.0, 3.0, 5), 1, "2.3 [1.0, 3.0]"),
        (Interval(0.4449, 0.44, 0.45, 5), None, "0.445 [0.440, 0.450]"),
        (Interval(94.56, 90.0, 99.0, 5), None, "94.6 [90.0, 99.0]"),
        (Interval(1234.5, 1.0, 2.0, 5), None, "1234 [1, 2]"),
        (Interval(0.0, 0.0, 0.0, 5), None, "0 [0, 0]"),
        (Interval(math.nan, 0.0, 0.0, 5), 1, "-"),
    ],
)
def test_text(interval, digits, text):
    assert interval.text(digits) == text


def test_speedup_where_all_runs_arrive():
    found = speedup([10.0, 20.0], [40.0, 80.0], horizon=100)
    assert found.bound == "exact"
    assert found.ratio.value == pytest.approx(4.0)
    assert found.text() == "×4.0 [4.0, 4.0]"


def test_a_run_that_does_not_arrive_is_a_bound_and_never_dropped():
    slow_baseline = speedup([10.0, 20.0], [40.0, None], horizon=100)
    assert slow_baseline.bound == "at least"
    assert slow_baseline.ratio.value == pytest.approx(math.sqrt(4.0 * 5.0))
    assert slow_baseline.text().startswith("≥ ")
    slow_arm = speedup([10.0, None], [40.0, 80.0], horizon=100)
    assert slow_arm.bound == "at most"
    assert (slow_arm.reached, slow_arm.reached_baseline) == (1, 2)
    assert speedup([None, 1.0], [None, 2.0], horizon=100).text() == "not reached"


def test_first_crossing_is_linear_between_evaluations():
    assert first_crossing([0, 10, 20], [0.0, 80.0, 100.0], 90.0) == pytest.approx(15.0)
    assert first_crossing([0, 10], [95.0, 99.0], 90.0) == 0.0
    assert first_crossing([0, 10], [5.0, 9.0], 90.0) is None
    # Falling back below the target later does not undo having reached it.
    assert first_crossing([0, 10, 20], [80.0, 90.0, 10.0], 90.0) == 10.0
