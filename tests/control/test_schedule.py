"""Momentum schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import keelnorm as kn
from keelnorm.control.momentum_schedule import MomentumSchedule, cosine, cumulative_then_exponential, linear, step_decay
from keelnorm.nn.whitening import WhiteningBatchNorm


def model_of(momentum: float | None = 0.1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=momentum), kn.BatchNorm2d(4, momentum=0.2),
        WhiteningBatchNorm(4, momentum=0.3), nn.InstanceNorm2d(4, momentum=0.4), nn.SyncBatchNorm(4, momentum=0.5),
    )  # fmt: skip


def momenta(model: nn.Module) -> list[float | None]:
    return [getattr(module, "momentum", None) for module in model.children()]


# Schedules


def test_cumulative_then_exponential() -> None:
    schedule = cumulative_then_exponential(0.25)
    assert [schedule(step) for step in range(6)] == [1, 1 / 2, 1 / 3, 0.25, 0.25, 0.25]


def test_cumulative_gives_the_exact_average_then_the_exponential_one() -> None:
    layer = kn.BatchNorm1d(3, dtype=torch.float64)
    schedule = MomentumSchedule(layer, cumulative_then_exponential(0.2))
    means = []
    for step in range(8):
        x = torch.randn(5, 3, dtype=torch.float64)
        means.append(x.mean(0))
        layer(x)
        schedule.step()
        if step < 5:
            torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0))
    expected = torch.stack(means[:5]).mean(0)
    for mean in means[5:]:
        expected = 0.8 * expected + 0.2 * mean
    torch.testing.assert_close(layer.running_mean, expected)


def test_step_decay() -> None:
    schedule = step_decay(0.5, 0.5, every=10, least=0.01)
    assert [schedule(step) for step in (0, 9, 10, 19, 20)] == [0.5, 0.5, 0.25, 0.25, 0.125]
    assert schedule(59) == 0.5**6
    assert schedule(60) == schedule(10**6) == 0.01


def test_linear_and_cosine() -> None:
    straight, curved = linear(0.5, 0.1, steps=8), cosine(0.5, 0.1, steps=8)
    for step in range(9):
        share = step / 8
        assert straight(step) == pytest.approx(0.5 + (0.1 - 0.5) * share)
        assert curved(step) == pytest.approx(0.1 + 0.4 * math.cos(math.pi * share / 2) ** 2)
    assert straight(8) == straight(100) == 0.1
    assert curved(8) == curved(100) == pytest.approx(0.1)
    assert linear(0.1, 0.5, steps=2)(1) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cumulative_then_exponential(1.5), "momentum must be between 0 and 1; got 1.5"),
        (lambda: step_decay(-0.1, every=2), "initial"),
        (lambda: step_decay(every=0), "every must be a positive number of steps; got 0"),
        (lambda: linear(0.5, 2, steps=3), "final"),
        (lambda: cosine(0.5, 0.1, steps=0), "steps"),
        (lambda: cosine(math.nan, 0.1, steps=3), "initial must be between 0 and 1; got nan"),
    ],
)
def test_illegal_schedules(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# On a model


def test_it_sets_every_batch_norm_and_nothing_else() -> None:
    model = model_of()
    schedule = MomentumSchedule(model, linear(0.9, 0.7, steps=2))
    assert momenta(model) == [None, 0.9, 0.9, 0.9, 0.4, 0.9]
    schedule.step()
    assert momenta(model) == pytest.approx([None, 0.8, 0.8, 0.8, 0.4, 0.8])
    assert schedule.steps == 1
    assert schedule.momentum == model[1].momentum
    schedule.step()
    assert model[1].momentum == pytest.approx(0.7)


def test_where() -> None:
    model = model_of()
    MomentumSchedule(model, lambda step: 0.9, where=lambda name, layer: name == "3" or type(layer) is nn.BatchNorm2d)
    assert momenta(model) == [None, 0.9, 0.2, 0.9, 0.4, 0.5]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_close_restores_each(momentum: float | None) -> None:
    model = model_of(momentum)
    before = momenta(model)
    schedule = MomentumSchedule(model, linear(0.9, 0.7, steps=2))
    schedule.step()
    schedule.close()
    assert momenta(model) == before
    vars(model[1])["momentum"] = 0.77
    schedule.close()  # a second time does nothing
    assert model[1].momentum == 0.77
    with pytest.raises(RuntimeError, match="closed"):
        schedule.step()
    with pytest.raises(RuntimeError, match="closed"):
        schedule.load_state_dict({"steps": 1})


def test_as_a_context_manager_it_closes_after_an_error() -> None:
    model = model_of()
    before = momenta(model)

    def train() -> None:
        with MomentumSchedule(model, lambda step: 0.9) as schedule:
            assert model[1].momentum == 0.9
            schedule.step()
            raise OverflowError

    with pytest.raises(OverflowError):
        train()
    assert momenta(model) == before


def test_state_dict() -> None:
    model, other = model_of(), model_of()
    schedule = MomentumSchedule(model, step_decay(every=2))
    for _ in range(5):
        schedule.step()
    resumed = MomentumSchedule(other, step_decay(every=2))
    resumed.load_state_dict(schedule.state_dict())
    for _ in range(4):
        assert momenta(other) == momenta(model)
        schedule.step()
        resumed.step()
    assert schedule.state_dict() == {"steps": 9}


@pytest.mark.parametrize("state", [{}, {"steps": -1}, {"steps": "3"}, {"last_epoch": 3}])
def test_an_illegal_state_changes_nothing(state: dict[str, object]) -> None:
    model = model_of()
    schedule = MomentumSchedule(model, linear(0.9, 0.7, steps=2))
    with pytest.raises(ValueError, match="number of steps"):
        schedule.load_state_dict(state)
    assert schedule.steps == 0
    assert model[1].momentum == 0.9


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, None, "0.1"])
def test_a_schedule_that_gives_no_momentum_changes_nothing(value: Any) -> None:
    model = model_of()
    before = momenta(model)
    with pytest.raises(ValueError, match="between 0 and 1; at step 0"):
        MomentumSchedule(model, lambda step: value)
    assert momenta(model) == before
    schedule = MomentumSchedule(model, lambda step: 0.9 if step == 0 else value)
    with pytest.raises(ValueError, match="at step 1"):
        schedule.step()
    assert schedule.steps == 0
    assert schedule.momentum == model[1].momentum == 0.9


def test_nothing_to_set() -> None:
    with pytest.raises(ValueError, match="MomentumSchedule: there is no batch norm in Sequential"):
        MomentumSchedule(nn.Sequential(nn.Linear(2, 2)), lambda step: 0.1)
    with pytest.raises(ValueError, match=r"where selects no batch norm\. The model's are: '1', '2', '3', '5'"):
        MomentumSchedule(model_of(), lambda step: 0.1, where=lambda name, layer: False)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        MomentumSchedule([nn.BatchNorm1d(2)], lambda step: 0.1)


def test_where_is_that_of_all_functions() -> None:
    model = model_of()
    before = momenta(model)
    with MomentumSchedule(model, lambda step: 0.7, where="1"):
        assert model[1].momentum == 0.7
        assert momenta(model).count(0.7) == 1
    with pytest.raises(ValueError, match="where='gone' matches no batch norm"):
        MomentumSchedule(model, lambda step: 0.7, where="gone")
    with pytest.raises(TypeError, match="schedule must be a function from the number of steps to the momentum"):
        MomentumSchedule(model, 0.5)  # type: ignore[arg-type]
    assert momenta(model) == before
    with pytest.raises(ValueError, match="the state has a number of steps"):
        MomentumSchedule(model, lambda step: 0.7).load_state_dict([3])  # type: ignore[arg-type]


def test_a_shared_layer_is_restored_once() -> None:
    shared = nn.BatchNorm1d(3, momentum=0.3)
    with MomentumSchedule(nn.ModuleList([shared, nn.Sequential(shared)]), lambda step: 0.9):
        assert shared.momentum == 0.9
    assert shared.momentum == 0.3


def test_a_compiled_layer_follows_without_compiling_each_time() -> None:
    torch._dynamo.reset()
    layer = kn.BatchNorm1d(3)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    schedule = MomentumSchedule(layer, linear(0.9, 0.1, steps=20))
    for _ in range(12):
        x = torch.randn(5, 3)
        expected = torch.lerp(layer.running_mean, x.mean(0), layer.momentum)
        compiled(x)
        torch.testing.assert_close(layer.running_mean, expected)
        schedule.step()
    assert counter.frame_count == 2  # with a constant, then with a variable
    torch._dynamo.reset()
