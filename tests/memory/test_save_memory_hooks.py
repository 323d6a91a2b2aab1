"""Recomputed outputs beside other hooks, transforms and compilers, and in calls that end by exceptions."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from support.saving import (
    Parts,
    assert_same_bits,
    assert_saving_changes_nothing,
    network,
    outcome,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import keelnorm as kn
from keelnorm.engine import saved_outputs
from keelnorm.engine.torch_internals import saved_tensor_hooks


def test_an_exception_in_the_model_leaves_no_hooks() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: torch.Tensor, fails: type[BaseException] | None = None) -> torch.Tensor:
            y = self.body(x)
            if fails is not None:
                raise fails("stop")
            return y

    model, x = Failing(), torch.randn(2, 3, 8, 8)
    with kn.save_memory(model):
        for kind in (ValueError, KeyboardInterrupt):
            with pytest.raises(kind, match="stop"):
                model(x, kind)
            other = copy.deepcopy(model.body)
            assert_same_bits(outcome(model, x)[:2], outcome(other, x)[:2])


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_checkpointing_acts_alone(where: str) -> None:
    body = network()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if where == "inside":
                return checkpoint(self.body, x, use_reentrant=False)
            return self.body(x)

    model, x = Checkpointed(), torch.randn(2, 3, 8, 8)
    call = (lambda given: checkpoint(model, given, use_reentrant=False)) if where == "outside" else model
    twin = copy.deepcopy(model)
    expected = outcome(twin, x)
    with kn.save_memory(model):
        given = x.clone().requires_grad_()
        y = call(given)
        (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    found = [y.detach(), given.grad, *(p.grad for p in model.parameters()), *model.buffers()]
    assert_same_bits(found, expected)


def test_other_hooks_on_saved_tensors_act_alone() -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    expected, seen = outcome(copy.deepcopy(model), x), []
    with (
        kn.save_memory(model),
        torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t),  # type: ignore[func-returns-value]
    ):
        assert_same_bits(outcome(model, x), expected)
    assert len(seen) > 10


def test_calls_within_calls_and_threads() -> None:
    """One model within another, both saving; and calls in two threads at once."""
    inner = network()
    outer = nn.Sequential(inner, nn.Conv2d(4, 2, 1))
    expected = outcome(copy.deepcopy(outer), torch.ones(2, 3, 8, 8))
    with kn.save_memory(outer), kn.save_memory(inner):
        assert_same_bits(outcome(outer, torch.ones(2, 3, 8, 8)), expected)
    models = [network() for _ in range(2)]
    x = torch.randn(2, 3, 8, 8)
    expecteds = [outcome(copy.deepcopy(model), x) for model in models]
    found: dict[int, list[torch.Tensor]] = {}
    handles = [kn.save_memory(model) for model in models]

    def run(i: int) -> None:
        found[i] = outcome(models[i], x)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, handle in enumerate(handles):
        handle.undo()
        assert_same_bits(found[i], expecteds[i])


def test_no_gradients_no_hooks() -> None:
    model = network()
    with kn.save_memory(model), torch.no_grad():
        assert torch.equal(model(torch.ones(2, 3, 8, 8)), copy.deepcopy(model)(torch.ones(2, 3, 8, 8)))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message.partition("calls: ")[2] for record in caplog.records if record.name == "keelnorm"]


@pytest.mark.parametrize("how", ["compile of a saving model", "saving of a compiled model", "Module.compile"])
def test_compiled_code_is_left_to_the_compiler_which_is_said_once(
    how: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(saved_outputs, "_announced", set())
    model, x = network(blocks=1), torch.randn(2, 3, 8, 8)
    expected = outcome(copy.deepcopy(model), x)
    options: Any = {"backend": "eager", "fullgraph": True}  # a message that is traced would break the graph
    called = torch.compile(model, **options) if how == "saving of a compiled model" else model
    with kn.save_memory(called):
        if how == "compile of a saving model":
            called = torch.compile(model, **options)
        elif how == "Module.compile":
            model.compile(**options)
        found = outcome(called, x)
        called(torch.randn(3, 3, 9, 9))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert said(caplog) == ["torch.compile decides itself what its graphs keep"]
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
def test_a_compiled_part_of_a_model() -> None:
    torch._dynamo.reset()
    model, x = network(blocks=2), torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        each[1].compile(backend="aot_eager")
    with kn.save_memory(twin):
        assert_same_bits(outcome(twin, x), outcome(model, x))
    torch._dynamo.reset()


def test_undo_removes_the_hooks() -> None:
    model = network()
    handle = kn.save_memory(model)
    assert model._forward_hooks
    handle.undo()
    handle.undo()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh"])
def test_what_saves_its_own_output_is_freed(activation: str) -> None:
    """A graph that holds its own output would never be freed."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), kn.BatchNorm2d(4))
    function = getattr(torch, activation)
    with kn.save_memory(model):
        ends = []
        for _ in range(3):
            y = function(model(torch.randn(2, 3, 8, 8)))
            ends.append(weakref.ref(y))
            del y

    class Ending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(self.body(x))

    ending = Ending()
    with kn.save_memory(ending):
        for _ in range(3):
            y = ending(torch.randn(2, 3, 8, 8))
            ends.append(weakref.ref(y))
            del y
    assert [end() for end in ends] == [None] * 6


