"""Counts of a layer's updates of its running statistics, kept beside torch.nn's buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from keelnorm.engine.torch_internals import functorch_is_active

#: The name of the counts in the message of a fast operator that declines them.
COUNTS = "update counts"
#: The rows of the counts.
SKIPPED, AVERAGED, AT = range(3)


class UpdateCounts:
    """Three counts for each channel, rows of one int64 tensor (3, *running_mean.shape).

        SKIPPED:   updates that were skipped, because the result was not finite
        AVERAGED:  batches in a cumulative average (momentum None)
        AT:        num_batches_tracked at that time

    A cumulative average weighs a batch by 1/(AVERAGED + 1), so that a skipped batch does not count. Where
    num_batches_tracked differs from AT, someone loaded, averaged or reset it; it is then the number of batches.

    The tensor is not a buffer, so that a layer has exactly torch.nn's buffers. It follows the running mean: it is
    created when it is needed, moved to the mean's device, and created anew where the mean's shape changed.
    """

    def __init__(self) -> None:
        #: None until something is counted; may have an old shape or device, see :meth:`beside`.
        self.tensor: Tensor | None = None

    def beside(self, running: Tensor) -> Tensor:
        """Return the tensor, with the running mean's shape and on its device."""
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
        """Return counts that share the memory, until either is moved or created anew."""
        other = UpdateCounts()
        other.tensor = self.tensor
        return other

    def __fx_create_arg__(self, tracer: Any) -> Any:
        """Return the node of the counts in a torch.fx graph of the layer."""
        names = [name for name, value in vars(tracer.root).items() if value is self]
        return tracer.create_node("get_attr", names[0], (), {})


def _kept(make: Callable[..., Tensor], *args: Any, **keywords: Any) -> Tensor:
    """Return a tensor that later calls can use in any mode.

    It is a parameter, since torch.compile takes only the shapes of parameters for fixed; it can't create one itself.
    """
    if torch.compiler.is_compiling():
        return make(*args, **keywords)
    with torch.inference_mode(False):
        return Parameter(make(*args, **keywords), requires_grad=False)


def _has_memory(running: Tensor) -> bool:
    """Return whether counts can outlive this call: not for meta and other special tensors, transforms and exports."""
    return (
        type(running) in (Tensor, Parameter)
        and not running.is_meta
        and not torch.compiler.is_exporting()
        and not functorch_is_active()
    )
