"""Copies run their own layers, pickles come back as what they were, and names are names, whatever stands in them."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusion.twins import LEARNED, Net, after, alike, batch, outcome, plainly, same, small_tensors_wait, twins  # noqa: F401
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.engine.fusion import pending
from keelnorm.engine.fusion.expectations import ATTRIBUTE


class Model(nn.Module):
    """Of a class that pickle can find."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()
        self.tail = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU())
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.act(self.bn(self.conv(x))))


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _replica(model: Any) -> Any:
    """As DataParallel makes them: modules are copied, children and parameters put in."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, other in copies.items():
        for name, child in module._modules.items():
            other._modules[name] = copies[child]
            setattr(other, name, copies[child])
        for name, parameter in module._parameters.items():
            other._parameters.pop(name, None)
            setattr(other, name, None if parameter is None else parameter.clone())
        for name, buffer in module._buffers.items():
            other._buffers[name] = buffer if buffer is None else buffer.clone()
    return copies[model]


def _shallow(model: Any) -> Any:
    other = copy.copy(model)
    other.__dict__["_modules"] = dict(model._modules)
    return other


COPIES = {
    "deepcopy": copy.deepcopy, "pickle": _pickled, "torch.save": _saved, "replica": _replica, "copy.copy": copy.copy,
    "copy of a copy": lambda m: copy.deepcopy(_pickled(m)), "own modules": _shallow,
}  # fmt: skip


def _alike(converted: Any, twin: Any, calls: int = 3) -> int:
    """Both do alike, in training and in evaluation; how many kernels ran."""
    before = pending.completed
    for training in (True,) * calls + (False,) * calls:
        x = batch()
        # parameters of replicas are no leaves
        same(*(outcome(model.train(training), x, plainly) for model in (converted, twin)))
    return pending.completed - before


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("used", [0, 1, 3])
def test_copies_do_as_copies_of_the_twin(way: str, used: int) -> None:
    """A copy of a converted model, before and after layers have learned, and the original afterwards."""
    converted, twin = twins(Model())
    if used:
        _alike(converted, twin, used)
    mine, other = COPIES[way](converted), COPIES[way](twin)
    fused = _alike(mine, other)
    assert fused > 0 or way == "replica"  # its parameters are no Parameters any more
    _alike(converted, twin)
    _alike(mine, other)


@pytest.mark.parametrize("way", ["copy.copy", "replica", "own modules"])
def test_copies_run_their_own_children(way: str) -> None:
    """What is put into a copy runs there, and the original keeps its own."""
    converted, twin = twins(Model())
    _alike(converted, twin)
    mine, other = COPIES[way](converted), COPIES[way](twin)
    for model in (mine, other):
        model._modules = dict(model._modules)
        torch.manual_seed(5)
        model._modules["conv"] = nn.Conv2d(3, 3, 3).double()
        model._modules["act"] = nn.Tanh()
    _alike(mine, other)
    _alike(converted, twin)


def test_copy_made_inside_the_forward() -> None:
    """A result is settled before its layer is copied; the copy has the counted statistics."""

    def body(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        other = copy.deepcopy(m.bn)
        z = torch.relu(y)
        return z, other.running_mean.clone(), other.eval()(x)

    for learned in LEARNED:
        alike(Net(after(learned, body)))


def test_data_parallel_on_the_cpu() -> None:
    converted, twin = twins(Model())
    assert _alike(nn.DataParallel(converted), nn.DataParallel(twin)) > 0


def test_replicas_in_threads() -> None:
    """As DataParallel calls them: each in a thread of its own, and their gradients reach the original."""
    converted, twin = twins(Model())
    _alike(converted, twin)
    for _ in range(4):
        x, results = [batch() for _ in range(4)], []
        for model in (converted, twin):
            model.train().zero_grad()
            replicas = [_replica(model) for _ in x]
            with ThreadPoolExecutor(4) as pool:
                ys = list(pool.map(lambda replica, x: replica(x), replicas, x))
            torch.cat(ys).square().sum().backward()
            means = [replica.bn.running_mean for replica in replicas]
            results.append((ys, means, {name: p.grad for name, p in model.named_parameters()}))
        same(*results)


def _sync(model: Any) -> Any:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _replaced(model: Any) -> Any:
    model.bn = nn.BatchNorm2d(3).double()
    return model


def _instance_norm(model: Any) -> Any:
    model.tail[1] = nn.GroupNorm(1, 3).double()
    return model


def _identity(model: Any) -> Any:
    model.bn = nn.Identity()
    return model


def _own_class(model: Any) -> Any:
    model.bn.__class__ = nn.BatchNorm2d
    return model


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
@pytest.mark.parametrize("change", [_sync, _replaced, _instance_norm, _identity, _own_class], ids=lambda f: f.__name__)
@pytest.mark.parametrize("used", [0, 3])
def test_changed_models_are_pickled(way: str, change: Any, used: int) -> None:
    """Layers replaced after convert, by others and by torch's own tool."""
    converted, twin = twins(Model())
    if used:
        _alike(converted, twin)
    converted, twin = change(converted), change(twin)
    if change is _sync:
        converted, twin = converted.eval(), twin.eval()
    mine, other = COPIES[way](converted), COPIES[way](twin)
    for one, two in ((converted, twin), (mine, other)):
        for i in range(6):
            x = batch()
            training = change is not _sync and i < 3
            same(*(outcome(model.train(training), x, plainly) for model in (one, two)))


