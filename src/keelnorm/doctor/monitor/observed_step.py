"""Hooks on the batch norms of a model for one training step, and what they have seen."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from keelnorm.control.run_uncompiled import uncompiled
from keelnorm.doctor.evidence.data import Data
from keelnorm.doctor.evidence.evidence import Evidence, number_of_ranks, unwrapped
from keelnorm.doctor.evidence.layer_inputs import Recorder
from keelnorm.doctor.evidence.layers import facts_of
from keelnorm.doctor.evidence.neighbors import from_sequence
from keelnorm.doctor.evidence.passing_hook import PassingHook
from keelnorm.doctor.evidence.training_step import TrainingStep

if TYPE_CHECKING:
    from torch.optim import Optimizer


class ObservedStep:
    """One training step that is looked at: the forward by hooks on layers, the backward by hooks on their inputs.

    Nothing is read from a GPU between the beginning of the step and :meth:`evidence`.

    Args:
        model: The model.
        layers: Its batch norms by path.
        step: The number of the step.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], step: int) -> None:
        self.step = step
        self._model, self._modules = model, layers
        paths = {module: path for path, module in model.named_modules()}
        # The running statistics as they are before this batch updates them.
        self._facts = facts_of(layers, from_sequence(unwrapped(model), layers.values(), paths))
        self._recorder = Recorder(layers, {})
        self._calls: dict[str, int] = {}
        self._gradients: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._made: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}
        self._hooks, self._on_tensors = ExitStack(), ExitStack()
        self._awaited: set[str] = set()

    @property
    def is_over(self) -> bool:
        """Whether the backward has been there, or none is to come."""
        return bool(self._gradients) or not self._awaited

    def begin(self, args: tuple[Any, ...] = (), keywords: Mapping[str, Any] | None = None) -> None:
        """Set the hooks, before the model's forward.

        Args:
            args: The model's arguments, for a model that is a batch norm itself: its own hooks run already.
            keywords: Its keywords.
        """
        self._hooks.enter_context(uncompiled())
        self._hooks.enter_context(self._recorder.recording())
        for path, module in self._modules.items():
            hook = PassingHook(partial(self._before, path))
            self._hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if module is self._model and keywords is not None:
                self._recorder.take(path, module, args, keywords)
                self._before(path, module, args, keywords)
        for module in self._model.modules():
            weight = module._parameters.get("weight")
            if isinstance(weight, Tensor) and weight.ndim > 1:
                self._hooks.callback(module.register_forward_hook(PassingHook(partial(self._after, weight))).remove)

    def end_forward(self) -> None:
        """Remove the hooks on layers; those on their inputs wait for the backward."""
        self._hooks.close()
        self._made.clear()

    def end(self) -> None:
        """Remove all hooks: a leaf of autograd would keep them for ever."""
        self.end_forward()
        self._on_tensors.close()

    def _before(self, path: str, layer: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        x = args[0] if args else keywords.get("input")
        self._calls[path] = self._calls.get(path, 0) + 1
        if not isinstance(x, Tensor):
            return
        source, version, weight = self._made.get(id(x), (None, 0, None))
        # The same tensor, and not changed in place since: an activation may stand between.
        if source is not None and weight is not None and source() is x and x._version == version:
            self._weights.setdefault(path, _norm(weight))
        if path not in self._awaited and x.requires_grad:  # the first call with a gradient
            self._awaited.add(path)
            self._on_tensors.callback(x.register_hook(partial(self._keep, path)).remove)

    def _after(self, weight: Tensor, layer: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        if isinstance(y, Tensor):
            self._made[id(y)] = weakref.ref(y), y._version, weight

    def _keep(self, path: str, gradient: Tensor) -> None:
        self._gradients[path] = _norm(gradient)

    def evidence(self, optimizer: Optimizer | None) -> tuple[Evidence, dict[str, float]]:
        """What rules look at, and the norms of the weights in front of layers, once the backward is over."""
        with torch.no_grad():
            self._recorder.end_batch()
            inputs = self._recorder.inputs()
        broken = {path for path, seen in inputs.items() if not seen.moments.is_finite}
        sizes = [max(seen.moments.sizes) for seen in inputs.values()]
        data = Data(sizes=(max(sizes, default=None),), complete=False, features=None, as_is=inputs, true=inputs)
        step = TrainingStep(
            loss=None,
            calls=self._calls,
            updates=dict.fromkeys(self._calls),
            late=dict.fromkeys(self._calls, 0),
            gradients={path: float(norm) for path, norm in self._gradients.items()},
            broken_inputs=frozenset(broken),
        )
        order = {path: index for index, path in enumerate(self._calls)}  # in which they ran
        facts = tuple(sorted(self._facts, key=lambda layer: order.get(layer.path, len(order))))
        evidence = Evidence(
            self._model, facts, optimizer, data=data, step=step if self._gradients else None, ranks=number_of_ranks()
        )
        return evidence, {path: float(norm) for path, norm in self._weights.items()}


def _norm(values: Tensor) -> Tensor:
    """The norm, added up in float32 at least: that of a large tensor exceeds what half precision can hold."""
    norm: Tensor = torch.linalg.vector_norm(values.detach(), dtype=torch.promote_types(values.dtype, torch.float32))
    return norm
