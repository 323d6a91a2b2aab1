"""Pool the moments of the inputs of a model's batch norms over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from keelnorm.control.frozen_layer import has_frozen_statistics
from keelnorm.control.layer_hooks import paused
from keelnorm.engine.error_messages import RefusedRuntimeError
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.functional import moments as moments_of
from keelnorm.moments import Moments
from keelnorm.nn._shared.variant import Variant
from keelnorm.surgery.known_layers import is_frozen

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def reason_to_leave(layer: BatchNormBase) -> str | None:
    """Why a layer's running statistics can't be set from its inputs; None if they can."""
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "does not know its channels yet"
    if layer.running_mean is None or layer.running_var is None:
        return "has no running statistics"
    if is_frozen(layer):
        return f"is a {type(layer).__name__}, whose statistics are fixed"
    if has_frozen_statistics(layer):
        return "is frozen"
    if isinstance(layer, Variant):
        if layer.own_data is not None:
            return f"is a {type(layer).__name__}, which keeps statistics {layer.own_data}"
        if layer.own_scale is not None:
            return f"is a {type(layer).__name__}, which keeps {layer.own_scale}"
    return None


def name_of(layer: BatchNormBase) -> str:
    """A layer in the words of an error."""
    return f"a {type(layer).__name__} of {layer.num_features} channels"


def check_finite(what: str, layer: BatchNormBase, moments: Moments, *new: Tensor) -> None:
    """Raise unless the moments of a layer's inputs are finite, and its new running statistics in their dtype too."""
    if not bool((moments.mean.isfinite() & moments.m2.isfinite()).all()):
        raise RefusedRuntimeError(
            f"{what}: the input of {name_of(layer)} is not finite; the model is as before. Leave out batches with "
            "NaN or infinite values"
        )
    if not all(bool(values.isfinite().all()) for values in new):
        raise RefusedRuntimeError(
            f"{what}: the moments of {name_of(layer)} are too large for its buffers of {new[-1].dtype}; the model is "
            "as before. Make the buffers float32"
        )


@dataclass
class PooledInput:
    """The inputs of one layer so far.

    Args:
        moments: The moments of all values.
        samples: The number of samples.
        batches: The number of batches.
        calls: The largest number of calls of the layer in one batch.
        per_batch: Count, mean and biased variance of each batch, if they are kept.
    """

    moments: Moments
    samples: int = 0
    batches: int = 0
    calls: int = 0
    per_batch: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def standard_error(self) -> float:
        """The largest standard error over channels, of means and variances.

        That of a mean is divided by the standard deviation, that of a variance by the variance. With weights
        w = count / total of B batches, SE(mean)² = B/(B−1) · Σ w²·(mean_b − mean)², and likewise for the variance, to
        which a batch contributes var_b + (mean_b − mean)². Infinite for fewer than two batches.
        """
        if len(self.per_batch) < 2:
            return float("inf")
        counts, means, variances = (torch.stack(part) for part in zip(*self.per_batch, strict=True))
        weights = (counts / counts.sum(0)).reshape(len(counts), -1)
        factor = len(counts) / (len(counts) - 1)
        var = self.moments.var.clamp(min=torch.finfo(means.dtype).tiny)
        shift = means - self.moments.mean
        mean_error = (factor * (weights * shift).square().sum(0)).sqrt() / var.sqrt()
        var_error = (factor * (weights * (variances + shift.square() - var)).square().sum(0)).sqrt() / var
        return float(torch.maximum(mean_error, var_error).max())


#: Starts a pass over the batches.
StartPass = Callable[[], Iterable[Any]]
#: Runs the model on a batch.
RunBatch = Callable[[Any], Any]
#: Sets a layer's running statistics from its pooled inputs.
SetStatistics = Callable[[BatchNormBase, PooledInput], None]


