"""Where waiting can't be right it does not happen, and the results are the twin's."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusion.twins import (  # noqa: F401
    LEARNED,
    Model,
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
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from keelnorm.engine.fusion import pending
from keelnorm.engine.fusion.deferred_tensor import DeferredTensor

pytestmark = [  # torch's own, about inputs that are no leaves and about its decompositions
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@contextlib.contextmanager
def _no_waiting() -> Any:
    before = pending.completed
    yield
    assert pending.completed == before


def _compile(f: Any) -> Any:
    return torch.compile(f, backend="aot_eager")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["torch.compile", "Module.compile", "eager"])
def test_compiled_model(training: bool, how: str) -> None:
    converted, twin = learned_twins(training)
    if how == "Module.compile":
        converted.compile(backend="aot_eager")
    backend = how.replace("torch.compile", "aot_eager")
    compiled = converted if how == "Module.compile" else torch.compile(converted, backend=backend)
    with _no_waiting():
        for _ in range(3):
            x = batch()
            same(outcome(compiled, x, plainly)["value"], outcome(twin, x, plainly)["value"])
            same(converted.bn.running_mean, twin.bn.running_mean)
            same([p.grad for p in converted.parameters()], [p.grad for p in twin.parameters()])


@pytest.mark.parametrize("how", ["torch.compile", "Module.compile"])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_child(how: str, training: bool) -> None:
    """Of a converted model, the child that takes a result, and the one that has a layer in it."""
    converted, twin = learned_twins(training)
    for name in ("act", "tail"):
        if how == "Module.compile":
            getattr(converted, name).compile(backend="aot_eager")
        else:
            setattr(converted, name, _compile(getattr(converted, name)))
    for _ in range(4):
        x = batch()
        found, wanted = outcome(converted, x, plainly), outcome(twin, x, plainly)
        same(found["value"], wanted["value"])
        same(found["x.grad"], wanted["x.grad"])
        same(list(found["state"].values()), list(wanted["state"].values()))


def _takes(m: Any, x: Tensor, maybe: Any) -> Any:
    return maybe(lambda y, x: torch.relu(y) + x)(m.bn(m.conv(x)), x)


def _calls(m: Any, x: Tensor, maybe: Any) -> Any:
    y = m.bn(m.conv(x))
    return maybe(lambda x: torch.relu(m.bn2(x)) * 2)(x) + torch.relu(y)


@pytest.mark.parametrize("kind", [_takes, _calls])
@pytest.mark.parametrize("learned", LEARNED)
def test_compiled_function_inside(kind: Any, learned: str) -> None:
    """A function that is compiled takes a result, or calls a layer while another's result waits."""

    def body(m: Any, x: Tensor) -> Any:
        return kind(m, x, _compile if m.compiles else lambda f: f)

    converted, twin = twins(Net(after(learned, body), compiles=True))
    twin.compiles = False
    for i in range(8):
        x = batch()
        same(*(outcome(m.train(i < 4), x, plainly) for m in (converted, twin)))


def test_compiled_function_of_the_model() -> None:
    converted, twin = learned_twins()
    step = _compile(lambda x: converted(x).square().mean())
    for _ in range(3):
        x = batch()
        same(step(x), twin(x).square().mean())


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    converted, twin = learned_twins(False)
    x = batch()
    exported = torch.export.export(converted, (x,), strict=strict)
    same(exported.module()(x).detach(), twin(x).detach())
    same(converted(x), twin(x))


def test_symbolic_trace() -> None:
    converted, twin = learned_twins()
    traced = torch.fx.symbolic_trace(converted)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"][:2] == ["conv", "bn"]
    for training in (True, False):
        x = batch()
        same(*(outcome(m.train(training), x, plainly)["value"] for m in (traced, twin)))


def test_make_fx() -> None:
    converted, twin = learned_twins(False)
    x = batch()
    graph = make_fx(converted)(x)
    same(graph(x).detach(), twin(x).detach())
    inside = after("relu", lambda m, x: make_fx(torch.tanh)(m.bn(m.conv(x)))(x))
    alike(Net(inside), modes=(True, True, False, False, False), fuses=True)


def test_jit_trace_is_refused_as_before() -> None:
    converted, _ = learned_twins(False)
    x = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"does not run under torch\.jit\.trace"):
            torch.jit.trace(converted, x, check_trace=False)
    assert type(converted(batch())) is Tensor


