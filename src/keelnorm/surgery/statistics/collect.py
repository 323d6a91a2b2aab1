"""The pooled moments of what goes into a model's batch norms, over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.control.frozen_layer import has_frozen_statistics
from keelnorm.control.layer_hooks import paused
from keelnorm.functional import moments as moments_of
from keelnorm.moments import Moments
from keelnorm.nn._shared.variant import Variant
from keelnorm.surgery.known_layers import is_frozen

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def reason_to_leave(layer: _BatchNorm) -> str | None:
    """Why a layer's running statistics can't be set from its inputs; None if they can."""
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "does not know its channels yet"
    if layer.running_mean is None or layer.running_var is None:
        return "has no running statistics"
    if is_frozen(layer):
        return f"is a {type(layer).__name__}, whose moments are fixed"
    if has_frozen_statistics(layer):
        return "is frozen"
    if isinstance(layer, Variant):
        if layer.own_data is not None:
            return f"is a {type(layer).__name__}, which keeps moments {layer.own_data}"
        if layer.own_scale is not None:
            return f"is a {type(layer).__name__}, which keeps {layer.own_scale}"
    return None


@dataclass
class Seen:
    """What has gone into one layer.

    Args:
        moments: Of all values so far.
        samples: How many samples they are of.
        batches: In how many batches.
        calls: The most calls of the layer in one batch.
        spread: Count, mean and biased variance of each batch, where they are kept.
    """

    moments: Moments
    samples: int = 0
    batches: int = 0
    calls: int = 0
    spread: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def standard_error(self) -> float:
        """The largest standard error over channels, of the mean in deviations and of the variance as a part of it.

        With weights w = count / total of B batches, SE(mean)² = B/(B−1) · Σ w²·(mean_b − mean)², and likewise of the
        variance, to which a batch contributes var_b + (mean_b − mean)². Infinite below two batches.
        """
        if len(self.spread) < 2:
            return float("inf")
        counts, means, variances = (torch.stack(part) for part in zip(*self.spread, strict=True))
        weights = (counts / counts.sum(0)).reshape(len(counts), -1)
        factor = len(counts) / (len(counts) - 1)
        var = self.moments.var.clamp(min=torch.finfo(means.dtype).tiny)
        off = means - self.moments.mean
        mean_error = (factor * (weights * off).square().sum(0)).sqrt() / var.sqrt()
        var_error = (factor * (weights * (variances + off.square() - var)).square().sum(0)).sqrt() / var
        return float(torch.maximum(mean_error, var_error).max())


#: Starts a pass over the batches.
Begin = Callable[[], Iterable[Any]]


class Collector:
    """Hooks on layers that take down the moments of their inputs.

    Args:
        targets: The layers.
        keep: Whether each batch's moments are kept, for standard errors.
        after: Called after each call of a layer has been taken down.
    """

    def __init__(self, targets: Iterable[_BatchNorm], keep: bool, after: Callable[[], None] = lambda: None) -> None:
        self.seen = {t: Seen(Moments.empty(t.running_mean.shape[-1], device=t.running_mean.device)) for t in targets}  # type: ignore[union-attr]
        self._keep, self._after = keep, after
        self._batch: dict[_BatchNorm, tuple[list[Moments], int]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in self.seen:
                stack.callback(layer.register_forward_pre_hook(self._take, with_kwargs=True, prepend=True).remove)
            yield

    def _take(self, layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        assert isinstance(layer, _BatchNorm)
        if keywords.get("sample_weight") is not None:
            raise ValueError(
                f"a {type(layer).__name__} is called with sample_weight=, which can't be pooled; use mask="
            )
        x: Tensor = args[0] if args else keywords["input"]
        parts, samples = self._batch.get(layer, ([], 0))
        parts.append(moments_of(x.detach(), keywords.get("mask")))
        self._batch[layer] = parts, max(samples, x.shape[0])
        self._after()

    def end_batch(self) -> None:
        """Let what a batch has shown enter the moments."""
        for layer, (parts, samples) in self._batch.items():
            seen, own = self.seen[layer], Moments.merge_all(parts)
            seen.moments = seen.moments.merge(own)
            seen.samples += samples
            seen.batches += 1
            seen.calls = max(seen.calls, len(parts))
            if self._keep:
                seen.spread.append((own.count, own.mean, own.var_or_zero))
        self._batch.clear()


class _EnoughError(Exception):
    """Ends a forward when what it is run for has been seen."""


def run_quietly(forward: Callable[[Any], Any], batch: Any, collector: Collector) -> None:
    """One batch, without gradients; all of it or nothing enters the moments."""
    try:
        with torch.no_grad():
            forward(batch)
    except _EnoughError:
        pass
    except BaseException:
        collector._batch.clear()
        raise
    collector.end_batch()


def stop() -> None:
    """End the forward: what it is run for has been seen."""
    raise _EnoughError


def order_of(targets: Iterable[_BatchNorm], forward: Callable[[Any], Any], batch: Any) -> dict[_BatchNorm, int]:
    """The layers that a batch reaches, in the order of their first calls, and how often each is called."""
    calls: dict[_BatchNorm, int] = {}

    def note(layer: nn.Module, *_: Any) -> None:
        assert isinstance(layer, _BatchNorm)
        calls[layer] = calls.get(layer, 0) + 1

    with ExitStack() as stack, torch.no_grad():
        for layer in targets:
            stack.callback(layer.register_forward_pre_hook(note).remove)
        forward(batch)
    return calls


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """The model in evaluation; afterwards every module's mode is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def by_the_batch(targets: Iterable[_BatchNorm]) -> Iterator[None]:
    """The layers normalize with the batch's moments, where it has a variance, and leave their running ones alone."""
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
    targets: list[_BatchNorm],
    call: Callable[[Any], Any],
    begin: Begin,
    put: Callable[[_BatchNorm, Seen], None],
    tolerance: float | None = None,
    group: ProcessGroup | None = None,
) -> dict[_BatchNorm, Seen]:
    """What goes into layers that normalize with the batch's moments; ``put`` is called for each at the end."""
    collector = Collector(targets, keep=tolerance is not None)
    with by_the_batch(targets), collector.listening():
        _run_over(begin(), call, collector, tolerance)
    for layer, seen in collector.seen.items():
        _merge_ranks(seen, group)
        put(layer, seen)
    return collector.seen


