"""What a forward reads is read on every call: nothing of an earlier one is kept, and what it does is done once."""

from __future__ import annotations

import os
import random
import types
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusion.twins import MODES, Net, alike, outcome, plainly, same, small_tensors_wait, twins  # noqa: F401
from torch import Tensor, nn

import keelnorm as kn


class _Head(nn.Module):
    """A child with a method of its own that parents call."""

    flag = False

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class _Other(_Head):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * 3


class _Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


@dataclass
class _Config:
    act: str = "relu"
    options: dict[str, Any] = field(default_factory=lambda: {"slope": 0.1})


SWITCH = {"on": False}


def _set(path: str, value: Any) -> Any:
    def change(model: Any) -> None:
        *owners, name = path.split(".")
        for owner in owners:
            model = getattr(model, owner)
        setattr(model, name, value() if callable(value) and getattr(value, "makes", False) else value)

    return change


def _bn(model: Any, x: Tensor) -> Tensor:
    return model.bn(model.conv(x))


def _branching(read: Any) -> Any:
    """A body that takes relu or tanh, as something says."""
    return lambda m, x: torch.relu(_bn(m, x)) if read(m) else torch.tanh(_bn(m, x))


def _or(error: type[Exception], attempt: Any, instead: Any) -> Any:
    def body(m: Any, x: Tensor) -> Any:
        y = _bn(m, x)
        try:
            return attempt(y)
        except error:
            return instead(y)

    return body


def _replace_forward(model: Any) -> None:
    model.head.forward = types.MethodType(lambda self, x: F.silu(x), model.head)


def _to_plain_layer(model: Any) -> None:
    new = nn.BatchNorm2d(3).double()
    new.load_state_dict(model.bn.state_dict())
    model.bn = new


def _new_weight(model: Any) -> None:
    model.bn.weight = nn.Parameter(torch.full((3,), 0.3, dtype=torch.float64))


#: A body, and what changes of the model before the fourth call and before the sixth.
CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "dropout in a child's method": (lambda m, x: m.head.drop(torch.relu(_bn(m, x))), {"head": _Head()}, None),
    "dropout on the result itself": (lambda m, x: torch.relu(m.head.drop(_bn(m, x))), {"head": _Head()}, None),
    "child's attribute": (_branching(lambda m: m.head.p > 0), {"head": _Head()}, _set("head.p", 0.0)),
    "buffer's value": (
        _branching(lambda m: float(m.on) > 0), {"head": _Head()}, lambda m: m.on.fill_(0) if hasattr(m, "on") else None,
    ),
    "attribute set later": (_branching(lambda m: hasattr(m, "late")), {}, _set("late", 1)),
    "config's contents": (
        lambda m, x: F.leaky_relu(_bn(m, x), m.config.options["slope"]), {"config": _Config()},
        lambda m: m.config.options.update(slope=0.4),
    ),
    "config's name of a function": (
        lambda m, x: getattr(F, m.config.act)(_bn(m, x)), {"config": _Config()}, _set("config.act", "silu"),
    ),
    "slope of an activation": (
        lambda m, x: m.act(_bn(m, x)), {"act": nn.LeakyReLU(0.1)}, _set("act.negative_slope", 0.4),
    ),
    "alpha of an activation": (lambda m, x: m.act(_bn(m, x)), {"act": nn.ELU(1.0)}, _set("act.alpha", 0.4)),
    "inplace of an activation": (lambda m, x: m.act(_bn(m, x)), {"act": nn.ReLU()}, _set("act.inplace", True)),
    "approximation of an activation": (
        lambda m, x: m.act(_bn(m, x)), {"act": nn.GELU()}, _set("act.approximate", "tanh"),
    ),
    "beta of a swish": (lambda m, x: m.act(torch.relu(_bn(m, x))), {"act": _Swish()}, _set("act.beta", 2.0)),
    "beta of a swish behind the layer": (lambda m, x: m.act(_bn(m, x)), {"act": _Swish()}, _set("act.beta", 2.0)),
    "activation replaced": (lambda m, x: m.act(_bn(m, x)), {}, lambda m: setattr(m, "act", nn.Tanh())),
    "function replaced": (lambda m, x: m.f(_bn(m, x)), {"f": torch.relu}, _set("f", torch.sigmoid)),
    "method patched on the instance": (lambda m, x: m.head(_bn(m, x)), {"head": _Head()}, _replace_forward),
    "class replaced": (lambda m, x: m.head(_bn(m, x)), {"head": _Head()}, _set("head.__class__", _Other)),
    "layers of a Sequential without its call": (
        lambda m, x: _through(m.rest, x), {"rest": nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())},
        lambda m: m.rest.append(nn.Sigmoid()),
    ),
    "layers of a ModuleList": (
        lambda m, x: _through(m.rest, x), {"rest": nn.ModuleList([nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()])},
        lambda m: m.rest.insert(2, nn.Tanh()),
    ),
    "try around a branch on a value": (
        _or(RuntimeError, lambda y: y if y.relu().sum() > 0 else -y, lambda y: y * 7), {}, None,
    ),
    "try around len": (_or(TypeError, lambda y: torch.relu(y) * len(y), lambda y: y * 7), {}, None),
    "try around what fails": (_or(RuntimeError, lambda y: y + torch.ones(5), torch.relu), {}, None),
    "try around a missing attribute": (_or(AttributeError, lambda y: y.no_such, torch.relu), {}, None),
    "eps of the layer": (lambda m, x: torch.relu(_bn(m, x)), {}, _set("bn.eps", 0.3)),
    "momentum of the layer": (lambda m, x: torch.relu(_bn(m, x)), {}, _set("bn.momentum", None)),
    "tracking of the layer": (lambda m, x: torch.relu(_bn(m, x)), {}, _set("bn.track_running_stats", False)),
    "weight of the layer": (lambda m, x: torch.relu(_bn(m, x)), {}, _new_weight),
    "values of the weight": (lambda m, x: torch.relu(_bn(m, x)), {}, lambda m: m.bn.weight.data.mul_(2)),
    "frozen weight": (lambda m, x: torch.relu(_bn(m, x)), {}, lambda m: m.bn.requires_grad_(False)),
    "torch.nn's layer instead": (lambda m, x: torch.relu(_bn(m, x)), {}, _to_plain_layer),
    "body replaced": (lambda m, x: torch.relu(_bn(m, x)), {}, _set("body", lambda m, x: _bn(m, x) * 2)),
    "layer removed": (
        lambda m, x: m.bn(m.conv(x)).relu() if m.bn is not None else m.conv(x), {}, _set("bn", None),
    ),
}  # fmt: skip