@pytest.mark.parametrize("training", [True, False])
def test_torch_func(training: bool) -> None:
    """vmap, grad, jvp, vjp, jacrev, functional_call."""
    converted, twin = learned_twins(training)
    x, v = batch(2, 3, 4, 4), batch(2, 3, 4, 4)

    def all_of(m: Any) -> Any:
        params = {n: p.detach() for n, p in m.named_parameters()}

        def f(params: Any, x: Tensor) -> Tensor:
            state = {n: b.clone() for n, b in m.named_buffers()}
            return torch.func.functional_call(m, (params, state), (x,))

        return (
            torch.func.functional_call(m, params, (x,)),
            torch.func.grad(lambda params, x: f(params, x).square().sum())(params, x),
            torch.func.jvp(lambda x: f(params, x), (x,), (v,)) if not training else None,
            torch.func.vjp(lambda x: f(params, x), x)[1](v),
            torch.func.jacrev(lambda x: f(params, x).sum((1, 2, 3)))(x).contiguous() if not training else None,
        )

    same(all_of(converted), all_of(twin))
    if not training:
        xs = batch(5, 2, 3, 4, 4)
        same(*(torch.func.vmap(m)(xs).detach().contiguous() for m in (converted, twin)))


@pytest.mark.parametrize("learned", LEARNED)
def test_torch_func_inside_the_forward(learned: str) -> None:
    """A result is closed over by, and given to, a transformed function."""

    def body(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        z = m.bn2(m.conv2(x))
        return (
            torch.func.vmap(torch.relu)(y), torch.func.vmap(lambda t: t + z[0])(x),
            torch.func.jvp(torch.tanh, (z,), (z,))[1], torch.func.grad(lambda t: (t * z).sum())(x),
        )  # fmt: skip

    alike(Net(after(learned, body)), fuses=None if learned == "nothing" else True)


@pytest.mark.parametrize("learned", LEARNED)
def test_forward_mode(learned: str) -> None:
    """Of the whole model, and of a waiting result inside the forward."""

    def body(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(y.detach(), torch.ones_like(x))
            inside = forward_ad.unpack_dual(torch.tanh(dual)).tangent
            mixed = torch.relu(y) + m.bn2(dual)
        return inside, mixed

    alike(Net(after(learned, body)), modes=(True,) * 4 + (False,) * 4, fuses=None)

    def run(m: Any, x: Tensor) -> Any:
        first = m(x)
        with forward_ad.dual_level():
            found = m(forward_ad.make_dual(x.detach(), torch.ones_like(x)))
            return first, [forward_ad.unpack_dual(t).tangent.detach() for t in found]

    if LEARNED[learned] is not None:
        alike(Net(LEARNED[learned]), run)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("learned", LEARNED)
def test_grad_modes(mode: Any, learned: str) -> None:
    """Around the model, around the layer, around what follows."""

    def body(m: Any, x: Tensor) -> Any:
        with mode():
            y = m.bn(m.conv(x))
        z = torch.relu(y)
        w = m.bn2(m.conv2(x))
        with mode():
            return z, F.silu(w), w

    def run(m: Any, x: Tensor) -> Any:
        first = m(x)
        with mode():
            second = m(x)
        return first, second, m(x)

    def flags(m: Any, x: Tensor) -> Any:
        return torch.utils._pytree.tree_map(lambda t: (t.detach().clone(), t.is_inference()), run(m, x))

    alike(Net(after(learned, body)), flags if mode is torch.inference_mode else run, fuses=None)


class _Tagged(Tensor):
    """A subclass as people write them: it stays itself through operations."""


class _Logged(Tensor):
    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _Logged.seen.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("kind", [_Tagged, _Logged, nn.Parameter])
def test_tensor_subclasses(kind: Any) -> None:
    """As the input, as the residual."""

    def body(m: Any, x: Tensor) -> Any:
        special = kind(x.detach()) if kind is nn.Parameter else x.detach().as_subclass(kind)
        y = torch.relu(m.bn(m.conv(x)) + special)
        z = torch.relu(m.bn2(special))
        return type(y).__name__, type(z).__name__, y.as_subclass(Tensor), z.as_subclass(Tensor)

    for learned in LEARNED:
        alike(Net(after(learned, body)), fuses=None)


class _Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "relu":
            return func(*args) * 2
        return func(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert DeferredTensor not in types
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Function, _Dispatch])
@pytest.mark.parametrize("where", ["around", "inside", "after the layer"])
def test_modes_that_see_every_operation(mode: Any, where: str) -> None:
    def body(m: Any, x: Tensor) -> Any:
        with mode() if where == "inside" else contextlib.nullcontext():
            y = m.bn(m.conv(x))
            z = m.bn2(m.conv2(x))
            with mode() if where == "after the layer" else contextlib.nullcontext():
                return torch.relu(y), F.silu(z + x)

    def run(m: Any, x: Tensor) -> Any:
        with mode() if where == "around" else contextlib.nullcontext():
            return m(x)

    for learned in LEARNED:
        alike(Net(after(learned, body)), run, fuses=None)


def test_default_device() -> None:
    """torch.device as a context is a mode as well, under which results still wait."""

    def run(m: Any, x: Tensor) -> Any:
        with torch.device("cpu"):
            return m(x)

    alike(Model(), run)
