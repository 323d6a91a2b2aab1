"""Robustness and scales: the arms do what they are called, numbers repeat, and the verdict follows from the results."""

import copy

import pytest
import torch

import keelnorm as kn
from keelnorm.lab.claims import robustness, scales
from keelnorm.lab.core.cell import Results
from keelnorm.lab.core.plan import Plan
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.core.threads import one_thread
from keelnorm.lab.data import CORRUPTIONS, corrupted, digits, table
from keelnorm.lab.reading.verdicts import verdict
from keelnorm.lab.training.arms import BN, NONE
from keelnorm.lab.training.stacks import StackedCNN, StackedMLP
from keelnorm.lab.training.train import Descent, correct, train

PLAN = Plan(quick=True, seeds=3)


@pytest.fixture(autouse=True)
def _as_cells_run():
    with one_thread():
        yield


SMALL = {"data": "digits", "seed": 0, "rates": (0.1, 0.3), "steps": 6, "train_on": 300, "severities": (3,)}


def test_one_replica_is_taken_out_of_a_stack_as_it_is():
    split = digits(0, centered=False)

    def network(replicas):
        draw = generator(draw="initialization", seed=0)
        return StackedCNN(1, 8, *robustness.SMALL, 10, BN, draw, torch.ones(replicas), pool=True)

    stack = network(3)
    how = Descent(torch.tensor([0.01, 0.1, 0.3]), momentum=0.9)
    train(stack, split, how, batch=64, evaluate_at=(12,), generator=generator(draw="order", seed=0))
    stack.eval()
    logits = stack(split.test_x).detach()
    for index in range(3):
        single = robustness.alone(stack, network(1), index).eval()
        assert torch.allclose(single(split.test_x)[0], logits[index], atol=1e-4)
    assert float((logits[0] - logits[2]).abs().max()) > 0.1


def test_each_way_of_adapting_is_the_one_it_is_called():
    split = digits(0, centered=False)
    draw = generator(draw="initialization", seed=0)
    network = StackedCNN(1, 8, *robustness.SMALL, 10, BN, draw, pool=True)
    how = Descent(torch.tensor([0.1]), momentum=0.9)
    train(network, split, how, batch=64, evaluate_at=(40,), generator=generator(draw="order", seed=0))
    network.eval()
    before = copy.deepcopy(network.state_dict())
    x = corrupted(split.test_x, "contrast", 4, generator(draw="corruption", seed=0))
    y = split.test_y
    found = robustness.ways(network, "bn", x, y)
    assert set(found) == {"bn", *robustness.ADAPTED}
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any("forward" in vars(layer) for layer in network.modules())

    def accuracy(part, labels):
        return float(100 * correct(network, part, labels, 30).float().mean())

    network.train()  # torch's own meaning of the batch's moments
    with torch.no_grad():
        mixed = accuracy(x, y)
        order = y.argsort(stable=True)
        by_label = accuracy(x[order], y[order])
        whole = float(100 * correct(network, x, y, 300).float().mean())
    assert found["mixed"] == pytest.approx(mixed, abs=0.4)
    assert found["sorted"] == pytest.approx(by_label, abs=0.4)
    assert found["adapted"] == pytest.approx(whole, abs=0.4)  # the running variance is unbiased, the batch's is not
    assert found["adapted"] > found["sorted"] + 10
    assert set(robustness.ways(network.eval(), "none", x, y)) == {"none"}


def test_a_cell_repeats_and_only_batch_norm_is_adapted():
    found = {arm: robustness.train_and_corrupt(arm=arm, **SMALL) for arm in ("none", "bn")}
    assert robustness.train_and_corrupt(arm="bn", **SMALL) == found["bn"]
    assert set(found["none"]["corrupted"]) == {"none"}
    assert set(found["bn"]["corrupted"]) == {"bn", "adapted", "mixed", "sorted"}
    for result in found.values():
        assert len(result["validation"]) == 2
        best = max(result["validation"])
        assert result["validation"][result["index"]] == best
        for by_corruption in result["corrupted"].values():
            assert list(by_corruption) == list(CORRUPTIONS)
            assert all(len(values) == 1 for values in by_corruption.values())


def made_up(plan, gap, *, adapted=20.0, without=()):
    """Results of all cells, with batch norm GAP points above none on corrupted images."""
    by_key = {}
    for cell in robustness.CLAIM.cells(plan):
        arm, seed = cell.axes["arm"], cell.axes["seed"]
        if (arm, seed) in without:
            continue
        level = {"none": 60.0, "bn": 60.0 + gap, "gn": 62.0}[arm] + 0.1 * seed
        ways = {arm: level}
        if arm == "bn":
            ways |= {"adapted": level + adapted, "mixed": 75.0, "sorted": 30.0}
        severities = len(cell.axes["severities"])
        corrupt = {
            way: {name: [value + seed * (way == "bn")] * severities for name in CORRUPTIONS}
            for way, value in ways.items()
        }
        rates = len(cell.axes["rates"])
        by_key[cell.key] = {"validation": [90.0] * rates, "index": 0, "clean": 97.0 + seed, "corrupted": corrupt}
    return Results(by_key)


