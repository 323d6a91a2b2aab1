"""Saving memory is undone in one thread while the model runs in another."""

from __future__ import annotations

import threading
from typing import Any

import torch
from support.saving import Parts, network

import keelnorm as kn
from keelnorm.engine import saved_outputs
from keelnorm.engine.torch_internals import saved_tensor_hooks


def test_undo_in_another_thread() -> None:
    """A call that runs ends as it began, and takes its hooks along; calls after it keep their outputs."""
    inside, go_on = threading.Event(), threading.Event()
    seen: dict[str, Any] = {}

    def code(m: Parts, x: torch.Tensor) -> torch.Tensor:
        y = m.bn(m.conv(x), activation="silu")
        inside.set()
        assert go_on.wait(60)
        seen["calls"] = saved_outputs.calls
        return m.last(y)

    model, x = Parts(code), torch.randn(2, 3, 8, 8)

    def run() -> None:
        for name in ("first", "second"):
            y = model(x)
            seen[f"{name} hooks"] = saved_tensor_hooks(True)
            before = sum(kn.kernels.calls().values())
            y.sum().backward()
            seen[name] = sum(kn.kernels.calls().values()) - before

    handles = [kn.save_memory(model), kn.save_memory(model, longest=2)]
    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(60)
    for handle in handles:
        handle.undo()
    handles[0].undo()
    assert not model._forward_pre_hooks
    assert model._forward_hooks  # those that end the call
    go_on.set()
    thread.join()
    assert not model._forward_hooks
    assert seen == {"calls": 0, "first hooks": None, "second hooks": None, "first": 2, "second": 1}
    assert saved_outputs._waiting == []


def test_undo_before_the_hook_that_begins_a_call_runs() -> None:
    """Another thread may remove the hooks when torch has already listed them."""
    model, x = network(blocks=1), torch.randn(2, 3, 8, 8)
    handle = kn.save_memory(model)
    begin = next(iter(model._forward_pre_hooks.values()))
    handle.undo()
    begin(model, (x,))
    assert saved_outputs.calls == 0
    assert saved_tensor_hooks(True) is None


def test_many_threads_and_undo() -> None:
    """Calls in four threads, while another one saves and undoes."""
    model, x = network(blocks=1), torch.randn(2, 3, 8, 8)
    expected, stop = model(x).detach(), threading.Event()
    wrong: list[str] = []

    def run() -> None:
        while not stop.is_set():
            if not torch.allclose(model(x), expected, atol=1e-5):
                wrong.append("values")
            if saved_tensor_hooks(True) is not None:
                wrong.append("hooks")

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        handle = kn.save_memory(model)
        model(x)
        handle.undo()
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert saved_outputs.calls == 0
    assert not model._forward_hooks
