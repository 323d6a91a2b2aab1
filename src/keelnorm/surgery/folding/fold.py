"""Fold a model's batch norms into the convolutions and linear layers next to them: the public function."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from keelnorm.control.layer_selection import Where
from keelnorm.control.run_uncompiled import uncompiled
from keelnorm.engine.error_messages import (
    RefusedRuntimeError,
    RefusedTypeError,
    RefusedValueError,
    check_tolerance,
)
from keelnorm.engine.torch_internals import compiled_original
from keelnorm.surgery.conversion.convert import undo_conversion
from keelnorm.surgery.folding.fold_check import difference
from keelnorm.surgery.folding.fold_plan import Plan, Planner, apply_plan
from keelnorm.surgery.observation.nested_tensors import call_of, map_tensors, tensors_in
from keelnorm.surgery.observation.observe import observe
from keelnorm.surgery.report import Report
from keelnorm.surgery.snapshot import all_or_nothing, preserved
from keelnorm.surgery.target_layers import batch_norms_in, notes_on, refuse_sharded

#: The largest difference of a whole model's output in float64 that counts as rounding, enlarged by many layers.
_WHOLE_FLOAT64 = 1e-8

_NOTHING_TO_COMPARE = "No floating-point tensor was found in the model's output, so the whole model was not compared."


@torch.inference_mode(False)  # its tensors do not count changes in place
def fold(
    model: nn.Module,
    example: Any,
    *,
    inplace: bool = False,
    verify: bool = True,
    tolerance: float | None = None,
    where: Where = None,
) -> tuple[nn.Module, Report]:
    """Fold batch norms into the convolutions and linear layers next to them, for inference.

    In evaluation a batch norm is y = x·s + t per channel, s = γ / √(running_var + eps), t = β − running_mean·s. So

        after a layer:   (W∗x + b)·s + t = (s·W)∗x + (s·b + t)
        before a layer:  W∗(x·s + t) + b = (W·s)∗x + (b + W·t)

    the latter only if the layer does not pad with zeros, or t = 0. The batch norm is replaced by an ``nn.Identity``, or
    by the modules that a registered class calls after normalizing (timm's ``BatchNormAct2d``; see
    ``kn.surgery.register``). A run of the model on ``example`` shows which layers are neighbours. Operations that
    commute with an affine map per channel may lie between: average pooling, means over positions, interpolation,
    copies, changes of shape.

    Args:
        model: Any module, in evaluation mode.
        example: The model's input: a tensor, its only argument; a tuple of its arguments; or a mapping of its keywords.
            Any size will do for which the model's code takes the same path as for real inputs; the differences in the
            report are for this input.
        inplace: Whether to change the model itself; otherwise a copy.
        verify: Whether to compare the whole model in float64 too, on a copy, and raise if it differs.
        tolerance: The largest difference of a layer, relative to its largest output. None for 1e-10 if its weight is
            float64, and for 16·eps of its dtype otherwise. A layer that exceeds it is left.
        where: A pattern for the batch norms' paths, a module's path, or several; None for all.

    Returns:
        The model, and a :class:`Report` with a row for each batch norm: the layer ``into`` which it was folded,
        ``where`` that layer is, and the ``difference`` that the fold makes to the pair's output, computed in float64
        with the rounded weights; or the ``reason`` why it was left. The summary has the whole model's ``difference`` on
        the example, in its own dtype and in ``float64``, relative to the output's largest value.

    State:
        Layers that a batch norm is folded into get new parameters of the same dtype and ``requires_grad``, and a bias
        if they had none. The batch norms' state is gone from the state_dict. All else is as before.

    Numerics:
        Weights are computed in float64 and rounded once, also if several batch norms are folded into one layer.

    Cost:
        Three runs of the model, of which the first keeps all its tensors, and with ``verify`` two more in float64; for
        each layer two runs of the pair in float64.

    Raises:
        TypeError: ``model`` is no module, or is scripted, compiled or sharded; ``example`` is none of the three.
        ValueError: The model is in training mode; ``where`` matches nothing; ``tolerance`` is negative.
        RuntimeError: The whole model differs, or no longer runs. After any error it is as before.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> folded, report = fold(model, torch.randn(1, 3, 8, 8))
        >>> folded[1], report.rows[0]["into"], report.summary["folded"]
        (Identity(), '0', 1)

    Source:
        Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko (2018), "Quantization and Training of Neural Networks
        for Efficient Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 3.2.
    """
    where = list(where) if isinstance(where, Iterator) else where  # used twice
    batch_norms_in("fold", model, where)
    refuse_sharded("fold", model)
    _check_model(model)
    check_tolerance("fold", tolerance)
    args, kwargs = call_of("fold", map_tensors(_without_inference_mode, example))
    model = model if inplace else copy.deepcopy(model)
    with all_or_nothing(model.modules()):
        undo_conversion(model)  # calls that convert has fused hide which layers are neighbours
        norms = batch_norms_in("fold", model, where)
        return _fold(model, args, kwargs, norms, verify=verify, tolerance=tolerance)


def _fold(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    norms: dict[str, Any],
    *,
    verify: bool,
    tolerance: float | None,
) -> tuple[nn.Module, Report]:
    with uncompiled():
        trace = observe(model, args, kwargs)
    expected = [tensor.clone() for tensor in tensors_in(trace.output)]
    with preserved(model):
        plan = Planner(model, trace, tolerance).run(norms)
    del trace  # it holds every tensor of the run
    notes = notes_on(model)
    if not any(each.is_floating_point() or each.is_complex() for each in expected):
        notes.append(_NOTHING_TO_COMPARE)
    in_float64 = _difference_in_float64(model, plan, args, kwargs, notes) if verify else None
    apply_plan(model, plan)
    found = _run_folded(model, args, kwargs)
    own = _difference(expected, found)
    if verify:
        _check_whole(model, plan, own, in_float64)
    if _integers_changed(expected, found):
        notes.append("Integers or booleans in the output changed on the example, as rounding can cause.")
    summary = {"folded": len(plan.gone), "left": len(norms) - len(plan.gone), "difference": own, "float64": in_float64}
    return model, Report("fold", {k: v for k, v in summary.items() if v is not None}, list(plan.rows.values()), notes)


def _check_model(model: nn.Module) -> None:
    for path, module in model.named_modules():
        compiled = compiled_original(module) is not None or module._compiled_call_impl is not None
        if compiled or isinstance(module, torch.jit.ScriptModule):
            raise RefusedTypeError(
                f"fold: {path or 'the model'} is {'compiled' if compiled else 'a ScriptModule'}, so what it runs can't "
                "be changed; fold the model that it was made from, and compile or script the result"
            )
    if any(value.is_meta for value in (*model.parameters(), *model.buffers())):
        raise RefusedValueError(
            "fold: parts of the model are on the meta device, which has no values to fold; load them first"
        )
    if model.training:
        raise RefusedValueError(
            "fold: the model is in training mode, where batch norms use the batch's statistics; folding is for "
            "inference: call model.eval() first"
        )


def _difference_in_float64(
    model: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any], notes: list[str]
) -> float | None:
    """How far the whole model's outputs differ in float64; None, and a note, if it does not run in float64."""
    args, kwargs = map_tensors(_to_double, args), map_tensors(_to_double, kwargs)
    try:
        twin = copy.deepcopy(model).double()
        with preserved(twin, (args, kwargs)):
            expected = [tensor.clone() for tensor in tensors_in(twin(*args, **kwargs))]
    except Exception as error:  # a model's code may raise anything in another dtype
        first_line = str(error).strip().partition("\n")[0]
        notes.append(f"Not compared in float64, where the model does not run: {type(error).__name__}: {first_line}")
        return None
    apply_plan(twin, plan)
    return _difference(expected, _run_folded(twin, args, kwargs))