def layer_by_layer(
    targets: list[_BatchNorm],
    call: Callable[[Any], Any],
    begin: Begin,
    put: Callable[[_BatchNorm, Seen], None],
    tolerance: float | None = None,
    group: ProcessGroup | None = None,
) -> dict[_BatchNorm, Seen]:
    """What goes into each layer of the network in evaluation, after ``put`` was called for all that run before it."""
    first = next(iter(begin()), None)
    calls = {} if first is None else order_of(targets, call, first)
    found: dict[_BatchNorm, Seen] = {}
    for layer in [*calls, *(layer for layer in targets if layer not in calls)]:
        collector = Collector([layer], tolerance is not None, stop if calls.get(layer, 1) == 1 else lambda: None)
        with collector.listening():
            _run_over(begin(), call, collector, tolerance)
        seen = found[layer] = collector.seen[layer]
        _merge_ranks(seen, group)
        put(layer, seen)
    return found


def _run_over(
    batches: Iterable[Any], call: Callable[[Any], Any], collector: Collector, tolerance: float | None
) -> None:
    for index, batch in enumerate(batches):
        run_quietly(call, batch, collector)
        if tolerance is None or index < 2:
            continue
        if all(seen.standard_error() <= tolerance for seen in collector.seen.values()):
            break


def _merge_ranks(seen: Seen, group: ProcessGroup | None) -> None:
    seen.moments = seen.moments.all_reduce(group, what="recalibrate")