#: Where the first thing done with the result is none that fuses.
NOT_FUSED = {"beta of a swish behind the layer", "try around what fails"}


def _through(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


@pytest.mark.parametrize("case", CASES)
def test_changes_between_calls_are_seen(case: str) -> None:
    body, parts, change = CASES[case]
    model = Net(body, **parts)
    if case == "buffer's value":
        model.register_buffer("on", torch.ones(()))
    modes = (True, True, True, True, True, True, False, False, False, True)
    alike(model, modes=modes, changes={3: change, 7: change} if change else None, fuses=case not in NOT_FUSED)


def test_layer_frozen_alone() -> None:
    """A layer in evaluation inside a model in training, and back."""

    def run(model: Any, x: Tensor) -> Tensor:
        model.bn.train(len(model.runs) % 4 < 2)
        model.runs.append(1)
        return model(x)

    model = Net(lambda m, x: torch.relu(_bn(m, x)), runs=[])
    alike(model, run, modes=(True,) * 9)


@pytest.mark.parametrize("kind", ["class attribute", "forward of a class", "a global", "the environment", "torch"])
def test_changes_outside_the_model_are_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = {
        "class attribute": lambda m: m.head.flag,
        "a global": lambda m: SWITCH["on"],
        "the environment": lambda m: os.environ.get("KEELNORM_TEST_SWITCH") == "1",
    }
    body = _branching(reads[kind]) if kind in reads else lambda m, x: m.head(F.silu(_bn(m, x)))
    converted, twin = twins(Net(body, head=_Head()))
    for i in range(7):
        if i == 3:
            monkeypatch.setattr(_Head, "flag", True)
            monkeypatch.setitem(SWITCH, "on", True)
            monkeypatch.setenv("KEELNORM_TEST_SWITCH", "1")
            if kind == "forward of a class":
                monkeypatch.setattr(_Head, "forward", lambda self, x: x.sigmoid())
            if kind == "torch":
                monkeypatch.setattr(F, "silu", lambda x: x * 5)
        x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
        same(outcome(converted, x, plainly), outcome(twin, x, plainly))


def test_random_branches_follow_their_generator() -> None:
    """An own random.Random decides which activation follows."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = _bn(m, x)
        return (torch.relu, torch.tanh, F.silu, torch.abs, lambda y: y + x)[m.dice.randrange(5)](y)

    alike(Net(body, dice=random.Random(3)), modes=(True,) * 25, fuses=None)


@pytest.mark.parametrize("kept", [None, True])
def test_side_effects_happen_once_a_call(kept: bool | None) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        m.step += 1
        y = _bn(m, x)
        m.seen.append(y)
        m.store["last"] = y
        m.holder.value = y
        if kept:
            m.kept = y
        m.counts += 1
        return torch.relu(y) + torch.relu(m.bn2(m.conv2(x)))

    def run(model: Any, x: Tensor) -> Any:
        y = model(x)
        result = (y, model.step, list(model.seen), dict(model.store), vars(model.holder).copy(), model.counts.clone())
        model.seen.clear()
        return result + ((model.kept,) if kept else ())

    model = Net(body, step=0, seen=[], store={}, holder=types.SimpleNamespace())
    model.register_buffer("counts", torch.zeros(()))
    assert alike(model, run).step == len(MODES)


def test_side_effects_where_nothing_is_converted() -> None:
    """convert itself runs nothing, and neither where it refuses."""

    def body(m: Any, x: Tensor) -> Any:
        m.step += 1
        return torch.relu(_bn(m, x))

    model = Net(body, step=0)
    vars(model.bn)["forward"] = model.bn.forward
    kn.convert(model)
    assert model.step == 0
    with pytest.raises(ValueError, match="nothing"):
        kn.convert(model, where="nothing.*")
    assert model.step == 0


def test_printing_happens_on_every_call(capsys: pytest.CaptureFixture[str]) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = _bn(m, x)
        print(y.detach())
        print(f"{y.mean():.6f}", tuple(y.shape), y.requires_grad)
        return torch.relu(y)

    converted, twin = twins(Net(body))
    for _ in range(4):
        x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
        converted(x)
        said = capsys.readouterr().out
        twin(x)
        assert said == capsys.readouterr().out != ""