class Collector:
    """Hooks on layers that record the moments of their inputs.

    Args:
        targets: The layers.
        keep_batches: Whether to keep each batch's moments, for standard errors.
        after_call: Called after each recorded call of a layer.
    """

    def __init__(
        self, targets: Iterable[BatchNormBase], *, keep_batches: bool, after_call: Callable[[], None] = lambda: None
    ) -> None:
        self.pooled: dict[BatchNormBase, PooledInput] = {}
        for layer in targets:
            assert layer.running_mean is not None
            channels, device = layer.running_mean.shape[-1], layer.running_mean.device
            self.pooled[layer] = PooledInput(Moments.empty(channels, device=device))
        self._keep_batches, self._after_call = keep_batches, after_call
        self._batch: dict[BatchNormBase, tuple[list[Moments], int]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls of the layers inside the block."""
        with ExitStack() as stack:
            for layer in self.pooled:
                # The last of the hooks: it sees what others make of the arguments.
                stack.callback(layer.register_forward_pre_hook(self._record, with_kwargs=True).remove)
            yield

    def _record(self, layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        assert isinstance(layer, BatchNormBase)
        if keywords.get("sample_weight") is not None:
            raise ValueError(
                f"a {type(layer).__name__} is called with sample_weight=, which can't be pooled; use mask= instead"
            )
        x: Tensor = args[0] if args else keywords["input"]
        parts, samples = self._batch.get(layer, ([], 0))
        parts.append(moments_of(x.detach(), keywords.get("mask")))
        self._batch[layer] = parts, max(samples, x.shape[0])
        self._after_call()

    def end_batch(self) -> None:
        """Merge the recorded batch into the pooled moments."""
        for layer, (parts, samples) in self._batch.items():
            pooled, own = self.pooled[layer], Moments.merge_all(parts)
            pooled.moments = pooled.moments.merge(own)
            pooled.samples += samples
            pooled.batches += 1
            pooled.calls = max(pooled.calls, len(parts))
            if self._keep_batches:
                pooled.per_batch.append((own.count, own.mean, own.var_or_zero))
        self.forget_batch()

    def forget_batch(self) -> None:
        """Discard the recorded batch."""
        self._batch.clear()

    def run(self, forward: RunBatch, batch: Any) -> None:
        """Run one batch without gradients; the pooled moments get all of it, or nothing if it raises."""
        try:
            with torch.no_grad():
                forward(batch)
        except _EnoughError:
            pass
        except BaseException:
            self.forget_batch()
            raise
        self.end_batch()

    def run_all(self, forward: RunBatch, batches: Iterable[Any], tolerance: float | None) -> None:
        """Run batches until all standard errors are within the tolerance; None runs them all."""
        for index, batch in enumerate(batches):
            self.run(forward, batch)
            if tolerance is None or index < 2:
                continue
            if all(pooled.standard_error() <= tolerance for pooled in self.pooled.values()):
                break


class _EnoughError(Exception):
    """Ends a forward early, once the layer of interest has been called."""


def _end_forward() -> None:
    raise _EnoughError


def calls_in_order(targets: Iterable[BatchNormBase], forward: RunBatch, batch: Any) -> dict[BatchNormBase, int]:
    """The layers that a batch reaches, in the order of their first calls, with the number of calls of each."""
    calls: dict[BatchNormBase, int] = {}

    def note(layer: nn.Module, *_: Any) -> None:
        assert isinstance(layer, BatchNormBase)
        calls[layer] = calls.get(layer, 0) + 1

    with ExitStack() as stack, torch.no_grad():
        for layer in targets:
            stack.callback(layer.register_forward_pre_hook(note).remove)
        forward(batch)
    return calls


@contextmanager
def normalizing_with_batch(targets: Iterable[BatchNormBase]) -> Iterator[None]:
    """Let layers of a model in evaluation normalize with the batch, without updating their running statistics.

    A batch with one value per channel has no variance, and is normalized by the running statistics.
    """
    targets = list(targets)

    def choose(layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else keywords["input"]
        layer.training = x.numel() != x.shape[1]

    with paused(targets), ExitStack() as stack:
        for layer in targets:
            stack.callback(layer.register_forward_pre_hook(choose, with_kwargs=True).remove)
        try:
            yield
        finally:
            for layer in targets:
                layer.training = False


def in_one_pass(
    targets: list[BatchNormBase],
    forward: RunBatch,
    start: StartPass,
    set_statistics: SetStatistics,
    tolerance: float | None = None,
    group: ProcessGroup | None = None,
) -> dict[BatchNormBase, PooledInput]:
    """Pool the inputs of all layers in one pass, in which they normalize with the batch; then set their statistics."""
    collector = Collector(targets, keep_batches=tolerance is not None)
    with normalizing_with_batch(targets), collector.recording():
        collector.run_all(forward, start(), tolerance)
    for layer, pooled in collector.pooled.items():
        _merge_ranks(pooled, group)
        set_statistics(layer, pooled)
    return collector.pooled


def layer_by_layer(
    targets: list[BatchNormBase],
    forward: RunBatch,
    start: StartPass,
    set_statistics: SetStatistics,
    tolerance: float | None = None,
    group: ProcessGroup | None = None,
) -> dict[BatchNormBase, PooledInput]:
    """Pool the inputs of each layer in a pass of its own, with the statistics of all layers before it already set."""
    first = next(iter(start()), None)
    calls = {} if first is None else calls_in_order(targets, forward, first)
    found: dict[BatchNormBase, PooledInput] = {}
    for layer in [*calls, *(layer for layer in targets if layer not in calls)]:
        after_call = _end_forward if calls.get(layer, 1) == 1 else lambda: None
        collector = Collector([layer], keep_batches=tolerance is not None, after_call=after_call)
        with collector.recording():
            collector.run_all(forward, start(), tolerance)
        pooled = found[layer] = collector.pooled[layer]
        _merge_ranks(pooled, group)
        set_statistics(layer, pooled)
    return found


def _merge_ranks(pooled: PooledInput, group: ProcessGroup | None) -> None:
    pooled.moments = pooled.moments.all_reduce(group, what="recalibrate")