def _run_folded(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    try:
        with preserved(model, (args, kwargs)):
            return tensors_in(model(*args, **kwargs))
    except Exception as error:
        raise RefusedRuntimeError(
            f"fold: the folded model does not run on the example ({type(error).__name__}: {error}); the model is as "
            "before. Its code may use an attribute of a batch norm that an Identity lacks: leave that one out by where="
        ) from error


def _without_inference_mode(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _to_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    return difference(expected, found) if len(expected) == len(found) else torch.inf


def _integers_changed(expected: list[Tensor], found: list[Tensor]) -> bool:
    pairs = zip(expected, found, strict=False)  # another number of outputs is an infinite difference
    return any(not (a.is_floating_point() or a.is_complex() or torch.equal(a, b)) for a, b in pairs)


def _check_whole(model: nn.Module, plan: Plan, own: float, in_float64: float | None) -> None:
    """Raise if the whole model's output differs by more than rounding."""
    if not plan.gone:
        return
    dtypes = {model.get_parameter(f"{path}.weight" if path else "weight").dtype for path in plan.weights}
    limit = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    found, dtype = own, "its own dtype"
    if in_float64 is not None:
        found, limit, dtype = in_float64, _WHOLE_FLOAT64, "float64"
    if not found <= limit:
        raise RefusedRuntimeError(
            f"fold: the model's output on the example would differ by {found:.2g} of its largest value in {dtype}, "
            f"more than {limit:.2g}, though each layer by itself agrees; the model is as before. Its code may use a "
            "layer unseen (a batch norm in a plain list, a kernel that is no operator of torch), give another output "
            "each time, or amplify rounding. Leave parts out by where=, or pass verify=False"
        )
