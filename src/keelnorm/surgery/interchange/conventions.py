"""Batch norms as other libraries name and keep them, in plain dicts of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.control.layer_selection import named
from keelnorm.engine.error_messages import describe
from keelnorm.nn.batch_norm import BatchNorm
from keelnorm.surgery.target_layers import chosen

#: Values per channel of a training batch: for all layers, or for each by its path.
Count: TypeAlias = float | Mapping[str, float] | None
#: Torch's names, in the state_dict's order.
OURS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Convention:
    """How a library keeps a batch norm.

    Args:
        name: The library's.
        theirs: Its names for torch's ``OURS``.
    """

    name: str
    theirs: tuple[str, str, str, str]

    @property
    def moments(self) -> set[str]:
        """The names that tell a batch norm from any other layer, which may have a scale and a bias too."""
        return set(self.theirs[2:])

    def read(self, what: str, path: str, values: Mapping[str, Any], count: Count) -> dict[str, Tensor]:
        """A layer's entries by torch's names, the variance as torch keeps it; what is None is missing.

        Raises:
            ValueError: for names that are unknown or missing, or shapes that differ.
            TypeError: for what is no array of floating-point numbers.
        """
        values = {name: value for name, value in values.items() if value is not None}
        unknown, missing = sorted(values.keys() - set(self.theirs)), sorted(self.moments - values.keys())
        if unknown or missing:
            wrong = f"unknown {unknown}" if unknown else f"missing {missing}"
            raise ValueError(
                f"{what}: a {self.name} batch norm has {list(self.theirs)}, of which the first two may be missing; "
                f"{named(path)!r} has {sorted(values)}: {wrong}"
            )
        layer = {
            ours: _tensor(what, path, name, values[name])
            for ours, name in zip(OURS, self.theirs, strict=True)
            if name in values
        }
        if len(shapes := {tuple(value.shape) for value in layer.values()}) > 1:
            raise ValueError(
                f"{what}: all entries of a batch norm have one value per channel; {named(path)!r} has shapes "
                f"{sorted(shapes)}"
            )
        n = _count(what, path, count)
        layer["running_var"] = scaled(layer["running_var"], n, n - 1 if n else None)
        return layer

    def write(self, what: str, path: str, layer: _BatchNorm, count: Count) -> dict[str, np.ndarray]:
        """A layer's entries by their names, the variance biased where a count is given.

        Raises:
            ValueError: the layer has no running statistics, or state that the other library has no place for.
        """
        state = layer.state_dict()
        if any(map(nn.parameter.is_lazy, state.values())):
            raise ValueError(
                f"{what}: {named(path)!r} ({type(layer).__name__}) has no shape yet; give the lazy model a batch first"
            )
        state.pop("num_batches_tracked", None)
        plain = all(isinstance(value, Tensor) and value.dim() == 1 for value in state.values())
        if not plain or state.keys() - set(OURS):
            shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
            raise ValueError(
                f"{what}: {named(path)!r} ({type(layer).__name__}) keeps {shapes}; {self.name} has a place for "
                f"{list(OURS)} of shape (C,) only. Leave the layer out, or put an kn.BatchNorm in its place first"
            )
        if missing := [name for name in OURS[2:] if name not in state]:
            raise ValueError(
                f"{what}: {named(path)!r} has no {' and '.join(missing)}, which a {self.name} batch norm needs; make "
                "the layer with track_running_stats=True and let it see data"
            )
        n = _count(what, path, count)
        state["running_var"] = scaled(state["running_var"], n - 1 if n else None, n)
        return {name: _array(state[ours]) for ours, name in zip(OURS, self.theirs, strict=True) if ours in state}


def scaled(var: Tensor, over: float | None, under: float | None) -> Tensor:
    """``var · over / under``, rounded once; ``var`` itself where they are None."""
    return var if over is None or under is None else (var.double() * float(over) / float(under)).to(var.dtype)


def leaves(what: str, tree: Any) -> dict[tuple[str, ...], Any]:
    """A nested dict's values by their paths; names that are joined by "/" or "." are taken apart."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"{what}: takes a dict of arrays, nested or with joined names; got {describe(tree)}")
    found: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise TypeError(f"{what}: names are strings, nested or joined by '/' or '.'; got {describe(key)}")
        path = tuple(key.replace(".", "/").split("/"))
        below = leaves(what, value) if isinstance(value, Mapping) else {(): value}
        for rest, leaf in below.items():
            if path + rest in found:
                raise ValueError(f"{what}: {'/'.join(path + rest)!r} is there twice, joined in different ways")
            found[path + rest] = leaf
    return found


