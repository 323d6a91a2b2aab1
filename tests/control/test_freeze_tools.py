"""Frozen layers beside the compiler, fusing, averaged models, pausing and methods of their own."""

from typing import Any

import pytest
import torch
from control.freezing_parts import freeze_and_give, train
from control.models import Block, buffers, data, same
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import keelnorm as kn
from keelnorm.control import assert_frozen, freeze, pause_statistics, unfreeze
from keelnorm.engine.fusion import pending
from keelnorm.engine.fusion.call import all_sizes_wait


@pytest.mark.parametrize("kind", ["torch", "keelnorm", "variant"])
@pytest.mark.parametrize("early", [True, False], ids=["frozen first", "compiled first"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled(kind, early):
    torch._dynamo.reset()
    model = Block(1, kind)
    x = data(1)
    if early:
        freeze(model)
    compiled: Any = torch.compile(model, backend="eager")
    compiled(x)
    compiled(x)
    freeze(model)
    before = buffers(model)
    compiled.train()
    y = compiled(x)
    assert same(buffers(model), before)
    assert torch.allclose(y, model.eval()(x))
    unfreeze(compiled)
    compiled.train()
    compiled(x)
    assert model.norm.num_batches_tracked.item() == before["norm.num_batches_tracked"].item() + 1


def test_sequential_stays_fused():
    net = freeze_and_give(kn.Sequential(kn.BatchNorm2d(3), nn.ReLU())).train()
    with all_sizes_wait():
        net(torch.randn(4, 3, 5, 5))  # the layer learns what follows it
        before = pending.completed
        assert (net(torch.randn(4, 3, 5, 5)) >= 0).all()
    assert pending.completed == before + 1


@pytest.mark.parametrize("kind", ["torch", "keelnorm", "variant"])
class TestAveraging:
    def test_average_of_a_frozen_model(self, kind):
        for keywords in ({}, {"use_buffers": True}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True}):
            model = Block(2, kind)
            train(model, 2, 2)
            freeze(model)
            averaged = AveragedModel(model, **keywords)
            before = buffers(model)
            for _ in range(3):
                train(model, 2, 1)
                averaged.update_parameters(model)
            assert same(buffers(averaged.module), before)
            assert_frozen(averaged)
            assert torch.equal(averaged.module.norm.weight, model.norm.weight)

    def test_update_bn_passes_over_frozen_layers(self, kind):
        model = Block(2, kind)
        train(model, 2, 2)
        freeze(model, where="norm")
        averaged = AveragedModel(model)
        for _ in range(2):
            train(model, 2, 1)
            averaged.update_parameters(model)
        before = buffers(averaged.module)
        batches = [data(2) for _ in range(3)]
        update_bn(batches, averaged)
        after = buffers(averaged.module)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"last.0.running_mean", "last.0.running_var", "last.0.num_batches_tracked"}
        assert after["last.0.num_batches_tracked"].item() == 3
        module = averaged.module.eval()
        inputs = [module.second(torch.relu(module.norm(module.first(x)))).detach() for x in batches]
        expected = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
        torch.testing.assert_close(after["last.0.running_mean"], expected, rtol=1e-5, atol=1e-5)


def test_frozen_inside_pause():
    model = Block(2, "keelnorm")
    freeze(model)
    x = data(2)
    expected = model(x)
    with pause_statistics(model):
        assert torch.equal(model(x), expected)


def test_methods_set_on_the_instance_come_back():
    """As people set train() to keep a layer in evaluation."""
    layer, asked = nn.BatchNorm1d(3), []

    def train(mode=True):
        asked.append(mode)
        return layer

    vars(layer).update(train=train, reset_running_stats=lambda: asked.append("reset"))
    kept = dict(vars(layer))
    for _ in range(2):
        freeze(layer)
    layer.train()
    layer.reset_running_stats()
    assert asked == []
    assert not layer.training
    unfreeze(layer)
    assert {name: vars(layer)[name] for name in kept if name != "training"} == {
        name: value for name, value in kept.items() if name != "training"
    }
    assert asked == [True]
