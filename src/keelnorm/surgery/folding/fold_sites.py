"""Decide which pairs of modules may be folded: find the layer next to a batch norm, and what lies between."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keelnorm.surgery.folding.fold_weights import channels
from keelnorm.surgery.folding.foldable_layers import LINEAR, channels_of, input_of, is_whole
from keelnorm.surgery.observation.call_record import Call, FunctionCall, ModuleCall, Trace, Value, version_of

#: Functions that are linear in their first argument. ``moved`` tries each call to find whether it commutes with
#: x·scale + shift per channel, as means and copies do, and on which axis the channels are afterwards.
_LINEAR_FUNCTIONS = frozenset(
    [getattr(Tensor, name) for name in (
        "clone", "contiguous", "detach", "flatten", "mean", "movedim", "permute", "reshape", "squeeze", "to",
        "transpose", "unsqueeze", "view",
    )]
    + [getattr(torch, name) for name in (
        "clone", "detach", "flatten", "mean", "movedim", "permute", "reshape", "squeeze", "transpose", "unsqueeze",
    )]
    + [getattr(F, name) for name in (
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
        "interpolate", "pad",
    )]
)  # fmt: skip


class CannotFoldError(Exception):
    """A batch norm can't be folded into a layer, for this reason."""


class Site(NamedTuple):
    """The layer next to a batch norm.

    Args:
        call: The layer's call.
        chain: The functions between the two, in order.
    """

    call: ModuleCall
    chain: tuple[FunctionCall, ...]


def site_before(trace: Trace, norm: ModuleCall, gone: set[Call]) -> Site:
    """Find the layer whose output the batch norm normalizes and nothing else reads.

    Args:
        trace: The model's run.
        norm: The batch norm's call.
        gone: Calls of batch norms that are already folded.

    Raises:
        CannotFoldError: There is no such layer.
    """
    value, axis = norm.inputs[0], 1
    current: Call = norm
    chain: list[FunctionCall] = []
    while True:
        others = [str(unit) for unit in _units(trace, value) if unit is not current]
        holders = trace.holders(value)
        if others:
            raise CannotFoldError(f"what it normalizes is also read by {_listed(others)}")
        if holders:
            raise CannotFoldError(f"what it normalizes is also {_listed(holders)}")
        writer = trace.writer(value)
        if writer is None:
            given = trace.is_given(value)
            raise CannotFoldError("it normalizes the model's input" if given else "its input has an unknown origin")
        unit = _unit(writer)
        if isinstance(unit, ModuleCall):
            if value not in unit.outputs or (not isinstance(unit.module, LINEAR) and unit not in gone):
                raise CannotFoldError(f"its input comes from {unit}")
            if unit not in gone:
                _check_channels(unit, unit.result, axis, channels(unit.module)[1], norm)
                return Site(unit, tuple(chain))
        else:
            assert isinstance(unit, FunctionCall)
            before = _moved_back(unit, axis)
            if before is None:
                raise CannotFoldError(f"its input comes from {_named(unit)}")
            axis = before
            chain.insert(0, unit)
        current, value = unit, unit.inputs[0]


def site_after(trace: Trace, norm: ModuleCall) -> Site:
    """Find the layer that alone reads the batch norm's output.

    Raises:
        CannotFoldError: There is no such layer.
    """
    x = input_of(norm)
    assert x is not None
    if version_of(x) != norm.inputs[0].version:  # once folded, readers of the output read this tensor
        raise CannotFoldError("its input is changed in place later")
    value, axis = norm.outputs[0], 1
    chain: list[FunctionCall] = []
    while True:
        units = _units(trace, value)
        holders = trace.holders(value)
        if holders:
            raise CannotFoldError(f"its output is {_listed(holders)}")
        if len(units) != 1:
            readers = _listed([str(unit) for unit in units]) or "nobody"
            raise CannotFoldError(f"its output is read by {readers}")
        unit = units[0]
        if isinstance(unit, ModuleCall):
            if not isinstance(unit.module, LINEAR) or value not in unit.inputs:
                raise CannotFoldError(f"its output is read by {unit}")
            given = input_of(unit)
            if given is None:
                raise CannotFoldError(f"its output is read by {unit}, called with more than its input")
            _check_channels(unit, given, axis, channels(unit.module)[0], norm)
            return Site(unit, tuple(chain))
        assert isinstance(unit, FunctionCall)
        after = moved(unit, axis)
        if after is None:
            raise CannotFoldError(f"its output is read by {_named(unit)}")
        axis = after
        chain.append(unit)
        value = unit.outputs[0]


