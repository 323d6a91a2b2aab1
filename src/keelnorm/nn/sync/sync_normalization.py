"""Synchronized batch normalization in steps, for a result that waits for the operation after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import Kept, Needs, State, check_arguments
from keelnorm.engine.normalization_steps import Normalization
from keelnorm.nn.sync.autograd import Call, refuse_second_derivative, synchronized_backward

if TYPE_CHECKING:
    from typing import Any

    from torch.distributed import ProcessGroup

    from keelnorm.nn.sync.sync_batch_norm import SyncBatchNorm


class SyncNormalization(Normalization):
    """The steps of a synchronized batch normalization."""

    __slots__ = ("count", "group", "layer")

    def __init__(
        self, state: State, weight: Tensor | None, bias: Tensor | None, layer: SyncBatchNorm, group: ProcessGroup
    ) -> None:
        super().__init__(state, weight, bias)
        self.layer, self.group = layer, group

    def run(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, act: Activation | None
    ) -> tuple[Tensor | None, Tensor]:
        """As :meth:`Normalization.run`, with the moments of all ranks."""
        check_arguments(self.state.what, x, None, weight, bias, self.state, None, "others")
        total, saved, self.count = self.layer.pooled(x, None, self.group)
        y = None if act is None else self.apply(x, None, weight, bias, saved, act)
        self.layer.update_running(total)
        return y, saved

    def backward(self, dy: Tensor, kept: Kept, need: Needs) -> tuple[Tensor | None, ...]:
        """As :meth:`Normalization.backward`, with sums over all ranks."""
        call = Call(kept.act, self.group, self.state.what, dy.dtype, None)
        return synchronized_backward(dy, kept, self.count, call, need)

    def differentiable(self, *_: Any) -> Tensor:
        """Raise: there is no second derivative."""
        refuse_second_derivative(self.state.what)

    def differentiable_backward(self, *_: Any) -> tuple[Tensor | None, ...]:
        """Raise: there is no second derivative."""
        refuse_second_derivative(self.state.what)
