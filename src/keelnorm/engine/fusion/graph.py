"""Autograd nodes of a batch norm whose result waits, and of the operations that are fused with it.

    x, γ, β ── BatchNormNode ── SumNode ── StepNode ── result
                      │            │           └── of each step that is not an addition
                   deferred     deferred

The graph has one node for each operation, so that every intermediate value has its gradient. Each node has two outputs:
the deferred tensor that users hold, and a hidden one, from which the graph continues; when a deferred tensor becomes
plain, it takes the hidden one's place. The last node computes all gradients with one kernel, and hands them to the
other nodes outside of the graph (:class:`Shared`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from keelnorm.engine.activations import NAMED, NONE, Activation
from keelnorm.engine.arguments import Needs
from keelnorm.engine.fusion.deferred_tensor import without_memory
from keelnorm.engine.fusion.operations import TIMES_START, Step, Steps, value_after
from keelnorm.engine.normalization_steps import Normalization
from keelnorm.engine.torch_internals import is_batched_gradient, is_transformed, running_backward

if TYPE_CHECKING:
    from keelnorm.engine.fusion.call import Call


class Shared:
    """What the nodes of one call exchange.

    Args:
        exact: Whether user code holds an intermediate value: then each node computes its own gradient.
        gradients: Of x, weight and bias, from the last node, in the backward ``task``.
        later: The gradient after the activation and the result, for the addition before it, in the same backward.
    """

    __slots__ = ("exact", "gradients", "later", "task")

    def __init__(self) -> None:
        self.exact, self.task = False, -1
        self.gradients: tuple[Tensor | None, ...] | None = None
        self.later: tuple[Tensor, Tensor] | None = None

    def put(self, gradients: tuple[Tensor | None, ...] | None, later: tuple[Tensor, Tensor] | None = None) -> None:
        """Leave gradients for the earlier nodes."""
        self.gradients, self.later = gradients, later
        self.task = running_backward()

    def take(self) -> tuple[tuple[Tensor | None, ...] | None, tuple[Tensor, Tensor] | None]:
        """Return what was put in the backward that runs, and clear it."""
        mine = self.task == running_backward()
        found = (self.gradients, self.later) if mine else (None, None)
        self.gradients = self.later = None
        return found


class BatchNormNode(Function):
    """The batch norm itself; the operations fused with it have nodes of their own."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the batch norm, and keep what its gradient needs."""
        call.run()
        ctx.save_for_backward(call.x, weight, call.saved)
        # torch's batch norm does not keep the bias, and lets it be changed before the backward.
        ctx.bias = None if bias is None else (bias, bias._version, bias.detach().clone())
        ctx.shared, ctx.normalization = call.shared, call.normalization
        ctx.need = x.requires_grad, weight is not None and weight.requires_grad, bias is not None and bias.requires_grad
        ctx.set_materialize_grads(False)
        call.node = ctx
        return without_memory(call.like), call.x.data

    @staticmethod
    def backward(ctx: Any, *dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients, those of the fused operations included."""
        fused, _ = ctx.shared.take()
        g = _sum(*dy)
        found: tuple[Tensor | None, ...] = fused or (None, None, None)
        if g is not None:
            one = _gradients(ctx, g, NONE, None)
            found = tuple(_sum(a, b) for a, b in zip(found, (one[0], *one[2:]), strict=True))
        return None, *(value if need else None for value, need in zip(found, ctx.need, strict=True))


class SumNode(Function):
    """The addition of a residual. ``final``: no operation follows it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, residual: Tensor, call: Call, final: bool) -> Any:
        """Add the residual."""
        call.add(residual)
        ctx.node, ctx.final = call.node, final
        if final:
            return call.take_noted_result()
        ctx.set_materialize_grads(False)
        return without_memory(call.like), call.x.data

    @staticmethod
    def backward(ctx: Any, *dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the batch norm's result and of the residual."""
        g = _sum(*dy)
        if ctx.final:
            return g, g, None, None
        _, later = ctx.node.shared.take()
        dresidual = None
        if later is not None:
            behind, y = later
            dx, dresidual, dweight, dbias = _gradients(
                ctx.node, behind, NAMED["relu"], y, need_residual=ctx.needs_input_grad[1]
            )
            ctx.node.shared.put((dx, dweight, dbias))
        return g, _sum(g, dresidual), None, None


class StepNode(Function):
    """A step after the batch norm; the last step returns the kernel's result.

    Args of the forward: the hidden tensors of the step's operand and of the batch norm's own result (None where the
    step does not read it), the call, and the number of the step.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, start: Tensor | None, call: Call, number: int) -> Any:
        """Return the kernel's result, or a deferred tensor before the last step."""
        steps = call.kernel.steps
        ctx.node, ctx.activation, ctx.steps, ctx.residual = call.node, call.kernel.activation, steps[:number], False
        ctx.step, ctx.final = steps[number], number + 1 == len(steps)
        if not ctx.final:
            ctx.set_materialize_grads(False)
            return without_memory(call.like), call.x.data
        result = call.take_noted_result()
        if call.kernel.residual:
            ctx.residual = True
            ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, *dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the operands' gradients, or leave them to the earlier nodes."""
        g = _sum(*dy)
        if g is None:
            return None, None, None, None
        node = ctx.node
        shared: Shared = node.shared
        if not ctx.final or shared.exact or torch.is_grad_enabled() or _is_batched(g):
            return *_exact(ctx, g), None, None
        if ctx.residual:
            shared.put(None, (g, *ctx.saved_tensors))
        else:
            dx, _, dweight, dbias = _gradients(node, g, ctx.activation, None)
            shared.put((dx, dweight, dbias))
        return None, None, None, None


def _gradients(
    node: Any, dy: Tensor, act: Activation, y: Tensor | None, need_residual: bool = False
) -> tuple[Tensor | None, ...]:
    """Return dx, dresidual, dweight and dbias from the gradient after an activation, by one kernel where possible."""
    x, weight, bias, saved = _kept(node)
    normalization: Normalization = node.normalization
    kept = normalization.kept(x, saved, weight, bias, y, act)
    if torch.is_grad_enabled() or _is_batched(dy):
        return normalization.differentiable_backward(dy, kept)
    need_x, need_weight, need_bias = node.need
    need = Needs(x=need_x, residual=need_residual, weight=need_weight, bias=need_bias)
    return normalization.backward(dy, kept, need)


def _kept(node: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Return x, weight, bias and statistics of a call; for a bias that was changed since, its copy, without a graph."""
    x, weight, saved = node.saved_tensors
    if node.bias is None:
        return x, weight, None, saved
    bias, version, copy = node.bias
    return x, weight, bias if bias._version == version else copy, saved


def _exact(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of one step's operands, computed for this step alone."""
    step: Step = ctx.step
    if ctx.residual:  # ReLU, whose result says enough
        (y,) = ctx.saved_tensors
        return ctx.activation.gradient(g, y), None
    x, weight, bias, saved = _kept(ctx.node)
    start = ctx.node.normalization.differentiable(x, saved, weight, bias)
    value = after(ctx.steps, start)
    if isinstance(step, Activation):
        return step.gradient(g, value), None
    if step == TIMES_START:
        return g * start, g * value
    operator, number = cast(tuple[str, float], step)
    return (g if operator == "+" else g / number), None


def after(steps: Steps, start: Tensor) -> Tensor:
    """Apply steps other than an addition to a batch norm's own result."""
    value = start
    for step in steps:
        value = value_after(step, value, start)
    return value


def _sum(*values: Tensor | None) -> Tensor | None:
    there = [value for value in values if value is not None]
    return None if not there else there[0] if len(there) == 1 else there[0] + there[1]


def _is_batched(gradient: Tensor) -> bool:
    """Return whether a transform batched several gradients, which kernels do not handle."""
    return is_transformed() or is_batched_gradient(gradient)
