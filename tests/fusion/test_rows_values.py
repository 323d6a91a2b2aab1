"""Calls keep their order, changes in place reach all who hold the tensor, types of results and dtypes stay."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusion.twins import LEARNED, TRAINING, Net, after, alike, batch, small_tensors_wait, twins  # noqa: F401
from torch import Tensor, nn


def _bn(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x))


def _shared(m: Any, x: Tensor) -> Tensor:
    a, b = m.bn(m.conv(x)), m.bn(m.conv(2 * x))
    return torch.relu(a) - b


def _shared_reversed(m: Any, x: Tensor) -> Tensor:
    a, b = m.bn(m.conv(x)), m.bn(m.conv(2 * x))
    return torch.relu(b) - torch.relu(a)


def _shared_both_added(m: Any, x: Tensor) -> Tensor:
    return torch.relu(m.bn(m.conv(x)) + m.bn(m.conv(2 * x)))


def _dropped(m: Any, x: Tensor) -> Tensor:
    m.bn(m.conv(x + 1))
    y = m.bn(m.conv(x))
    del y
    return torch.relu(m.bn(m.conv(2 * x)))


def _dropped_later(m: Any, x: Tensor) -> Tensor:
    y = m.bn2(m.conv2(x))
    z = torch.relu(m.bn(m.conv(x)))
    del y
    return z


def _statistics_between(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    seen = [m.bn.running_mean.clone(), float(m.bn.running_var.sum()), int(m.bn.num_batches_tracked)]
    z = torch.relu(y)
    return z, seen, m.bn.running_mean.clone()


def _statistics_between_with_residual(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    before = m.bn.running_mean.clone()
    y = y + x
    between = m.bn.running_var.clone()
    return torch.relu(y), before, between, m.bn.num_batches_tracked.clone()


def _inner_statistics(m: Any, x: Tensor) -> Any:
    """A second layer normalizes with what the first has just counted."""
    y = m.bn(m.conv(x))
    return torch.relu(y), x * m.bn.running_mean.reshape(1, 3, 1, 1)


def _residual_reused(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    z = y + x
    return torch.relu(z), z, y


def _two_readers(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    return torch.relu(y), F.silu(y), y.sum()


def _in_front_of_the_activation(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    z = torch.relu(y)
    return z, y


def _three_added(m: Any, x: Tensor) -> Tensor:
    return torch.relu(_bn(m, x) + x + m.bn2(m.conv2(x)))


def _minus(m: Any, x: Tensor) -> Tensor:
    return torch.relu(x - torch.relu(_bn(m, x)))


def _in_place_on_result(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    held = [y]
    y.relu_()
    return y, held[0], y is held[0]


def _in_place_addition_to_x(m: Any, x: Tensor) -> Any:
    held = x
    x += _bn(m, x.clone())
    return torch.relu(x), held, held is x


def _in_place_addition_to_result(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    held = y
    y += x
    z = F.relu(y, inplace=True)
    return z, held, z is held, y is held


def _in_place_module(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    z = m.act(y)
    return z, y, z is y


def _in_place_on_activation(m: Any, x: Tensor) -> Any:
    z = F.silu(_bn(m, x))
    held = z
    z.mul_(2)
    z += 1
    return z, held, z is held


def _view_before(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    view = y.view(4, -1)
    y.relu_()
    return y, view


def _view_changed(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    y[0].zero_()
    y[:, 1] += 3
    return torch.relu(y), y


def _flattened(m: Any, x: Tensor) -> Any:
    y = _bn(m, x).flatten(1)
    y[:, 0] = 5
    return torch.relu(y)


def _detached(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    d = y.detach()
    with torch.no_grad():
        d.mul_(2)
    return y.clone(), d


def _detached_in_place(m: Any, x: Tensor) -> Any:
    return torch.relu(_bn(m, x).detach_()), x.sum()


def _data(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    y.data.mul_(2)
    return torch.relu(y.clone())


def _set_data(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    y.data = torch.ones_like(x)
    return y * 2


def _copied_into(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    buffer = torch.zeros_like(y)
    buffer.copy_(y)
    out = torch.empty_like(x.detach())
    with torch.no_grad():
        torch.add(y, x, out=out)
    return buffer, out, torch.relu(y)


def _out_is_the_result(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = _bn(m, x)
        torch.mul(x, 2, out=y)
        return torch.relu(y), y


def _chunks(m: Any, x: Tensor) -> Any:
    a, b = _bn(m, x).chunk(2)
    return torch.relu(a) + b


def _no_grad_inside(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = _bn(m, x)
    return torch.relu(y), x.sum()


def _activation_without_grad(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    with torch.no_grad():
        z = torch.relu(y)
    return z, y.sum()


def _activation_with_grad(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = _bn(m, x)
    with torch.enable_grad():
        return torch.relu(y + x)


def _with_itself(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    return y + y, y * y, torch.relu(y)


def _mode_flipped(m: Any, x: Tensor) -> Any:
    y = _bn(m, x)
    m.bn.train(not m.bn.training)
    z = torch.relu(y)
    m.bn.train(not m.bn.training)
    return z, y.sum()


def _in_place_sum_of_two(m: Any, x: Tensor) -> Any:
    a, b = _bn(m, x), m.bn2(m.conv2(x))
    held = a
    a += b
    return torch.relu(a), held, b


BODIES = [f for name, f in list(globals().items()) if isinstance(f, types.FunctionType) and f.__module__ == __name__]
BODIES.remove(_bn)
#: What runs as one kernel here, at least sometimes.
FUSED = {
    _shared_reversed, _shared_both_added, _dropped, _dropped_later, _statistics_between, _residual_reused,
    _statistics_between_with_residual, _inner_statistics, _two_readers, _in_front_of_the_activation, _three_added,
    _minus, _in_place_on_result, _in_place_addition_to_result, _in_place_module, _in_place_on_activation,
    _mode_flipped, _in_place_sum_of_two,
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("learned", LEARNED)
def test_order_and_aliases(body: Any, learned: str) -> None:
    """What is read between, who sees a change in place, in which order statistics are counted."""
    parts = {"act": nn.ReLU(inplace=True)} if body is _in_place_module else {}
    alike(
        Net(after(learned, body), **parts), lambda m, x: (m(x), x), fuses=learned != "nothing" or body in FUSED or None
    )


@pytest.mark.parametrize("body", BODIES, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("learned", ["nothing", "relu", "addition, relu"])
def test_order_and_aliases_where_nothing_has_gradients(body: Any, learned: str) -> None:
    """The input does not require gradients, and neither do the parameters."""
    parts = {"act": nn.ReLU(inplace=True)} if body is _in_place_module else {}
    model = Net(after(learned, body), **parts).requires_grad_(False)

    def run(m: Any, x: Tensor) -> Any:
        x = x.detach()
        return m(x), x

    alike(model, run, fuses=None)
