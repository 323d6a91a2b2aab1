"""Running statistics that are the exact moments of a data set under the present weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.control.layer_selection import Where
from keelnorm.control.run_uncompiled import uncompiled
from keelnorm.engine.error_messages import describe
from keelnorm.surgery.known_layers import notes_on
from keelnorm.surgery.report import Report
from keelnorm.surgery.statistics.collect import Seen, in_one_pass, layer_by_layer, modes_kept, reason_to_leave
from keelnorm.surgery.statistics.model_inputs import Forward, check_loader, passes_over, run_batch
from keelnorm.surgery.target_layers import chosen

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Model = TypeVar("Model", bound=nn.Module)


def recalibrate(
    model: Model,
    loader: Iterable[Any],
    *,
    where: Where = None,
    sequential: bool = False,
    tolerance: float | None = None,
    forward: Forward | None = None,
    max_batches: int | None = None,
    process_group: ProcessGroup | None = None,
    progress: bool | None = None,
) -> tuple[Model, Report]:
    """Set the running statistics of a model's batch norms to the pooled moments of a data set ("precise BN"), in place.

    Per layer and channel, over all values v of its input in all batches, merged exactly in float64:

        running_mean = Σv / n        running_var = Σ(v − running_mean)² / (n − 1)

    One pass takes them from a network whose layers normalize with the batch's moments, as in training, while all other
    modules are in evaluation: an approximation, since a layer's input in evaluation is made by layers that use the
    population's. ``sequential`` settles the layers in the order in which they run, each with all that run before it
    already using their new moments, which is exact for the network in evaluation.

    Args:
        model: Any module; it is changed.
        loader: Batches: tensors, tuples or lists whose first part is the model's argument, or mappings of its keywords.
        where: A pattern for the layers' paths, a module's path, or several; None for all.
        sequential: Settle layer after layer; passes over the data once for each of them.
        tolerance: Stop when the standard errors of all layers' means, in deviations, and variances, relative to
            themselves, are below this; they are estimated from how the batches differ (three batches at least).
        forward: ``forward(model, batch)``, for batches of another kind.
        max_batches: Take no more of the loader.
        process_group: Ranks of torch.distributed whose moments are merged, each having run over its part; None for all,
            where it is initialized. A rank may have fewer batches than others, but for ``SyncBatchNorm`` in one pass.
        progress: Whether a bar is shown; None shows it in a terminal, where rich is installed.

    Returns:
        The model itself, and a report: per layer the number of values, the largest drift of the mean in new deviations,
        the largest ratio between the new and the old variance, the standard error where a tolerance was given; or why
        it was left.

    State:
        ``num_batches_tracked`` becomes the number of batches. Frozen layers, those without running statistics and
        variants that keep other moments are left. Modes, hooks and, after an exception, the buffers are as before. A
        layer that runs several times in a forward pools all its calls; sequentially, its later calls see its old
        moments. In one pass, a batch with one value per channel is normalized by the running statistics.

    Cost:
        One pass over the data without gradients, and one over each layer's input. Sequentially a pass for each layer,
        each of which ends where that layer is called.

    Raises:
        TypeError, ValueError: for what is no model, no batches, an empty loader or a layer that no batch reaches.
        RuntimeError: the moments of a layer are not finite. The model is as before.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
        >>> data = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 8.0], [5.0, 8.0], [4.0, 5.0]])
        >>> model, report = recalibrate(model, [data[:2], data[2:]])
        >>> model[0].running_mean, model[0].running_var
        (tensor([3., 5.]), tensor([4.0000, 9.5000]))

    Source:
        Wu, Johnson (2021), "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3 (one pass); after weight
        averaging Izmailov et al. (2018), arXiv:1803.05407, section 3.2; after merging Jordan et al. (2022), REPAIR,
        arXiv:2211.08403.
    """
    layers = chosen("recalibrate", model, where)
    for name, value, legal in (("tolerance", tolerance, 0.0), ("max_batches", max_batches, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= legal):
            raise ValueError(f"recalibrate: {name} must be None or a number of {legal} or more; got {describe(value)}")
    left = {path: reason_to_leave(layer) for path, layer in layers.items()}
    targets = {path: layer for path, layer in layers.items() if left[path] is None}
    passes = len(targets) if sequential else 1
    check_loader("recalibrate", loader, passes)
    before = {layer: buffers_of(layer) for layer in targets.values()}

    def call(batch: Any) -> Any:
        return (forward or run_batch)(model, batch)

    with ExitStack() as undo:
        undo.callback(put_back, before)
        with (
            modes_kept(model),
            uncompiled(),
            passes_over(loader, max_batches, progress, "recalibrate", passes) as begin,
        ):
            collect = layer_by_layer if sequential else in_one_pass
            seen = collect(list(targets.values()), call, begin, set_moments, tolerance, process_group)
        undo.pop_all()
    rows = [_row(path, layer, seen.get(layer), before.get(layer), left[path]) for path, layer in layers.items()]
    batches = max((one.batches for one in seen.values()), default=0)
    summary = {"layers": len(targets), "left": len(layers) - len(targets), "batches": batches}
    notes = notes_on(model)
    if sequential and any(one.calls > 1 for one in seen.values()):
        notes.append("Layers that run several times in a forward were settled with their own old moments in between.")
    return model, Report("recalibrate", summary, rows, notes)


def set_moments(layer: _BatchNorm, seen: Seen) -> None:
    """The layer's running statistics become those that were seen."""
    moments = seen.moments
    count = float(moments.count.min())
    if count < 2:
        raise ValueError(
            f"recalibrate: {_what(layer)} was given {count:g} values per channel; the data must reach every layer with "
            "two or more. Give where= to leave layers out"
        )
    if not bool((moments.mean.isfinite() & moments.m2.isfinite()).all()):
        raise RuntimeError(f"recalibrate: the input of {_what(layer)} is not finite; the model is as before")
    assert layer.running_mean is not None and layer.running_var is not None
    mean, var = moments.mean.to(layer.running_mean.dtype), moments.var_unbiased.to(layer.running_var.dtype)
    if not bool((mean.isfinite() & var.isfinite()).all()):
        raise RuntimeError(
            f"recalibrate: the moments of {_what(layer)} are too large for its buffers of {var.dtype}; the model is as "
            "before"
        )
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(seen.batches)


