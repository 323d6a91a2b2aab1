"""Models and Sequentials inside one another, and calls inside calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fusion.twins import LEARNED, Net, ResNet, after, alike, batch, outcome, same, small_tensors_wait, twins  # noqa: F401
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.engine.fusion import pending


def test_recursion() -> None:
    """The model calls itself within its forward."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        if x.shape[0] > 1:
            rest = m(x[: x.shape[0] // 2])
            y = y + rest.mean()
        return torch.relu(y)

    alike(Net(body), fuses=None)


def test_other_model_inside_the_forward() -> None:
    """A teacher, converted as well, that is no child; called while the student's result waits."""
    teachers = twins(ResNet())
    converted, twin = twins(Net(lambda m, x: (lambda y: torch.relu(y + m.teacher[0](x)))(m.bn(m.conv(x)))))
    converted.teacher, twin.teacher = [teachers[0]], [teachers[1]]
    before = pending.completed
    for i in range(8):
        x = batch()
        same(*(outcome(m.train(i < 4), x, lambda m, x: (m(x), m.teacher[0](x))) for m in (converted, twin)))
    assert pending.completed > before


SEQUENTIALS: dict[str, Any] = {
    "relu": lambda: [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()],
    "in place": lambda: [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)],
    "last": lambda: [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)],
    "two": lambda: [nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.SiLU()],
    "dropout": lambda: [nn.BatchNorm2d(3), nn.Dropout(0.5), nn.SiLU()],
    "identity": lambda: [nn.BatchNorm2d(3), nn.Identity(), nn.SiLU()],
    "softmax": lambda: [nn.BatchNorm2d(3), nn.Softmax(1)],
    "flatten": lambda: [nn.BatchNorm2d(3), nn.Flatten(), nn.ReLU()],
}


@pytest.mark.parametrize("kind", SEQUENTIALS)
@pytest.mark.parametrize("where", ["kn.Sequential", "inside a model", "nested"])
def test_sequentials(kind: str, where: str) -> None:
    """torch.nn's inside a converted model, ours by itself, ours inside."""
    layers = SEQUENTIALS[kind]()
    if where == "inside a model":
        alike(Net(lambda m, x: torch.relu(m.rest(m.conv(x))), rest=nn.Sequential(*layers)), fuses=None)
        return
    twin: Any = nn.Sequential(*layers).double()
    if where == "nested":
        twin = nn.Sequential(twin, nn.BatchNorm2d(3).double(), nn.ReLU()) if kind != "flatten" else nn.Sequential(twin)
    mine, twin = twins(twin, fuse=False)
    mine = _with(mine, kn.Sequential)
    for i in range(9):
        torch.manual_seed(i)
        x = batch()
        same(*(outcome(m.train(i < 5), x, lambda m, x: m(x), i) for m in (mine, twin)))


def _with(model: nn.Module, kind: type) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.Sequential:
            module.__class__ = kind
    return model


def test_ek_sequential_fuses() -> None:
    net = kn.Sequential(nn.Conv2d(3, 3, 1), kn.BatchNorm2d(3), nn.ReLU()).double()
    for _ in range(3):
        net(batch())
    before = pending.completed
    assert type(net(batch())) is Tensor
    assert pending.completed == before + 1


def test_scopes_are_put_back_by_revert() -> None:
    converted, twin = twins(ResNet())
    for _ in range(3):
        converted(batch())
    converted, _ = kn.revert(converted)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in converted.modules())
    twin.load_state_dict(converted.state_dict())
    x = batch()
    same(*(outcome(m, x, lambda m, x: m(x)) for m in (converted, twin)))
