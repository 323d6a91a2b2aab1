"""Read and write batch norms as other libraries keep them, in plain dicts of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from keelnorm.control.layer_selection import named
from keelnorm.engine.error_messages import describe
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.nn.batch_norm import BatchNorm
from keelnorm.surgery.target_layers import batch_norms_in

#: The number of values per channel in a training batch: one for all layers, or one for each path.
Count: TypeAlias = float | Mapping[str, float] | None
#: torch's names, in the state_dict's order.
OURS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Convention:
    """How a library names the entries of a batch norm.

    Args:
        name: The library's name.
        theirs: Its names for the entries ``OURS``.
    """

    name: str
    theirs: tuple[str, str, str, str]

    @property
    def moments(self) -> set[str]:
        """The names that only batch norms have; other layers may have a scale and a bias too."""
        return set(self.theirs[2:])

    def read(self, what: str, path: str, values: Mapping[str, Any], count: Count) -> dict[str, Tensor]:
        """Read a layer's entries into torch's names, with the variance unbiased if ``count`` is given.

        Args:
            what: The public function that was called, for errors.
            path: The layer's path.
            values: The entries by the library's names; None counts as missing.
            count: The number of values per channel in a training batch.

        Raises:
            ValueError: Names are unknown or missing, or shapes differ.
            TypeError: An entry is no array of floating-point numbers.
        """
        values = {name: value for name, value in values.items() if value is not None}
        unknown, missing = sorted(values.keys() - set(self.theirs)), sorted(self.moments - values.keys())
        if unknown or missing:
            wrong = f"unknown {unknown}" if unknown else f"missing {missing}"
            raise ValueError(
                f"{what}: a {self.name} batch norm has {list(self.theirs)}, of which the first two may be missing; "
                f"got {sorted(values)} for {named(path)!r}: {wrong}"
            )
        layer = {
            ours: _tensor(what, path, name, values[name])
            for ours, name in zip(OURS, self.theirs, strict=True)
            if name in values
        }
        if len(shapes := {tuple(value.shape) for value in layer.values()}) > 1:
            raise ValueError(
                f"{what}: all entries of a batch norm must have one value per channel; got shapes {sorted(shapes)} "
                f"for {named(path)!r}"
            )
        n = _count(what, path, count)
        layer["running_var"] = scaled(layer["running_var"], n, n - 1 if n else None)
        return layer

    def write(self, what: str, path: str, layer: BatchNormBase, count: Count) -> dict[str, np.ndarray]:
        """Write a layer's entries under the library's names, with the variance biased if ``count`` is given.

        Raises:
            ValueError: The layer has no running statistics, or state that the library has no place for.
        """
        state = layer.state_dict()
        if any(map(nn.parameter.is_lazy, state.values())):
            raise ValueError(
                f"{what}: {named(path)!r} ({type(layer).__name__}) has no shape yet; run the lazy model once first"
            )
        state.pop("num_batches_tracked", None)
        plain = all(isinstance(value, Tensor) and value.dim() == 1 for value in state.values())
        if not plain or state.keys() - set(OURS):
            shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
            raise ValueError(
                f"{what}: {named(path)!r} ({type(layer).__name__}) keeps {shapes}; {self.name} has a place for "
                f"{list(OURS)} of shape (C,) only. Leave the layer out, or replace it by a kn.BatchNorm first"
            )
        if missing := [name for name in OURS[2:] if name not in state]:
            raise ValueError(
                f"{what}: {named(path)!r} has no {' and '.join(missing)}, which a {self.name} batch norm needs; build "
                "the layer with track_running_stats=True and run it on data"
            )
        n = _count(what, path, count)
        state["running_var"] = scaled(state["running_var"], n - 1 if n else None, n)
        return {name: _array(state[ours]) for ours, name in zip(OURS, self.theirs, strict=True) if ours in state}


def scaled(var: Tensor, over: float | None, under: float | None) -> Tensor:
    """Compute ``var · over / under``, rounded once; ``var`` itself if they are None."""
    return var if over is None or under is None else (var.double() * float(over) / float(under)).to(var.dtype)


def leaves(what: str, tree: Any) -> dict[tuple[str, ...], Any]:
    """A nested dict's values by path; names joined by "/" or "." are split."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"{what}: needs a dict of arrays, nested or with joined names; got {describe(tree)}")
    found: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise TypeError(f"{what}: names must be strings, nested or joined by '/' or '.'; got {describe(key)}")
        path = tuple(key.replace(".", "/").split("/"))
        below = leaves(what, value) if isinstance(value, Mapping) else {(): value}
        for rest, leaf in below.items():
            if path + rest in found:
                raise ValueError(f"{what}: {'/'.join(path + rest)!r} is given twice, joined in different ways")
            found[path + rest] = leaf
    return found


def import_layers(
    what: str, layers: Mapping[str, Mapping[str, Tensor]], eps: float, momentum: float, prefix: str | None
) -> BatchNorm | dict[str, Tensor]:
    """Build a :class:`kn.BatchNorm` from a single layer without a prefix, else a state_dict."""
    if not (isinstance(momentum, int | float) and 0 <= momentum <= 1):
        raise ValueError(
            f"{what}: momentum must be from 0 to 1, the weight of the old statistics; got {describe(momentum)}"
        )
    if not (isinstance(eps, int | float) and 0 <= eps < float("inf")):
        raise ValueError(f"{what}: epsilon must be a finite number of at least 0; got {describe(eps)}")
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
    """Write all batch norms of a model, by the parts of their paths; () for a model that is itself one."""
    layers = batch_norms_in(what, model)
    if not layers:
        raise ValueError(f"{what}: the model has no batch norm (a BatchNormBase)")
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
            raise ValueError(f"{what}: count must have an entry for {named(path)!r}; got {sorted(count)}")
        count = count[path]
    if count is not None and not (isinstance(count, int | float) and 1 < count < float("inf")):
        raise ValueError(
            f"{what}: count must be the number of values per channel in a batch, more than 1, or a dict of these by "
            f"path; got {describe(count)}"
        )
    return count
