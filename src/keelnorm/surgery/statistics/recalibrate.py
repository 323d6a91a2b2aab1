"""Recompute running statistics from a data set under the present weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from keelnorm.control.layer_selection import Where
from keelnorm.control.run_uncompiled import uncompiled
from keelnorm.engine.error_messages import RefusedValueError, check_tolerance
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.surgery.report import Report
from keelnorm.surgery.snapshot import all_or_nothing, copy_values, in_evaluation
from keelnorm.surgery.statistics.collect import (
    PooledInput,
    check_finite,
    in_one_pass,
    layer_by_layer,
    name_of,
    reason_to_leave,
)
from keelnorm.surgery.statistics.model_inputs import Forward, check_loader, passes_over, run_batch
from keelnorm.surgery.target_layers import batch_norms_in, notes_on

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Model = TypeVar("Model", bound=nn.Module)
#: The buffers that a batch norm's state_dict has.
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


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
    """Set the running statistics of a model's batch norms to the moments of a data set ("precise BN"), in place.

    Per layer and channel, over all values v of its input in all batches, merged exactly in float64:

        running_mean = Σv / n        running_var = Σ(v − running_mean)² / (n − 1)

    By default one pass collects the moments while the batch norms normalize with the batch, as in training, and all
    other modules are in evaluation. This is an approximation, since in evaluation the layers before use running
    statistics. ``sequential`` sets the layers one after the other in the order in which they run, each with the new
    statistics of all layers before it, which is exact for the network in evaluation.

    Args:
        model: Any module; it is changed.
        loader: Batches: tensors, tuples or lists whose first part is the model's argument, or mappings of its keywords.
        where: A pattern for the layers' paths, a module's path, or several; None for all.
        sequential: Whether to set layer after layer, with one pass over the data for each.
        tolerance: Stop when the standard errors of all layers' means (divided by the standard deviation) and variances
            (divided by the variance) are below this. They are estimated from how the batches differ, from three on.
        forward: ``forward(model, batch)``, for batches of another kind.
        max_batches: The largest number of batches to take from the loader; None for all.
        process_group: The ranks of torch.distributed whose moments are merged, each having run over its part; None for
            all, if it is initialized. Ranks may have different numbers of batches, except with ``SyncBatchNorm`` in one
            pass.
        progress: Whether to show a progress bar; None shows it in a terminal if rich is installed.

    Returns:
        The model itself, and a report: per layer the number of values, the largest drift of the mean in new standard
        deviations, the largest ratio between the new and the old variance, the standard error if a tolerance was given;
        or the reason why it was left.

    State:
        ``num_batches_tracked`` becomes the number of batches. Frozen layers, layers without running statistics and
        variants that keep other statistics are left. Modes and hooks are as before, and after an error the buffers too.
        A layer that runs several times in a forward pools all its calls; sequentially, its later calls see its old
        statistics. In one pass, a batch with one value per channel is normalized by the running statistics.

    Cost:
        One pass over the data without gradients, and one over each layer's input. Sequentially a pass for each layer,
        which ends where that layer is called.

    Raises:
        TypeError: ``model`` is no module, ``loader`` gives no batches, or a batch is of a kind that needs ``forward``.
        ValueError: A layer gets fewer than two values per channel, or an option is not legal. The model is as before.
        RuntimeError: A layer's moments are not finite, or too large for its buffers. The model is as before.

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
    layers = batch_norms_in("recalibrate", model, where)
    check_tolerance("recalibrate", tolerance)
    left = {path: reason_to_leave(layer) for path, layer in layers.items()}
    targets = {path: layer for path, layer in layers.items() if left[path] is None}
    passes = len(targets) if sequential else 1
    check_loader("recalibrate", loader, passes)
    before = {layer: copy_values(layer, BUFFERS) for layer in targets.values()}
    collect = layer_by_layer if sequential else in_one_pass
    with (
        all_or_nothing((), (getattr(layer, name) for layer, copies in before.items() for name in copies)),
        in_evaluation(model),
        uncompiled(),
        passes_over(loader, max_batches, progress, "recalibrate", passes) as start,
    ):
        run = partial(forward or run_batch, model)
        pooled = collect(list(targets.values()), run, start, set_statistics, tolerance, process_group)
    rows = [_row(path, layer, pooled.get(layer), before.get(layer), left[path]) for path, layer in layers.items()]
    batches = max((one.batches for one in pooled.values()), default=0)
    summary = {"layers": len(targets), "left": len(layers) - len(targets), "batches": batches}
    notes = notes_on(model)
    if sequential and any(one.calls > 1 for one in pooled.values()):
        notes.append("Layers that run several times in a forward used their own old statistics in between.")
    return model, Report("recalibrate", summary, rows, notes)


def set_statistics(layer: BatchNormBase, pooled: PooledInput) -> None:
    """Set a layer's running statistics to the moments of its inputs.

    Raises:
        ValueError: There were fewer than two values per channel.
        RuntimeError: The moments are not finite, or too large for the buffers.
    """
    moments = pooled.moments
    count = float(moments.count.min())
    if count < 2:
        raise RefusedValueError(
            f"recalibrate: {name_of(layer)} got {count:g} values per channel; every layer needs two or more. Use "
            "where= to leave layers out that the data does not reach"
        )
    assert layer.running_mean is not None and layer.running_var is not None
    mean, var = moments.mean.to(layer.running_mean.dtype), moments.var_unbiased.to(layer.running_var.dtype)
    check_finite("recalibrate", layer, moments, mean, var)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(pooled.batches)


def drift(mean: Tensor, var: Tensor, old_mean: Tensor, old_var: Tensor) -> dict[str, float]:
    """The largest shift of a running mean, in new standard deviations, and the largest ratio of running variances."""
    tiny = torch.finfo(torch.float64).tiny
    new, old = var.double().clamp(min=tiny), old_var.double().clamp(min=tiny)
    shift = (mean.double() - old_mean.double()).abs() / new.sqrt()
    return {"mean drift": float(shift.max()), "variance ratio": float(torch.maximum(new / old, old / new).max())}


def _row(
    path: str, layer: BatchNormBase, pooled: PooledInput | None, old: Mapping[str, Tensor] | None, reason: str | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "path": path, "kind": type(layer).__name__, "values": None, "mean drift": None, "variance ratio": None,
        "standard error": None, "reason": reason,
    }  # fmt: skip
    if pooled is not None and old is not None:
        assert layer.running_mean is not None and layer.running_var is not None
        row["values"] = int(pooled.moments.count.min())
        row |= drift(layer.running_mean, layer.running_var, old["running_mean"], old["running_var"])
        row["standard error"] = pooled.standard_error() if pooled.per_batch else None
    return row
