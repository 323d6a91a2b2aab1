"""Covariate shift, gradients, γ and β alone, placement and the loss's landscape: verdicts on made-up results."""

import math
import re

import pytest

from keelnorm.lab.claims import affine_only, covariate_shift, gradients, loss_landscape, placement
from keelnorm.lab.core.cell import Results
from keelnorm.lab.core.plan import Plan
from keelnorm.lab.reading.verdicts import verdict
from keelnorm.measure.statistics import Interval

PLAN = Plan(quick=True, seeds=3)


def history(reached_at, *, rates, best, level=95.0, other=20.0):
    """A made-up history: the replica `best` gets to LEVEL in a line through 90 % at REACHED_AT; the others do not."""
    steps = [0, reached_at, 1000]
    row = [[other] * rates for _ in steps]
    for index, value in enumerate((0.0, 90.0, level)):
        row[index][best] = value
    return {"steps": steps, "validation": row, "test": row, "test_batch": row, "loss": []}


def covariate_results(drift=1.0, cosine=(0.2, 0.2, 0.2), noisy=600, without=()):
    """Batch norm drifts by 0.1 against DRIFT, and its cosines lie COSINE above; the noisy arm gets there at NOISY."""
    by_key = {}
    prepared = list(covariate_shift.PREPARED.values())
    for cell in covariate_shift.CLAIM.cells(PLAN):
        axes, jitter = cell.axes, 0.01 * cell.axes["seed"]
        task, arm, rates = cell.task.__name__, axes["arm"], len(axes["rates"])
        if (task, arm, axes["seed"]) in without:
            continue
        if task == "drift":
            at_step = {"none": 400, "bn": 50, "noisy": noisy}[arm] + axes["seed"]
            shift = {"none": drift, "bn": 0.1, "noisy": 2.0}[arm] * (1 + jitter)
            percentiles = [[[-1.0, 0.0, 1.0]] * rates] * 3
            moved = {"shift": [[0.0] * rates, [shift / 2] * rates, [shift] * rates], "percentiles": percentiles}
            by_key[cell.key] = history(at_step, rates=rates, best=1) | moved
        else:
            gain = cosine[prepared.index((axes["activation"], axes["centered"]))] if arm == "bn" else 0.0
            value = 0.5 + gain + (jitter if arm == "bn" else 0.0)
            rows = [[value] * rates] * 2
            by_key[cell.key] = {"steps": [0, 3], "cosine": rows, "accuracy": [96.0] * rates}
    return Results(by_key)


@pytest.mark.parametrize(
    ("drift", "cosine", "noisy", "expected"),
    [
        (1.0, (0.2, 0.2, 0.2), 600, "holds"),
        (1.0, (0.2, 0.2, 0.2), 100, "depends"),
        (1.0, (0.2, 0.2, -0.2), 600, "depends"),
        (1.0, (-0.2, -0.2, -0.2), 30, "depends"),
        (0.02, (-0.2, -0.2, -0.2), 30, "does not hold"),
    ],
)
def test_the_verdict_on_covariate_shift_follows_drift_cosine_and_noise(drift, cosine, noisy, expected):
    reading = covariate_shift.read(PLAN, covariate_results(drift, cosine, noisy))
    assert verdict(reading.findings) == expected
    a, *b, cost, gained = [each for each in reading.findings if each.decisive]
    assert a.effect.value == pytest.approx(drift / 0.1)
    assert [each.effect.value for each in b] == pytest.approx([gain + 0.01 for gain in cosine])
    assert cost.effect.value == pytest.approx(noisy / 50, rel=0.03)
    assert gained.effect.value == pytest.approx(400 / noisy, rel=0.03)


def test_a_seed_without_one_of_the_arms_is_left_out_of_covariate_shift():
    reading = covariate_shift.read(PLAN, covariate_results(without={("drift", "noisy", 1)}))
    by_part = {finding.quantity[:3]: finding.effect.n for finding in reading.findings if finding.decisive}
    assert by_part == {"(a)": 2, "(b)": 3, "(c)": 2}
    with pytest.raises(ValueError, match="no seed has a result for every arm"):
        covariate_shift.read(PLAN, covariate_results(without={("drift", "bn", seed) for seed in range(3)}))


