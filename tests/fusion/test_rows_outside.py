"""Code that sees values without asking torch's functions: autograd functions, hooks, C++, other processes."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fusion.twins import LEARNED, Net, after, alike, batch, outcome, plainly, same, small_tensors_wait, twins  # noqa: F401
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from keelnorm.engine.fusion import pending

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.parametrize("learned", LEARNED),
]


class _Quantize(torch.autograd.Function):
    """Straight through: the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        assert type(x) is Tensor or type(x.sum()) is Tensor
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.width = width
        return (x > 0).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        assert isinstance(x, Tensor)
        return dy * torch.exp(-((x / ctx.width) ** 2)), None


class _DoubleInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy


class _Both(torch.autograd.Function):
    """Saves its input and its output, and has two of each."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        c = torch.tanh(a) * b
        ctx.save_for_backward(a, b, c)
        return c, a + b

    @staticmethod
    def backward(ctx: Any, dc: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
        a, b, _ = ctx.saved_tensors
        t = torch.tanh(a)
        return dc * b * (1 - t * t) + ds, dc * t + ds


class _NewStyle(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.saved_tensors[0].cos()


class _Same(torch.autograd.Function):
    """Returns its input itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return -dy


class _Itself(_Same):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x


def _grad_inside(y: Tensor, x: Tensor) -> Any:
    if not torch.is_grad_enabled():
        return y
    (g,) = torch.autograd.grad(torch.relu(y).sum(), x, retain_graph=True)
    return y + g


def _backward_inside(y: Tensor, x: Tensor) -> Any:
    y.square().sum().backward(retain_graph=True)
    return torch.relu(y)


def _hooked(y: Tensor, x: Tensor) -> Any:
    seen: list[type] = []

    def double(g: Tensor) -> Tensor:
        seen.append(type(g))
        return g * 2

    y.register_hook(double)
    return torch.relu(y), F.silu(y), seen


def _retained(y: Tensor, x: Tensor) -> Any:
    y.retain_grad()
    z = torch.relu(y)
    z.sum().backward(retain_graph=True)
    return z, y.grad.clone()


def _node_hooked(y: Tensor, x: Tensor) -> Any:
    y.grad_fn.register_prehook(lambda grads: tuple(g * 3 for g in grads))
    return torch.relu(y)


def _packed(y: Tensor, x: Tensor) -> Any:
    kinds: list[type] = []

    def pack(t: Tensor) -> Tensor:
        kinds.append(type(t))
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        z = torch.sigmoid(y) * y
    return z, kinds


def _on_cpu(y: Tensor, x: Tensor) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return torch.tanh(y)


def _saved(y: Tensor, x: Tensor) -> Any:
    file = io.BytesIO()
    torch.save([y.detach(), y], file)
    file.seek(0)
    return torch.load(file)[0], torch.relu(y)


def _into_numpy(y: Tensor, x: Tensor) -> Any:
    values = np.zeros(tuple(y.shape))
    values[...] = y.detach()
    return torch.from_numpy(values), torch.relu(y), float(np.mean(y.detach().numpy()))


def _storage_shared(y: Tensor, x: Tensor) -> Any:
    memory = y.detach().numpy()
    memory[:] = 0
    return y.clone()


def _reentrant(y: Tensor, x: Tensor) -> Any:
    return checkpoint(lambda t: torch.relu(t) * 2, y, use_reentrant=True), y.sum()


def _not_reentrant(y: Tensor, x: Tensor) -> Any:
    return checkpoint(lambda t: torch.relu(t) * t, y, use_reentrant=False)


def _twice(y: Tensor, x: Tensor) -> Any:
    return _Quantize.apply(y), _Surrogate.apply(y, 1.0), torch.relu(y)


def _relu_and_add(y: Tensor, x: Tensor) -> Tensor:
    return torch.relu(y) + x


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    _scripted = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Sigmoid()))
    _script = torch.jit.script(_relu_and_add)


