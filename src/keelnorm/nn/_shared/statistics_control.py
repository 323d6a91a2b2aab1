"""What the blocks around a layer's calls ask of its statistics, beside what is set on the layer itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.engine.arguments import State
from keelnorm.moments import Moments


class Pool:
    """The moments that a layer has seen, merged, in place of entering its running ones."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self.moments: Moments | None = None
        #: The layer's at the last forward.
        self.momentum: float | None = None
        self._lock = threading.Lock()

    def take(self, moments: Moments) -> None:
        """Merge a batch's moments in."""

        parts = {name: value.detach() for name, value in vars(moments).items() if value is not None}

        def merge(*values: Tensor) -> None:
            own = type(moments)(**dict(zip(parts, values, strict=True)))
            with self._lock:
                self.moments = own if self.moments is None else self.moments.merge(own)
                self.momentum = self.layer.momentum

        if torch._C._functorch.peek_interpreter_stack() is None:
            merge(*parts.values())
        else:
            _Given.apply(merge, *parts.values())

    def forget(self) -> None:
        """Begin anew."""
        self.moments = None


class _Given(torch.autograd.Function):
    """Gives the values inside function transforms to what is outside; under vmap those of each instance."""

    @staticmethod
    def forward(to: Callable[..., None], *values: Tensor) -> Tensor:
        to(*values)
        return values[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[Tensor, None]:
        for index in range(info.batch_size):
            parts = zip(given, in_dims, strict=True)
            none = _Given.apply(*(value if dim is None else value.select(dim, index) for value, dim in parts))
        return none, None


class Control:
    """What is asked of one layer, while a block around it is open.

    The layer holds it apart from what the user sets. Copies and pickles, whose statistics are their own, go without. A
    shallow copy (a replica of DataParallel) shares the layer's statistics and so the control.
    """

    def __init__(self) -> None:
        #: How many blocks hold the control.
        self.blocks = 0
        #: How many of them hold the layer off its running statistics, and whether one does.
        self.pauses = 0
        self.paused = False
        #: Where the moments go, if not into the running ones.
        self.pool: Pool | None = None

    def pause(self, blocks: int) -> None:
        """Count blocks that hold the layer off its running statistics."""
        self.pauses += blocks
        self.paused = self.pauses > 0

    def applied(self, state: State) -> State:
        """How a call that would update the running statistics uses the state."""
        return state._replace(update=state.update and not self.paused, sink=self.sink())

    def sink(self) -> Callable[[Moments], None] | None:
        """What takes the moments in place of the running ones."""
        pool = self.pool
        return None if pool is None else pool.take

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class Controlled(_BatchNorm):
    """A batch normalization that asks its :class:`Control`, where it has one, before it counts a batch."""

    _control: Control | None = None

    def reset_running_stats(self) -> None:
        """As torch.nn's; what a block around has pooled is forgotten too."""
        super().reset_running_stats()
        if self._control is not None and self._control.pool is not None:
            self._control.pool.forget()