@pytest.mark.parametrize(
    ("gap", "expected"), [(8.0, "holds"), (-8.0, "does not hold"), (-1.0, "not resolved")], ids=["more", "less", "same"]
)
def test_the_verdict_on_robustness_follows_the_corrupted_accuracy(gap, expected):
    reading = robustness.read(PLAN, made_up(PLAN, gap))
    assert verdict(reading.findings) == expected
    [claim] = [each for each in reading.findings if each.decisive]
    assert claim.effect.value == pytest.approx(gap + 1)
    remedy = next(each for each in reading.findings if each.quantity == "the remedy: adapted − not adapted")
    assert remedy.effect.value == pytest.approx(19)
    assert f"{61 + gap + 0.1:.1f} % with batch norm, 60.1 % without" in reading.answer
    assert [figure.kind for figure in reading.figures] == ["bars", "heatmap"]
    assert len(reading.figures[1].series) == len(CORRUPTIONS)
    assert [len(row) for row in reading.tables[1].rows] == [len(reading.tables[1].columns)] * 3


def test_robustness_on_several_data_sets_depends_where_they_disagree():
    plan = Plan(quick=False, seeds=3, data=("mnist@00000000",))
    good, bad = made_up(plan, 8.0), made_up(plan, -8.0)
    mixed = {}
    for cell in robustness.CLAIM.cells(plan):
        source = good if cell.axes["data"] == "digits" else bad
        [(_, mixed[cell.key])] = source.of([cell])
    reading = robustness.read(plan, Results(mixed))
    assert verdict(reading.findings) == "depends"
    assert "(digits)" in reading.answer
    assert "(mnist)" in reading.answer
    assert any("lies at the edge" in note for note in reading.notes)


def test_a_failed_cell_takes_its_seed_with_it():
    reading = robustness.read(PLAN, made_up(PLAN, 8.0, without={("gn", 1)}))
    assert reading.findings[0].effect.n == 2
    with pytest.raises(ValueError, match="no seed has a result for every arm"):
        robustness.read(PLAN, made_up(PLAN, 8.0, without={("bn", seed) for seed in range(3)}))


def test_batch_norm_on_the_input_is_standardizing_by_the_batch():
    split = table("wine", 0)
    how = {"initialization": "torch"}
    network = scales.NormalizedInput(13, (8,), 3, NONE, generator(draw="initialization", seed=0), torch.ones(2), **how)
    plain = StackedMLP(13, (8,), 3, NONE, generator(draw="initialization", seed=0), torch.ones(2), **how)
    assert len(list(network.parameters())) == len(list(plain.parameters()))  # no γ and β
    x = split.train_x[:16].double()
    scaled = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-5).sqrt()
    assert torch.allclose(network(split.train_x[:16]), plain(scaled.float()), atol=1e-4)
    kn.recalibrate(network, [split.train_x])
    network.eval()
    standard = scales.standardized(split)
    assert torch.allclose(network(split.test_x), plain(standard.test_x), atol=0.05)  # ε, and the unbiased variance


def test_standardizing_uses_the_training_part_alone():
    split = table("cancer", 0)
    standard = scales.standardized(split)
    assert torch.allclose(standard.train_x.mean(dim=0), torch.zeros(30), atol=1e-4)
    assert torch.allclose(standard.train_x.square().mean(dim=0), torch.ones(30), atol=1e-3)
    expected = (split.test_x - split.train_x.mean(dim=0)) / split.train_x.std(dim=0, correction=0)
    assert torch.allclose(standard.test_x, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(standard.test_y, split.test_y)


def test_a_table_s_cell_repeats():
    axes = {"data": "wine", "seed": 0, "rates": (0.01, 0.1), "steps": 60}
    first = {arm: scales.train_on_table(arm=arm, **axes) for arm in scales.ARMS}
    assert first == {arm: scales.train_on_table(arm=arm, **axes) for arm in scales.ARMS}
    assert max(first["input"]["test"][-1]) > max(first["raw"]["test"][-1]) + 10


@pytest.mark.parametrize(
    ("gains", "expected"),
    [((20, 9), "holds"), ((20, -9), "depends"), ((-20, -9), "does not hold"), ((0, 0), "not resolved")],
    ids=["both", "one", "neither", "same"],
)
def test_the_verdict_on_scales_follows_both_tables(gains, expected):
    by_key = {}
    for cell in scales.CLAIM.cells(PLAN):
        arm, seed, rates = cell.axes["arm"], cell.axes["seed"], cell.axes["rates"]
        gain = gains[list(scales.NAMES).index(cell.axes["data"])]
        level = {"raw": 70.0, "input": 70.0 + gain + seed - 1, "hidden": 72.0, "standardized": 90.0}[arm]
        validation = [10.0] * len(rates)
        validation[2] = 20.0  # the best rate is the third
        test = [0.0] * len(rates)
        test[2] = level
        by_key[cell.key] = {"steps": [1], "validation": [validation], "test": [test]}
    reading = scales.read(PLAN, Results(by_key))
    assert verdict(reading.findings) == expected
    decisive = [each for each in reading.findings if each.decisive]
    assert [each.effect.value for each in decisive] == pytest.approx(list(gains))
    assert f"from 70.0 to {70 + gains[0]:.1f} % (wine; 90.0 % standardized" in reading.answer