FUNCTIONS: dict[str, Any] = {
    "straight through": lambda y, x: _Quantize.apply(y),
    "surrogate": lambda y, x: _Surrogate.apply(y, 0.5),
    "in place": lambda y, x: (_DoubleInPlace.apply(y), y * 1),
    "two inputs": lambda y, x: _Both.apply(y, x),
    "two inputs, turned": lambda y, x: _Both.apply(x, y),
    "both inputs": lambda y, x: _Both.apply(y, y),
    "setup_context": lambda y, x: _NewStyle.apply(y),
    "a view": lambda y, x: _Same.apply(y),
    "its input": lambda y, x: _Itself.apply(y),
    "after an activation": lambda y, x: _Quantize.apply(torch.relu(y)),
    "after an addition": lambda y, x: _Quantize.apply(y + x),
    "before an activation": lambda y, x: torch.relu(_Quantize.apply(y)),
    "used afterwards": lambda y, x: (_Quantize.apply(y), torch.relu(y)),
    "used twice": _twice,
    "grad inside": _grad_inside,
    "backward inside": _backward_inside,
    "register_hook": _hooked,
    "retain_grad": _retained,
    "hook of the node": _node_hooked,
    "saved_tensors_hooks": _packed,
    "save_on_cpu": _on_cpu,
    "torch.save": _saved,
    "numpy": _into_numpy,
    "memory shared with numpy": _storage_shared,
    "reentrant checkpoint": _reentrant,
    "checkpoint": _not_reentrant,
    "scripted child": lambda y, x: _scripted(y),
    "scripted function": _script,
    "C++ of torch": lambda y, x: torch._C._nn.gelu(y),
    "torch.ops": lambda y, x: torch.ops.aten.relu(y) + torch.ops.aten.add.Tensor(y, x),
    "torch.ops in place": lambda y, x: torch.ops.aten.mul_.Tensor(y, 2.0),
    "torch.ops with a list": lambda y, x: torch.ops.aten.cat.default([y, x]),
    "_foreach": lambda y, x: torch._foreach_add([y, x], 1.0),
    "multi_head": lambda y, x: F.scaled_dot_product_attention(y, y, x),
    "DLPack": lambda y, x: torch.from_dlpack(y.detach()) + torch.relu(y),
    "set_grad_enabled": lambda y, x: torch.relu(y.requires_grad_()) if not y.requires_grad else torch.relu(y),
}