def gradient_results(factors, plan=PLAN):
    """Factors a layer with batch norm by activation; 0.9 without."""
    by_key = {}
    for cell in gradients.CLAIM.cells(plan):
        axes = cell.axes
        if "rates" in axes:
            by_key[cell.key] = history(
                20, rates=len(axes["rates"]), best=1, level=96.0 if axes["arm"] == "bn" else 91.0
            )
        else:
            factor = (factors[axes["activation"]] if axes["arm"] == "bn" else 0.9) * (1 + 0.001 * axes["seed"])
            log10 = [-layer * math.log10(factor) for layer in range(gradients.DEPTH)]
            by_key[cell.key] = {"log10": log10, "factor": factor}
    return Results(by_key)


@pytest.mark.parametrize(
    ("sigmoid", "tanh", "relu", "expected"),
    [
        (1.02, 1.01, 0.99, "holds"),
        (1.02, 1.1, 1.2, "depends"),
        (0.5, 1.0, 1.0, "depends"),
        (0.5, 1.2, 1.2, "does not hold"),
    ],
)
def test_the_verdict_on_gradients_follows_the_factors(sigmoid, tanh, relu, expected):
    reading = gradients.read(PLAN, gradient_results({"sigmoid": sigmoid, "tanh": tanh, "relu": relu}))
    assert verdict(reading.findings) == expected
    decisive = {f.where.rpartition(" ")[2]: f.effect.value for f in reading.findings if f.decisive}
    expected = {"sigmoid": sigmoid, "tanh": tanh, "ReLU": relu}
    assert decisive == pytest.approx({name: max(each, 1 / each) for name, each in expected.items()}, rel=2e-3)
    for name, factor in expected.items():
        fate = "explodes" if factor > gradients.MARGIN else "vanishes" if factor < 1 / gradients.MARGIN else "keeps"
        [said] = [part for part in re.findall(r"it [^(]*\([^)]*\)", reading.answer) if f", {name}" in part]
        assert re.search(rf"{fate}.* with it|{fate}.* with and without it", said), (name, fate, said)


@pytest.mark.parametrize(
    ("low", "high", "fate"),
    [
        (0.2, 0.9, "vanishes"),
        (0.9, 1.0, "is not resolved"),
        (0.99, 1.01, "keeps its size"),
        (1.01, 1.2, "is not resolved"),
        (1.1, 1.3, "explodes"),
    ],
)
def test_what_becomes_of_a_gradient_follows_from_the_interval(low, high, fate):
    assert gradients._fate(Interval((low * high) ** 0.5, low, high, 5)) == fate


def test_one_seed_resolves_nothing_about_gradients_and_every_data_set_is_in_both_tables():
    plan = Plan(quick=True, seeds=1, data=("mnist@00000000",))
    reading = gradients.read(plan, gradient_results({"sigmoid": 0.99, "tanh": 1.01, "relu": 1.2}, plan))
    assert verdict(reading.findings) == "not resolved"
    for table in reading.tables:
        assert {row[0].partition(",")[0] for row in table.rows} == {"digits", "mnist"}


def affine_results(level):
    """Test accuracy with γ and β alone by depth; 90 with the output layer alone, 97 with everything."""
    by_key = {}
    for cell in affine_only.CLAIM.cells(PLAN):
        axes = cell.axes
        value = {"affine": level[axes["depth"]], "output": 90.0, "all": 97.0}[axes["arm"]] + axes["seed"] - 1
        rates = len(axes["rates"])
        made = history(50, rates=rates, best=rates - 1, level=value, other=0.0)
        by_key[cell.key] = made | {"trained": 512, "total": 26378}
    return Results(by_key)


@pytest.mark.parametrize(
    ("shallow", "deep", "expected"),
    [(85.0, 80.0, "holds"), (85.0, 5.0, "depends"), (4.0, 5.0, "does not hold"), (10.5, 9.5, "not resolved")],
)
def test_the_verdict_on_gamma_and_beta_follows_every_depth(shallow, deep, expected):
    reading = affine_only.read(PLAN, affine_results({2: shallow, 8: deep}))
    assert verdict(reading.findings) == expected
    decisive = [finding.effect.value for finding in reading.findings if finding.decisive]
    assert decisive == pytest.approx([shallow - 10, deep - 10])
    beside = [f.effect.value for f in reading.findings if f.quantity.endswith("the output layer alone")]
    assert beside == pytest.approx([shallow - 90, deep - 90])


