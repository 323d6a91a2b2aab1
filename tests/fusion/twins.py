"""A converted model beside its twin that was not converted: called alike, both have to do alike, call after call."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.engine.fusion import call, pending
from keelnorm.engine.fusion.deferred_tensor import DeferredTensor

#: A layer learns on its first call in a mode, and waits from the second on.
MODES = (True, True, True, True, False, False, False, False, True)
TRAINING = (True, True, True, True)
_TOLERANCES = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def small_tensors_wait(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results wait however small they are, and one thread computes them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(call, "smallest", [0, 0])
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Two convolutions and batch norms, a linear layer, an activation, and a body that uses them as it likes."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.conv, self.conv2 = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.bn, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.act = nn.ReLU()
        self.body, self.calls = body, [0, 0]
        for name, part in parts.items():
            setattr(self, name, part)
        self.double()
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, nn.BatchNorm2d) and layer.weight is not None:
                    layer.weight.uniform_(0.5, 1.5)
                    layer.bias.normal_()

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def _relu(m: Net, x: Tensor) -> Any:
    return torch.relu(m.bn(m.conv(x))), torch.relu(m.bn2(m.conv2(x)))


def _add_relu(m: Net, x: Tensor) -> Any:
    return torch.relu(m.bn(m.conv(x)) + x), torch.relu(m.bn2(m.conv2(x)) + x)


def _swish(m: Net, x: Tensor) -> Any:
    y, z = m.bn(m.conv(x)), m.bn2(m.conv2(x))
    return y * torch.sigmoid(y), z * torch.sigmoid(z)


#: What the two batch norms of a Net have been used for before, so that they wait for it.
LEARNED: dict[str, Any] = {"nothing": None, "relu": _relu, "addition, relu": _add_relu, "swish by hand": _swish}


def after(learned: str, body: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """A body that has done something else in the first two calls of a mode."""

    def run(m: Net, x: Tensor) -> Any:
        m.calls[m.training] += 1
        first = LEARNED[learned]
        return body(m, x) if first is None or m.calls[m.training] > 2 else first(m, x)

    return run


def batch(*shape: int) -> Tensor:
    return torch.randn(shape or (4, 3, 6, 6), dtype=torch.float64)


def twins(model: nn.Module, **options: Any) -> tuple[Any, Any]:
    """A model, converted, and a copy of it as it was."""
    twin = copy.deepcopy(model)
    return kn.convert(model, **options)[0], twin


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module | BaseException):
        yield from tensors_in(vars(value))


def same(found: Any, wanted: Any) -> None:
    """Two values are alike to rounding, down to their types."""
    assert type(found) is type(wanted), (found, wanted)
    if isinstance(found, Tensor):
        assert type(found) is not DeferredTensor
        for name in ("dtype", "shape", "device", "requires_grad", "is_leaf", "layout"):
            assert getattr(found, name) == getattr(wanted, name), name
        assert found.stride() == wanted.stride()
        bound = _TOLERANCES.get(found.dtype, 0)
        torch.testing.assert_close(found, wanted, rtol=bound, atol=bound, equal_nan=True)
    elif isinstance(found, Mapping):
        assert list(found) == list(wanted)
        for key, value in found.items():
            same(value, wanted[key])
        if hasattr(found, "__dict__"):
            same(vars(found), vars(wanted))
    elif isinstance(found, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            same(one, other)
    elif isinstance(found, float):
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9, nan_ok=True)
    elif isinstance(found, BaseException | nn.Module):
        pass  # of the same type
    elif hasattr(found, "__dict__") and not isinstance(found, enum.Enum):
        same(vars(found), vars(wanted))
    else:
        assert found == wanted


def outcome(model: nn.Module, start: Tensor, run: Callable[[Any, Tensor], Any], seed: int = 0) -> dict[str, Any]:
    """All that can be seen of a call and its backward."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = None
    leaf = start.clone().requires_grad_(start.is_floating_point())
    x = leaf.clone()
    try:
        value = run(model, x)
    except Exception as error:
        value = error
    losses = [
        (t * torch.linspace(0.5, 2, t.numel(), dtype=torch.float64).reshape(t.shape)).sum()
        for t in dict.fromkeys(tensors_in(value))
        if t.requires_grad and t.grad_fn is not None
    ]
    failure = None
    try:
        if losses:
            torch.stack(losses).sum().backward()
    except RuntimeError as error:
        failure = error
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"value": value, "x": x, "x.grad": leaf.grad, "grads": grads, "state": state, "failure": failure}


def plainly(model: Any, x: Tensor) -> Any:
    return model(x)


def alike(
    model: nn.Module,
    run: Callable[[Any, Tensor], Any] = plainly,
    *,
    modes: tuple[bool, ...] = MODES,
    changes: Mapping[int, Callable[[Any], Any]] | None = None,
    fuses: bool | None = True,
    x: Tensor | None = None,
    raises: bool = False,
    **options: Any,
) -> nn.Module:
    """Convert a model and call it and its twin again and again; ``changes`` says what is done to both before a call.

    Args:
        fuses: Whether something has to have run as one kernel; None where that is left open.
        raises: Whether the twin may raise; both then have to raise alike.
    """
    converted, twin = twins(model, **options)
    before = pending.completed
    for i, training in enumerate(modes):
        results = []
        start = batch() if x is None else x
        for one in (converted, twin):
            if changes and i in changes:
                changes[i](one)
            one.train(training)
            results.append(outcome(one, start, run, seed=i))
        assert raises or not isinstance(results[1]["value"], Exception), results[1]["value"]
        if results[1]["failure"]:  # what was needed was changed in place; a fused kernel may need less
            for result in results:
                for name in ("failure", "x.grad", "grads"):
                    del result[name]
        same(*results)
    if fuses is not None:
        assert (pending.completed > before) == fuses
    return converted


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)) + x)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.layer1 = nn.Sequential(Block(), Block())
        self.bn = nn.BatchNorm2d(3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.layer1(self.features(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
        self.tail = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU())
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.act(self.bn(self.conv(x)) + x))


def learned_twins(training: bool = True) -> tuple[Any, Any]:
    """A model whose layers wait, and its twin."""
    converted, twin = twins(Model())
    for _ in range(3):
        x = batch()
        same(*(outcome(m.train(training), x, plainly) for m in (converted, twin)))
    return converted, twin