def run_again(call: FunctionCall, x: Tensor) -> Any:
    """Call a function again, with x as its first argument."""
    return call.function(x, *call.args[1:], **call.kwargs)


def moved(call: FunctionCall, axis: int) -> int | None:
    """The channels' axis after a function for which f(x·scale + shift) = f(x)·scale + shift per channel, else None.

    This holds for a linear function that maps inputs constant in each channel to the same constants.
    """
    if call.function not in _LINEAR_FUNCTIONS or len(call.inputs) != 1 or len(call.outputs) != 1:
        return None
    x, y = call.args[0] if call.args else None, call.result
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.dtype != y.dtype or x.device != y.device:
        return None
    if call.function is F.pad and (*call.args[2:], call.kwargs.get("mode", "constant"))[0] == "constant":
        return None  # if it pads by nothing on the example, it may still pad other sizes
    constants = torch.arange(1, x.shape[axis] + 1, dtype=torch.float64).sqrt()  # no mean of several equals another one
    found = run_again(call, _spread(constants, axis, x.shape))
    if found.dtype != constants.dtype:
        return None
    fits = [
        i
        for i, size in enumerate(found.shape)
        if size == len(constants) and torch.allclose(found, _spread(constants, i, found.shape), rtol=1e-12, atol=0)
    ]
    return min(fits, key=lambda i: i != axis) if fits else None  # with one channel, several axes fit


def _moved_back(call: FunctionCall, axis: int) -> int | None:
    """The channels' axis before a function after which they are at ``axis``; None if there is none."""
    x = call.args[0] if call.args else None
    if not isinstance(x, Tensor) or not isinstance(call.result, Tensor):
        return None
    size = call.result.shape[axis]
    dims = sorted((i for i in range(x.dim()) if x.shape[i] == size), key=lambda i: i != axis)
    return next((i for i in dims if moved(call, i) == axis), None)


def _spread(constants: Tensor, axis: int, shape: torch.Size) -> Tensor:
    return constants.view(*[1] * axis, -1, *[1] * (len(shape) - axis - 1)).expand(shape).contiguous()


def _check_channels(call: ModuleCall, tensor: Tensor, axis: int, size: int, norm: ModuleCall) -> None:
    """Raise unless a layer's channels are those that the batch norm normalizes."""
    legal = -1 if isinstance(call.module, nn.Linear) else 1
    ranks = None if legal == -1 else len(call.module.kernel_size) + 2  # type: ignore[arg-type]
    if axis != legal % tensor.dim() or ranks not in (None, tensor.dim()) or size != channels_of(norm.module):
        raise CannotFoldError(f"its channels are not those of {call}")


def _unit(call: Call) -> Call:
    """The call of the outermost layer that folding looks at as a whole and that contains this call; or itself."""
    outer: Call | None = call
    while outer is not None:
        if isinstance(outer, ModuleCall) and is_whole(outer.module):
            call = outer
        outer = outer.inside
    return call


def _units(trace: Trace, value: Value) -> list[Call]:
    return list(dict.fromkeys(map(_unit, trace.readers(value))))


def _named(call: Call) -> str:
    inside = call.inside
    return f"{call} (in {inside})" if inside is not None and inside.path else str(call)


def _listed(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))
