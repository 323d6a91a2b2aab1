"""Faults that a conversion can have, put into the code on purpose: the program fuzz has to find each.

The kinds are those that recording forwards had: what it read was stale, it had side effects, calls moved, aliases and
types were lost, copies and pickles ran somebody else's modules, dtypes were not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.engine.activations import Activation
from keelnorm.engine.fusion import call, operations, pending, scope
from keelnorm.engine.fusion.expectations import Memory


def _stale_mode(patch: Any) -> None:
    """Dropout is taken to be off for good."""
    patch.setitem(
        operations._READERS,
        torch.nn.functional.dropout,
        lambda args, kwargs: operations.Operation(operations.HAND_ON, args[0]),
    )


def _stale_parameter(patch: Any) -> None:
    """An activation's parameter is what it was when the layer learned it."""
    matches = pending.Promise.follow

    def follow(self: Any, operation: Any, func: Any, args: Any, kwargs: Any) -> Any:
        expected = self.call.kernel.steps[self.done]
        if isinstance(operation.step, Activation) and isinstance(expected, Activation):
            operation = operation._replace(step=expected if operation.step.code == expected.code else operation.step)
        return matches(self, operation, func, args, kwargs)

    patch.setattr(pending.Promise, "follow", follow)


def _stale_activation(patch: Any) -> None:
    """Whatever activation comes, the one that was learned is taken."""
    matches = pending.Promise.follow

    def follow(self: Any, operation: Any, func: Any, args: Any, kwargs: Any) -> Any:
        expected = self.call.kernel.steps[self.done]
        if isinstance(operation.step, Activation) and isinstance(expected, Activation):
            operation = operation._replace(step=expected)
        return matches(self, operation, func, args, kwargs)

    patch.setattr(pending.Promise, "follow", follow)


def _runs_twice(patch: Any) -> None:
    """The first call of a model runs its forward twice."""
    enter = scope.open_scope

    def open_twice(module: nn.Module, args: Any) -> None:
        if not vars(module).get("_was_run") and hasattr(module, "steps"):
            vars(module)["_was_run"] = True
            module.forward(*args)
        enter(module, args)

    patch.setattr(scope, "open_scope", open_twice)


def _statistics_later(patch: Any) -> None:
    """The running statistics are updated when the result is used."""
    run, apply = call.Normalization.run, call.Call.take_result
    waiting: dict[int, Any] = {}

    def late(self: Any, x: Tensor, weight: Any, bias: Any, act: Any) -> Any:
        waiting[id(self)] = (self, x)
        again = call.Normalization(self.state._replace(update=False), weight, bias)
        return run(again, x, weight, bias, act)

    def take(self: Any) -> Tensor:
        found = waiting.pop(id(self.normalization), None)
        if found is not None:
            run(found[0], found[1].detach(), None, None, None)
        return apply(self)

    patch.setattr(call.Normalization, "run", late)
    patch.setattr(call.Call, "take_result", take)


def _input_changed(patch: Any) -> None:
    """Changes in place of what a result is computed from are not looked for."""
    patch.setattr(call.Call, "is_unchanged", lambda self: True)


def _in_place_is_not(patch: Any) -> None:
    """An operation in place on a waiting result gives a new one, and leaves the old as it was."""
    patch.setattr(pending, "become", lambda old, new: None)
    follow = pending.Promise.follow

    def gives(self: Any, operation: Any, func: Any, args: Any, kwargs: Any) -> Any:
        return follow(self, operation._replace(inplace=False), func, args, kwargs)

    patch.setattr(pending.Promise, "follow", gives)


def _sum_elsewhere(patch: Any) -> None:
    """``x += bn(h)`` gives a new tensor, which x's other holders do not see."""

    def add(args: Any, kwargs: Any) -> Any:
        return operations._add(False)(args, kwargs) if len(args) == 2 else None

    patch.setitem(operations._READERS, Tensor.add_, add)


def _plain_containers(patch: Any) -> None:
    """Outputs are taken apart and put together as plain tuples."""
    close = scope.close_scope

    def rebuild(module: nn.Module, args: Any, result: Any) -> Any:
        close(module, args, result)
        return tuple(result) if isinstance(result, tuple) and type(result) is not tuple else None

    patch.setattr(scope, "close_scope", rebuild)


def _left_waiting(patch: Any) -> None:
    """Nobody settles what leaves the model."""
    patch.setattr(scope.Scope, "settle", lambda self, reason, learn=True: None)


def _copies_share(patch: Any) -> None:
    """A copied layer is normalized with the statistics of the one that it was copied from."""
    patch.setattr(Memory, "__deepcopy__", lambda self, memo: self, raising=False)
    first: dict[int, Any] = {}
    normalization = kn.BatchNorm2d.normalization

    def borrowed(self: Any, x: Tensor) -> Any:
        owner = first.setdefault(id(self.__dict__.get("_fusion")), self)
        return normalization(owner if owner.num_features == self.num_features else self, x)

    patch.setattr(kn.BatchNorm2d, "normalization", borrowed)


def _any_dtype(patch: Any) -> None:
    """Whatever has the shape counts as a residual."""
    patch.setattr(pending, "_fits", lambda one, residual: residual.shape == one.x.shape)


def _twice(patch: Any) -> None:
    """The kernel's result is handed out again and again."""
    patch.setattr(call.Call, "take_result", lambda self: self.result)


def _no_history(patch: Any) -> None:
    """Waiting results have no place in the graph."""
    start = call.Call.start

    def without(self: Any) -> Tensor:
        with torch.no_grad():
            grad, self.grad = self.grad, False
            made = start(self)
            self.grad = grad
        return made

    patch.setattr(call.Call, "start", without)


def _grad_mode(patch: Any) -> None:
    """A result that was computed in one grad mode is handed out in another."""
    patch.setattr(torch, "is_grad_enabled", lambda: True)


def _second_addition(patch: Any) -> None:
    """One waiting result takes two residuals, one after the other."""
    fits = pending._fits
    patch.setattr(
        pending.Promise,
        "_may_add",
        lambda self, residual: type(residual) is Tensor and fits(self.call, residual) and self.call.is_unchanged(),
    )


def _exchanged_arguments(patch: Any) -> None:
    """A value in between is made plain inside an autograd.Function, which knows it by its place in the graph."""
    patch.setattr(pending.Promise, "stays", lambda self, reason: False)


MUTANTS: dict[str, Callable[[Any], None]] = {
    name.removeprefix("_").replace("_", " "): mutant
    for name, mutant in list(globals().items())
    if name.startswith("_") and callable(mutant) and getattr(mutant, "__module__", "") == __name__
}
