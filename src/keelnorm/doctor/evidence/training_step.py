"""What one training step shows: how often running statistics were updated, and how large gradients are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from keelnorm.doctor.evidence.batches import Batches
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.evidence.next_update import Update, updates_of
from keelnorm.engine.error_messages import RefusedTypeError, RefusedValueError, describe

if TYPE_CHECKING:
    from torch.optim import Optimizer

#: ``loss(model, batch)``, or a module such as ``nn.CrossEntropyLoss()``, called with the output and the batch's second
#: element.
Loss: TypeAlias = Callable[..., Tensor] | nn.Module


@dataclass(frozen=True)
class TrainingStep:
    """One forward and backward in training mode, without a step of the optimizer.

    Args:
        loss: The loss; None where it is not known.
        calls: How often each batch norm was called, by path; those that were not called are left out.
        updates: How often each has updated its running statistics; None where it does not count.
        late: How many of these updates came in the backward, where checkpointed modules run again.
        gradients: The norm of the loss's gradient with respect to each layer's output, of its first call that has one.
        broken_inputs: Layers whose input was not finite.
        left_evaluating: Layers that were in training mode before the forward, and are not after it.
        without_gradient: Layers that were called, and whose parameters train, but got no gradient.
        next_updates: What the optimizer's next step does to the weights in front of each batch norm.
        untried: Why the next step could not be tried; None if it was, or if there is no optimizer.
    """

    loss: float | None
    calls: Mapping[str, int]
    updates: Mapping[str, int | None]
    late: Mapping[str, int]
    gradients: Mapping[str, float]
    broken_inputs: frozenset[str]
    left_evaluating: frozenset[str] = frozenset()
    without_gradient: frozenset[str] = frozenset()
    next_updates: Mapping[str, Update] = field(default_factory=dict)
    untried: str | None = None


def take_step(
    model: nn.Module,
    called: nn.Module,
    layers: tuple[LayerFacts, ...],
    batches: Batches,
    loss: Loss,
    optimizer: Optimizer | None = None,
) -> TrainingStep:
    """Run forward and backward on the first batch, inside of a block of ``untouched``.

    Args:
        model: The model.
        called: The model that ``loss`` is called with.
        layers: Its batch norms.
        batches: The batches.
        loss: Gives the loss.
        optimizer: The optimizer, whose next step is tried on copies.

    Raises:
        TypeError: The loss is no tensor.
        ValueError: It is not a scalar that requires a gradient, or the batch has no target.
    """
    paths = {layer.module: layer.path for layer in layers}
    watch = _Watch()
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    with ExitStack() as stack, torch.enable_grad():
        for module, path in paths.items():
            stack.callback(module.register_forward_pre_hook(partial(watch.before, path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(watch.after, path)).remove)
        counts = {path: _count(module) for module, path in paths.items()}
        training = {path for module, path in paths.items() if module.training}
        value = loss_of(called, batches, loss)
        left = {path for module, path in paths.items() if path in training and not module.training}
        first = {path: _count(module) for module, path in paths.items()}
        calls = dict(watch.calls)
        _backward(value, model)
        last = {path: _count(module) for module, path in paths.items()}
    updates, untried = _tried(layers, optimizer)
    without = {path for module, path in paths.items() if path in calls and _gets_none(module)}
    for parameter in model.parameters():
        parameter.grad = None
    return TrainingStep(
        loss=float(value.detach()),
        calls=calls,
        updates={path: _difference(counts[path], last[path]) for path in counts},
        late={path: _difference(first[path], last[path]) or 0 for path in counts},
        gradients=watch.gradients,
        broken_inputs=frozenset(watch.broken),
        left_evaluating=frozenset(left),
        without_gradient=frozenset(without),
        next_updates=updates,
        untried=untried,
    )


def _backward(value: Tensor, model: nn.Module) -> None:
    """The gradients of the parameters; hooks that step an optimizer as they accumulate do not run."""
    parameters = [one for one in model.parameters() if one.requires_grad]
    if not any(one._post_accumulate_grad_hooks for one in parameters):
        value.backward()
        return
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient


def _gets_none(layer: nn.Module) -> bool:
    """Whether a layer has parameters that train, and none of them got a gradient."""
    gradients = [one.grad for one in layer.parameters() if one.requires_grad]
    return bool(gradients) and all(gradient is None for gradient in gradients)


def _tried(layers: tuple[LayerFacts, ...], optimizer: Optimizer | None) -> tuple[dict[str, Update], str | None]:
    """The next updates, and why they are not known."""
    if optimizer is None:
        return {}, None
    try:
        return updates_of(layers, optimizer), None
    except Exception as error:  # the code of another package may raise anything
        return {}, f"{type(optimizer).__name__} could not be tried on copies: {type(error).__name__}: {error}"


def loss_of(called: nn.Module, batches: Batches, loss: Loss) -> Tensor:
    """The loss of the first batch.

    Raises:
        TypeError: It is no tensor.
        ValueError: It is not a scalar that requires a gradient, or the batch has no target.
    """
    batch = batches.first
    if isinstance(loss, nn.Module):
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise RefusedValueError(
                f"diagnose: loss={type(loss).__name__}() needs batches of input and target; got {describe(batch)}. "
                "Pass loss=lambda model, batch: ..., which returns the loss"
            )
        device = next((p.device for p in called.parameters()), None)
        value = loss(batches.run(called, batch), batch[1] if device is None else batch[1].to(device))
    else:
        value = loss(called, batch)
    if not isinstance(value, Tensor):
        raise RefusedTypeError(f"diagnose: loss must return a tensor; got {describe(value)}")
    if value.numel() != 1 or not value.requires_grad:
        raise RefusedValueError(
            f"diagnose: loss must return one number that requires a gradient; got {describe(value)}"
        )
    return value.reshape(())


class _Watch:
    """Hooks that count calls, and measure gradients."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.gradients: dict[str, float] = {}
        self.broken: set[str] = set()
        self.hooked: set[str] = set()

    def before(self, path: str, layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.calls[path] = self.calls.get(path, 0) + 1
        x = args[0] if args else keywords.get("input")
        if isinstance(x, Tensor) and not bool(x.detach().isfinite().all()):
            self.broken.add(path)

    def after(self, path: str, layer: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        # The first call with a gradient: a reentrant checkpoint calls without one first.
        if path not in self.hooked and isinstance(y, Tensor) and y.requires_grad:
            self.hooked.add(path)
            y.register_hook(partial(self._keep, path))

    def _keep(self, path: str, gradient: Tensor) -> None:
        self.gradients[path] = float(gradient.detach().double().norm())


def _count(layer: nn.Module) -> int | None:
    batches = getattr(layer, "num_batches_tracked", None)
    return int(batches) if isinstance(batches, Tensor) and batches.numel() == 1 else None


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before
