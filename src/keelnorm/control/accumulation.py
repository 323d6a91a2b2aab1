"""Accumulation: one update of the running statistics from all forwards of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.nn import Module

from keelnorm.control.frozen_layer import has_frozen_statistics
from keelnorm.control.layer_hooks import control_of, controlled, updating
from keelnorm.control.layer_selection import Where, named, select_some
from keelnorm.control.run_uncompiled import uncompiled
from keelnorm.engine.arguments import State
from keelnorm.engine.running_statistics import update_running
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.engine.update_counts import UpdateCounts
from keelnorm.moments import Moments
from keelnorm.nn._shared.skipped_updates import CountsSkipped
from keelnorm.nn._shared.statistics_control import Pool
from keelnorm.nn._shared.variant import Variant

#: The update counts of torch.nn's layers; keelnorm's layers hold their own.
_updates: WeakKeyDictionary[BatchNormBase, UpdateCounts] = WeakKeyDictionary()


class Accumulated:
    """The moments that :func:`accumulate_statistics` has pooled; the value of its ``with``.

    Args:
        pools: The pool of each layer that takes part, by the layer's path.
    """

    def __init__(self, pools: dict[str, Pool]) -> None:
        self._pools = pools

    @property
    def paths(self) -> list[str]:
        """The paths of the layers that take part."""
        return list(self._pools)

    @property
    def moments(self) -> dict[str, Moments]:
        """The moments pooled since the last update, by path; layers without a forward since then are left out."""
        return {path: pool.moments for path, pool in self._pools.items() if pool.moments is not None}

    def update(self) -> list[str]:
        """Update the running statistics with the pooled moments, as one batch, and start a new pool.

        Returns:
            The paths of the layers that were updated.
        """
        pooled = self.moments
        for pool in self._pools.values():
            pool.forget()
        # A layer that was frozen meanwhile, or whose running statistics were switched off, stays as it is.
        layers = updating(
            {path: pool.layer for path, pool in self._pools.items() if not has_frozen_statistics(pool.layer)}
        )
        updated = [path for path in pooled if path in layers]
        for path in updated:
            enter(layers[path], pooled[path], self._pools[path].momentum)
        return updated


@contextmanager
def accumulate_statistics(model: Module, *, where: Where = None) -> Iterator[Accumulated]:
    """Update the running statistics once, at the end of the block, with the pooled moments of all forwards inside.

    The moments of all inputs of a layer are merged exactly to count n, mean and M2:

        running_mean = (1 − momentum)·running_mean + momentum·mean
        running_var  = (1 − momentum)·running_var + momentum·M2/(n − 1)

    and num_batches_tracked grows by 1, as after one batch of all inputs. Each micro-batch is still normalized with its
    own moments, and so are the gradients.

    Args:
        model: A model, or a layer.
        where: A pattern for the layers' paths (``"layer1.*"``), a module's path, or several; None for all.

    Returns:
        :class:`Accumulated`, as the value of ``with``. Its ``update()`` updates at once and starts a new pool: call it
        once per optimizer step in a long block. The end of the block updates with the rest, if any.

    State:
        Running statistics change at the end of the block and at ``update()``; not if the block raises. Every forward of
        a layer in training counts. These forwards do not count: in evaluation, of frozen layers, inside
        :func:`pause_statistics`, forwards that raise, and those that a checkpoint repeats within the block. Values
        count as the call's ``mask`` and ``sample_weight`` say. Under ``torch.func.vmap`` each instance counts. A layer
        without a forward, a layer frozen meanwhile, and a channel with a value that is not finite keep their running
        statistics. The momentum is that of the last forward. A copy of the model made inside the block takes no part.
        ``reset_running_stats`` of keelnorm's layers also empties the pool; for torch.nn's, call ``update()`` before it.

    Numerics:
        Moments are float64, so pooling loses no accuracy.

    Cost:
        For torch.nn's layers one more pass over their input. Compiled models run uncompiled inside the block.

    Raises:
        TypeError, ValueError: ``model`` is not a module; it has no batch norm, or ``where`` selects none.
        RuntimeError: A layer is in such a block already; a ``torch.nn.SyncBatchNorm`` in a group of several processes.

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
            f"accumulate_statistics: a block around this one accumulates already for {', '.join(busy)}. Call its "
            "update(), or leave these layers out by where="
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        synchronized = [named(path) for path, layer in layers.items() if isinstance(layer, torch.nn.SyncBatchNorm)]
        if synchronized:
            raise RuntimeError(
                f"accumulate_statistics: {', '.join(synchronized)} normalizes with the moments of all processes, but "
                "torch.nn.SyncBatchNorm exposes only this process's. Leave it out by where=, or use kn.SyncBatchNorm"
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


def count_in(layer: BatchNormBase, moments: Moments) -> None:
    """Update the running statistics with a batch's moments, or pool them, as the open blocks ask."""
    control = control_of(layer)
    if not updating({"": layer}) or (control is not None and control.paused):
        return
    if control is not None and control.pool is not None:
        control.pool.take(moments)
    else:
        enter(layer, moments, layer.momentum)


def enter(layer: BatchNormBase, moments: Moments, momentum: float | None) -> None:
    """Update the running statistics with moments as a forward would; channels that are not finite stay."""
    if isinstance(layer, Variant):
        layer.enter(moments, momentum)
        return
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None and var is not None  # layers without them are left out
    own = layer._updates if isinstance(layer, CountsSkipped) else None
    updates = own or _updates.setdefault(layer, UpdateCounts())
    state = State(
        training=True, update=True, momentum=momentum, eps=layer.eps, running_mean=mean, running_var=var,
        num_batches_tracked=layer.num_batches_tracked, updates=updates,
    )  # fmt: skip
    update_running(state, moments.mean, moments.var_or_zero, moments.count, squares=moments.squares)
