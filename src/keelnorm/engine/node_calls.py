"""Ordinary calls of a layer, which autograd's node in C++ runs, and the gradients that it leaves to Python."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from keelnorm.engine import saved_outputs
from keelnorm.engine.activations import NAMED, TABLE, Activation, of_module
from keelnorm.engine.arguments import Kept, Needs, State
from keelnorm.engine.dispatch import gradients
from keelnorm.engine.kernels import registry
from keelnorm.engine.kernels.cpu import autograd_node
from keelnorm.engine.recomputation import is_repeating
from keelnorm.engine.torch_internals import run_uncompiled


def run_node(
    x: Any, residual: Any, weight: Any, bias: Any, state: State, activation: Any, ranks: tuple[int, ...] | None
) -> Any:
    """Run an ordinary call by the node in C++, unchecked arguments included.

    Returns:
        y; or NotImplemented where the call is not an ordinary one, or there is no such node. Nothing was written then.
    """
    run = autograd_node.run
    if run is None or not registry.native_enabled or saved_outputs.calls or is_repeating() or state.sink is not None:
        return NotImplemented
    act = NAMED.get(activation) if activation is None or type(activation) is str else of_module(activation)
    if act is None:
        return NotImplemented
    return run(
        x, residual, weight, bias, state.running_mean, state.running_var, state.num_batches_tracked, state.counts(),
        ranks, state.training, state.update, state.momentum, state.eps, act,
    )  # fmt: skip


run_uncompiled(run_node.__code__)  # torch.compile can't trace the node, where it runs a layer outside of a graph


def _gradients_of_node(
    tensors: tuple[Any, ...], training: bool, eps: float, code: int, a: float, b: float, *need: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients that the node in C++ leaves to Python, see kernels/cpu/csrc/autograd_node.cpp."""
    dy, x, saved, weight, bias, y, residual = tensors
    act = Activation(TABLE[code].name, code, a, b)
    kept = Kept(x=x, saved=saved, weight=weight, bias=bias, y=y, residual=residual, training=training, act=act)
    return gradients(dy, kept, Needs(*need), eps)


autograd_node.connect(_gradients_of_node)
