"""What a layer counts of its updates of the running statistics, beside torch.nn's buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from keelnorm.engine.torch_internals import functorch_is_active

#: What the fast operators call them, where they decline them.
COUNTS = "update counts"
#: The rows of the counts.
SKIPPED, AVERAGED, AT = range(3)


class UpdateCounts:
    """Three counts for each channel, rows of one int64 tensor (3, *running_mean.shape).

        SKIPPED:   updates that were left out, because what would have been stored was not finite
        AVERAGED:  batches that a cumulative average (momentum None) is over
        AT:        num_batches_tracked at that time

    A cumulative average weighs a batch by 1/(AVERAGED + 1), so that a batch that was left out does not count. Where
    num_batches_tracked is not what it was at AT, someone has loaded, averaged or reset it, and it counts itself.

    The tensor is no buffer, so that a layer's buffers are torch.nn's, one for one. It follows the running mean: it is
    made when it is needed, moved where the mean has moved, and begun anew where the mean has another shape.
    """

    def __init__(self) -> None:
        #: None as long as nothing was to be counted, as on the meta device; else of any size and in any place.
        self.tensor: Tensor | None = None

    def beside(self, running: Tensor) -> Tensor:
        """The tensor, of the running mean's size and on its device."""
        shape = (len((SKIPPED, AVERAGED, AT)), *running.shape)
        if not _has_memory(running):
            return running.new_zeros(shape, dtype=torch.int64)
        tensor = self.tensor
        if tensor is None or tensor.shape != shape:
            self.tensor = _kept(torch.zeros, shape, dtype=torch.int64, device=running.device)
        elif tensor.device != running.device:
            self.tensor = _kept(tensor.to, running.device)
        assert self.tensor is not None
        return self.tensor

    def shared(self) -> UpdateCounts:
        """Counts in the same memory, until either is moved or begun anew."""
        other = UpdateCounts()
        other.tensor = self.tensor
        return other

    def __fx_create_arg__(self, tracer: Any) -> Any:
        """In a graph of a layer by itself: the layer's counts."""
        names = [name for name, value in vars(tracer.root).items() if value is self]
        return tracer.create_node("get_attr", names[0], (), {})


def _kept(make: Callable[..., Tensor], *args: Any, **keywords: Any) -> Tensor:
    """The tensor, for calls to come in whatever mode. A parameter, as torch.compile takes the shapes of these alone for
    fixed; it can't make one itself."""
    if torch.compiler.is_compiling():
        return make(*args, **keywords)
    with torch.inference_mode(False):
        return Parameter(make(*args, **keywords), requires_grad=False)


def _has_memory(running: Tensor) -> bool:
    """Whether counts beside it outlive this call: not those of meta and fake tensors and others of a type of their own,
    of transforms and exported programs."""
    return (
        type(running) in (Tensor, Parameter)
        and not running.is_meta
        and not torch.compiler.is_exporting()
        and not functorch_is_active()
    )
