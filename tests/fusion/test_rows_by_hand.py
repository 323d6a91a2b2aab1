"""Activations written by hand, what stands in front of one, and results that nobody uses."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusion.twins import LEARNED, Net, after, alike, batch, outcome, plainly, same, small_tensors_wait, twins  # noqa: F401
from torch import Tensor, nn

from keelnorm.engine.fusion import pending


def _values(layer: Any) -> Any:
    return {name: t.clone() for name, t in layer.state_dict().items()}


HAND_WRITTEN: dict[str, Any] = {
    "swish": lambda y: y * torch.sigmoid(y),
    "swish, turned": lambda y: torch.sigmoid(y) * y,
    "swish, method": lambda y: y.mul(y.sigmoid()),
    "swish in place": lambda y: y.sigmoid().mul_(y),
    "hardswish": lambda y: y * F.relu6(y + 3) / 6,
    "hardswish, other order": lambda y: y * (F.relu6(y + 3) / 6),
    "hardswish of hardtanh": lambda y: y * F.hardtanh(y + 3.0, 0.0, 6.0) / 6.0,
    "hardsigmoid": lambda y: F.relu6(y + 3) / 6,
    "hardsigmoid in place": lambda y: F.relu6(y + 3.0, inplace=True) / 6.0,
    "mish": lambda y: y * torch.tanh(F.softplus(y)),
    "mish of modules": lambda y: y * nn.Tanh()(nn.Softplus()(y)),
}
#: Nearly those, and no activation that fuses.
NEARLY: dict[str, Any] = {
    "square": lambda y: y * y,
    "swish of another": lambda y: torch.sigmoid(y) * (y + 0),
    "swish of two factors": lambda y: y * torch.sigmoid(1.702 * y),
    "relu times start": lambda y: torch.relu(y) * y,
    "tanh times start": lambda y: torch.tanh(y) * y,
    "plus four": lambda y: y * F.relu6(y + 4) / 6,
    "over three": lambda y: y * F.relu6(y + 3) / 3,
    "plus three, no relu6": lambda y: (y + 3) / 6,
    "plus three, used twice": lambda y: (lambda z: F.relu6(z) / 6 + z)(y + 3),
    "sigmoid used twice": lambda y: (lambda s: s * y + s)(torch.sigmoid(y)),
    "sigmoid plus start": lambda y: torch.sigmoid(y) + y,
    "softplus times start": lambda y: F.softplus(y) * y,
    "mish with beta": lambda y: y * torch.tanh(F.softplus(y, beta=2)),
    "glu by hand": lambda y: torch.sigmoid(y) * y.flip(1),
    "three in place": lambda y: y.add_(3).clamp_(0, 6).div_(6),
    "swish that writes": lambda y: y.mul_(torch.sigmoid(y)),
    "sigmoid that writes": lambda y: y.sigmoid_() * y,
    "whole numbers": lambda y: torch.relu(torch.div(y + 3, 6, rounding_mode="floor") + y),
}


def _detached(m: Any, x: Tensor) -> Any:
    return torch.utils._pytree.tree_map(torch.detach, m(x))


@pytest.mark.parametrize("name", [*HAND_WRITTEN, *NEARLY])
@pytest.mark.parametrize("residual", [False, True])
def test_activations_written_by_hand(name: str, residual: bool) -> None:
    act = HAND_WRITTEN.get(name) or NEARLY[name]

    def body(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        return act(y + x if residual else y)

    for learned in LEARNED:
        before = pending.completed
        model = Net(after(learned, body))
        run = _detached if name == "whole numbers" else plainly
        alike(model, run, fuses=None)
        assert pending.completed > before or name not in HAND_WRITTEN


@pytest.mark.parametrize("act", [torch.relu, F.silu, F.gelu, lambda y: y * torch.sigmoid(y)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("later", [torch.sum, torch.relu, lambda y: y * 2, lambda y: y.add_(1), lambda y: y])
def test_value_in_front_of_an_activation(act: Any, residual: bool, later: Any) -> None:
    """Asked for afterwards it is computed again, without a second update; then the layer stops before it."""

    def body(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        y = y + x if residual else y
        z = act(y)
        return z.clone(), later(y), _values(m.bn)

    for learned in LEARNED:
        converted = alike(Net(after(learned, body)), modes=(True,) * 7 + (False,) * 7, fuses=None)
        if learned == "nothing":
            before = pending.completed
            converted.train()(batch())
            assert pending.completed - before == (1 if residual else 0)


@pytest.mark.parametrize("learned", LEARNED)
@pytest.mark.parametrize("collect", [False, True])
def test_results_that_nobody_uses(learned: str, collect: bool) -> None:
    """The running statistics count each call once, in order, whether its result is used or not."""

    def body(m: Any, x: Tensor) -> Any:
        m.bn(m.conv(x))
        y = m.bn(m.conv(3 * x))
        if collect:
            del y
            gc.collect(1)
        m.bn2(m.conv2(x))
        last = m.bn(m.conv(5 * x))
        return torch.relu(m.bn2(x)), _values(m), last if collect else None

    alike(Net(after(learned, body)), modes=(True,) * 6 + (False,) * 4 + (True,), fuses=None)
