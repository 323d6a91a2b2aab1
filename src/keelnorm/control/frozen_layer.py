"""How one layer is frozen and unfrozen: attributes set on the instance, and all layers changed or none."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy

from keelnorm.engine.rollback import Unchanged
from keelnorm.engine.torch_internals import BatchNormBase

#: The attribute with the names of the parameters that freezing turned off.
_TURNED_OFF = "_frozen_parameters"
#: The methods that freezing replaces on the instance.
_METHODS = ("train", "reset_running_stats")


class _FrozenTrain:
    """Takes the place of ``layer.train`` while statistics are frozen: keeps evaluation, and notes the mode asked for.

    It is an attribute and not a hook: compiled code ignores a hook set after ``torch.compile``, and a hook makes
    ``kn.Sequential`` run unfused.
    """

    def __init__(self, layer: BatchNormBase) -> None:
        self.layer = layer
        self.mode = layer.training
        #: Attributes of these names that someone else had set.
        self.before = {
            name: value for name, value in vars(layer).items() if name in _METHODS and value is not _keep_running_stats
        }

    def __call__(self, mode: bool = True) -> BatchNormBase:
        if not isinstance(mode, bool):
            raise ValueError(f"train: mode must be True or False; got {mode!r}")
        type(self.layer).train(self.layer, False)
        if has_frozen_statistics(self.layer):  # a new object: whoever puts back the attributes gets the old mode back
            vars(self.layer)["train"] = asked = copy(self)
            asked.mode = mode
        return self.layer


def _keep_running_stats() -> None:
    """Takes the place of ``layer.reset_running_stats`` while statistics are frozen."""


def has_frozen_statistics(layer: BatchNormBase) -> bool:
    """Whether :func:`freeze_statistics` is in force."""
    return isinstance(layer.__dict__.get("train"), _FrozenTrain)


def freeze_statistics(layer: BatchNormBase) -> None:
    """Keep a layer in evaluation, whatever ``train()`` asks for."""
    if not has_frozen_statistics(layer):
        vars(layer).update(train=_FrozenTrain(layer), reset_running_stats=_keep_running_stats)
    layer.train(layer.__dict__["train"].mode)


def unfreeze_statistics(layer: BatchNormBase) -> None:
    """Undo :func:`freeze_statistics`, and set the mode that was last asked for."""
    if has_frozen_statistics(layer):
        held = vars(layer).pop("train")
        if vars(layer).get("reset_running_stats") is _keep_running_stats:
            del vars(layer)["reset_running_stats"]
        vars(layer).update({name: value for name, value in held.before.items() if name not in vars(layer)})
        layer.train(held.mode)


def freeze_parameters(layer: BatchNormBase) -> None:
    """Turn off the gradients of a layer's parameters, and note which were on."""
    parameters = dict(layer.named_parameters())
    names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None  # an optimizer looks at nothing else
    vars(layer)[_TURNED_OFF] = (*vars(layer).get(_TURNED_OFF, ()), *names)


def unfreeze_parameters(layer: BatchNormBase) -> None:
    """Turn on the gradients that :func:`freeze_parameters` turned off."""
    names = vars(layer).pop(_TURNED_OFF, ())
    for name, parameter in layer.named_parameters():
        if name in names:
            parameter.requires_grad_(True)


def change(layers: Collection[BatchNormBase], *, on: bool, statistics: bool, affine: bool) -> None:
    """Freeze or unfreeze statistics and parameters of layers; after an error, none is changed."""
    modules = {module for layer in layers for module in layer.modules()}
    parameters = {parameter for layer in layers for parameter in layer.parameters()}
    with Unchanged(modules=modules, parameters=parameters):
        for layer in layers:
            if statistics:
                (freeze_statistics if on else unfreeze_statistics)(layer)
            if affine:
                (freeze_parameters if on else unfreeze_parameters)(layer)
