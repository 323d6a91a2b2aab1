"""What code changes between the forward and a backward that recomputes outputs: values of the forward, or an error."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from support.saved_kinds import FUSED, KINDS, PLAIN_TORCH, Two, batch
from support.saving import assert_same_bits, outcome
from torch import nn

import keelnorm as kn

#: A few of each sort.
SOME = ["plain", "mask", "mask, keep", "ghost", "sync", "renorm", "weights, mask", "sync, mask", "conditional, mask"]
MASKED = [name for name in KINDS if "mask" in name]
#: Whose mask is copied, in the shape that the kernels take.
COPIED = "samples masked"
CHANGED = "modified by an inplace operation"


def of_last(model: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """The last convolution's gradient alone, which reads the output before it and no batch norm's gradient."""
    (found,) = torch.autograd.grad(y.square().sum(), model.last.weight)
    return found


def paired(name: str, activation: str = "silu", dtype: torch.dtype = torch.float32) -> tuple[Two, Two]:
    return Two(KINDS[name], activation).to(dtype), Two(KINDS[name], activation).to(dtype)


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_that_is_written_to(name: str) -> None:
    """The forward's mask counts, or it is torch's error, also where torch would not look."""
    model, twin = paired(name)
    expected = of_last(model, model(batch()))
    with kn.save_memory(twin):
        y = twin(batch())
    twin.given["mask"].logical_not_()
    if KINDS[name].recomputed and name != COPIED:
        with pytest.raises(RuntimeError, match=CHANGED):
            of_last(twin, y)
    else:
        assert torch.equal(of_last(twin, y), expected)


@pytest.mark.parametrize("name", ["mask", "mask, keep"])
def test_a_mask_whose_memory_was_freed(name: str) -> None:
    _, twin = paired(name)
    with kn.save_memory(twin):
        y = twin(batch())
    twin.given["mask"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory of what an output is computed from"):
        of_last(twin, y)


@pytest.mark.parametrize("name", ["mask", "weights, mask", "conditional, mask"])
def test_a_mask_that_is_let_go(name: str) -> None:
    model, twin = paired(name)
    expected = outcome(model, batch())
    with kn.save_memory(twin):
        x = batch().requires_grad_()
        y = twin(x)
    twin.given.clear()
    gc.collect()
    (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in twin.parameters()), *twin.buffers()]
    assert_same_bits(found, expected)


@pytest.mark.parametrize("what", ["parameters", "buffers", "momentum and eps", "mode", "freed parameters"])
@pytest.mark.parametrize("name", SOME)
def test_what_a_layer_has_is_taken_as_it_was(name: str, what: str) -> None:
    """An output is recomputed with the parameters and statistics that the forward used, in evaluation too."""
    for training in (True, False):
        model, twin = paired(name)
        for each in (model, twin):
            each(batch() * 2)
            each.train(training)
        expected = of_last(model, model(batch()))
        with kn.save_memory(twin):
            y = twin(batch())
        for layer in (twin.bn1, twin.bn2):
            changed: list[torch.Tensor] = []
            if what in ("parameters", "buffers"):
                changed += layer.parameters() if what == "parameters" else layer.buffers()
            with torch.no_grad():
                for tensor in changed:
                    tensor.add_(1)
            for value in layer.parameters() if what == "freed parameters" else ():
                value.untyped_storage().resize_(0)
            if what == "momentum and eps":
                vars(layer).update(momentum=0.9, eps=1.0)
            if what == "mode":
                layer.train(not training)
        assert torch.equal(of_last(twin, y), expected)


@pytest.mark.parametrize("name", PLAIN_TORCH)
def test_a_changed_bias_is_no_error_where_torch_does_not_read_it(name: str) -> None:
    model, twin = paired(name)
    expected = outcome(model, batch())
    with kn.save_memory(twin):
        x = batch().requires_grad_()
        y = twin(x)
    with torch.no_grad():
        for layer in (twin.bn1, twin.bn2):
            if layer.bias is not None:
                layer.bias.add_(1)
    (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    assert_same_bits([y.detach(), x.grad, *(p.grad for p in twin.parameters())], expected[: -len([*twin.buffers()])])


@pytest.mark.parametrize("name", ["weights", "L1"])
def test_a_derivative_of_the_gradient_needs_the_weight_as_it_was(name: str) -> None:
    _, twin = paired(name)
    with kn.save_memory(twin):
        x = batch().requires_grad_()
        y = twin(x)
    with torch.no_grad():
        twin.bn2.weight.add_(1)
    with pytest.raises(RuntimeError, match=CHANGED):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.parametrize("changed", ["input", "residual"])
@pytest.mark.parametrize("name", ["mask", "ghost", "sync, mask", "L1", "weights"])
def test_an_input_or_a_residual_that_is_written_to(name: str, changed: str) -> None:
    found: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    for saves in (False, True):
        model = Two(KINDS[name], "silu", residual=True)
        watched = model.first if changed == "input" else model.between
        watched.register_forward_hook(lambda _, __, y: seen.append(y))
        handle = kn.save_memory(model) if saves else None
        y = model(batch())
        if handle is not None:
            handle.undo()
            with torch.no_grad():
                seen[-1].mul_(2)
        reader = model.middle.weight if changed == "input" else model.last.weight
        if handle is not None and changed == "input" and name != "sync, mask":  # which keeps a masked copy
            with pytest.raises(RuntimeError, match=CHANGED):
                torch.autograd.grad(y.square().sum(), reader)
            return
        found += torch.autograd.grad(y.square().sum(), reader)
    assert torch.equal(*found)  # a residual is computed from the first layer's input


@pytest.mark.parametrize("name", KINDS)
def test_second_derivatives(name: str) -> None:
    """Bit for bit on fused kernels; in torch's operators sums may come in another order."""
    model, twin = paired(name, dtype=torch.float64)
    found = []
    for each in (model, twin):
        x = batch(torch.float64).requires_grad_()
        if each is twin:
            with kn.save_memory(each):
                y = each(x)
        else:
            y = each(x)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        g.square().sum().backward()
        found.append([g.detach(), x.grad, *(p.grad for p in each.parameters())])
    if name in FUSED:
        assert_same_bits(found[1], found[0])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:  # terms of the size of the largest gradient cancel in some, as in a bias before a batch norm
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SOME)
def test_retained_graphs_several_gradients_and_copies(name: str) -> None:
    model, twin = paired(name)
    expected = model(batch())
    with kn.save_memory(twin):
        found = twin(batch())
        other = copy.deepcopy(twin)
        assert torch.equal(other(batch()), twin(batch()))
    for _ in range(2):
        for y in (expected, found):
            y.sum().backward(retain_graph=True)
    assert_same_bits([p.grad for p in twin.parameters()], [p.grad for p in model.parameters()])
    several = [
        torch.autograd.grad(y, each.last.weight, torch.stack([torch.ones_like(y), y.detach()]), is_grads_batched=True)
        for y, each in ((expected, model), (found, twin))
    ]
    assert torch.equal(several[0][0], several[1][0])


@pytest.mark.parametrize("name", ["mask", "ghost", "weights", "sync, mask", "L1"])
def test_calls_that_raise_leave_nothing(name: str) -> None:
    model, twin = paired(name)
    bad = batch()[:, :, :0]
    with kn.save_memory(twin):
        for _ in range(2):
            with pytest.raises((ValueError, RuntimeError)):
                twin(bad)
            assert_same_bits(outcome(twin, batch()), outcome(model, batch()))
