"""Evenkeel's batch norms in a model of someone else's, and back."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from evenkeel.control.selection import Where, select
from evenkeel.surgery.fused_forward import FusedForward
from evenkeel.surgery.fusing import Outcome, plan_all
from evenkeel.surgery.kinds import change_back, change_class, is_changed, target_of
from evenkeel.surgery.report import Report

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    *,
    fuse: bool = True,
    sync: bool | None = None,
    where: Where = None,
    process_group: Any = None,
) -> tuple[Model, Report]:
    """Make every batch norm of a model evenkeel's, in place, and let it run with the addition and activation behind it.

    A layer changes its class and stays the same object: parameters (an optimizer that has them keeps working), buffers,
    mode, hooks, name and state_dict keys are what they were. With ``fuse``, each module whose forward calls a batch
    norm is traced by torch.fx, children being calls; where a batch norm is followed by an activation, by an addition,
    or by both, as modules, functions, methods or operators, the module gets a rewritten forward that runs them as one
    kernel. A child whose output is a batch norm's (a ``Sequential`` that ends with one) is fused with what its caller
    does next. The model keeps its class, its methods and its modules.

    The rewritten forward looks, on every call, whether the modules concerned are still those that were traced: where
    one is replaced or hooked, or an attribute that the forward read has another value, the class's own forward runs.

    Args:
        model: Any module, a batch norm included. It is changed.
        fuse: Whether forwards are rewritten; else layers change their class alone.
        sync: True makes all layers ``ek.SyncBatchNorm``, False makes synchronized ones plain; None keeps what they are.
        where: A pattern for the layers' paths (``"layer1.*"``), a module's path, or several; None for all.
        process_group: Of the synchronized layers; None keeps theirs, or means all ranks.

    Returns:
        The model itself, and a report: a row for each batch norm, with its class before and after, the activation that
        runs with it and whether an addition does, the module whose forward was rewritten for it, and why it was left
        alone where it was.

    State:
        ``skipped_updates`` is added to the layers; it is in no state_dict. :func:`revert` undoes all of it.

    Differs:
        A fused activation's module is not called: it has to have no hook then, which is looked at on every call.

    Raises:
        TypeError, ValueError: ``model`` is no module, or a pattern matches no layer. The model is then as before.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model, report = convert(model)
        >>> type(model[1]).__module__, report.summary["fused"]
        ('evenkeel.nn.batch_norm', 1)

    Source:
        Reed, DeVito, He, Ussery, Ansel (2022), "torch.fx: Practical Program Capture and Transformation for Deep
        Learning in Python", arXiv:2112.08429.
    """
    layers = select("convert", model, where)
    rows: dict[str, dict[str, Any]] = {}
    targets: dict[_BatchNorm, type[nn.Module]] = {}
    for path, layer in layers.items():
        target = target_of(layer, sync)
        rows[path] = {"path": path, "was": _named(type(layer)), "is": _named(type(layer)), **_NOTHING}
        if isinstance(target, str):
            rows[path]["reason"] = target if "already" not in target else None
        else:
            targets[layer] = target
            rows[path]["is"] = _named(target)
    with ExitStack() as undo:
        plans, outcomes = plan_all(model, sync) if fuse else ({}, {})
        chosen = set(layers.values())
        for layer, target in targets.items():
            undo.callback(restore, layer, layer.__class__, dict(vars(layer)), dict(layer._buffers))
            change_class(layer, target, process_group)
        for path, plan in plans.items():
            if (
                not {model.get_submodule(_join(path, one.layer)) for mode in plan.fused for one in plan.fused[mode]}
                <= chosen
            ):
                continue  # layers that are not to be touched have a part in it
            undo.callback(_put_forward, plan.module, plan.module.__dict__.get("forward"))
            _put_forward(plan.module, FusedForward(plan))
        undo.pop_all()
    for path, outcome in outcomes.items():
        if path in rows and rows[path]["reason"] is None:
            rows[path].update(_cells(outcome))
    listed = list(rows.values())
    fused = sum(row["runs with"] is not None for row in listed)
    refused = sum(row["reason"] is not None for row in listed)
    summary = {"batch norms": len(listed), "converted": len(targets), "fused": fused, "left with a reason": refused}
    return model, Report("convert", summary, listed)


_NOTHING: dict[str, Any] = {"runs with": None, "in": None, "reason": None}


def revert(model: Model) -> tuple[Model, Report]:
    """Undo :func:`convert`: layers have their classes again, modules their own forwards.

    What training and loading have changed since, stays: parameters and buffers are the same objects. Evenkeel's layers
    that were not converted stay too. Works on copies and on loaded models.

    Returns:
        The model itself, and a report with a row for each layer that was changed back.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
        >>> model, _ = revert(convert(model)[0])
        >>> type(model[0]) is nn.BatchNorm1d
        True
    """
    layers = select("revert", model, None)
    kinds = {path: _named(type(layer)) for path, layer in layers.items() if is_changed(layer)}
    with ExitStack() as undo:
        forwards = take_back(model, undo)
        undo.pop_all()
    rows = [{"path": path, "was": was, "is": _named(type(layers[path]))} for path, was in kinds.items()]
    return model, Report("revert", {"layers": len(rows), "forwards": forwards}, rows)


def take_back(model: nn.Module, undo: ExitStack) -> int:
    """Undo what convert did to a model, in a way that ``undo`` undoes; gives the number of forwards."""
    forwards = 0
    for module in model.modules():
        if is_changed(module):
            undo.callback(restore, module, module.__class__, dict(vars(module)), dict(module._buffers))
            change_back(module)
        if isinstance(module.__dict__.get("forward"), FusedForward):
            undo.callback(_put_forward, module, module.__dict__["forward"])
            del module.__dict__["forward"]
            forwards += 1
    return forwards


def _cells(outcome: Outcome) -> dict[str, Any]:
    if outcome.reason is not None:
        return {"reason": outcome.reason}
    parts = ["addition"] * outcome.residual
    if outcome.activation not in (None, "none"):
        parts.append(f"{outcome.activation} ({outcome.by})")
    return {"runs with": " and ".join(parts), "in": outcome.module or "the model"}


def _named(kind: type) -> str:
    package = kind.__module__.partition(".")[0]
    return f"ek.{kind.__name__}" if package == "evenkeel" else kind.__name__


def _join(path: str, layer: str) -> str:
    return f"{path}.{layer}" if path else layer


def _put_forward(module: nn.Module, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def restore(layer: nn.Module, kind: type, attributes: dict[str, Any], buffers: dict[str, Any]) -> None:
    layer.__class__ = kind
    vars(layer).clear()
    vars(layer).update(attributes)
    layer._buffers.clear()
    layer._buffers.update(buffers)