#: What is not as in torch where the result waits.
WRONG = {
    "hook of the node": "documented: the node has more outputs than torch's, whose gradients are None",
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("leaf", [True, False])
def test_uses_that_do_not_ask(name: str, learned: str, leaf: bool, request: pytest.FixtureRequest) -> None:
    """Values, gradients and aliases are the twin's, whether or not the input itself wants a gradient."""
    if name in WRONG and learned != "nothing":
        request.applymarker(pytest.mark.xfail(strict=True, reason=WRONG[name]))

    def body(m: Any, x: Tensor) -> Any:
        h = x if leaf else x.detach()
        if not h.requires_grad and name == "grad inside":
            h.requires_grad_()
        return FUNCTIONS[name](m.bn(m.conv(h)), h)

    alike(Net(after(learned, body)), fuses=None if learned == "nothing" else True)


@pytest.mark.parametrize("act", [torch.relu, F.silu, torch.tanh, F.gelu, F.mish, F.hardswish])
@pytest.mark.parametrize("residual", [False, True])
def test_double_backward(act: Any, residual: bool, learned: str) -> None:
    """A gradient penalty through the converted model."""

    def body(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        return act(y + x if residual else y)

    def run(m: Any, x: Tensor) -> Any:
        y = m(x)
        y = y[0] if isinstance(y, tuple) else y
        (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        return y, g.square().sum()

    alike(Net(after(learned, body)), run)


HOOKS: dict[str, Any] = {
    "forward of the layer": lambda m, f: m.bn.register_forward_hook(lambda b, i, o: f(i, o)),
    "forward of the layer, replacing": lambda m, f: m.bn.register_forward_hook(lambda b, i, o: f(i, o) or o * 2),
    "pre of the layer": lambda m, f: m.bn.register_forward_pre_hook(lambda b, i: f(i)),
    "backward of the layer": lambda m, f: m.bn.register_full_backward_hook(lambda b, i, o: f(i, o)),
    "pre backward of the layer": lambda m, f: m.bn.register_full_backward_pre_hook(lambda b, o: f(o)),
    "pre of the activation": lambda m, f: m.act.register_forward_pre_hook(lambda b, i: f(i)),
    "forward of the activation": lambda m, f: m.act.register_forward_hook(lambda b, i, o: f(i, o)),
    "backward of the activation": lambda m, f: m.act.register_full_backward_hook(lambda b, i, o: f(i, o)),
    "forward of the container": lambda m, f: m.rest.register_forward_hook(lambda b, i, o: f(i, o)),
    "pre of the container": lambda m, f: m.rest.register_forward_pre_hook(lambda b, a, k: f(a, k), with_kwargs=True),
    "always called": lambda m, f: m.bn.register_forward_hook(lambda b, i, o: f(i, o), always_call=True),
    "forward of the model": lambda m, f: m.register_forward_hook(lambda b, i, o: f(i, o)),
    "forward of the model, first": lambda m, f: m.register_forward_hook(lambda b, i, o: f(i, o), prepend=True),
    "pre of the model": lambda m, f: m.register_forward_pre_hook(lambda b, i: f(i)),
    "backward of the model": lambda m, f: m.register_full_backward_hook(lambda b, i, o: f(i, o)),
    "of a parameter": lambda m, f: m.bn.weight.register_hook(lambda g: f(g)),
    "after a parameter's gradient": lambda m, f: m.bn.bias.register_post_accumulate_grad_hook(lambda p: f(p.grad)),
    "global": lambda m, f: nn.modules.module.register_module_forward_hook(lambda b, i, o: f(i, o)),
    "global pre": lambda m, f: nn.modules.module.register_module_forward_pre_hook(lambda b, i: f(i)),
    "global backward": lambda m, f: nn.modules.module.register_module_full_backward_hook(lambda b, i, o: f(i, o)),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("when", [0, 3])
def test_hooks_see_plain_tensors(name: str, when: int, learned: str) -> None:
    """Added before the first call or after the layers have learned; what they see is the twin's, call by call."""

    def body(m: Any, x: Tensor) -> Any:
        y = m.act(m.bn(m.conv(x)))
        return m.rest(y), torch.relu(m.bn(m.conv2(y)) + y)

    model = Net(after(learned, body), rest=nn.Sequential(nn.BatchNorm2d(3), nn.Tanh()))
    converted, twin = twins(model)
    for i in range(9):
        x, results = batch(), []
        for m in (converted, twin):
            seen: list[Any] = []

            def note(*values: Any, seen: list[Any] = seen) -> None:
                for t in (v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, Tensor)):
                    seen.append((type(t), t.detach().clone()))

            handle = HOOKS[name](m, note) if i >= when else None
            results.append((outcome(m.train(i < 5), x, plainly), seen))
            if handle is not None:
                assert seen or not m.training or learned != "nothing"
                handle.remove()
        same(*results)


@pytest.fixture
def group(tmp_path: Any) -> Any:
    """One process, over gloo."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _all_gather(y: Tensor, x: Tensor) -> Any:
    parts = [torch.empty_like(x)]
    torch.distributed.all_gather(parts, y.detach())
    return parts, torch.relu(y)


def _functional_all_reduce(y: Tensor) -> Tensor:
    from torch.distributed._functional_collectives import all_reduce

    return all_reduce(y.detach(), "sum", torch.distributed.group.WORLD) + y


COLLECTIVES: dict[str, Any] = {
    "all_reduce": lambda y, x: (torch.distributed.all_reduce(y.detach()), torch.relu(y))[1],
    "all_reduce without a graph": lambda y, x: (torch.distributed.all_reduce(y), y * 2)[1],
    "all_gather": _all_gather,
    "broadcast": lambda y, x: (torch.distributed.broadcast(y, 0), torch.relu(y))[1],
    "functional": lambda y, x: _functional_all_reduce(y) * 2,
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives(name: str, learned: str, group: Any) -> None:
    def body(m: Any, x: Tensor) -> Any:
        if name in ("all_reduce without a graph", "broadcast"):
            with torch.no_grad():
                return COLLECTIVES[name](m.bn(m.conv(x)), x)
        return COLLECTIVES[name](m.bn(m.conv(x)), x)

    alike(Net(after(learned, body)), fuses=None)


@pytest.mark.parametrize("static", [False, True])
def test_distributed_data_parallel(static: bool, learned: str, group: Any) -> None:
    """Its hooks look through the model's outputs for what needs gradients."""

    def body(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        return {"relu": torch.relu(y), "rest": [m.bn2(m.conv2(x)) + x]}

    converted, twin = twins(Net(after(learned, body)))
    before = pending.completed
    wrapped = [nn.parallel.DistributedDataParallel(m, static_graph=static) for m in (converted, twin)]
    for _ in range(5):
        x = batch()
        same(*(outcome(m, x, plainly) for m in wrapped))
    assert pending.completed > before
