"""How a layer is held frozen: what is set on it, how that is undone, and all layers or none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

#: Where a frozen layer remembers which of its parameters were turned off.
_TURNED_OFF = "_frozen_parameters"
#: The instance attributes that freezing sets.
_ATTRIBUTES = ("train", "reset_running_stats", _TURNED_OFF)


class _Held:
    """What ``layer.train`` is while the statistics are frozen: the layer stays in evaluation, the mode is remembered.

    An attribute of the layer and not a hook: a hook that comes after ``torch.compile`` goes unnoticed there, and makes
    ``kn.Sequential`` run unfused.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self.mode = layer.training
        #: What someone else had set in the place of what freezing sets.
        self.before = {
            name: value
            for name, value in vars(layer).items()
            if name in _ATTRIBUTES[:2] and value is not _keep_running_stats
        }

    def __call__(self, mode: bool = True) -> _BatchNorm:
        if not isinstance(mode, bool):
            raise ValueError(f"train: mode must be True or False; got {mode!r}")
        type(self.layer).train(self.layer, False)
        self.mode = mode
        return self.layer


def _keep_running_stats() -> None:
    """What ``layer.reset_running_stats`` is while the statistics are frozen."""


def is_held(layer: _BatchNorm) -> bool:
    return isinstance(layer.__dict__.get("train"), _Held)


def hold_statistics(layer: _BatchNorm) -> None:
    if not is_held(layer):
        vars(layer).update(train=_Held(layer), reset_running_stats=_keep_running_stats)
    layer.train(layer.__dict__["train"].mode)


def let_go_statistics(layer: _BatchNorm) -> None:
    if is_held(layer):
        held = vars(layer).pop("train")
        if vars(layer).get("reset_running_stats") is _keep_running_stats:
            del vars(layer)["reset_running_stats"]
        vars(layer).update({name: value for name, value in held.before.items() if name not in vars(layer)})
        layer.train(held.mode)


def turn_off(layer: _BatchNorm) -> None:
    parameters = dict(layer.named_parameters())
    names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None  # an optimizer looks at nothing else
    vars(layer)[_TURNED_OFF] = (*vars(layer).get(_TURNED_OFF, ()), *names)


def turn_on(layer: _BatchNorm) -> None:
    names = vars(layer).pop(_TURNED_OFF, ())
    for name, parameter in layer.named_parameters():
        if name in names:
            parameter.requires_grad_(True)


def all_or_none(layers: dict[str, _BatchNorm], change: Callable[[_BatchNorm], None]) -> None:
    """Change all layers, or none if there is an error."""
    with ExitStack() as undo:
        for layer in layers.values():
            undo.callback(_restore, layer, *_as_it_is(layer))
            change(layer)
        undo.pop_all()


def _as_it_is(layer: _BatchNorm) -> tuple[Any, ...]:
    attributes = {name: value for name, value in vars(layer).items() if name in _ATTRIBUTES}
    mode = vars(layer)["train"].mode if is_held(layer) else None
    modes = [(module, module.training) for module in layer.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in layer.parameters()]
    return attributes, mode, modes, parameters


def _restore(layer: _BatchNorm, attributes: dict[str, Any], mode: Any, modes: list[Any], parameters: list[Any]) -> None:
    for name in _ATTRIBUTES:
        vars(layer).pop(name, None)
    vars(layer).update(attributes)
    if mode is not None:
        vars(layer)["train"].mode = mode
    for module, training in modes:
        module.training = training
    for parameter, requires_grad, grad in parameters:
        parameter.requires_grad_(requires_grad)
        parameter.grad = grad
