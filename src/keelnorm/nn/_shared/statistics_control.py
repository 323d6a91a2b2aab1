"""Control of a layer's running statistics by ``with`` blocks: whether they are updated, or pooled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from keelnorm.engine.arguments import State
from keelnorm.engine.torch_internals import BatchNormBase, transform_stack
from keelnorm.moments import Moments


class Pool:
    """Merges the moments of a layer's batches, instead of updating its running statistics."""

    def __init__(self, layer: BatchNormBase) -> None:
        self.layer = layer
        self.moments: Moments | None = None
        #: The layer's momentum at the last forward.
        self.momentum: float | None = None
        self._lock = threading.Lock()

    def take(self, moments: Moments) -> None:
        """Merge a batch's moments into the pool."""
        parts = {name: value.detach() for name, value in vars(moments).items() if value is not None}

        def merge(*values: Tensor) -> None:
            own = type(moments)(**dict(zip(parts, values, strict=True)))
            with self._lock:
                self.moments = own if self.moments is None else self.moments.merge(own)
                self.momentum = self.layer.momentum

        if transform_stack() is None:
            merge(*parts.values())
        else:
            _PassOut.apply(merge, *parts.values())

    def forget(self) -> None:
        """Empty the pool."""
        self.moments = None


class _PassOut(torch.autograd.Function):
    """Passes values out of function transforms to a callable; under vmap those of each instance."""

    @staticmethod
    def forward(to: Callable[..., None], *values: Tensor) -> Tensor:
        """Call ``to``."""
        to(*values)
        return values[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[Tensor, None]:
        for index in range(info.batch_size):
            parts = zip(given, in_dims, strict=True)
            none = _PassOut.apply(*(value if dim is None else value.select(dim, index) for value, dim in parts))
        return none, None


class Control:
    """What open blocks ask of one layer.

    It is kept apart from what the user sets. Copies and pickles have statistics of their own, and no control. A shallow
    copy (a replica of DataParallel) shares the layer's statistics, and so its control.
    """

    def __init__(self) -> None:
        #: Number of open blocks that use this control.
        self.blocks = 0
        #: Number of blocks that pause the running statistics, and whether there is one.
        self.pauses = 0
        self.paused = False
        #: Takes the moments instead of the running statistics.
        self.pool: Pool | None = None

    def pause(self, blocks: int) -> None:
        """Add to the number of blocks that pause the running statistics."""
        self.pauses += blocks
        self.paused = self.pauses > 0

    def applied(self, state: State) -> State:
        """The state of a call that would update the running statistics, changed as the blocks ask."""
        return state._replace(update=state.update and not self.paused, sink=self.sink())

    def sink(self) -> Callable[[Moments], None] | None:
        """The function that takes moments instead of the running statistics; None without a pool."""
        pool = self.pool
        return None if pool is None else pool.take

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class Controlled(BatchNormBase):
    """A batch normalization that follows its :class:`Control`, if it has one."""

    _control: Control | None = None

    def reset_running_stats(self) -> None:
        """As torch.nn's; the pool of an open block is emptied too."""
        super().reset_running_stats()
        if self._control is not None and self._control.pool is not None:
            self._control.pool.forget()
