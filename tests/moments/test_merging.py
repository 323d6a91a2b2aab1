"""Merging: any partition, in any order, gives the moments of the whole."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from support.batches import cuts, masks, values

from keelnorm import Moments

EPS = torch.finfo(torch.float64).eps


def assert_same(found, wanted):
    """The same moments up to rounding in float64: of the mean relative to its magnitude, and of m2 relative to
    that of the deviations with the rounding of the mean in them."""
    assert torch.equal(found.count.expand_as(found.mean), wanted.count.expand_as(wanted.mean))
    count = wanted.count.expand_as(wanted.mean).clamp(min=1)
    mean_error = 64 * EPS * wanted.mean.abs()
    assert bool(((found.mean - wanted.mean).abs() <= mean_error).all())
    m2_error = 1e-12 * wanted.m2 + count * mean_error * (mean_error + (wanted.m2 / count).sqrt())
    assert bool(((found.m2 - wanted.m2).abs() <= m2_error).all())


@given(data=st.data(), x=values())
def test_any_partition_in_any_order_is_the_whole(data, x):
    parts = [Moments.from_tensor(x[begin:end]) for begin, end in data.draw(cuts(len(x)))]
    parts = data.draw(st.permutations(parts))
    assert_same(Moments.merge_all(parts), Moments.from_tensor(x))


@given(data=st.data(), x=values())
def test_any_tree_of_merges_is_the_whole(data, x):
    """Not only one after the other: merged with merged."""
    parts = [Moments.from_tensor(x[begin:end]) for begin, end in data.draw(cuts(len(x)))]
    while len(parts) > 1:
        at = data.draw(st.integers(0, len(parts) - 2))
        parts[at : at + 2] = [parts[at].merge(parts[at + 1])]
    assert_same(parts[0], Moments.from_tensor(x))


@given(data=st.data(), x=values())
def test_masked_and_unmasked_values_make_the_whole(data, x):
    """Parts with a count for each channel."""
    mask = data.draw(masks(tuple(x.shape)))
    negated = ~mask
    merged = Moments.from_tensor(x, mask).merge(Moments.from_tensor(x, negated))
    assert_same(merged, Moments.from_tensor(x))


@given(x=values(), before=st.integers(0, 3), after=st.integers(0, 3))
def test_empty_parts_change_nothing(x, before, after):
    some = Moments.from_tensor(x)
    nothing = Moments.from_tensor(x, torch.zeros(len(x), dtype=torch.bool))
    empty = Moments.empty(x.shape[1])
    merged = Moments.merge_all([*[empty] * before, nothing, some, Moments.from_tensor(x[:0]), *[empty] * after])
    for name in ("mean", "m2"):
        assert torch.equal(getattr(merged, name), getattr(some, name))
    assert torch.equal(merged.count.expand(x.shape[1]), some.count.expand(x.shape[1]))


def test_merge_takes_several_at_once():
    parts = [Moments.from_tensor(torch.randn(n, 3, dtype=torch.float64)) for n in (1, 2, 5)]
    at_once = parts[0].merge(*parts[1:])
    one_by_one = functools.reduce(Moments.merge, parts)
    for name in ("count", "mean", "m2"):
        assert torch.equal(getattr(at_once, name), getattr(one_by_one, name))
    alone = parts[0].merge()
    assert alone is parts[0]


def test_empty_channels_among_full_ones():
    """One channel of a part is empty, another is not."""
    x = torch.tensor([[1.0, 10.0], [3.0, 20.0]])
    first = Moments.from_tensor(x, torch.tensor([[True, False], [True, False]]))
    second = Moments.from_tensor(x, torch.tensor([[False, True], [False, False]]))
    merged = first.merge(second)
    assert merged.count.tolist() == [2, 1]
    assert merged.mean.tolist() == [2, 10]
    assert merged.m2.tolist() == [2, 0]


def test_large_counts_and_small_parts():
    """A single value merged into very many moves the mean by its share, and the deviations stay exact."""
    count, mean, m2 = torch.tensor(1e12, dtype=torch.float64), torch.zeros(1).double(), torch.ones(1).double() * 1e12
    merged = Moments(count, mean, m2).merge(Moments.from_tensor(torch.full((1, 1), 1e6)))
    assert merged.mean.item() == pytest.approx(1e-6, rel=1e-11)
    assert merged.m2.item() == pytest.approx(2e12, rel=1e-11)


def test_merge_all_of_nothing():
    with pytest.raises(ValueError, match=r"at least one .*Moments\.empty\(C\)"):
        Moments.merge_all([])


def test_merge_all_takes_an_iterator():
    assert Moments.merge_all(iter([Moments.empty(2)])).mean.tolist() == [0, 0]


def test_channels_must_agree():
    with pytest.raises(ValueError, match="as many channels: 3 here, 2 there"):
        Moments.empty(3).merge(Moments.empty(2))
