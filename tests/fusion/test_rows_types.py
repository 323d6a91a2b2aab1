"""Results keep their containers' classes and are plain in them; dtypes and shapes are those of torch."""

from __future__ import annotations

import collections
import types
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from fusion.twins import LEARNED, TRAINING, Net, after, alike, batch, small_tensors_wait, twins  # noqa: F401
from torch import Tensor


def _bn(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x))


class _Point(NamedTuple):
    a: Any
    b: Any


@dataclass
class _Result:
    logits: Any
    hidden: Any


class _Dict(dict[str, Any]):
    pass


class _List(list[Any]):
    pass


class _Output(collections.OrderedDict[str, Any]):
    """As transformers' results: its items are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _Opaque:
    __slots__ = ("values",)

    def __init__(self, *values: Any) -> None:
        self.values = values


def _fill(kind: Any, values: list[Any]) -> Any:
    result = kind()
    result.value = values[0]
    return result


CONTAINERS = {
    "OrderedDict": lambda y, z: collections.OrderedDict(z=z, y=y),
    "dict": lambda y, z: {"z": z, "y": y},
    "dict subclass": lambda y, z: _Dict(z=z, y=y),
    "defaultdict": lambda y, z: collections.defaultdict(list, z=z, y=y),
    "ModelOutput": lambda y, z: _Output(z=z, y=y),
    "list": lambda y, z: [z, y, [y]],
    "list subclass": lambda y, z: _List([z, y]),
    "tuple": lambda y, z: (z, (y, y)),
    "NamedTuple": lambda y, z: _Point(z, y),
    "dataclass": lambda y, z: _Result(z, [y]),
    "SimpleNamespace": lambda y, z: types.SimpleNamespace(z=z, y=y),
    "deque": lambda y, z: collections.deque([z, y]),
    "attribute of a list": lambda y, z: _fill(_List, [y]),
    "nothing else": lambda y, z: y,
    "mappingproxy": lambda y, z: types.MappingProxyType({"y": y}),
}


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in it, of any class, however deep."""
    if isinstance(value, Tensor):
        return [value]
    found = []
    if hasattr(value, "__dict__"):
        found += [t for item in vars(value).values() for t in _tensors(item)]
    if isinstance(value, dict | types.MappingProxyType):
        value = list(value.values())
    if isinstance(value, list | tuple | set | frozenset | collections.deque):
        found += [t for item in value for t in _tensors(item)]
    return found


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("residual", [False, True])
def test_results_are_plain_in_any_container(kind: str, residual: bool) -> None:
    """Containers keep their class, and what is in them is plain."""

    def body(m: Any, x: Tensor) -> Any:
        z = torch.relu(m.bn2(m.conv2(x)))
        y = _bn(m, x)
        return CONTAINERS[kind](y + x if residual else y, z)

    converted, twin = twins(Net(after("addition, relu" if residual else "relu", body)))
    for training in (True,) * 5 + (False,) * 5:
        x = batch()
        found, wanted = converted.train(training)(x), twin.train(training)(x)
        assert type(found) is type(wanted)
        assert len(_tensors(found)) == len(_tensors(wanted)) > 0
        for one, other in zip(_tensors(found), _tensors(wanted), strict=True):
            assert type(one) is Tensor
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
            assert one.requires_grad == other.requires_grad


def test_results_are_plain_in_what_nothing_can_look_into() -> None:
    """In an object with slots, a closure, a generator's frame."""

    def body(m: Any, x: Tensor) -> Any:
        y = _bn(m, x)
        m.seen.append(lambda: y)
        return _Opaque(y, _bn(m, x))

    converted, _ = twins(Net(after("relu", body), seen=[]))
    for _ in range(5):
        found = converted(batch())
    assert [type(t) for t in found.values] == [Tensor, Tensor]
    assert [type(read()) for read in converted.seen] == [Tensor] * 3


DTYPES = {
    "bool mask added": lambda m, x: torch.relu(_bn(m, x) + (x > 0)),
    "long mask added": lambda m, x: torch.relu(_bn(m, x) + (x > 0).long()),
    "mask in front": lambda m, x: torch.relu((x > 0) + _bn(m, x)),
    "float added": lambda m, x: torch.relu(_bn(m, x) + x.float()),
    "added to float": lambda m, x: torch.relu(x.float() + _bn(m, x)),
    "float takes it": lambda m, x: x.float().add_(_bn(m, x)).relu_(),
    "float is taken": lambda m, x: _bn(m, x).add_(x.float()).relu_(),
    "half added": lambda m, x: torch.relu(_bn(m, x) + x.detach().half()),
    "complex added": lambda m, x: (_bn(m, x) + torch.complex(x, x)).abs(),
    "number added": lambda m, x: torch.relu(_bn(m, x) + 1),
    "complex number added": lambda m, x: (_bn(m, x) + 1j).abs(),
    "number of numpy's added": lambda m, x: torch.relu(_bn(m, x) + x.detach().numpy().sum()),
    "one value added": lambda m, x: torch.relu(_bn(m, x) + x.mean()),
    "broadcast": lambda m, x: torch.relu(_bn(m, x) + x[:1]),
    "broadcast to more": lambda m, x: torch.relu(_bn(m, x) + x[None]),
    "bool multiplied": lambda m, x: _bn(m, x) * (x > 0),
    "added with a factor": lambda m, x: torch.relu(torch.add(_bn(m, x), x, alpha=2)),
    "added with a factor, method": lambda m, x: torch.relu(_bn(m, x).add(x, alpha=-1)),
    "float made of it": lambda m, x: torch.relu(_bn(m, x).float()),
    "double by string": lambda m, x: torch.relu(_bn(m, x).to(torch.bfloat16)),
    "type_as": lambda m, x: torch.relu(_bn(m, x).type_as(x.float())),
    "expanded residual": lambda m, x: torch.relu(_bn(m, x) + x[:1].expand(4, -1, -1, -1)),
    "transposed residual": lambda m, x: torch.relu(_bn(m, x) + x.transpose(2, 3)),
    "residual in channels-last": lambda m, x: torch.relu(_bn(m, x) + x.to(memory_format=torch.channels_last)),
    "input in channels-last": lambda m, x: torch.relu(_bn(m, x.to(memory_format=torch.channels_last)) + x),
    "strided input": lambda m, x: torch.relu(m.bn(x.transpose(2, 3)) + x),
    "sliced input": lambda m, x: torch.relu(m.bn(x[:, :, ::2]) + x[:, :, ::2]),
}


@pytest.mark.parametrize("case", DTYPES)
@pytest.mark.parametrize("learned", LEARNED)
def test_dtypes_and_shapes(case: str, learned: str) -> None:
    """Whatever is added, results and errors are the twin's; also where something that fuses came before."""
    modes = (*TRAINING, True, True, *(False,) * 5)
    alike(Net(after(learned, DTYPES[case])), modes=modes, fuses=None if learned == "nothing" else True)
