"""One update of the running moments from all forwards of a block, as if they had been one batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from evenkeel.arguments import State
from evenkeel.control.pausing import blocks_holding, held_off, with_running_moments
from evenkeel.control.selection import Where, named, select
from evenkeel.functional import moments as moments_of
from evenkeel.moments import Moments
from evenkeel.nn.variant import Variant
from evenkeel.running import update_running
from evenkeel.second_run import is_second_run

#: Layers whose moments are being pooled.
_pooling: WeakSet[_BatchNorm] = WeakSet()


class Accumulated:
    """What :func:`accumulate_statistics` has pooled; the value of its ``with``.

    Args:
        paths: The layers that take part.
    """

    def __init__(self, pools: dict[str, _Pool]) -> None:
        self._pools = pools

    @property
    def paths(self) -> list[str]:
        """The layers that take part."""
        return list(self._pools)

    @property
    def moments(self) -> dict[str, Moments]:
        """Pooled so far, since the last update; layers that have seen nothing are not there."""
        return {path: pool.moments for path, pool in self._pools.items() if pool.moments is not None}

    def update(self) -> list[str]:
        """Let what was pooled enter the running moments, as one batch, and begin anew.

        Returns:
            The paths of the layers that were updated.
        """
        pooled = self.moments
        for path, moments in pooled.items():
            self._pools[path].update(moments)
        return list(pooled)


@contextmanager
def accumulate_statistics(model: Module, *, where: Where = None) -> Iterator[Accumulated]:
    """Update the running moments once, at the end of the block, from the pooled moments of all forwards inside.

    With the moments of all inputs that a layer has seen, merged exactly to count n, mean and M2:

        running_mean = (1 − momentum)·running_mean + momentum·mean
        running_var  = (1 − momentum)·running_var + momentum·M2/(n − 1)

    and num_batches_tracked + 1: what one batch of them all would have done. The normalization is still each
    micro-batch's own, and so are the gradients.

    Args:
        model: A model, or a layer.
        where: A pattern for the layers' paths (``"layer1.*"``), a module's path, or several; None for all.

    Returns:
        :class:`Accumulated`, as the value of ``with``. Its ``update()`` updates at once and begins anew, once per
        optimizer step in a long block; the end of the block then updates from what is left, if anything.

    State:
        Running moments change at the end of the block and at ``update()``, and not if the block raises. Forwards of
        layers in training count, each use of a layer used several times; those in evaluation, frozen layers', those
        inside :func:`pause_statistics`, those that raise and those that a checkpoint repeats within the block do not.
        A layer that has seen nothing stays as it is. A channel with a value that is not finite stays as it is, as in
        evenkeel's layers. A copy of the model made inside the block stays as it is there.

    Numerics:
        Moments are float64, so that pooling costs no digits.

    Cost:
        One more reading of each layer's input. Compiled models run uncompiled inside the block, ``ek.Sequential``
        unfused; results are the same.

    Raises:
        TypeError, ValueError: ``model`` is no module; a pattern matches no layer.
        RuntimeError: A layer is in such a block already; a ``torch.nn.SyncBatchNorm`` among several processes.

    Example:
        >>> layer, data = torch.nn.BatchNorm1d(3), torch.randn(32, 3)
        >>> with accumulate_statistics(layer):
        ...     outputs = [layer(micro_batch) for micro_batch in data.split(8)]
        >>> torch.allclose(layer.running_var, 0.9 + 0.1 * data.var(0)), layer.num_batches_tracked.item()
        (True, 1)
    """
    layers = with_running_moments(select("accumulate_statistics", model, where))
    busy = [named(path) for path, layer in layers.items() if layer in _pooling]
    if busy:
        raise RuntimeError(
            f"accumulate_statistics: a block around this one accumulates already for {', '.join(busy)}. Use that one's "
            "update(), or leave these layers out by where="
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        synchronized = [named(path) for path, layer in layers.items() if isinstance(layer, torch.nn.SyncBatchNorm)]
        if synchronized:
            raise RuntimeError(
                f"accumulate_statistics: {', '.join(synchronized)} normalizes with the moments of all processes, which "
                "torch.nn.SyncBatchNorm does not tell; only this process's would be pooled. Leave it out by where=, or "
                "take ek.SyncBatchNorm"
            )
    pools = {path: _Pool(layer) for path, layer in layers.items()}
    accumulated = Accumulated(pools)
    with ExitStack() as stack:
        # A compiled graph keeps the hooks that there were when it was made, and would pass over those set here.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for pool in pools.values():
            stack.enter_context(pool.open())
        yield accumulated
        accumulated.update()


class _Pool:
    """The moments that one layer has seen."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self.moments: Moments | None = None
        self._seen: Moments | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, the layer's moments come here in place of the running ones."""
        _pooling.add(self.layer)
        try:
            if isinstance(self.layer, Variant):
                with self._instead_of_update():
                    yield
            else:
                with self._by_hooks():
                    yield
        finally:
            _pooling.discard(self.layer)

    def take(self, moments: Moments) -> None:
        self.moments = moments if self.moments is None else self.moments.merge(moments)

    def update(self, moments: Moments) -> None:
        """Let the moments enter the running ones, and begin anew."""
        if isinstance(self.layer, Variant):
            _update_variant(self.layer, moments)
        else:
            enter(self.layer, moments)
        self.moments = None

    @contextmanager
    def _instead_of_update(self) -> Iterator[None]:
        """A variant says itself which moments are to enter its running ones: they may not be those of its input."""
        layer = self.layer
        assert isinstance(layer, Variant)

        def update_running(moments: Moments) -> None:
            if layer.counts():
                self.take(moments)

        vars(layer)["update_running"] = update_running
        try:
            yield
        finally:
            del vars(layer)["update_running"]

    @contextmanager
    def _by_hooks(self) -> Iterator[None]:
        before = self.layer.register_forward_pre_hook(self._look, with_kwargs=True)
        after = self.layer.register_forward_hook(self._keep)
        try:
            with held_off([self.layer]):
                yield
        finally:
            before.remove()
            after.remove()

    # Looked at before the forward, which may overwrite its input; kept after it, which may raise.

    def _look(self, layer: Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._seen = None
        paused = blocks_holding(self.layer) > 1  # one is ours
        if not layer.training or paused or is_second_run():
            return
        x = inputs[0] if inputs else keywords.get("x", keywords.get("input"))
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2 and x.numel() > 0:
            self._seen = moments_of(x.detach(), keywords.get("mask"))

    def _keep(self, *_: Any) -> None:
        if self._seen is not None:
            self.take(self._seen)
            self._seen = None


def _update_variant(layer: Variant, moments: Moments) -> None:
    """As the variant itself would, whatever mode it is in by now."""
    vars(layer)["counts"] = lambda: True
    try:
        type(layer).update_running(layer, moments)
    finally:
        del vars(layer)["counts"]


def enter(layer: _BatchNorm, moments: Moments) -> None:
    """Let moments enter the running ones as a forward with them would, save in channels that are not finite."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None and var is not None  # others take no part
    skipped = getattr(layer, "skipped_updates", None)
    state = State(mean, var, layer.num_batches_tracked, True, True, layer.momentum, layer.eps, skipped=skipped)
    update_running(state, moments.mean, moments.m2 / moments.count.clamp(min=1), moments.count)
