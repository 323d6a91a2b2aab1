"""``kn.Monitor`` in unusual training: several forwards, copies, compiled code, errors, and what it leaves behind."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from followed import data, network, train
from torch import nn

import keelnorm as kn
from keelnorm.doctor import MonitorWarning
from keelnorm.doctor.monitor import monitor as module


def test_copies_within_an_observed_step():
    model = network()
    monitor = kn.Monitor(model, 1)
    monitor.begin_step()
    model(data(1)[0]).sum().backward()
    loaded = pickle.loads(pickle.dumps(model))
    for other in (torch.optim.swa_utils.AveragedModel(model), loaded, copy.deepcopy(model)):
        other.train()(data(1)[0]).sum().backward()
    monitor.end_step()
    assert [len(seen.layers) for seen in monitor.observations] == [2]


def test_a_model_that_is_a_batch_norm():
    layer = nn.BatchNorm1d(4)
    x = torch.randn(32, 4, requires_grad=True)
    with kn.Monitor(layer, 1) as monitor:
        layer(input=x).square().sum().backward()
        layer(x).square().sum().backward()
    assert [list(seen.layers) for seen in monitor.observations] == [[""], [""]]
    assert all(seen.layers[""].gradient is not None for seen in monitor.observations)


def test_several_forwards_with_one_backward():
    """Two images of a pair; and a generator that is first called for the discriminator alone."""
    model = network()
    with kn.Monitor(model, 1) as monitor:
        for left, right in zip(data(3), data(3, seed=1), strict=True):
            (model(left) - model(right)).square().mean().backward()
    assert [seen.step for seen in monitor.observations] == [1, 2, 3, 4, 5, 6]
    assert all(one.gradient is not None for seen in monitor.observations for one in seen.layers.values())
    generator, discriminator = network(), nn.Linear(2, 1)
    both = nn.ModuleList([generator, discriminator])
    monitor = kn.Monitor(both, 1)
    for x in data(2):
        monitor.begin_step()
        with torch.no_grad():
            fake = generator(x)
        discriminator(fake).mean().backward()
        discriminator(generator(x)).mean().backward()
        monitor.end_step()
    assert all(one.gradient is not None for seen in monitor.observations for one in seen.layers.values())


def test_steps_without_a_backward_do_not_pile_up():
    model = network()
    with kn.Monitor(model, 1) as monitor:
        for x in data(20):
            model(x)
        assert len(monitor.observations) >= 11
    assert len(monitor.observations) == 20


def test_a_leaf_keeps_no_hooks():
    class Dreaming(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.image = nn.BatchNorm1d(4), nn.Parameter(torch.randn(32, 4))

        def forward(self):
            return self.norm(self.image)

    model = Dreaming()
    with kn.Monitor(model, 1) as monitor:
        for _ in range(3):
            model().square().sum().backward()
    assert len(monitor.observations) == 3
    assert not model.image._backward_hooks


def test_rows_of_a_layer_are_its_samples():
    """A head that gets several rows of each sample beside one that gets one."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.few, self.many = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.many(x.reshape(-1, 4)).square().mean() + self.few(x[:, 0]).square().mean()

    torch.manual_seed(0)
    x = torch.randn(8, 64, 4)
    with kn.Monitor(Heads(), 1, select="small-batches") as monitor:
        monitor._model(x).backward()
    few, many = (monitor.observations[0].layers[name] for name in ("few", "many"))
    assert few.effective == pytest.approx(7, abs=0.1)
    assert many.effective == pytest.approx(511, abs=1)
    found = {one.layers: one.evidence["samples"] for one in kn.diagnose(Heads(), [x], select="KN205").findings}
    assert found == {("few",): 8}


def test_a_layer_that_gets_other_channels_is_left_out():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8, affine=False, track_running_stats=False)
            self.other = nn.BatchNorm1d(8)

        def forward(self, x):
            return self.other(x).sum() + self.norm(x[:, :4]).sum() + self.norm(x[:, :2]).sum()

    model = Two()
    with kn.Monitor(model, 1) as monitor:
        model(torch.randn(16, 8)).backward()
    assert list(monitor.observations[0].layers) == ["other"]


def test_an_error_of_its_own_does_not_end_the_training(monkeypatch):
    model = network()
    monkeypatch.setattr(module, "run_rules", lambda *args: 1 / 0)
    monitor = kn.Monitor(model, 2).start()
    with pytest.warns(MonitorWarning, match="step 2 could not be read: ZeroDivisionError"):
        train(model, 3)
    monitor.stop()
    assert all(not part._forward_pre_hooks for part in model.modules())


def test_layers_that_are_gone_do_not_end_the_training():
    model = network()
    monitor = kn.Monitor(model, 1, where="5").start()
    model[5] = nn.Identity()
    with pytest.warns(MonitorWarning, match="could not be read: .*where='5' matches no batch norm"):
        train(model, 2)
    monitor.stop()
    assert monitor.steps == 2
    assert monitor.observations == []


def test_an_error_in_the_block_is_not_followed_by_another():
    def fails():
        with kn.Monitor(network(), 1):
            raise KeyError("before the first step")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError):
            fails()


def test_a_sink_that_stops_it():
    model = network()
    monitors: list[kn.Monitor] = []
    monitor = kn.Monitor(model, 1, to=lambda seen: monitors[0].stop())
    monitors.append(monitor)
    with monitor as same:
        assert same is monitor
        train(model, 3)
    assert monitor.steps == 1
    assert all(not part._forward_pre_hooks for part in model.modules())
    with kn.Monitor(model, 1).start() as started:
        train(model, 1)
    assert started.steps == 1


def test_weights_behind_an_activation_in_place_are_not_in_front():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.BatchNorm1d(8))
    with kn.Monitor(model, 1) as monitor:
        model(torch.randn(16, 4)).sum().backward()
    assert monitor.observations[0].layers["2"].weights is None


def test_layers_are_in_the_order_in_which_they_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(5))

        def forward(self, x):
            for part in reversed(self.parts):
                x = part(x)
            return x

    model = Backwards()
    with kn.Monitor(model, 1) as monitor:
        model(torch.randn(16, 4)).sum().backward()
    assert list(monitor.observations[0].layers) == [f"parts.{index}" for index in (4, 3, 2, 1, 0)]


def test_a_replaced_layer_is_followed():
    model = network()
    with kn.Monitor(model, 1) as monitor:
        train(model, 1)
        model[1] = kn.BatchNorm2d(4)
        train(model, 1)
    assert [list(seen.layers) for seen in monitor.observations] == [["1", "5"], ["1", "5"]]


def test_a_model_inside_of_compiled_code(tmp_path):
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, backend="eager")
    monitor = kn.Monitor(model, 1).start()
    train(compiled, 2)
    if not monitor.steps:
        with pytest.warns(MonitorWarning, match="no training step was seen.*follow the compiled module"):
            monitor.stop()
    monitor.stop()


def test_a_record_is_continued_and_nothing_else(tmp_path):
    path, model = tmp_path / "record.csv", network()
    for _ in range(2):
        with kn.Monitor(model, 1, to=path):
            train(model, 1)
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["step", "1", "1", "1", "1"]
    path.write_text("my,own,table\n1,2,3\n")
    with pytest.raises(ValueError, match="no record of a monitor"):
        kn.Monitor(model, 1, to=path)
    assert path.read_text() == "my,own,table\n1,2,3\n"
