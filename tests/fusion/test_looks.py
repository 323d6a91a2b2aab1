"""What can be asked of a waiting result, one by one: the answers are those of the plain tensor."""

from __future__ import annotations

import copy
import io
import json
import operator
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fusion.twins import LEARNED, Net, after, alike, batch, same, small_tensors_wait, twins  # noqa: F401
from torch import Tensor, nn

from keelnorm.engine.fusion import pending
from keelnorm.engine.fusion.deferred_tensor import DeferredTensor


def _pickled(y: Tensor) -> Any:
    return pickle.loads(pickle.dumps(y.detach()))


def _saved(y: Tensor) -> Any:
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    return torch.load(file)


def _saved_in_a_dict(y: Tensor) -> Any:
    file = io.BytesIO()
    torch.save({"y": [y]}, file)
    file.seek(0)
    return torch.load(file)


def _rounded(text: str) -> str:
    """The text without the name of its node, which breaks its last line elsewhere."""
    return " ".join(text.partition("grad_fn")[0].split())


def _node(y: Tensor) -> Any:
    node = y.grad_fn
    return (node is None, node is not None and bool(node.next_functions))


def _matched(y: Any) -> str:
    match y:
        case Tensor(ndim=4):
            return "tensor"
    return "something else"


def _tagged(y: Any) -> Any:
    y.tag = 5
    return y


def _weak(y: Tensor) -> Any:
    return weakref.ref(y)() is y


