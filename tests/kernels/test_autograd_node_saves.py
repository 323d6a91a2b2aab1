"""What the node in C++ saves for the backward: the same as the node in Python, seen by hooks and checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from support.node_calls import counted, everything, in_python, layer_for, same
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from keelnorm.engine.kernels.cpu import autograd_node

pytestmark = pytest.mark.skipif(autograd_node.run is None, reason=f"no node in C++: {autograd_node.missing()}")


@pytest.mark.parametrize("keep", ["cpu", "own"])
def test_hooks_on_saved_tensors(keep: str) -> None:
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.clone()

    own = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    layer = layer_for((4, 3))
    x = torch.randn(4, 3, requires_grad=True)
    plain = everything(layer, x, None, "silu")
    with torch.autograd.graph.save_on_cpu() if keep == "cpu" else own:
        same(everything(layer, x, None, "silu"), plain)
    assert len(seen) == (4 if keep == "own" else 0)  # x, statistics, weight, bias


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
def test_both_nodes_save_the_same_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch, activation: str | None, residual: bool
) -> None:
    """Activation checkpointing tells saved tensors by their number: one node runs first, and the other again."""
    layer = layer_for((4, 3))
    x, added = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3) if residual else None
    kept: list[list[Tensor]] = [[], []]
    for seen in kept:

        def pack(tensor: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(tensor)
            return tensor

        node = in_python(monkeypatch) if seen is kept[1] else counted(monkeypatch)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), node:
            copy.deepcopy(layer)(x, added, activation=activation)
    same(*kept)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    layer = layer_for((4, 3))
    x, added = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    inputs = [x, added, layer.weight, layer.bias]
    twin = copy.deepcopy(layer)
    checkpointed = checkpoint(
        lambda x, added: layer(x * 2, added, activation="silu"), x, added, use_reentrant=reentrant
    )
    plain = twin(x * 2, added, activation="silu")
    plain.square().sum().backward()
    expected = [x.grad, added.grad, twin.weight.grad, twin.bias.grad]
    x.grad = added.grad = None
    checkpointed.square().sum().backward()
    same([tensor.grad for tensor in inputs], expected)
    same([*layer.buffers()], [*twin.buffers()])


def test_an_exception_in_a_hook_reaches_the_caller() -> None:
    def fail(_: Tensor) -> Tensor:
        raise KeyError("mine")

    layer = layer_for((4, 3))
    updates = int(layer.num_batches_tracked)
    with pytest.raises(KeyError, match="mine"), torch.autograd.graph.saved_tensors_hooks(fail, lambda t: t):
        layer(torch.randn(4, 3, requires_grad=True))
    assert int(layer.num_batches_tracked) == updates + 1  # as in torch.nn, the forward has run