def placement_results(after, into):
    """Test accuracy before the activation AFTER above that behind it and INTO above that at the inputs."""
    by_key = {}
    for cell in placement.CLAIM.cells(PLAN):
        axes, rates = cell.axes, len(cell.axes["rates"])
        value = 95.0 - {"before": 0.0, "after": after, "input": into}[axes["place"]]
        value += 0.05 * axes["seed"] * (axes["place"] == "before")
        by_key[cell.key] = history(30, rates=rates, best=1, level=value)
    return Results(by_key)


@pytest.mark.parametrize(
    ("after", "into", "expected"),
    [(1.0, 2.0, "holds"), (-1.0, 2.0, "depends"), (-1.0, -2.0, "does not hold"), (-0.05, -0.05, "not resolved")],
)
def test_the_verdict_on_the_place_follows_both_comparisons(after, into, expected):
    reading = placement.read(PLAN, placement_results(after, into))
    assert verdict(reading.findings) == expected
    effects = [finding.effect.value for finding in reading.findings if finding.decisive]
    assert effects == pytest.approx([after + 0.05, into + 0.05] * 2)
    assert f"{after + 0.05:+.2f} points against after it and {into + 0.05:+.2f} against the input" in reading.answer


def landscape_results(ratio):
    """Every quantity RATIO times as large without batch norm as with it, by activation."""
    by_key = {}
    for cell in loss_landscape.CLAIM.cells(PLAN):
        axes = cell.axes
        value = (ratio[axes["activation"]] if axes["arm"] == "none" else 1.0) * (1 + 0.01 * axes["seed"] ** 2)
        looks = {name: [value, value / 4] for name in loss_landscape.QUANTITIES}
        jitter = 1.01 if axes["arm"] == "none" and axes["seed"] == 1 else 1.0
        looks = {name: [each * jitter for each in row] for name, row in looks.items()}
        by_key[cell.key] = {"step": [0, 10], "loss": [2.0, 1.0], **looks, "accuracy": 95.0}
    return Results(by_key)


@pytest.mark.parametrize(
    ("relu", "tanh", "expected"),
    [(2.0, 3.0, "holds"), (2.0, 0.5, "depends"), (0.5, 0.5, "does not hold"), (1.0, 1.0, "not resolved")],
)
def test_the_verdict_on_the_landscape_follows_both_activations(relu, tanh, expected):
    reading = loss_landscape.read(PLAN, landscape_results({"relu": relu, "tanh": tanh}))
    assert verdict(reading.findings) == expected
    for activation, factor in (("ReLU", relu), ("tanh", tanh)):
        own = [f.effect.value for f in reading.findings if f.where.endswith(activation)]
        assert own == pytest.approx([factor] * len(loss_landscape.QUANTITIES), rel=0.01)
    less = "the loss varies 2.0" in reading.answer
    assert less == (relu == 2.0)


MADE_UP = {
    "gradients": (gradients, lambda: gradient_results({"sigmoid": 1.0, "tanh": 1.0, "relu": 1.0})),
    "affine_only": (affine_only, lambda: affine_results({2: 80.0, 8: 80.0})),
    "placement": (placement, lambda: placement_results(1.0, 1.0)),
    "loss_landscape": (loss_landscape, lambda: landscape_results({"relu": 2.0, "tanh": 2.0})),
}


def without(module, results, gone):
    """The results without those of the cells that are GONE."""
    return Results({cell.key: next(results.of([cell]))[1] for cell in module.CLAIM.cells(PLAN) if not gone(cell)})


@pytest.mark.parametrize("name", MADE_UP)
def test_a_failed_cell_takes_its_seed_with_it_and_no_more(name):
    module, make = MADE_UP[name]
    failed = module.CLAIM.cells(PLAN)[0].key
    whole = [each.effect.n for each in module.read(PLAN, make()).findings]
    left = without(module, make(), lambda cell: cell.key == failed)
    fewer = [each.effect.n for each in module.read(PLAN, left).findings]
    assert {a - b for b, a in zip(whole, fewer, strict=True)} == {0, -1}


@pytest.mark.parametrize("name", MADE_UP)
def test_an_arm_without_any_result_is_no_comparison(name):
    module, make = MADE_UP[name]
    axis = "place" if module is placement else "arm"
    gone = module.CLAIM.cells(PLAN)[-1].axes[axis]
    with pytest.raises(ValueError, match="no seed has a result for every arm"):
        module.read(PLAN, without(module, make(), lambda cell: cell.axes[axis] == gone))
