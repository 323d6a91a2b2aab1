"""The classes that convert gives to layers of other packages: theirs, with the batch norm on keelnorm's kernels.

Such a class is derived from ours and from theirs, so that ``isinstance``, attributes and methods of theirs stay.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from keelnorm import nn as layers
from keelnorm.engine.arguments import Options, State
from keelnorm.engine.fusion.call import passes_by
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.nn.batch_norm import FusedBatchNorm, fx_node
from keelnorm.surgery.known_layers import ORIGIN, Known, known

passes_by(__file__)
#: The base that replaces each of torch.nn's.
_OURS: dict[type[BatchNormBase], type[BatchNormBase]] = {
    nn.BatchNorm1d: layers.BatchNorm1d,
    nn.BatchNorm2d: layers.BatchNorm2d,
    nn.BatchNorm3d: layers.BatchNorm3d,
    nn.SyncBatchNorm: layers.SyncBatchNorm,
}


class Registered(nn.Module):
    """A layer of a known class: the batch norm of its next base class, then its own modules."""

    _registered: type[nn.Module]
    _then: tuple[str, ...]

    def forward(self, x: Any = None, *, input: Any = None) -> Tensor:
        """Normalize x, which torch.nn calls ``input``, and call the layer's own modules on the result."""
        x = input if x is None else x
        if not isinstance(x, Tensor):
            node = fx_node(self, x, None, Options())
            if node is not None:
                return node  # type: ignore[no-any-return]
        if isinstance(self, Frozen) and not self.fits(x):
            return self._registered.forward(self, x)
        y = super().forward(x)
        for name in self._then:
            part = getattr(self, name, None)
            if part is not None:
                y = part(y)
        return y  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The default, but for the class, which can't be found by its name.
        return _empty, (self._registered,), *super().__reduce_ex__(max(int(protocol), 2))[2:]


class Frozen(nn.Module):
    """The batch norm of a layer with fixed statistics; not derived from torch.nn's, which tools would train."""

    _ranks = (4,)
    too_few = "error"
    defers_in_training = True
    forward = FusedBatchNorm.forward
    normalization = FusedBatchNorm.normalization
    __prepare_scriptable__ = FusedBatchNorm.__prepare_scriptable__

    def fits(self, x: Tensor) -> bool:
        """Whether ours gives the same result: where dtypes differ, each package's own code promotes in its own way."""
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            return False
        mean, var, *affine = (getattr(self, name) for name in ("running_mean", "running_var", "weight", "bias"))
        if mean.requires_grad or var.requires_grad:
            return False
        return all(v is None or (v.dtype == x.dtype and v.shape == x.shape[1:2]) for v in (mean, var, *affine))

    def _unpacked(self) -> tuple[Any, Any, State]:
        layer: Any = self
        state = State(
            training=False, update=False, momentum=0.0, eps=layer.eps, running_mean=layer.running_mean,
            running_var=layer.running_var, what=type(self).__name__,
        )  # fmt: skip
        return self.weight, self.bias, state


def twin_of(kind: Any) -> type[nn.Module]:
    """The class that layers of a known class get.

    Raises:
        TypeError: The class is not known in this process, as when a pickle is loaded.
    """
    found = known(kind)
    if found is None:
        raise TypeError(f"{kind.__qualname__} is not known here; call kn.surgery.register({kind.__name__}, ...) first")
    return _twin(kind, found)


@cache
def _twin(kind: Any, found: Known) -> type[nn.Module]:
    base = Frozen if found.frozen else next((ours for theirs, ours in _OURS.items() if issubclass(kind, theirs)), None)
    bases = (Registered, base or layers.BatchNorm, kind)
    return type(kind.__name__, bases, {"__module__": __name__, ORIGIN: kind, "_then": found.then})


def _empty(kind: Any) -> nn.Module:
    """A layer without attributes, for copies and pickles to fill."""
    twin = twin_of(kind)
    return twin.__new__(twin)