def test_torch_func_goes_its_own_way() -> None:
    model = network("silu").eval()
    parameters = dict(model.named_parameters())

    def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, given, (torch.ones(2, 3, 8, 8),)).square().sum()

    expected = torch.func.grad(loss)(parameters)
    with kn.save_memory(model):
        found = torch.func.grad(loss)(parameters)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_copies_and_pickles_save_memory_too() -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    expected = outcome(copy.deepcopy(model), x)
    with kn.save_memory(model):
        others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert not model._forward_hooks
    for other in others:
        seen: list[int] = []
        other[0].register_forward_pre_hook(lambda *_, seen=seen: seen.append(saved_outputs.calls))
        assert_same_bits(outcome(other, x), expected)
        assert seen == [1]


def test_hooks_of_the_users_after_an_interrupt() -> None:
    def code(m: Parts, x: torch.Tensor) -> torch.Tensor:
        if m.fails:
            raise KeyboardInterrupt
        return m.last(m.bn(m.conv(x), activation="relu"))

    model: Any = Parts(code)
    x, seen = torch.randn(2, 3, 8, 8), []
    model.fails = True
    handle = kn.save_memory(model)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.fails = False
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        model(x).sum().backward()
    assert len(seen) > 4
    model.fails = True
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.undo()
    assert saved_tensor_hooks(True) is None


def test_undo_within_the_call() -> None:
    handles: list[kn.save_memory] = []

    def code(m: Parts, x: torch.Tensor) -> torch.Tensor:
        y = m.bn(m.conv(x), activation="relu")
        handles.pop().undo()
        return m.last(y)

    model = Parts(code)
    handles.append(kn.save_memory(model))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert saved_tensor_hooks(True) is None


def test_where_hooks_are_disabled_nothing_is_done() -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    expected = outcome(copy.deepcopy(model), x)
    with kn.save_memory(model), torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert_same_bits(outcome(model, x), expected)


def test_a_call_within_itself() -> None:
    """A module that calls itself, and whose inner call fails."""

    def code(m: Parts, x: torch.Tensor, inner: bool = False) -> torch.Tensor:
        if x.shape[0] == 1:
            raise SystemExit
        with pytest.raises(SystemExit):
            m(x[:1])
        return m.last(m.bn(m.conv(x), activation="relu"))

    assert_saving_changes_nothing(Parts(code), torch.randn(2, 3, 8, 8))


def test_each_reason_to_keep_outputs_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_outputs, "_announced", set())
    model, x = network(blocks=1).eval(), torch.ones(2, 3, 8, 8)

    def others() -> None:
        with torch.autograd.graph.save_on_cpu():
            model(x)

    def disabled() -> None:
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            model(x)

    def transformed() -> None:
        torch.func.vjp(model, x)

    with kn.save_memory(model):
        for call in (others, disabled, transformed) * 2:
            call()
        model(x)
    assert said(caplog) == [
        "other hooks on saved tensors are active around the call, and act alone",
        "hooks on saved tensors are disabled (not here)",
        "torch.func takes no hooks on saved tensors",
    ]
