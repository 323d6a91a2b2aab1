"""What the batches show: the inputs of each batch norm and the model's outputs, in at most three runs over them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from keelnorm.doctor.evidence.batches import Batches
from keelnorm.doctor.evidence.layer_inputs import LayerInputs, Recorder
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.evidence.model_outputs import Compared, OutputRecord, labels_of
from keelnorm.doctor.evidence.sampled_moments import SampledMoments
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.surgery.observation.nested_tensors import tensors_in
from keelnorm.surgery.snapshot import in_evaluation
from keelnorm.surgery.statistics.collect import normalizing_with_batch, reason_to_leave

#: Runs the model on a batch.
RunBatch = Callable[[Any], Any]
#: Starts a pass over the batches.
Passes = Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class Data:
    """What the batches show.

    Args:
        sizes: The number of samples of each batch; None for one whose tensors do not agree on it.
        complete: Whether these are all batches there are.
        features: The standard deviation of each feature of the model's input, (F,), where that is (N, F) and real;
            else None.
        as_is: The layers' inputs in evaluation, with the running statistics that the model has.
        true: Those where every layer in front normalizes with the batch, as in training; other modules evaluate.
        against_true: The outputs in evaluation beside those with the statistics of ``true``; None where they can't be
            compared.
        batch_against_true: The outputs where layers normalize with the batch, beside those with the statistics of
            ``true``.
        is_same: Whether each run gave the same batches.
    """

    sizes: tuple[int | None, ...]
    complete: bool
    features: Tensor | None
    as_is: Mapping[str, LayerInputs]
    true: Mapping[str, LayerInputs]
    against_true: Compared | None = None
    batch_against_true: Compared | None = None
    is_same: bool = True

    @property
    def samples(self) -> int | None:
        """The usual number of samples of a batch: the largest."""
        return max((size for size in self.sizes if size is not None), default=None)

    def moments(self, path: str) -> SampledMoments | None:
        """The true moments of a layer's input; None where they are not known or not finite."""
        found = self.true.get(path)
        return None if found is None or not found.moments.is_finite else found.moments


def collect_data(
    model: nn.Module, layers: tuple[LayerFacts, ...], batches: Batches, run: RunBatch, passes: Passes
) -> Data:
    """Run the model over the batches, inside of a block of ``untouched``.

    Args:
        model: The model.
        layers: Its batch norms.
        batches: The batches.
        run: Runs the model on one.
        passes: Starts a pass over them.
    """
    modules = {layer.path: layer.module for layer in layers}
    targets = {
        path: module
        for path, module in modules.items()
        if isinstance(module, BatchNormBase) and reason_to_leave(module) is None
    }
    activations = {layer.path: found for layer in layers if (found := _activation(layer)) is not None}
    as_is, true = Recorder(modules, activations), Recorder(modules, {})
    outputs, batch_outputs, true_outputs = OutputRecord(), OutputRecord(), OutputRecord()
    labels: list[Tensor | None] = []
    sizes: list[int | None] = []
    features, marks = _Features(), []
    with in_evaluation(model), torch.no_grad():
        start = _repeating(passes)
        for batch in start():
            sizes.append(batches.samples_of(batch))
            labels.append(labels_of(batch, sizes[-1]))
            features.add(batch)
            marks.append(_mark(batch))
            with as_is.recording():
                outputs.add(run(batch))
            as_is.end_batch()
            with normalizing_with_batch(targets.values()), true.recording():
                batch_outputs.add(run(batch))
            true.end_batch()
        true_inputs = true.inputs()
        for path, module in targets.items():
            if path in true_inputs:
                _set(module, true_inputs[path].moments)
        again = []
        for batch in start():
            again.append(_mark(batch))
            true_outputs.add(run(batch))
    is_same = marks == again
    return Data(
        sizes=tuple(sizes),
        complete=batches.most is None or len(sizes) < batches.most,
        features=features.deviations(),
        as_is=as_is.inputs(),
        true=true_inputs,
        against_true=outputs.compared(true_outputs, labels) if is_same else None,
        batch_against_true=batch_outputs.compared(true_outputs, labels) if is_same else None,
        is_same=is_same,
    )


def _repeating(passes: Passes) -> Passes:
    """Passes that begin with the same random generators, so that a loader which shuffles gives the same batches."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()

    def start() -> Iterator[Any]:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        return passes()

    return start


def _set(module: nn.Module, moments: SampledMoments) -> None:
    """Give a layer true running statistics."""
    if not moments.is_finite:
        return
    unbiased = moments.var * (moments.values / max(moments.values - 1, 1))
    layer: Any = module
    layer.running_mean.copy_(moments.mean)
    layer.running_var.copy_(unbiased)


def _activation(layer: LayerFacts) -> str | None:
    """The activation behind a layer, where it is alone there."""
    if layer.beside is None or len(layer.beside.after) != 1:
        return None
    [after] = layer.beside.after
    name = (after.function or after.name).lower().rstrip("_")
    return next((one for one in ("relu", "sigmoid", "tanh") if name == one or name.startswith(f"{one} ")), None)


def _mark(batch: Any) -> tuple[float, ...]:
    """What two equal batches have in common."""
    return tuple(float(t.detach().double().nan_to_num().sum()) for t in tensors_in(batch) if not t.is_complex())


class _Features:
    """Moments of the features of the model's input, (N, F)."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, batch: Any) -> None:
        first = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if isinstance(first, Tensor) and first.ndim == 2 and first.is_floating_point():
            self._parts.append(first.detach().cpu().double())

    def deviations(self) -> Tensor | None:
        if not self._parts or len({part.shape[1] for part in self._parts}) > 1:
            return None
        return torch.cat(self._parts).std(0, correction=0)