def import_layers(
    what: str, layers: Mapping[str, Mapping[str, Tensor]], eps: float, momentum: float, prefix: str | None
) -> BatchNorm | dict[str, Tensor]:
    """An :class:`kn.BatchNorm` if a single layer is all there is, and no prefix; else a state_dict."""
    if not (isinstance(momentum, int | float) and 0 <= momentum <= 1):
        raise ValueError(
            f"{what}: momentum is the weight that the old moments keep, from 0 to 1; got {describe(momentum)}"
        )
    if not (isinstance(eps, int | float) and 0 <= eps < float("inf")):
        raise ValueError(f"{what}: epsilon is added to the variance, a number from 0 on; got {describe(eps)}")
    if set(layers) == {""} and prefix is None:
        state = layers[""]
        mean = state["running_mean"]
        affine = "weight" in state or "bias" in state
        layer = BatchNorm(len(mean), eps, 1 - momentum, affine, device=mean.device, dtype=mean.dtype)
        for name in OURS[: 2 * affine]:
            if name not in state:
                layer.register_parameter(name, None)
        layer.load_state_dict({**layer.state_dict(), **state})
        return layer
    result: dict[str, Tensor] = {}
    for path, state in layers.items():
        mean = state["running_mean"]
        whole = {"weight": torch.ones_like(mean), "bias": torch.zeros_like(mean), **state}
        joined = ".".join(part for part in (prefix, path) if part)
        result |= {f"{joined}.{name}" if joined else name: whole[name] for name in OURS}
    return result


def export_layers(
    what: str, model: nn.Module, convention: Convention, count: Count
) -> dict[tuple[str, ...], dict[str, np.ndarray]]:
    """Every batch norm's entries, by the parts of its path; () for a model that is one itself."""
    layers = chosen(what, model)
    if not layers:
        raise ValueError(f"{what}: the model has no batch norm (a torch.nn.modules.batchnorm._BatchNorm)")
    return {
        tuple(path.split(".")) if path else (): convention.write(what, path, layer, count)
        for path, layer in layers.items()
    }


def _tensor(what: str, path: str, name: str, value: Any) -> Tensor:
    tensor = value.detach().clone() if isinstance(value, Tensor) else None
    if tensor is None:
        array = np.array(value)
        tensor = torch.from_numpy(array) if array.dtype.kind == "f" else None
    if tensor is None or not tensor.is_floating_point() or tensor.dim() != 1:
        raise TypeError(
            f"{what}: {name!r} of {named(path)!r} must be an array or tensor of one floating-point number per channel, "
            f"in a dtype that numpy has; got {describe(value)}"
        )
    return tensor


def _array(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return np.array((value.float() if value.dtype == torch.bfloat16 else value).numpy())  # numpy has no bfloat16


def _count(what: str, path: str, count: Count) -> float | None:
    if isinstance(count, Mapping):
        if path not in count:
            raise ValueError(f"{what}: count has no entry for {named(path)!r}; it has {sorted(count)}")
        count = count[path]
    if count is not None and not (isinstance(count, int | float) and 1 < count < float("inf")):
        raise ValueError(
            f"{what}: count is the number of values per channel of a batch, more than 1, or a dict of these by path; "
            f"got {describe(count)}"
        )
    return count
