"""One update of the running statistics from all forwards of a block, as if they had been one batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.control.frozen_layer import is_held
from keelnorm.control.layer_hooks import control_of, controlled, updating
from keelnorm.control.layer_selection import Where, named, select_some
from keelnorm.control.run_uncompiled import uncompiled
from keelnorm.engine.arguments import State
from keelnorm.engine.running_statistics import update_running
from keelnorm.engine.update_counts import UpdateCounts
from keelnorm.moments import Moments
from keelnorm.nn._shared.skipped_updates import CountsSkipped
from keelnorm.nn._shared.statistics_control import Pool
from keelnorm.nn._shared.variant import Variant

#: What keelnorm's layers count themselves, for torch.nn's.
_updates: WeakKeyDictionary[_BatchNorm, UpdateCounts] = WeakKeyDictionary()


class Accumulated:
    """What :func:`accumulate_statistics` has pooled; the value of its ``with``.

    Args:
        paths: The layers that take part.
    """

    def __init__(self, pools: dict[str, Pool]) -> None:
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
        """Let what was pooled enter the running statistics, as one batch, and begin anew.

        Returns:
            The paths of the layers that were updated.
        """
        pooled = self.moments
        for pool in self._pools.values():
            pool.forget()
        # A layer may have been frozen meanwhile, or told to keep no statistics: it then stays as it is.
        layers = updating({path: pool.layer for path, pool in self._pools.items() if not is_held(pool.layer)})
        updated = [path for path in pooled if path in layers]
        for path in updated:
            enter(layers[path], pooled[path], self._pools[path].momentum)
        return updated


@contextmanager
def accumulate_statistics(model: Module, *, where: Where = None) -> Iterator[Accumulated]:
    """Update the running statistics once, at the end of the block, from the pooled moments of all forwards inside.

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
        Running statistics change at the end of the block and at ``update()``, and not if the block raises. Forwards of
        layers in training count, each use of a layer used several times; those in evaluation, frozen layers', those
        inside :func:`pause_statistics`, those that raise and those that a checkpoint repeats within the block do not.
        Values count as the call's ``mask`` and ``sample_weight`` say. Under ``torch.func.vmap`` each instance counts.
        A layer that has seen nothing stays as it is. A channel with a value that is not finite stays as it is, as in
        keelnorm's layers. A layer that is frozen meanwhile stays as it is. The momentum is that of the last forward.
        A copy of the model made inside the block takes no part. ``reset_running_stats`` of keelnorm's layers also
        forgets what was pooled; for torch.nn's, call ``update()`` before it.

    Numerics:
        Moments are float64, so that pooling costs no digits.

    Cost:
        For torch.nn's layers one more reading of their input. Compiled models run uncompiled inside the block.

    Raises:
        TypeError, ValueError: ``model`` is no module; there is no batch norm, or none that ``where`` means.
        RuntimeError: A layer is in such a block already; a ``torch.nn.SyncBatchNorm`` among several processes.

    Example:
        >>> layer, data = torch.nn.BatchNorm1d(3), torch.randn(32, 3)
        >>> with accumulate_statistics(layer):
        ...     outputs = [layer(micro_batch) for micro_batch in data.split(8)]
        >>> torch.allclose(layer.running_var, 0.9 + 0.1 * data.var(0)), layer.num_batches_tracked.item()
        (True, 1)
    """
    layers = updating(select_some("accumulate_statistics", model, where))
    controls = {path: control_of(layer) for path, layer in layers.items()}
    busy = [named(path) for path, control in controls.items() if control is not None and control.pool is not None]
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
                "take kn.SyncBatchNorm"
            )
    pools = {path: Pool(layer) for path, layer in layers.items()}
    accumulated = Accumulated(pools)
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for pool in pools.values():
            stack.enter_context(_pooled(pool))
        yield accumulated
        accumulated.update()


@contextmanager
def _pooled(pool: Pool) -> Iterator[None]:
    with controlled(pool.layer) as control:
        control.pool = pool
        try:
            yield
        finally:
            control.pool = None


def count_in(layer: _BatchNorm, moments: Moments) -> None:
    """Let a batch's moments enter the running ones as the blocks around would have it."""
    control = control_of(layer)
    if not updating({"": layer}) or (control is not None and control.paused):
        return
    if control is not None and control.pool is not None:
        control.pool.take(moments)
    else:
        enter(layer, moments, layer.momentum)


def enter(layer: _BatchNorm, moments: Moments, momentum: float | None) -> None:
    """Let moments enter the running ones as a forward with them would, save in channels that are not finite."""
    if isinstance(layer, Variant):
        layer.enter(moments, momentum)
        return
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None and var is not None  # others take no part
    own = layer._updates if isinstance(layer, CountsSkipped) else None
    updates = own or _updates.setdefault(layer, UpdateCounts())
    state = State(mean, var, layer.num_batches_tracked, True, True, momentum, layer.eps, updates=updates)
    update_running(state, moments.mean, moments.var_or_zero, moments.count, squares=moments.squares)
