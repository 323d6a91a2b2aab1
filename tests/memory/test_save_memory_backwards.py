"""Backwards that recompute outputs: partial, repeated, at once, ended by errors, and beside other hooks."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from support.saved_kinds import KINDS, C, Kind, N, Two, batch
from support.saving import Block, Parts, assert_same_bits, kept, network, outcome
from torch import nn
from torch.utils.checkpoint import checkpoint

import keelnorm as kn
from keelnorm.engine import output_recipes


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[torch.Tensor]]:
    """Every output that is recomputed within a test."""
    found: list[weakref.ref[torch.Tensor]] = []
    compute = output_recipes.Recipe._compute

    def noting(self: output_recipes.Recipe) -> torch.Tensor:
        y = compute(self)
        found.append(weakref.ref(y))
        return y

    monkeypatch.setattr(output_recipes.Recipe, "_compute", noting)
    return found


def test_a_partial_backward_leaves_no_output_behind(computed: list[weakref.ref[torch.Tensor]]) -> None:
    """An output with several readers, not all of which take part."""
    model = network(blocks=2)
    with kn.save_memory(model):
        y = model(batch())
    for reader in (model[2].conv1.weight, model[1].conv2.weight, model[0].weight):
        before = len(computed)
        torch.autograd.grad(y.sum(), reader, retain_graph=True)
        assert len(computed) > before
        assert [each() for each in computed] == [None] * len(computed)
    y.sum().backward()
    assert [each() for each in computed] == [None] * len(computed)


def test_a_reader_that_is_not_asked_leaves_no_output_behind(computed: list[weakref.ref[torch.Tensor]]) -> None:
    aside = nn.Conv2d(C, 1, 1)

    def code(m: Parts, x: torch.Tensor) -> torch.Tensor:
        y = m.bn(m.conv(x), activation="silu")
        m.unused = aside(y)
        return m.last(y)

    model = Parts(code)
    with kn.save_memory(model):
        y = model(batch())
    y.sum().backward()
    assert len(computed) == 1
    assert computed[0]() is None


def test_a_value_read_outside_of_a_backward_is_not_shared(computed: list[weakref.ref[torch.Tensor]]) -> None:
    model = Parts(lambda m, x: m.last(m.bn(m.conv(x), activation="silu")))
    with kn.save_memory(model):
        y = model(batch())
    first = y.grad_fn._saved_input
    assert torch.equal(first, y.grad_fn._saved_input)
    del first
    assert len(computed) == 2
    assert [each() for each in computed] == [None, None]
    y.sum().backward()
    assert len(computed) == 3


def test_an_error_in_a_backward_and_another_one_after_it() -> None:
    model, twin = network(blocks=2), network(blocks=2)
    for each in (model, twin):
        handle = kn.save_memory(each) if each is twin else None
        y = each(batch())
        hook = each[1].conv1.weight.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            y.sum().backward(retain_graph=True)
        hook.remove()
        each.zero_grad(set_to_none=True)
        y.sum().backward()
        if handle is not None:
            handle.undo()
    assert_same_bits([p.grad for p in twin.parameters()], [p.grad for p in model.parameters()])


def test_backwards_at_once_in_two_threads() -> None:
    model = network(blocks=3)
    expected = [torch.autograd.grad(model(batch()).sum(), [*model.parameters()])[0]]
    with kn.save_memory(model):
        y = model(batch())
    found: list[torch.Tensor] = []

    def run() -> None:
        found.extend(torch.autograd.grad(y.sum(), [*model.parameters()], retain_graph=True)[:1])

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same_bits(found, expected * 4)


def test_parts_of_an_output() -> None:
    """Slices, flattened and transposed ones are recomputed as such, and are what another batch norm adds."""

    def code(m: Parts, x: torch.Tensor) -> torch.Tensor:
        y = m.bn(m.conv(x), activation="silu")
        halves = y.chunk(2)
        z = m.bn2(halves[0].contiguous(), halves[1], activation="relu")
        return m.last(torch.cat([z * z, halves[1].mT.mT * halves[0]]))

    found = []
    for saves in (False, True):
        torch.manual_seed(0)
        model = Parts(code)
        model.bn2 = kn.BatchNorm2d(C)
        if saves:
            kn.save_memory(model)
        found.append(outcome(model, batch()))
    assert_same_bits(*found)


@pytest.mark.parametrize("name", ["mask", "ghost", "sync", "L1", "weights", "conditional"])
def test_chains_longer_than_asked(name: str) -> None:
    layers = [nn.Sequential(nn.Conv2d(C, C, 1), Layer(KINDS[name])) for _ in range(5)]
    found = []
    for saves in (0, 1, 2, 64):
        torch.manual_seed(0)
        model = Chain(copy.deepcopy(layers))
        handle = kn.save_memory(model, longest=saves) if saves else None
        found.append(outcome(model, torch.randn(N, C, 5, 5, generator=torch.Generator().manual_seed(1))))
        if handle is not None:
            handle.undo()
    for each in found[1:]:
        assert_same_bits(each, found[0])


class Layer(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.bn, self.given = kind.layer(), kind.given()

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.bn(x, residual, activation="relu", **self.given)
        return y


class Chain(nn.Module):
    """Each output is the next one's residual."""

    def __init__(self, layers: list[nn.Sequential]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for pair in self.layers:
            x = pair[1](pair[0](x), x)  # type: ignore[index]
        return x


def test_hooks_inside_the_model_keep_what_they_would(computed: list[weakref.ref[torch.Tensor]]) -> None:
    """Within hooks of others nothing is noted: what leaves them is kept, and not what it was computed from."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.last = Block("silu", 3), nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(checkpoint(self.block, x, use_reentrant=False))

    model = Inside()
    with kn.save_memory(model):
        y = model(batch().requires_grad_())
    y.sum().backward()
    assert computed == []
    size = N * 3 * 25 * 4
    assert kept(model, batch().requires_grad_(), 8) == kept(model, batch().requires_grad_(), 0) < 2 * size


@pytest.mark.parametrize("name", ["mask", "ghost", "weights, mask", "L1", "conditional"])
@pytest.mark.parametrize(
    "where", ["checkpoint inside", "checkpoint outside", "save_on_cpu inside", "save_on_cpu outside"]
)
def test_other_hooks_act_alone(name: str, where: str) -> None:
    def wrapped(function: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if where.startswith("checkpoint"):
            y: torch.Tensor = checkpoint(function, x, use_reentrant=False)
            return y
        with torch.autograd.graph.save_on_cpu():
            return function(x)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.after = Two(KINDS[name], "relu", residual=True), nn.Conv2d(2, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = wrapped(self.body, x) if where.endswith("inside") else self.body(x)
            out: torch.Tensor = self.after(y)
            return out

    found = []
    for saves in (False, True):
        model = Around()
        torch.manual_seed(0)
        nn.init.normal_(model.after.weight)
        nn.init.zeros_(model.after.bias)
        handle = kn.save_memory(model) if saves else None
        x = batch().requires_grad_()
        y = wrapped(model, x) if where.endswith("outside") else model(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
        if handle is not None:
            handle.undo()
    assert_same_bits(*found)