def _what(layer: _BatchNorm) -> str:
    return f"a {type(layer).__name__} of {layer.num_features} channels"


def buffers_of(layer: _BatchNorm) -> dict[str, Tensor]:
    """Copies of the buffers that a state_dict has."""
    found = {name: layer._buffers.get(name) for name in ("running_mean", "running_var", "num_batches_tracked")}
    return {name: buffer.clone() for name, buffer in found.items() if buffer is not None}


def put_back(copies: Mapping[_BatchNorm, Mapping[str, Tensor]]) -> None:
    """Give layers the values of their buffers, and of their parameters, that were kept."""
    with torch.no_grad():
        for layer, values in copies.items():
            for name, value in values.items():
                getattr(layer, name).copy_(value)


def drift(mean: Tensor, var: Tensor, old_mean: Tensor, old_var: Tensor) -> dict[str, float]:
    """How far running statistics have gone: largest shift of a mean in new deviations, largest ratio of variances."""
    tiny = torch.finfo(torch.float64).tiny
    new, old = var.double().clamp(min=tiny), old_var.double().clamp(min=tiny)
    shift = (mean.double() - old_mean.double()).abs() / new.sqrt()
    return {"mean drift": float(shift.max()), "variance ratio": float(torch.maximum(new / old, old / new).max())}


def _row(
    path: str, layer: _BatchNorm, seen: Seen | None, old: Mapping[str, Tensor] | None, reason: str | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "path": path, "kind": type(layer).__name__, "values": None, "mean drift": None, "variance ratio": None,
        "standard error": None, "reason": reason,
    }  # fmt: skip
    if seen is not None and old is not None:
        assert layer.running_mean is not None and layer.running_var is not None
        row["values"] = int(seen.moments.count.min())
        row |= drift(layer.running_mean, layer.running_var, old["running_mean"], old["running_var"])
        row["standard error"] = seen.standard_error() if seen.spread else None
    return row
