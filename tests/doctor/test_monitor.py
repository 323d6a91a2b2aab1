"""``kn.Monitor``: what it sees, that training is as without it, where it writes, and when it speaks."""

from __future__ import annotations

import copy
import csv
import pickle
import random
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from followed import data, network, train
from torch import nn
from torch.nn.parallel import DataParallel
from torch.utils.checkpoint import checkpoint

import keelnorm as kn
from keelnorm.doctor import MonitorWarning
from keelnorm.doctor.monitor import monitor as module


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def converted():
    model, _ = kn.convert(network())
    return model


def hooks(model):
    return [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()]


@pytest.mark.parametrize("make", [network, converted, Checkpointed, lambda: DataParallel(network())])
@pytest.mark.parametrize("every", [1, 2])
def test_training_is_as_without_it(make, every):
    plain, followed = make(), make()
    before = hooks(followed)
    torch.manual_seed(3)
    wanted = train(plain)
    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    torch.manual_seed(3)
    with kn.Monitor(followed, every) as monitor:
        assert train(followed) == wanted
    assert torch.equal(states[0], torch.get_rng_state())
    assert (random.getstate(), repr(np.random.get_state())) == states[1:]
    for mine, one in zip(followed.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine, one)
    assert [seen.step for seen in monitor.observations] == list(range(every, 7, every))
    assert [len(seen.layers) for seen in monitor.observations] == (6 // every) * [2]
    assert hooks(followed) == before


def test_what_is_seen():
    """Against the numbers computed by hand, in float64, on a twin."""
    model = network().double()
    model[3].p = 0.0
    twin = copy.deepcopy(model)
    x = data(1)[0].double()
    with kn.Monitor(model, 1) as monitor:
        model(x).square().mean().backward()
    [seen] = monitor.observations
    first, second = seen.layers["1"], seen.layers["5"]

    inside = twin[0](x)
    inside.retain_grad()
    behind = twin[4](twin[2](twin[1](inside)))
    behind.retain_grad()
    twin[8](twin[7](twin[6](twin[5](behind)))).square().mean().backward()
    assert first.gradient == pytest.approx(float(inside.grad.norm()))
    assert second.gradient == pytest.approx(float(behind.grad.norm()))
    assert first.weights == pytest.approx(float(twin[0].weight.detach().norm()))
    assert second.weights == pytest.approx(float(twin[4].weight.detach().norm()))
    assert first.gamma == 1.0

    values = inside.detach().transpose(0, 1).flatten(1)
    mean, var = values.mean(1), values.var(1, correction=0)
    right = (values - mean[:, None]) / (var[:, None] + 1e-5).sqrt()
    change = (values / (1 + 1e-5) ** 0.5 - right).square().mean()  # running statistics are 0 and 1 before the step
    samples = inside.detach().flatten(2)
    spread = 16 / 15 * (samples.mean(2) - mean).square().mean(0)
    squares = (samples - mean[:, None]).square().mean(2)
    wide = 16 / 15 * (squares - var).square().mean(0)
    unit = var + 1e-5
    noise = ((spread / unit + var * wide / (4 * unit**3)) / 16).mean()
    assert first.noise == pytest.approx(float(noise.sqrt()), rel=1e-6)
    assert first.limit == pytest.approx(first.noise)
    assert first.drift == pytest.approx(float((change - noise).sqrt()), rel=1e-6)
    assert first.effective == pytest.approx(float((16 * var / spread).median()), rel=1e-6)


def test_only_training_steps_count():
    model = network()
    with kn.Monitor(model, 2) as monitor:
        train(model, 3)
        model.eval()(data(1)[0])
        with torch.no_grad():
            model.train()(data(1)[0])
        assert monitor.steps == 3
        assert [seen.step for seen in monitor.observations] == [2]
    train(model, 3)
    assert monitor.steps == 3
    monitor.stop()
    with monitor:
        train(model, 1)
    assert [seen.step for seen in monitor.observations] == [2, 4]


def test_nothing_runs_on_layers_between():
    model = network()
    with kn.Monitor(model, 3):
        for index, x in enumerate(data(6), 1):
            y = model(x)
            assert all(not part._forward_pre_hooks for part in model.modules() if part is not model), index
            y.sum().backward()


def test_steps_of_a_loop_that_calls_parts():
    model = network()
    monitor = kn.Monitor(model, 2)
    for x in data(4):
        monitor.begin_step()
        for part in model:
            x = part(x)
        x.square().mean().backward()
        monitor.end_step()
    assert [seen.step for seen in monitor.observations] == [2, 4]
    assert all(one.gradient > 0 for seen in monitor.observations for one in seen.layers.values())
    with monitor:
        with pytest.raises(RuntimeError, match="counts steps by itself"):
            monitor.begin_step()
        with pytest.raises(RuntimeError, match="stop"):
            monitor.start()
        train(model, 1)


def test_a_forward_that_raises_leaves_no_hook():
    model = network()
    with kn.Monitor(model, 1) as monitor:
        with pytest.raises(RuntimeError):
            model(torch.zeros(2, 7, 8, 8))
        assert all(not part._forward_pre_hooks for part in model.modules() if part is not model)
        train(model, 1)
    assert [seen.step for seen in monitor.observations] == [1, 2]
    assert monitor.observations[0].layers == {}


def test_copies_are_not_followed():
    model = network()
    monitor = kn.Monitor(model, 1).start()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    loaded = pickle.loads(pickle.dumps(model))
    for other in (averaged, loaded, copy.deepcopy(model)):
        other.train()(data(1)[0]).sum().backward()
    assert monitor.steps == 0
    with pytest.warns(MonitorWarning, match="no training step was seen"):
        monitor.stop()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """A gradient whose norm exceeds what float16 can hold."""
    model = network()
    model[3].p = 0.0
    seen = []
    for enabled in (False, True):
        with kn.Monitor(model, 1) as monitor, torch.autocast("cpu", dtype, enabled=enabled):
            (3e4 * model(data(1)[0]).float().sum()).backward()
        seen.append(monitor.observations[0].layers["5"])
    exact, half = seen
    assert half.gradient > 65504
    for name, value in exact.known().items():
        if name != "drift":  # the running statistics have moved
            assert half.known()[name] == pytest.approx(value, rel=0.1)


def test_compiled_models():
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, backend="eager")
    with kn.Monitor(compiled, 2) as monitor:
        train(compiled, 4)
    assert [len(seen.layers) for seen in monitor.observations] == [2, 2]


