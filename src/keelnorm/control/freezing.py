"""Freezing: batch norms that keep their running statistics, their parameters, or both, in training too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.parameter import is_lazy

from keelnorm.control import frozen_layer
from keelnorm.control.layer_selection import Where, named, select, select_some
from keelnorm.engine.torch_internals import BatchNormBase


class Frozen(NamedTuple):
    """Which parts of a layer are frozen.

    Args:
        statistics: Whether the running statistics normalize, and ``train()`` does not change that.
        affine: Whether no parameter of the layer requires a gradient.
    """

    statistics: bool
    affine: bool


def freeze(model: torch.nn.Module, *, statistics: bool = True, affine: bool = True, where: Where = None) -> list[str]:
    """Freeze batch norms: their running statistics, their parameters, or both, until :func:`unfreeze`.

    With frozen statistics a layer computes y = (x − running_mean) / √(running_var + eps) · γ + β in training too, and
    never updates its running statistics, even if ``model.train()`` is called every epoch. Frozen parameters require no
    gradient and have none, so no optimizer changes them, not even by weight decay or momentum.

    Args:
        model: A model, or a layer: keelnorm's, torch.nn's, and subclasses of them.
        statistics: Freeze the running statistics.
        affine: Freeze γ and β, and all other parameters of the layer.
        where: A pattern for the layers' paths (``"layer1.*"``), a module's path, or several; None for all.

    Returns:
        The paths of the layers.

    State:
        Parameters, buffers and state_dict stay as they are. ``copy.deepcopy``, ``pickle`` and ``torch.save`` of the
        module keep it frozen; compiled models respect it. ``reset_running_stats`` of a frozen layer does nothing, so
        ``torch.optim.swa_utils.update_bn`` leaves it alone. Loading a state_dict still sets the running statistics.
        Freezing twice is freezing once. No hook is set, so ``kn.Sequential`` still fuses. Replacing the layer undoes
        it: freeze after ``convert_sync_batchnorm``, and before DistributedDataParallel, which records the parameters
        that train. An assignment to ``layer.training`` bypasses it; :func:`assert_frozen` detects that.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: The model has no batch norm, or ``where`` selects none; a layer has no running statistics, or none
            yet. The model is then as before, as it is after an error in a layer's own code.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> freeze(model)
        ['1']
        >>> model.train()[1].training, model[1].weight.requires_grad
        (False, False)
    """
    layers = select_some("freeze", model, where)
    if statistics:
        _check_statistics(layers)
    frozen_layer.change(layers.values(), on=True, statistics=statistics, affine=affine)
    return list(layers)


def unfreeze(model: torch.nn.Module, *, statistics: bool = True, affine: bool = True, where: Where = None) -> list[str]:
    """Undo :func:`freeze`, wholly or in part.

    Each layer gets the mode that ``train()`` or ``eval()`` last asked for, or that it had when it was frozen. The
    parameters that ``freeze`` turned off require a gradient again; those that were off before stay off. The arguments
    are those of :func:`freeze`.

    Returns:
        The paths of the selected layers, frozen or not.

    Raises:
        As :func:`freeze`, but a layer without running statistics is not an error.

    Example:
        >>> layer = torch.nn.BatchNorm1d(3)
        >>> _ = freeze(layer)
        >>> _ = unfreeze(layer, affine=False)
        >>> frozen(layer)
        {'': Frozen(statistics=False, affine=True)}
    """
    layers = select_some("unfreeze", model, where)
    frozen_layer.change(layers.values(), on=False, statistics=statistics, affine=affine)
    return list(layers)


def frozen(model: torch.nn.Module, *, where: Where = None) -> dict[str, Frozen]:
    """Tell which parts of each batch norm are frozen, by its path.

    Example:
        >>> frozen(torch.nn.BatchNorm1d(3))
        {'': Frozen(statistics=False, affine=False)}
    """
    return {
        path: Frozen(
            frozen_layer.has_frozen_statistics(layer) and not layer.training,
            not any(parameter.requires_grad for parameter in layer.parameters()),
        )
        for path, layer in select("frozen", model, where).items()
    }


def assert_frozen(
    model: torch.nn.Module, *, statistics: bool = True, affine: bool = True, where: Where = None
) -> list[str]:
    """Raise unless the batch norms are frozen, for a test or the start of a run; the arguments are those of ``freeze``.

    Returns:
        The paths of the layers.

    Raises:
        AssertionError: A layer is not frozen; the message names each, and what is not frozen. Raised with Python's -O
            too.
        TypeError, ValueError: ``model`` is not a module; it has no batch norm, or ``where`` selects none.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
        >>> assert_frozen(model, affine=False)
        Traceback (most recent call last):
        AssertionError: assert_frozen: 1 of 1 batch norms are not frozen: 0 (statistics: freeze has not been called)
    """
    layers = select_some("assert_frozen", model, where)
    failures = {path: _unfrozen(layer, statistics, affine) for path, layer in layers.items()}
    listed = [f"{named(path)} ({'; '.join(reasons)})" for path, reasons in failures.items() if reasons]
    if listed:
        raise AssertionError(
            f"assert_frozen: {len(listed)} of {len(layers)} batch norms are not frozen: {', '.join(listed)}"
        )
    return list(layers)


def _unfrozen(layer: BatchNormBase, statistics: bool, affine: bool) -> list[str]:
    """What is not frozen in a layer, in words."""
    reasons = []
    if statistics and layer.running_mean is None:
        reasons.append("statistics: there are no running statistics")
    elif statistics and not frozen_layer.has_frozen_statistics(layer):
        reasons.append("statistics: freeze has not been called")
    elif statistics and layer.training:
        reasons.append("statistics: training was set to True by assignment; call freeze again")
    if affine:
        names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        if names:
            reasons.append(f"affine: {', '.join(names)} with requires_grad=True")
    return reasons


def _check_statistics(layers: dict[str, BatchNormBase]) -> None:
    for path, layer in layers.items():
        if layer.running_mean is None:
            raise ValueError(
                f"freeze: {named(path)} has no running statistics (track_running_stats=False), so its statistics "
                "can't be frozen. Leave it out by where=, or pass statistics=False"
            )
        if is_lazy(layer.running_mean):
            raise ValueError(
                f"freeze: {named(path)} is lazy and has no running statistics before its first forward; run one first"
            )
