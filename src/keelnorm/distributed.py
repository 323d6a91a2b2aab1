"""Several processes: the preflight of synchronized layers, and pooling of running statistics over ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from keelnorm.engine.collectives import explained, group_of
from keelnorm.engine.error_messages import check_module, describe
from keelnorm.engine.preflight import preflight, preflight_is_on
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.moments import Moments, wide_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["preflight", "preflight_is_on", "sync_statistics"]


@torch.no_grad()
def sync_statistics(
    model: torch.nn.Module, process_group: ProcessGroup | None = None, *, count: float | None = None
) -> None:
    """Pool the running statistics of all batch normalizations of a model over the ranks.

    Each rank has running statistics of its own batches; afterwards all ranks have those of all batches. With the
    weights w of the ranks, per layer and channel:

        mean = Σ w·mean_r / Σw        var = Σ w·(var_r + (mean_r − mean)²) / Σw

    The variance includes the spread between the ranks' means, which an average of the ranks' variances lacks.

    Args:
        model: A model with the same batch normalizations on all ranks: every ``BatchNormBase``
            that has running statistics, keelnorm's included.
        process_group: The ranks; default: all.
        count: The weight of this rank, such as its number of samples. Default: each layer's ``num_batches_tracked``, or
            1 if there is none.

    State:
        ``running_mean``, ``running_var``, and ``num_batches_tracked``, which becomes the ranks' rounded average, so
        that pooling again later counts no batch twice. A layer that no rank has trained stays as it is. A channel that
        is not finite on a rank gets the values of the other ranks. On one rank, or without torch.distributed, nothing
        changes.

    Cost:
        Two collectives: one compares the layers, one pools all of them.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: The model has no batch norm.
        RuntimeError: The ranks' models or counts don't fit together; raised on every rank, before anything is changed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> sync_statistics(model)  # after an epoch, on all ranks

    Source:
        The merge: Chan, Golub, LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample
        variances", eq. 2.1.
    """
    what = "sync_statistics"
    check_module(what, model)
    group = group_of(process_group, what)
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, BatchNormBase)}
    if group is None:
        _check_some(found, model, what)
        return
    layers = {
        name: layer for name, layer in found.items() if layer.running_mean is not None and layer.running_var is not None
    }
    notes = [_Note(count, {name: _Buffers.of(layer) for name, layer in layers.items()})] * dist.get_world_size(group)
    with explained(group, what):
        dist.all_gather_object(notes, notes[0], group=group)
    _check_notes(notes, dist.get_process_group_ranks(group), what)
    if not layers:  # on all ranks
        _check_some(found, model, what)
        return
    # Only ratios of the weights matter; Moments need counts from 1 on.
    unit = min((note.weight for note in notes if note.weight), default=1.0) if count is not None else 1.0
    weight = None if count is None else count / unit
    device = next(model.buffers()).device
    own = [_moments(layer, weight, device) for layer in layers.values()]
    pooled = Moments(*(torch.cat([getattr(m, part) for m in own]) for part in ("count", "mean", "m2")))
    pooled = pooled.all_reduce(group, what=what)
    parts = (v.split([len(m.mean) for m in own]) for v in (pooled.count, pooled.mean, pooled.m2))
    for (name, layer), known, mean, m2 in zip(layers.items(), *parts, strict=True):
        assert layer.running_mean is not None and layer.running_var is not None
        old = layer.running_mean, layer.running_var
        values = mean, m2 / known.where(known > 0, 1)
        new = [value.view_as(running).to(running) for running, value in zip(old, values, strict=True)]
        # A channel whose values a half-precision buffer can't store stays as it is.
        good = (known > 0).view_as(new[0]).to(new[0].device) & new[0].isfinite() & new[1].isfinite()
        for running, value in zip(old, new, strict=True):
            running.copy_(torch.where(good, value, running))
        batches = layer.num_batches_tracked
        if batches is not None:
            numbers = torch.tensor([other.layers[name].batches for other in notes], dtype=torch.float64)
            batches.copy_(numbers.mean(0).round())


def _check_some(layers: dict[str, BatchNormBase], model: torch.nn.Module, what: str) -> None:
    if not layers:
        raise ValueError(f"{what}: there is no batch norm in {type(model).__name__}, so there is nothing to pool")


class _Buffers(NamedTuple):
    """What the ranks compare of a layer before pooling."""

    shape: tuple[int, ...]
    batches: Any

    @classmethod
    def of(cls, layer: BatchNormBase) -> _Buffers:
        """Describe a layer's buffers."""
        assert layer.running_mean is not None
        return cls(
            tuple(layer.running_mean.shape),
            None if layer.num_batches_tracked is None else layer.num_batches_tracked.tolist(),
        )


class _Note(NamedTuple):
    """What the ranks compare before pooling."""

    weight: float | None
    layers: dict[str, _Buffers]


def _check_notes(notes: list[_Note], ranks: list[int], what: str) -> None:
    """Raise if the ranks differ; all ranks see the same notes."""
    for rank, note in zip(ranks, notes, strict=True):
        count, layers = note.weight, note.layers
        if (count is None) != (notes[0].weight is None):
            raise RuntimeError(
                f"{what}: count is given on all ranks or on none; rank {ranks[0]} has {notes[0].weight!r}, rank {rank} "
                f"{count!r}"
            )
        if count is not None and not (isinstance(count, int | float) and 0 <= count < math.inf):
            raise RuntimeError(f"{what}: count must be a number from 0 on; got {describe(count)} on rank {rank}")
        for name in [*notes[0].layers, *layers]:
            here, there = notes[0].layers.get(name), layers.get(name)
            if (
                here is None
                or there is None
                or here.shape != there.shape
                or (here.batches is None) != (there.batches is None)
            ):
                raise RuntimeError(
                    f"{what}: the models differ at {name!r}: rank {ranks[0]} has {_shown(here)}, rank {rank} "
                    f"{_shown(there)}. All ranks need the same batch normalizations"
                )


def _shown(note: _Buffers | None) -> str:
    if note is None:
        return "no batch normalization with running statistics there"
    counter = "without num_batches_tracked" if note.batches is None else "with num_batches_tracked"
    return f"running statistics of shape {note.shape} {counter}"


def _moments(layer: BatchNormBase, weight: float | None, device: torch.device) -> Moments:
    """A layer's running statistics as moments, all rows in one; channels that are not finite have the weight 0."""
    assert layer.running_mean is not None and layer.running_var is not None
    mean, var = (running.to(device, wide_dtype(device)) for running in (layer.running_mean, layer.running_var))
    batches = layer.num_batches_tracked
    given = torch.tensor(1.0) if batches is None else batches
    count = (given if weight is None else torch.tensor(weight)).to(mean).unsqueeze(-1).expand_as(mean)
    good = mean.isfinite() & var.isfinite()
    return Moments(*(torch.where(good, part, 0).flatten() for part in (count, mean, var * count)))