LOOKS: dict[str, Any] = {
    "isinstance": lambda y: (isinstance(y, Tensor), isinstance(y, nn.Parameter), isinstance(y, torch.DoubleTensor)),
    "issubclass": lambda y: issubclass(type(y), Tensor),
    "torch.is_tensor": torch.is_tensor,
    "shape": lambda y: y.shape,
    "unpacked shape": lambda y: (lambda n, c, *s: (n, c, s))(*y.shape),
    "size": lambda y: (y.size(), y.size(1), y.size(-1)),
    "dtype": lambda y: (y.dtype, y.is_floating_point(), torch.is_floating_point(y), y.itemsize),
    "device": lambda y: (y.device, y.is_cpu, y.is_cuda, y.get_device(), y.is_meta),
    "dimensions": lambda y: (y.ndim, y.dim(), len(y), y.numel(), torch.numel(y), y.nbytes, y.nelement()),
    "requires_grad": lambda y: y.requires_grad,
    "grad_fn": _node,
    "is_leaf": lambda y: y.is_leaf,
    "grad": lambda y: y.detach().grad,
    "stride": lambda y: (y.stride(), y.stride(1), y.is_contiguous(), y.storage_offset()),
    "memory format": lambda y: y.is_contiguous(memory_format=torch.channels_last),
    "layout": lambda y: (y.layout, y.is_sparse, y.is_quantized, y.is_mkldnn, y.is_nested),
    "version": lambda y: y._version,
    "base": lambda y: (y._base is None, y._is_view()),
    "repr": lambda y: _rounded(repr(y)),
    "str": lambda y: _rounded(str(y)),
    "format": lambda y: _rounded(f"{y}"),
    "format of a number": lambda y: f"{y.detach().sum():.6f}",
    "index": lambda y: y[0],
    "slice": lambda y: y[:, 1:, ::2],
    "index of a tensor": lambda y: y[torch.tensor([0, 2])],
    "mask": lambda y: y[y > 0],
    "ellipsis": lambda y: y[..., None],
    "iteration": list,
    "unpacking": lambda y: (lambda a, *rest: (a, rest))(*y),
    "reversed": lambda y: list(reversed(y)),
    "enumerate": lambda y: [t.sum() for _, t in enumerate(y)],
    "zip": lambda y: [a + b for a, b in zip(y, y, strict=True)],
    "len": len,
    "bool": lambda y: bool(y.sum() > 0),
    "bool of many": lambda y: not y,
    "float": lambda y: float(y.detach().sum()),
    "float of many": float,
    "int": lambda y: int(y.detach().mean() * 1e3 + 0.5),
    "int of many": int,
    "index of many": operator.index,
    "complex of many": complex,
    "item": lambda y: y.detach()[0, 0, 0, 0].item(),
    "item of many": lambda y: y.item(),
    "tolist": lambda y: y.detach().tolist(),
    "hash": lambda y: hash(y) == id(y) == hash(y),
    "dict key": lambda y: {y: 1}[y],
    "set": lambda y: (y in {y}, len({y, y})),
    "is": lambda y: y is y,
    "in a list": lambda y: [y].index(y) if [y][0] is y else -1,
    "contains a value": lambda y: y.detach()[0, 0, 0, 0].item() in y,
    "contains text": lambda y: "text" in y,
    "equal": lambda y: y == y,
    "unequal": lambda y: y != 0,
    "compare": lambda y: ((y > 0), (y <= 0), y.__gt__(0), y.ge(0)),
    "equal to None": lambda y: (y is None, y == None),  # noqa: E711
    "torch.equal": lambda y: (torch.equal(y, y), torch.allclose(y, y)),
    "arithmetic": lambda y: (y * 2, 2 * y, y - 1, 1 - y, y / 2, 1 / y, y**2, 2**y, y // 1, y % 2, -y, +y, abs(y)),
    "matmul": lambda y: y @ y,
    "invert": lambda y: ~y,
    "and": lambda y: y & y,
    "divmod": lambda y: divmod(y, 2),
    "round": round,
    "copy.copy": copy.copy,
    "deepcopy": lambda y: copy.deepcopy(y.detach()),
    "deepcopy with a graph": copy.deepcopy,
    "deepcopy of a list": lambda y: copy.deepcopy([y.detach(), y.detach()]),
    "pickle": _pickled,
    "pickle with a graph": lambda y: pickle.loads(pickle.dumps(y)),
    "torch.save": _saved,
    "torch.save of a dict": _saved_in_a_dict,
    "json": json.dumps,
    "numpy": lambda y: y.detach().numpy().sum(),
    "numpy with a graph": lambda y: y.numpy(),
    "np.asarray": lambda y: np.asarray(y.detach()).sum(),
    "np.asarray with a graph": np.asarray,
    "np function": lambda y: np.add(y.detach(), 1).sum(),
    "dlpack": lambda y: torch.from_dlpack(y.detach()),
    "dlpack with a graph": torch.from_dlpack,
    "to_dlpack": lambda y: torch.from_dlpack(torch.utils.dlpack.to_dlpack(y.detach())),
    "to_dlpack with a graph": lambda y: torch.from_dlpack(torch.utils.dlpack.to_dlpack(y)),
    "__dlpack__": lambda y: torch.from_dlpack(y.detach().__dlpack__()),
    "__dlpack_device__": lambda y: y.__dlpack_device__(),
    "buffer": memoryview,
    "data pointer": lambda y: y.data_ptr() != 0 and y.data_ptr() == y.untyped_storage().data_ptr(),
    "storage": lambda y: y.untyped_storage().nbytes(),
    "storage values": lambda y: sum(y.storage().tolist()),
    "torch.tensor": lambda y: torch.as_tensor(y),
    "new tensors": lambda y: (torch.zeros_like(y), y.new_ones(2), torch.ones(2).to(y), y.new_tensor([1.0])),
    "attribute": lambda y: (_tagged(y).tag, getattr(y, "none", 7), hasattr(y, "tag")),
    "unknown attribute": lambda y: y.no_such_thing,
    "vars": lambda y: [key for key in vars(y) if not key.startswith("_")],
    "dir": lambda y: "relu" in dir(y),
    "match": _matched,
    "weak reference": _weak,
    "names": lambda y: y.has_names(),
    "callable": callable,
    "type as text": lambda y: y.type(),
    "type(y)()": lambda y: type(y)([1.0, 2.0]).sum(),
    "Parameter of it": lambda y: nn.Parameter(y.detach()),
    "torch.stack": lambda y: torch.stack([y, y]),
    "torch.cat": lambda y: torch.cat((y, y), 1),
    "einsum": lambda y: torch.einsum("nchw,nchw->nc", y, y),
    "where": lambda y: torch.where(y > 0, y, 0),
    "max": lambda y: y.max(1),
    "functional": lambda y: (F.adaptive_avg_pool2d(y, 1), F.softmax(y, 1), F.pad(y, (1, 1))),
    "apply": lambda y: y.detach().apply_(lambda v: v + 1),
    "map": lambda y: y.detach().map_(y.detach(), lambda a, b: a + b),
    "clone": lambda y: (y.clone(), y.contiguous(), y.detach(), y.cpu(), y.double(), y.to("cpu")),
    "property views": lambda y: (y.T if y.ndim == 2 else y.mT, y.real, y.data),
    "expand_as": lambda y: (torch.ones(3, 1, 1).expand_as(y), y.view_as(y), y.reshape(-1), y.flatten(1)),
    "pytree": lambda y: torch.utils._pytree.tree_map(lambda t: t * 2, {"a": [y]}),
}


#: Looks that are not answered as they should be.
WRONG = {
    "to_dlpack with a graph": "documented: torch's own error, that there is no memory to read; y.__dlpack__() works",
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("learned", LEARNED)
def test_looks(look: str, learned: str, request: pytest.FixtureRequest) -> None:
    """Answers and errors are the twin's, and what follows is right."""
    if look in WRONG:
        request.applymarker(pytest.mark.xfail(strict=True, reason=WRONG[look]))

    def body(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        if look == "bool of many" and m.calls[m.training] % 2:
            return torch.relu(y)
        try:
            found = LOOKS[look](y)
        except Exception as error:
            found = error
        return found, torch.relu(y)

    alike(Net(after(learned, body)), modes=(True,) * 5 + (False,) * 4, fuses=None if learned == "nothing" else True)


@pytest.mark.parametrize(
    "look", ["shape", "isinstance", "dtype", "device", "requires_grad", "is_leaf", "stride", "hash"]
)
def test_looks_that_cost_nothing(look: str) -> None:
    """After these the result still waits, and runs together with what follows."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        LOOKS[look](y)
        return torch.relu(y)

    converted, _ = twins(Net(body))
    for _ in range(3):
        converted(batch())
    before = pending.completed
    converted(batch())
    assert pending.completed == before + 1


def test_type_is_the_documented_difference() -> None:
    """type(y) shows that a result waits; settled, the same object is plain. fuse=False and where= avoid it."""
    seen: list[Any] = []

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        seen.append(type(y))
        y.sum()
        seen.append(type(y))
        return y

    model = Net(lambda m, x: torch.relu(m.bn(m.conv(x))))
    converted, twin = twins(model)
    for _ in range(3):
        converted(batch())
    converted.body = twin.body = body
    converted(batch())
    assert seen == [DeferredTensor, Tensor]
    for options in ({"fuse": False}, {"where": "bn2"}):
        seen.clear()
        other, _ = twins(twin, **options)
        for _ in range(3):
            other(batch())
        assert seen == [Tensor] * 6


def test_identity_is_kept_when_it_settles() -> None:
    """One object from the layer's call on: as a key, in a list, behind a weak reference, with its attributes."""

    def body(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        y.mark = "mine"
        table, held, weak, number = {y: 1}, [y], weakref.ref(y), id(y)
        y.sum()
        return torch.relu(y), table[y], held[0] is y, weak() is y, id(y) == number, getattr(y, "mark", None)

    for learned in LEARNED:
        alike(Net(after(learned, body)), fuses=None)


def test_attributes_stay_when_an_activation_in_place_follows() -> None:
    def body(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        y.mark = "mine"
        weak = weakref.ref(y)
        y.relu_()
        return y, getattr(y, "mark", None), weak() is y

    for learned in LEARNED:
        alike(Net(after(learned, body)))


def test_rest_of_a_waiting_result_is_freed() -> None:
    """Nothing keeps a result alive once the model's call has ended."""
    model = Net(lambda m, x: torch.relu(m.bn(m.conv(x))))
    converted, _ = twins(model)
    refs: list[Any] = []

    def body(m: Any, x: Tensor) -> Any:
        refs.append(weakref.ref(y := m.bn(m.conv(x))))
        return torch.relu(y)

    converted.body = body
    for _ in range(4):
        same(converted(batch()).shape, torch.Size((4, 3, 6, 6)))
    assert [ref() for ref in refs] == [None] * 4