def test_files_and_functions(tmp_path):
    model = network()
    seen: list[kn.doctor.Observation] = []
    path = tmp_path / "record.csv"
    with kn.Monitor(model, 2, to=[seen.append, path]) as monitor:
        train(model)
    assert seen == monitor.observations
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["layer"]) for row in rows] == [(s, p) for s in ("2", "4", "6") for p in ("1", "5")]
    for row, (one, layer) in zip(rows, [(one, layer) for one in seen for layer in ("1", "5")], strict=True):
        known = one.layers[layer].known()
        assert {name: float(row[name]) for name in known} == known
        assert len(known) == 7


class Writer:
    """With the method of torch.utils.tensorboard.SummaryWriter."""

    def __init__(self):
        self.got = []

    def add_scalar(self, tag, scalar_value, global_step=None):
        self.got.append((tag, scalar_value, global_step))


class Tracker:
    """With the function of mlflow, which takes these characters in names only."""

    def __init__(self):
        self.got = []

    def log_metrics(self, metrics, step=None):
        assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_/.- :") for name in metrics)
        self.got += [(name, value, step) for name, value in metrics.items()]


class Run:
    """With the methods of a run of wandb."""

    def __init__(self):
        self.got, self.metrics = [], []

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, values):
        step = values.pop("batch_norm/step")
        self.got += [(name, value, step) for name, value in values.items()]


@pytest.mark.parametrize("kind", [Writer, Tracker, Run])
def test_loggers(kind):
    model, logger = network(), kind()
    with kn.Monitor(model, 3, to=logger) as monitor:
        train(model)
    wanted = [(name, value, seen.step) for seen in monitor.observations for name, value in seen.scalars().items()]
    assert logger.got == wanted
    assert ("batch_norm/findings", 0, 3) in wanted
    assert len(wanted) == 2 * (2 * 7 + 1)
    if kind is Run:
        assert logger.metrics == [("batch_norm/step", None), ("batch_norm/*", "batch_norm/step")]


