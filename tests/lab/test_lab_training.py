import pytest
import torch
from torch import nn

import keelnorm as kn
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.data import digits
from keelnorm.lab.training.arms import arm_named
from keelnorm.lab.training.input_shift import MeanDrift, received_by, unit_moments
from keelnorm.lab.training.stacks import StackedMLP
from keelnorm.lab.training.train import batch_moments, batches, rounded, train
from keelnorm.lab.training.trials import trial

AXES = {
    "data": "digits",
    "activation": "relu",
    "centered": True,
    "seed": 0,
    "rates": (0.1, 0.5),
    "evaluate_at": (0, 5, 10),
}


def test_a_split_divides_all_images_and_is_the_seeds_own():
    first, again, other = digits(0), digits(0), digits(1)
    sizes = [len(part) for part in (first.train_y, first.validation_y, first.test_y)]
    assert sizes == [1297, 200, 300]
    assert torch.equal(first.test_x, again.test_x)
    assert not torch.equal(first.test_y, other.test_y)
    raw = digits(0, centered=False)
    images = torch.cat([raw.train_x, raw.validation_x, raw.test_x]).flatten(1)
    assert images.min() == 0
    assert images.max() == 1
    assert len(images.mul(16).unique(dim=0)) == 1797  # none of them twice


def test_centered_pixels_have_mean_zero_and_deviation_one_on_the_training_part_alone():
    split = digits(0)
    assert split.train_x.mean(dim=0).abs().max() < 1e-5
    assert split.train_x.square().mean().item() == pytest.approx(1.0, abs=1e-4)
    assert split.test_x.mean(dim=0).abs().max() > 1e-3


def test_batches_are_epochs_in_random_order():
    drawn = list(batches(10, 3, 7, generator(draw="test")))
    assert [len(batch) for batch in drawn] == [3] * 7
    for epoch in (drawn[:3], drawn[3:6]):
        assert len(set(torch.cat(epoch).tolist())) == 9
    assert not torch.equal(torch.cat(drawn[:3]), torch.cat(drawn[3:6]))
    with pytest.raises(ValueError, match="batch of 11"):
        next(batches(10, 11, 1, generator(draw="test")))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, kn.BatchNorm1d])
def test_looking_with_the_batchs_moments_leaves_no_trace(layer):
    model = layer(4)
    model(torch.randn(10, 4))
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(50, 4) * 3 + 7
    with batch_moments(model):
        seen = model(x)
    assert seen.mean(dim=0).abs().max() < 1e-5
    assert not seen.requires_grad
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_looking_leaves_no_trace_after_an_error_either():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(3, 1))
    before = model[0].running_mean.clone()
    with pytest.raises(RuntimeError, match="shapes"), batch_moments(model):
        model(torch.randn(10, 4))
    assert torch.equal(model[0].running_mean, before)


def test_the_two_batch_norms_train_alike():
    theirs, ours = (trial(arm=arm, **AXES) for arm in ("torch", "bn"))
    first, second = (torch.tensor(each["loss"][1:]) for each in (theirs, ours))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_a_cell_run_again_alone_gives_the_same_numbers():
    assert trial(arm="bn", **AXES) == trial(arm="bn", **AXES)


def test_evaluating_more_often_changes_nothing_but_what_is_seen():
    often = trial(arm="torch", **AXES)
    seldom = trial(arm="torch", **AXES | {"evaluate_at": (10,)})
    assert seldom["test"][-1] == often["test"][-1]
    assert seldom["validation"][-1] == often["validation"][-1]


def test_training_learns_and_a_lost_run_is_none_in_the_store():
    result = trial(arm="none", **AXES | {"rates": (0.1, 1e6), "evaluate_at": (0, 60)})
    assert result["test"][0][0] < 40 < 80 < result["test"][-1][0]
    assert result["loss"][-1][1] is None
    assert result["loss"][0] == []
    assert rounded(torch.tensor([1.23456, float("inf"), float("nan")]), 2) == [1.23, None, None]


def test_the_probe_sees_every_evaluation():
    seen = []
    whole = StackedMLP(64, (8,), 10, arm_named("none"), generator(draw="test"))
    train(
        whole,
        digits(0),
        torch.tensor([0.1]),
        batch=60,
        evaluate_at=(0, 2, 3),
        generator=generator(draw="order"),
        probe=lambda step, model: seen.append((step, model is whole)),
    )
    assert seen == [(0, True), (2, True), (3, True)]


def test_drift_by_hand():
    drift = MeanDrift()
    x = torch.randn(1, 3, 500, dtype=torch.float64)
    mean, deviation = unit_moments(x)
    torch.testing.assert_close(mean, x[0].mean(dim=1))
    torch.testing.assert_close(deviation, x[0].std(dim=1, correction=0))
    for moved in (0.0, 1.0, 2.0):
        drift.add((x - mean.view(1, 3, 1)) / deviation.view(1, 3, 1) + moved)
    torch.testing.assert_close(drift.shift(), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))


def test_a_unit_that_never_varies_is_left_out():
    drift = MeanDrift()
    x = torch.stack([torch.randn(500), torch.full((500,), 2.0)]).unsqueeze(0)
    drift.add(x)
    drift.add(x)
    assert drift.shift().tolist() == [0.0, 0.0]


def test_what_a_module_receives_is_collected_and_the_hook_is_gone_after():
    module = nn.ReLU()
    with received_by(module) as seen:
        module(torch.ones(2))
    module(torch.zeros(2))
    assert [each.tolist() for each in seen] == [[1.0, 1.0]]
