"""Checkpoints, autocast and threads: results are right there too."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusion.twins import (  # noqa: F401
    LEARNED,
    Net,
    after,
    alike,
    batch,
    learned_twins,
    outcome,
    plainly,
    same,
    small_tensors_wait,
    twins,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


def _maybe(m: Any, f: Any, x: Tensor, reentrant: bool) -> Any:
    """A checkpoint in the converted model alone: keelnorm counts its batch once, torch's layer twice."""
    return checkpoint(f, x, use_reentrant=reentrant) if m.checkpoints else f(x)


def _alike_with_checkpoints(model: Net, run: Any, fuses: bool | None) -> None:
    vars(model)["checkpoints"] = True

    def either(m: Any, x: Tensor) -> Any:
        m.checkpoints = type(m.bn) is not nn.BatchNorm2d
        return run(m, x)

    alike(model, either, fuses=fuses)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("learned", LEARNED)
def test_checkpoints(reentrant: bool, learned: str) -> None:
    """Of a block inside, of what takes a result, of a part of the model and of the whole."""

    def body(m: Any, x: Tensor) -> Any:
        y = _maybe(m, lambda x: torch.relu(m.bn(m.conv(x)) + x), x, reentrant)
        z = m.bn2(m.conv2(y))
        return _maybe(m, torch.relu, z, reentrant), _maybe(m, F.silu, y + z, reentrant)

    _alike_with_checkpoints(Net(after(learned, body)), plainly, None if learned == "nothing" else True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_a_whole_model(reentrant: bool) -> None:
    """And of a part of it, and of a Sequential in pieces."""
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())]
    model = Net(lambda m, x: m.rest(torch.relu(m.bn(m.conv(x)) + x)), rest=nn.Sequential(*layers))

    def in_pieces(m: Any, x: Tensor) -> Any:
        return checkpoint_sequential(m.rest, 2, x, use_reentrant=reentrant) if m.checkpoints else m.rest(x)

    _alike_with_checkpoints(model, lambda m, x: (m(x), _maybe(m, m, x, reentrant)), True)
    _alike_with_checkpoints(twins(model)[1], lambda m, x: (m(x), _maybe(m, m.rest, m.conv(x), reentrant)), True)
    _alike_with_checkpoints(twins(model)[1], lambda m, x: (m(x), in_pieces(m, x)), True)


ACTS: dict[str, Any] = {
    "relu": torch.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu, "elu": F.elu, "silu": F.silu, "gelu": F.gelu,
    "gelu tanh": lambda y: F.gelu(y, approximate="tanh"), "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "mish": F.mish, "softplus": F.softplus,
    "addition": lambda y: y + y.detach(),
    "by hand": lambda y: y * torch.sigmoid(y), "mish by hand": lambda y: y * torch.tanh(F.softplus(y)),
    "hardswish by hand": lambda y: y * F.relu6(y + 3) / 6, "matmul": lambda y: y @ y,
}  # fmt: skip


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("residual", ["none", "same", "float"])
def test_autocast(act: str, residual: str) -> None:
    """Output dtypes are the twin's; values up to the rounding of bfloat16."""

    def run(m: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            h = m.conv(x.float())
            y = m.bn(h)
            if residual != "none":
                y = y + (h if residual == "same" else x.float())
            return ACTS[act](y)

    net = Net(run).float()
    converted, twin = twins(net)
    for i in range(8):
        x = batch()
        found, wanted = (m.train(i < 4)(x) for m in (converted, twin))
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)


def test_model_in_several_threads() -> None:
    """In evaluation all results are the twin's; in training every thread's result is, and no update is lost in one."""
    converted, twin = learned_twins(False)
    x = [batch() for _ in range(16)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(converted, x))
    for one, y in zip(x, found, strict=True):
        same(y, twin(one))
    converted, twin = learned_twins()
    lock = threading.Barrier(4)

    def work(one: Tensor) -> Tensor:
        lock.wait()
        return converted(one)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, x))
    for one, y in zip(x, found, strict=True):
        same(y, twin(one))


@pytest.mark.parametrize("learned", LEARNED)
def test_other_thread_inside_the_forward(learned: str) -> None:
    """A layer is called, or its result used, in another thread while the call waits for it."""

    def body(m: Any, x: Tensor) -> Any:
        with ThreadPoolExecutor(1) as pool:
            y = m.bn(m.conv(x))
            a = pool.submit(torch.relu, y).result()
            b = pool.submit(m.bn2, x).result()
            assert type(b) is Tensor
            z = m.bn(m.conv(2 * x))
            c = pool.submit(m.bn, x).result()
            return a, torch.relu(b), torch.relu(z), c, pool.submit(lambda: z.sum()).result()

    alike(Net(after(learned, body)), fuses=None)