def test_a_logger_that_raises_is_left_out(tmp_path):
    model, calls = network(), []

    def broken(seen):
        calls.append(seen.step)
        raise OSError("disk full")

    path = tmp_path / "record.csv"
    monitor = kn.Monitor(model, 2, to=[broken, path]).start()
    with pytest.warns(MonitorWarning, match=r"raised OSError: disk full\. It gets nothing from step 2 on"):
        train(model)
    monitor.stop()
    assert calls == [2]
    assert len(monitor.observations) == 3
    assert len(path.read_text().splitlines()) == 7


def test_a_rule_speaks_once_when_it_begins():
    model = network()
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with kn.Monitor(model, 1, select="broken-statistics", to=lambda seen: told.append(len(seen.began))) as monitor:
            train(model, 2)
            for _ in range(2):
                model[1].running_var[0] = float("inf")
                model[5].running_var[0] = float("inf")
                train(model, 4)
                model[1].reset_running_stats()
                model[5].reset_running_stats()
                train(model, 1)
    assert told == [0, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0, 0]
    assert [step for step, _ in monitor.findings] == [4, 4, 9, 9]
    messages = [str(one.message) for one in caught]
    assert len(messages) == 2  # one for each time, not for each layer
    assert messages[0].startswith("step 4: KN109 broken-statistics: The running variance of BatchNorm2d '1'")
    assert "The same in 1 more. Remedy:\nkn.recalibrate(model, batches" in messages[0]
    assert all(one.category is MonitorWarning for one in caught)


def test_what_passes_and_what_is_silenced_is_not_told():
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with kn.Monitor(model, 1, select="KN109", silence={"KN109": "5"}) as monitor:
            model[1].running_var[0] = float("inf")
            train(model, 1)
            model[1].reset_running_stats()
            model[5].running_var[0] = float("inf")
            train(model, 4)
    assert monitor.findings == []


def test_healthy_training_is_quiet():
    """The default rules, on data that a network can learn, with a usual schedule."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=200)
    with warnings.catch_warnings(), kn.Monitor(model, 10, optimizer=optimizer) as monitor:
        warnings.simplefilter("error", MonitorWarning)
        for x in data(200):
            target = (x.mean((1, 2, 3)) > 0).long()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
            schedule.step()
    assert len(monitor.observations) == 20


def test_the_record_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "KEPT", 8)
    model = network()
    with kn.Monitor(model, 1, select="KN109") as monitor:
        train(model, 30)
    steps = [seen.step for seen in monitor.observations]
    assert 4 <= len(steps) <= 8
    assert steps[0] == 1
    assert {after - before for before, after in pairwise(steps)} == {4}
    assert steps[-1] > 26


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"every": 0}, ValueError, "every must be a positive number"),
        ({"every": 1.5}, ValueError, "every must be a positive number"),
        ({"to": 3}, TypeError, "to must be a function of an observation"),
        ({"to": "record.txt"}, ValueError, "must end in .csv"),
        ({"to": f"{__file__}/record.csv"}, ValueError, "nothing can be written to"),
        ({"optimizer": 3}, TypeError, "optimizer must be"),
        ({"select": "KN9"}, ValueError, "which is no rule"),
        ({"where": "nowhere"}, ValueError, "nowhere"),
        ({"select": ["KN201", "KN202"]}, ValueError, "none is asked while a model trains"),
    ],
)
def test_bad_arguments(options, error, says):
    with pytest.raises(error, match=says):
        kn.Monitor(network(), **options)


def test_bad_models():
    with pytest.raises(ValueError, match="Monitor: there is no batch norm in Linear"):
        kn.Monitor(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="Monitor"):
        kn.Monitor(3)
    with pytest.raises(ValueError, match=r"Monitor: .* has no shape yet"):
        kn.Monitor(nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match=r"Monitor.write_page: nothing has been observed in 0 steps"):
        kn.Monitor(network()).write_page("page.html")