def test_old_pickles_without_a_memory() -> None:
    """A layer whose memory is gone waits no more, and is right."""
    converted, twin = twins(Model())
    del converted.bn.__dict__[ATTRIBUTE]
    _alike(converted, twin)


def test_state_dicts_are_interchangeable() -> None:
    converted, twin = twins(Model())
    _alike(converted, twin)
    assert list(converted.state_dict()) == list(twin.state_dict())
    new, other = Model(), kn.convert(Model())[0]
    new.load_state_dict(converted.state_dict())
    other.load_state_dict(twin.state_dict())
    _alike(other, new)


def test_revert_works_on_copies() -> None:
    converted, twin = twins(Model())
    _alike(converted, twin)
    for way in ("pickle", "deepcopy", "replica"):
        mine, other = COPIES[way](converted), COPIES[way](twin)
        mine, _ = kn.revert(mine)
        assert _alike(mine, other) == 0


NAMES = [
    "global", "class", "None", "self", "x", "forward_", "quo'te", 'quo"te', "back\\slash", "new\nline", "ﬁ", "ſ", "Å",
    "ünïcödé", "名前", "a b", "1", "a-b", "{}", "%s", "__import__('os')", "*", "[0]", "#", "🙂", "_", " ",
    "lambda: 0", "__class__2", "bn(x)",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_name_will_do(name: str) -> None:
    """A ModuleDict takes any key but those with a dot."""
    parts = nn.ModuleDict({name: nn.BatchNorm2d(3), name + "2": nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())})
    model = Net(lambda m, x: m.parts[name + "2"](torch.relu(m.parts[name](m.conv(x)))), parts=parts)
    converted = alike(model)
    _, report = kn.convert(converted)
    assert f"parts.{name}" in [row["path"] for row in report.rows]


def test_same_names_after_normalizing() -> None:
    """Python takes these two for one identifier; a ModuleDict does not."""
    layers = nn.ModuleDict({"ﬁ": nn.BatchNorm2d(3), "fi": nn.BatchNorm2d(3)})

    def body(m: Any, x: Tensor) -> Tensor:
        return torch.relu(m.layers["ﬁ"](m.conv(x))) + F.silu(m.layers["fi"](m.conv2(x)))

    alike(Net(body, layers=layers))


def test_attributes_that_hide_names() -> None:
    """Layers reached by getattr, a property and add_module."""
    model = Net(lambda m, x: torch.relu(getattr(m, "layer 1")(m.conv(x))))
    model.add_module("layer 1", nn.BatchNorm2d(3).double())
    alike(model)


def test_no_warning_from_copies() -> None:
    converted, _ = twins(Model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for way in COPIES.values():
            way(converted)(batch())
