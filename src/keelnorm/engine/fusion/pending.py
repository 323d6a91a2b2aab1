"""The two states of a deferred tensor: computed and observed (Observed), or not computed yet (Promise).

Both have one interface. ``takes_residual``: whether an addition may follow. ``start``: the batch norm's own result,
from which the tensor was made. ``follow``: the result of an operation on it, or None if that needs plain tensors.
``settle``: turns it into a plain tensor. ``expose``: its values, for code that does not see the class. ``stays``:
whether it must stay the same object while its values are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keelnorm.engine import saved_outputs
from keelnorm.engine.dispatch import PLAIN
from keelnorm.engine.fusion.deferred_tensor import (
    DeferredTensor,
    become,
    become_plain,
    defer,
    deferred_in,
    settle,
    without_memory,
)
from keelnorm.engine.fusion.graph import StepNode, SumNode
from keelnorm.engine.fusion.operations import ADD, HAND_ON, TIMES_START, Operation, Steps, kernel_of, may_go_on
from keelnorm.engine.noted_steps import NotedStep
from keelnorm.engine.torch_internals import (
    dispatch_mode_count,
    plain_apply,
    saved_tensor_hooks,
    without_torch_function,
)

if TYPE_CHECKING:
    from keelnorm.engine.fusion.call import Call

completed = 0
"""How many fused kernels have run in this process."""
_ADDED = "it is added to the result of another batch norm"


class Observed:
    """A computed tensor whose next operation is to be learned."""

    def __init__(self, call: Call, steps: Steps, start: Tensor | None) -> None:
        self.call, self.steps, self.start = call, steps, start

    @property
    def takes_residual(self) -> bool:
        """Return whether an addition may be fused next."""
        return not self.steps

    def follow(self, operation: Operation, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the result of an operation on the tensor, or None where that needs plain tensors."""
        call, step, target = self.call, operation.step, operation.target
        if step == HAND_ON:
            return target
        start = self.start if self.steps else target
        if operation.inplace and start is target:
            start = None  # it is not what it was
        become_plain(target)
        for tensor in deferred_in((args, kwargs)):
            settle(tensor, _ADDED)
        fits = step != ADD or (not self.steps and _fits(call, operation.other) and call.is_computed_again(target))
        result = self._run(operation, func, args, kwargs)
        steps = (*self.steps, step)
        known, more = kernel_of(steps), may_go_on(steps)
        if steps == call.memory.refused[call.training]:
            return result
        if not fits or not (known or more) or type(result) is not Tensor or call.grad != torch.is_grad_enabled():
            if not self.steps:
                call.memory.give_up(call.training, f"{getattr(func, '__name__', func)} reads its result")
            return result
        if known is not None:
            call.memory.learn(call.training, known)
        if more:
            call.scope.track(defer(result, Observed(call, steps, start)))
        return result

    def _run(self, operation: Operation, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if not saved_outputs.calls:
            return func(*args, **kwargs)
        target, other = operation.target, operation.other
        tensors = (target,) if other is None or other is target else (target, other)
        return saved_outputs.run_noted(NotedStep(func, args, kwargs, tensors, operation.inplace))

    def settle(self, tensor: Tensor, reason: str, learn: bool) -> None:
        """Turn the tensor into a plain one."""
        become_plain(tensor)
        if learn and not self.steps:
            self.call.memory.give_up(self.call.training, reason)

    def stays(self, reason: str) -> bool:
        """Return whether the tensor must stay the same object while its values are read."""
        return False

    def expose(self) -> Tensor:
        """Return the values, for code that does not see the class."""
        raise AssertionError("an observed tensor has values of its own")


class Promise:
    """A tensor that is not computed, because a later one is expected to be used instead.

    Args:
        call: The call of the batch norm.
        done: How many of the expected steps it includes.
        hidden: Its stand-in in autograd's graph; None where nothing is recorded.
    """

    __slots__ = ("call", "done", "exposed", "hidden")

    def __init__(self, call: Call, done: int, hidden: Tensor | None) -> None:
        self.call, self.done, self.hidden = call, done, hidden
        self.exposed: Tensor | None = None

    @property
    def takes_residual(self) -> bool:
        """Return whether an addition may be fused next."""
        return self.done == 0 and self.call.kernel.residual

    @property
    def start(self) -> Tensor | None:
        """Return the batch norm's own result, if it is still deferred."""
        call = self.call
        root = call.root() if self.done and call.root is not None else None
        if type(root) is not DeferredTensor:
            return None
        made = root._pending
        return root if isinstance(made, Promise) and made.call is call and made.done == 0 else None

    def follow(self, operation: Operation, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the result of an operation on the tensor, or None where that needs plain tensors."""
        call, step = self.call, operation.step
        if step == HAND_ON:
            return operation.target
        if (
            step != call.kernel.steps[self.done]
            or self.exposed is not None
            or call.grad != torch.is_grad_enabled()
            or call.scope.thread != get_ident()
            or dispatch_mode_count() > 0
            or call.hooks != saved_tensor_hooks(True)
            or (operation.inplace and not self._may_become(args[0]))
            or not (call.result is not None if step != ADD else self._may_add(operation.other))
        ):
            return None
        result = self._next(operation)
        if not operation.inplace:
            return result
        become(args[0], result)
        return args[0]

    def _next(self, operation: Operation) -> Tensor:
        """Return the kernel's result if this was the last step, else the next promise."""
        global completed
        call, hidden, other, done = self.call, self.hidden, operation.other, self.done + 1
        final = done == len(call.kernel.steps)
        completed += final
        if hidden is None:
            if operation.step == ADD:
                with torch.no_grad():
                    call.add(other)  # type: ignore[arg-type]
            return call.take_result() if final else promise(call, done, without_memory(call.like), None)
        if operation.step == ADD:
            made = _sum_node(hidden, other, call, final)
        else:
            start = other._pending.hidden if operation.step == TIMES_START else None  # type: ignore[union-attr]
            made = _step_node(hidden, start, call, self.done)
        return made if final else promise(call, done, *made)

    def _may_add(self, residual: Any) -> bool:
        call = self.call
        if type(residual) is DeferredTensor:
            settle(residual, _ADDED)
        recorded = self.hidden is not None or not (call.grad and residual.requires_grad)
        return recorded and call.residual is None and _fits(call, residual) and call.is_unchanged()

    def _may_become(self, tensor: Any) -> bool:
        """Return whether an operation in place may replace the tensor: its history has no other operation."""
        return type(tensor) is DeferredTensor and isinstance(made := tensor._pending, Promise) and made._is_own(tensor)

    def _is_own(self, tensor: Tensor) -> bool:
        """Return whether a promised tensor is still the result of its own node."""
        with without_torch_function():
            if self.hidden is None:
                return not tensor.requires_grad
            return tensor.grad_fn is self.hidden.grad_fn

    def settle(self, tensor: Tensor, reason: str, learn: bool) -> None:
        """Turn the tensor into a plain one."""
        with torch.inference_mode(False):
            if self._is_own(tensor):
                value = self.expose().detach()
                if self.hidden is not None:
                    assert self.call.shared is not None
                    self.call.shared.exact = True  # whoever holds it may ask for its gradient
                    self.hidden.data = value
                    value, self.hidden = self.hidden, None
            else:  # with whatever has been done to it below
                with torch.enable_grad(), without_torch_function():
                    value = tensor.clone()
            become(tensor, value)
        if learn:
            self._learn(reason)

    def _learn(self, reason: str) -> None:
        call = self.call
        if call.residual is None if self.takes_residual else call.result is not None:
            call.memory.miss(call.training, reason)  # the expected operation did not come
        elif self.done:
            call.memory.stop_before(call.training, call.kernel.steps[: self.done + 1])
        else:
            call.memory.give_up(call.training, f"{reason}, besides the operation that runs with it", True)

    def stays(self, reason: str) -> bool:
        """Return whether the tensor must stay the same object while its values are read."""
        # So within an autograd.Function, which has looked at its arguments' places in the graph before.
        if not self.call.grad or torch.is_grad_enabled():
            return False
        self._learn(reason)
        return True

    def expose(self) -> Tensor:
        """Return the values, for code that does not see the class."""
        if self.exposed is None:
            self.exposed = self.call.value_after(self.done)
        return self.exposed


Pending = Observed | Promise


def promise(call: Call, done: int, tensor: Any, hidden: Tensor | None) -> DeferredTensor:
    """Make a tensor without memory the result of the first ``done`` steps."""
    tensor._pending = Promise(call, done, hidden)
    call.scope.track(tensor)
    return tensor  # type: ignore[no-any-return]


def _fits(call: Call, residual: Any) -> bool:
    x = call.x
    return (
        type(residual) in PLAIN
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
        and not residual.is_inference()
    )


_sum_node = plain_apply(SumNode)
_step_node = plain_apply(StepNode)
