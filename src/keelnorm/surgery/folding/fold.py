"""Batch norms folded into the convolutions and linear layers beside them, for inference."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from keelnorm.control.layer_selection import Where
from keelnorm.control.run_uncompiled import uncompiled
from keelnorm.engine.error_messages import describe
from keelnorm.surgery.conversion.convert import take_back
from keelnorm.surgery.folding.fold_check import difference
from keelnorm.surgery.folding.fold_plan import Plan, Planner, apply_plan
from keelnorm.surgery.known_layers import notes_on
from keelnorm.surgery.observation.nested_tensors import call_of, map_tensors, tensors_in
from keelnorm.surgery.observation.observe import observe, preserved
from keelnorm.surgery.report import Report
from keelnorm.surgery.target_layers import chosen, refuse_sharded

#: The largest difference of a whole model's output in float64: rounding that many layers may have enlarged.
_WHOLE_FLOAT64 = 1e-8

_NOTHING_TO_COMPARE = "No floating-point tensor was found in the model's output, so the whole model was not compared."


@torch.inference_mode(False)  # whose tensors do not say when they are changed
def fold(
    model: nn.Module,
    example: Any,
    *,
    inplace: bool = False,
    verify: bool = True,
    tolerance: float | None = None,
    where: Where = None,
) -> tuple[nn.Module, Report]:
    """Fold batch norms into the convolutions and linear layers beside them, for inference.

    In evaluation a batch norm is y = x·s + t per channel, s = γ / √(running_var + eps), t = β − running_mean·s. So

        after a layer:   (W∗x + b)·s + t = (s·W)∗x + (s·b + t)
        before a layer:  W∗(x·s + t) + b = (W·s)∗x + (b + W·t)

    the latter only where the layer does not pad with zeros, or t = 0. An ``nn.Identity`` takes the batch norm's place,
    or what the layers of a registered class do behind it (timm's ``BatchNormAct2d``; see ``kn.surgery.register``).
    Who is beside whom is seen from a run of the model on ``example``; between the two there may be what commutes with
    an affine map per channel: average pooling, means over positions, interpolation, copies, changes of shape.

    Args:
        model: Any module, in evaluation mode.
        example: What the model is run on: a tensor, which is its only argument; a tuple of its arguments; or a mapping
            of its keywords. Any size will do that takes the same way through the code as the real inputs; the
            differences in the report are for it.
        inplace: Change the model itself; otherwise a copy.
        verify: Compare the whole model in float64 too, on a copy, and raise if it is another one.
        tolerance: The largest difference of a layer, relative to its largest output. None for 1e-10 where its weight is
            float64, and 16·eps of its dtype elsewhere. A layer that exceeds it is left.
        where: A pattern for the batch norms' paths, a module's path, or several; None for all.

    Returns:
        The model, and a :class:`Report` with a row for each batch norm: ``into`` which layer it went, ``where`` that is
        from its point of view, the ``difference`` that makes to the pair's output, computed in float64 with the weights
        as they are rounded; or the ``reason`` why it was left. The summary has the whole model's ``difference`` on the
        example, in its own dtype and in ``float64``, relative to the output's largest value.

    State:
        Layers that take a batch norm in get new parameters, in the same dtype, with the same ``requires_grad``, and a
        bias if they had none. The batch norms' state is gone from the state_dict. All else is as before.

    Numerics:
        Weights are computed in float64 and rounded once, also where a layer takes several batch norms in.

    Cost:
        Three runs of the model, of which the first keeps all its tensors, and with ``verify`` two in float64; for each
        layer two runs of the pair in float64.

    Raises:
        TypeError: ``model`` is no module, scripted or compiled; ``example`` is none of the three.
        ValueError: The model is in training mode; ``where`` matches nothing; ``tolerance`` is negative.
        RuntimeError: The whole model differs after all, or does not run any more. After any error it is as it was.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> folded, report = fold(model, torch.randn(1, 3, 8, 8))
        >>> folded[1], report.rows[0]["into"], report.summary["folded"]
        (Identity(), '0', 1)

    Source:
        Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko (2018), "Quantization and Training of Neural Networks
        for Efficient Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 3.2.
    """
    where = list(where) if isinstance(where, Iterator) else where  # it is asked twice
    chosen("fold", model, where)
    refuse_sharded("fold", model)
    _check_model(model)
    if tolerance is not None and not (isinstance(tolerance, int | float) and tolerance >= 0):
        raise ValueError(f"fold: tolerance is None or a number of at least 0; got {describe(tolerance)}")
    args, kwargs = call_of("fold", map_tensors(_ordinary, example))
    model = model if inplace else copy.deepcopy(model)
    with ExitStack() as undo:
        take_back(model, undo)  # calls that convert has fused hide which layers are beside each other
        result = _fold(model, args, kwargs, verify, tolerance, chosen("fold", model, where), undo)
        undo.pop_all()
    return result


def _fold(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    verify: bool,
    tolerance: float | None,
    norms: dict[str, Any],
    undo: ExitStack,
) -> tuple[nn.Module, Report]:
    with uncompiled():
        trace = observe(model, args, kwargs)
    expected = [tensor.clone() for tensor in tensors_in(trace.output)]
    with preserved(model):
        plan = Planner(model, trace, tolerance).run(norms)
    del trace  # and with it every tensor of the run
    notes = notes_on(model)
    if not any(each.is_floating_point() or each.is_complex() for each in expected):
        notes.append(_NOTHING_TO_COMPARE)
    wide = _difference_in_float64(model, plan, args, kwargs, notes) if verify else None
    apply_plan(model, plan, undo)
    found = _run_folded(model, args, kwargs)
    own = _difference(expected, found)
    if verify:
        _check_whole(model, plan, own, wide)
    if _integers_changed(expected, found):
        notes.append("Integers or booleans in the output changed on the example, as rounding can make them.")
    summary = {"folded": len(plan.gone), "left": len(norms) - len(plan.gone), "difference": own, "float64": wide}
    return model, Report("fold", {k: v for k, v in summary.items() if v is not None}, list(plan.rows.values()), notes)


def _check_model(model: nn.Module) -> None:
    for path, module in model.named_modules():
        compiled = hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        if compiled or isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"fold: {path or 'the model'} is {'compiled' if compiled else 'a ScriptModule'}, so what it runs can't "
                "be changed; fold the model that it was made from, and compile or script that"
            )
    if any(value.is_meta for value in (*model.parameters(), *model.buffers())):
        raise ValueError("fold: parts of the model are on the meta device, without numbers to fold; load them first")
    if model.training:
        raise ValueError(
            "fold: the model is in training mode, where batch norms use the batch's moments; folding is for inference: "
            "call model.eval() first"
        )


def _difference_in_float64(
    model: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any], notes: list[str]
) -> float | None:
    """The whole model's difference, unfolded and folded, both in float64; None and a note where it does not run."""
    args, kwargs = map_tensors(_to_double, args), map_tensors(_to_double, kwargs)
    try:
        twin = copy.deepcopy(model).double()
        with preserved(twin, (args, kwargs)):
            expected = [tensor.clone() for tensor in tensors_in(twin(*args, **kwargs))]
    except Exception as error:  # whatever a model's code raises in another dtype
        said = str(error).strip().partition("\n")[0]
        notes.append(f"Not compared in float64, in which the model does not run: {type(error).__name__}: {said}")
        return None
    apply_plan(twin, plan, ExitStack())
    return _difference(expected, _run_folded(twin, args, kwargs))


def _run_folded(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    try:
        with preserved(model, (args, kwargs)):
            return tensors_in(model(*args, **kwargs))
    except Exception as error:
        raise RuntimeError(
            f"fold: the folded model does not run on the example ({type(error).__name__}: {error}); the model is as it "
            "was. Its code may ask a batch norm for what an Identity does not have: leave that one out by where="
        ) from error


def _ordinary(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _to_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    return difference(expected, found) if len(expected) == len(found) else torch.inf


def _integers_changed(expected: list[Tensor], found: list[Tensor]) -> bool:
    pairs = zip(expected, found, strict=False)  # where their numbers differ, so do the outputs altogether
    return any(not (a.is_floating_point() or a.is_complex() or torch.equal(a, b)) for a, b in pairs)


def _check_whole(model: nn.Module, plan: Plan, own: float, wide: float | None) -> None:
    if not plan.gone:
        return
    dtypes = {model.get_parameter(f"{path}.weight" if path else "weight").dtype for path in plan.weights}
    limit = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    off, most, dtype = (own, limit, "its own dtype") if wide is None else (wide, _WHOLE_FLOAT64, "float64")
    if not off <= most:
        raise RuntimeError(
            f"fold: the model's output on the example would differ by {off:.2g} of its largest value in {dtype}, more "
            f"than {most:.2g}, though each layer by itself agrees; the model is as it was. Its code uses a layer where "
            "that is not seen (a batch norm in a plain list, a kernel that is no operator of torch), or does not give "
            "the same output twice, or enlarges rounding. Leave parts out by where=, or pass verify=False"
        )
