"""Moments sample by sample, against their definition in one piece."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from keelnorm.doctor.evidence.sampled_moments import Samples, SamplesSum
from keelnorm.doctor.rules import _tests


def inputs(*shape, batches=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches, *shape, generator=generator, dtype=torch.float64)
    return list(x + torch.randn(batches, *shape[:2], *[1] * (len(shape) - 2), generator=generator) + 3)


def summed(batches, masks=None):
    sums = SamplesSum()
    for index, batch in enumerate(batches):
        sums.add(Samples.of(batch, None if masks is None else masks[index]))
    return sums.moments()


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5), (6, 2, 3, 4), (5, 2, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_of_whole_batches(shape, offset):
    batches = [batch + offset for batch in inputs(*shape)]
    found = summed(batches)
    x = torch.cat(batches).flatten(2) if len(shape) > 2 else torch.cat(batches).unsqueeze(2)
    n = len(x)
    torch.testing.assert_close(found.mean, x.mean((0, 2)), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.var, x.var((0, 2), correction=0), rtol=1e-7, atol=0)
    torch.testing.assert_close(found.mean_spread, x.mean(2).var(0), rtol=1e-6, atol=0)
    squares = (x - found.mean.view(1, -1, 1)).square().mean(2)
    torch.testing.assert_close(found.var_spread, squares.var(0), rtol=1e-5, atol=0)
    assert found.samples == n
    assert found.values == x.shape[0] * x.shape[2]
    assert found.sizes == (shape[0],) * 4
    groups = [batch.flatten(2).mean(2) if len(shape) > 2 else batch for batch in batches]
    wanted = [stats.f_oneway(*(group[:, c].numpy() for group in groups)) for c in range(shape[1])]
    torch.testing.assert_close(found.unlike, torch.tensor([f.statistic for f in wanted]), rtol=1e-6, atol=0)


def test_the_spread_is_the_variance_of_a_mean():
    """Its definition, by repetition: positions of a sample share a value, so that 20 of them are worth little more
    than one."""
    generator = torch.Generator().manual_seed(0)
    means, spreads, effective = [], [], []
    for _ in range(2000):
        x = torch.randn(16, 1, 20, generator=generator) + 2 * torch.randn(16, 1, 1, generator=generator)
        found = summed([x])
        means.append(found.mean)
        spreads.append(found.mean_spread / 16)
        effective.append(found.effective(16))
    assert float(torch.stack(means).var()) == pytest.approx(float(torch.stack(spreads).mean()), rel=0.1)
    assert float(torch.stack(effective).median()) == pytest.approx(16 * 5 / 4.05, rel=0.1)


def test_masked_values_do_not_count():
    x = inputs(6, 3, 7)
    masks = [torch.arange(7) < torch.tensor([7, 3, 1, 5, 2, 0]).unsqueeze(1) for _ in x]
    spoiled = [torch.where(mask.unsqueeze(1), batch, float("nan")) for batch, mask in zip(x, masks, strict=True)]
    found = summed(spoiled, masks)
    values = torch.cat([batch.transpose(1, 2)[mask] for batch, mask in zip(x, masks, strict=True)])
    torch.testing.assert_close(found.mean, values.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.var, values.var(0, correction=0), rtol=1e-10, atol=0)
    assert found.sizes == (5,) * 4


def test_calls_of_the_same_samples_are_merged():
    first, second = inputs(6, 3, 7, batches=2)
    merged = Samples.of(first).with_other(Samples.of(second))
    whole = Samples.of(torch.cat([first, second], 2))
    for mine, wanted in zip(merged.table(), whole.table(), strict=True):
        torch.testing.assert_close(mine, wanted)
    assert len(Samples.of(first).with_other(Samples.of(second[:4])).table()[0]) == 10


def test_special_batches():
    assert SamplesSum().moments() is None
    one = summed([torch.ones(1, 2)])
    assert one.unlike is None
    assert float(one.mean_spread.max()) == 0
    constant = summed([torch.ones(4, 2), torch.ones(4, 2)])
    assert constant.unlike.tolist() == [1.0, 1.0]
    apart = summed([torch.ones(4, 2), torch.zeros(4, 2)])
    assert float(apart.unlike.min()) > 1e6
    assert not summed([torch.full((4, 2), float("nan"))]).is_finite


@pytest.mark.parametrize("freedom", [3, 15, 127])
def test_the_t_test_is_not_below_the_exact_one(freedom):
    t = torch.linspace(0.1, 12, 40, dtype=torch.float64)
    mine = _tests.t_test(t, torch.ones_like(t), freedom)
    exact = torch.from_numpy(2 * stats.t.sf(t.numpy(), freedom))
    assert bool((mine >= exact * (1 - 1e-9)).all())
    assert bool((mine.log() - exact.log() < 0.3 + 0.05 * exact.log().abs()).all()), "and close to it"


def test_the_t_test_where_nothing_varies():
    distance, error = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    assert _tests.t_test(distance, error, 5).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(("between", "within"), [(3, 60), (5, 186), (19, 620)])
def test_the_f_test_is_near_the_exact_one(between, within):
    f = torch.linspace(0.5, 8, 30, dtype=torch.float64)
    mine, exact = _tests.f_test(f, between, within), torch.from_numpy(stats.f.sf(f.numpy(), between, within))
    there = exact > 1e-10
    assert bool(((mine.log10() - exact.log10()).abs()[there] < 0.1 + 0.06 * exact.log10().abs()[there]).all())


@pytest.mark.parametrize(("losses", "wins"), [(0, 0), (5, 0), (30, 12), (3, 9), (900, 800)])
def test_the_sign_test(losses, wins):
    wanted = stats.binomtest(losses, losses + wins, alternative="greater").pvalue if losses + wins else 1.0
    assert math.isclose(_tests.sign_test(losses, wins), wanted, rel_tol=0.02)
