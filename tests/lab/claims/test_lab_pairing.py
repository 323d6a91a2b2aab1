"""Batch sizes are compared seed by seed, also where cells have failed."""

import pytest

from keelnorm.lab.claims import batch_size, hyperparameters, small_batches
from keelnorm.lab.core.cell import Results
from keelnorm.lab.core.plan import Plan

PLAN = Plan(quick=True, seeds=4)


def made_up(claim, failed):
    """Accuracies that differ much from seed to seed, and by size in the same way for every seed."""
    results = {}
    for cell in claim.cells(PLAN):
        axes = cell.axes
        if (axes["seed"], axes["batch"]) in failed:
            continue
        accuracy = 40.0 + 10.0 * axes["seed"] + (5.0 if axes["batch"] > 2 else 0.0)
        row = [accuracy] * len(axes["rates"])
        results[cell.key] = {"validation": [row], "test": [row], "test_batch": [row]}
    return Results(results)


@pytest.mark.parametrize("failed", [set(), {(0, 2)}, {(0, 2), (1, 64)}])
def test_an_effect_that_is_the_same_for_every_seed_has_no_spread(failed):
    reading = batch_size.read(PLAN, made_up(batch_size.CLAIM, failed))
    effect = next(finding.effect for finding in reading.findings if "batch 64 − batch 2" in finding.quantity)
    assert (effect.low, effect.value, effect.high) == pytest.approx((5.0, 5.0, 5.0))
    assert effect.n == 4 - len(failed)

    reading = small_batches.read(PLAN, made_up(small_batches.CLAIM, failed))
    left = [finding.effect for finding in reading.findings if finding.quantity.startswith("what is left")]
    assert left
    for effect in left:
        assert (effect.low, effect.value, effect.high) == pytest.approx((-5.0, -5.0, -5.0))
        assert effect.n == 4 - len(failed)


def test_settings_are_compared_over_the_depths_that_every_arm_of_a_seed_has():
    plan = Plan(quick=False, seeds=3)
    results = {}
    for cell in hyperparameters.CLAIM.cells(plan):
        axes = cell.axes
        if (axes["arm"], axes["seed"], len(axes["widths"])) != ("ln", 0, 8):
            works = {"none": 4, "ln": 8, "bn": 12}[axes["arm"]] + axes["seed"]
            results[cell.key] = {"test": [[95.0] * works + [10.0] * (len(axes["rates"]) - works)]}
    reading = hyperparameters.read(plan, Results(results))
    assert [finding.effect.n for finding in reading.findings] == [2] * 4
    assert reading.findings[0].effect.value == pytest.approx(100 * 8 / 24)
