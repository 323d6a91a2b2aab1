"""Report what is known about the batch norms of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from keelnorm.cli._shared.failures import CommandError, one_line
from keelnorm.control.freezing import frozen
from keelnorm.control.layer_selection import Where
from keelnorm.doctor.evidence.dead import dead_below
from keelnorm.doctor.evidence.neighbors import neighbor_of
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.surgery import Report, convert, fold, kept_memory
from keelnorm.surgery.folding.foldable_layers import channels_of
from keelnorm.surgery.known_layers import is_frozen
from keelnorm.surgery.observation.call_record import Trace
from keelnorm.surgery.observation.nested_tensors import call_of
from keelnorm.surgery.observation.observe import observe
from keelnorm.surgery.snapshot import preserved
from keelnorm.surgery.target_layers import batch_norms_in, notes_on

#: The column of `kn.kept_memory` for what is kept with `kn.save_memory`.
SAVING = "with save_memory"


class Range(NamedTuple):
    """The minimum and the maximum of some numbers; in JSON a list of both."""

    least: float
    largest: float

    def __str__(self) -> str:
        return " to ".join(dict.fromkeys(f"{value:.3g}" for value in self))


def inspect_model(model: nn.Module, example: Any, *, where: Where = None, evaluation: bool = True) -> Report:
    """Report a row for each batch norm.

    Args:
        model: Any module. Its training modes change, and nothing else.
        example: As in ``kn.fold``. Without it the report lacks what only a run can show: the neighbors of a batch norm,
            what it runs with after ``kn.convert``, and whether it can be folded.
        where: Which batch norms; None for all.
        evaluation: Whether that run is in evaluation mode.
    """
    layers = batch_norms_in("inspect", model, where)
    held = {path: is_frozen(layer) or frozen(layer)[""].statistics for path, layer in layers.items()}
    rows = {path: _facts(path, layer, held[path]) for path, layer in layers.items()}
    notes = notes_on(model)
    summary = {"batch norms": len(rows), "channels": sum(row["channels"] or 0 for row in rows.values())}
    summary["dead channels"] = sum(row["dead"] or 0 for row in rows.values())

    if example is not None:
        fusing = _tried("fuses with", lambda: _converted(model, example, where, notes), notes)
        for row in fusing.rows if fusing else ():
            rows[row["path"]]["fuses with"] = row["runs with"]
        if fusing:
            summary["fusible"] = fusing.summary["fused"]
        args, kwargs = call_of("inspect", example)
        trace = observe(model.train(not evaluation), args, kwargs)
        for path, layer in layers.items():
            rows[path].update(_neighbours(trace, layer))
        del trace
        folding = _tried("folds into", lambda: fold(model.eval(), example, where=where)[1], notes)
        for row in folding.rows if folding else ():
            rows[row["path"]]["folds into"] = row["into"] or None
        if folding:
            summary["foldable"] = folding.summary["folded"]
    return Report("inspect", summary, list(rows.values()), notes)


def inspect_memory(model: nn.Module, example: Any, *, limit: float | None = None) -> Report:
    """Report what each module keeps for the backward: as it is, converted, and converted with ``kn.save_memory``.

    Args:
        model: Any module; it stays as it is.
        example: As in ``kn.fold``.
        limit: See ``kn.kept_memory``.
    """
    if example is None:
        raise CommandError("inspect: --memory runs the model; give an example by --input or --example")
    plain = kept_memory(model, example, limit=limit)
    converted, _ = convert(copy.deepcopy(model))
    notes = run_twice(converted, example)
    less = kept_memory(converted, example, limit=limit)
    rows: dict[str, dict[str, Any]] = {}
    for report, names in ((plain, {"kept MB": "kept MB"}), (less, {"kept MB": "converted", SAVING: SAVING})):
        for row in report.rows:
            mine = rows.setdefault(row["path"], {"path": row["path"], "kept MB": 0.0, "converted": 0.0, SAVING: 0.0})
            mine.update({name: row[given] for given, name in names.items()})
    order = [name for name, _ in model.named_modules() if name in rows]
    summary = {"kept MB": plain.summary["kept MB"], "converted": less.summary["kept MB"], SAVING: less.summary[SAVING]}
    if limit is not None:
        batches = [plain.summary["largest batch"], *(less.summary[f"largest batch{of}"] for of in ("", f" {SAVING}"))]
        summary["largest batch"] = " / ".join(map(str, batches))
    return Report("inspect --memory", summary, [rows[path] for path in order], notes)


def run_twice(model: nn.Module, example: Any) -> list[str]:
    """Run a converted model twice in evaluation and twice in training, so that its layers learn what follows them.

    Buffers, modes and random generators are restored.

    Returns:
        A note if the model does not run in training on the example, as with a single value per channel.

    Raises:
        Whatever the model raises in evaluation.
    """
    args, kwargs = call_of("convert", example)
    with preserved(model, (args, kwargs)):
        for _ in range(2):
            model.eval()(*args, **kwargs)
    try:
        with preserved(model, (args, kwargs)):
            for _ in range(2):
                model.train()(*args, **kwargs)
    except Exception as error:  # the code of a model may raise anything
        return [f"The model was run in evaluation alone; in training it raised {one_line(error)}"]
    return []


def without_constants(report: Report) -> Report:
    """The report for a terminal: values that are equal in every row are printed below the table."""
    same = {
        name: report.rows[0][name]
        for name in ("kind", "eps", "momentum", "mode", "moments", "batches")
        if len(report.rows) > 1 and len({row[name] for row in report.rows}) == 1
    }
    rows = [{name: value for name, value in row.items() if name not in same} for row in report.rows]
    told = ", ".join(f"{name} {value}" for name, value in same.items() if value is not None)
    return replace(report, rows=rows, notes=[*([f"All of them: {told}."] if told else []), *report.notes])


def _converted(model: nn.Module, example: Any, where: Where, notes: list[str]) -> Report:
    """The report of a converted copy after a run."""
    converted, report = convert(copy.deepcopy(model), where=where)
    notes += run_twice(converted, example)
    return report


def _facts(path: str, layer: BatchNormBase, held: bool) -> dict[str, Any]:
    kind = type(layer)
    weight = _numbers(layer.weight)
    gains = None if weight is None else weight.abs()
    return {
        "path": path,
        "kind": f"kn.{kind.__name__}" if kind.__module__.partition(".")[0] == "keelnorm" else kind.__name__,
        "channels": channels_of(layer) or None,  # a lazy layer has 0
        "eps": layer.eps,
        "momentum": getattr(layer, "momentum", None),  # which frozen ones of other packages lack
        "mode": "frozen" if held else "train" if layer.training else "eval",
        "moments": _moments(layer),
        "batches": _number_of_batches(layer),
        "running var": _range(_numbers(layer.running_var)),
        "|weight|": _range(gains),
        "dead": None if weight is None else _dead(weight, layer),
        "comes after": None,
        "goes to": None,
        "fuses with": None,
        "folds into": None,
    }


def _dead(weight: Tensor, layer: BatchNormBase) -> int:
    """The number of channels whose output is β whatever comes in."""
    bias = _numbers(layer.bias)
    return int((weight.abs() <= dead_below(weight, bias, weight.dtype)).sum())


def _moments(layer: BatchNormBase) -> str:
    if layer.running_mean is None or layer.running_var is None:
        return "none"
    moments = [_numbers(layer.running_mean), _numbers(layer.running_var)]
    if any(moment is None for moment in moments):
        return "not there yet"
    return (
        "finite"
        if all(bool(torch.isfinite(moment).all()) for moment in moments if moment is not None)
        else "not finite"
    )


def _number_of_batches(layer: BatchNormBase) -> int | None:
    count = _numbers(getattr(layer, "num_batches_tracked", None))
    return int(count) if count is not None and count.numel() == 1 else None


def _range(values: Tensor | None) -> Range | None:
    return None if values is None else Range(float(values.min()), float(values.max()))


def _numbers(values: Any) -> Tensor | None:
    """The tensor if it has values; tensors of lazy layers and on the meta device have none."""
    if not isinstance(values, Tensor) or is_lazy(values) or values.is_meta or not values.numel():
        return None
    return values.detach()


def _neighbours(trace: Trace, layer: BatchNormBase) -> dict[str, Any]:
    calls = trace.calls_of(layer)
    if not calls or not calls[0].inputs or not calls[0].outputs:
        return {"comes after": None if calls else "not called"}
    before, after = calls[0].inputs[0], calls[0].outputs[0]
    writer = trace.writer(before)
    source = neighbor_of(writer).name if writer else "the model's input" if trace.is_given(before) else None
    readers = [neighbor_of(reader).name for reader in trace.readers(after)] or trace.holders(after)
    times = f" (called {len(calls)} times)" if len(calls) > 1 else ""
    return {"comes after": source and source + times, "goes to": ", ".join(dict.fromkeys(readers)) or None}


def _tried(column: str, operation: Callable[[], Report], notes: list[str]) -> Report | None:
    """The report of an operation; None, and a note, if it fails on this model."""
    try:
        return operation()
    except Exception as error:  # the code of a model may raise anything
        notes.append(f"Not known what it {column}: {one_line(error)}")
        return None
