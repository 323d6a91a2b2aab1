"""The operations that can be fused: how calls of torch's functions are read, and which sequences have a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from keelnorm.engine.activations import NAMED, NONE, TABLE, Activation, Definition

#: A residual of the same shape, dtype and device is added.
ADD = "add"
#: The value is multiplied by the batch norm's own result, as in x · sigmoid(x).
TIMES_START = "times the start"
#: The result is the argument itself, as of dropout that is off.
HAND_ON = "hand on"
#: One operation: an activation, one of the above, or an operator ("+" or "/") with a number.
Step = Activation | str | tuple[str, float]
Steps = tuple[Step, ...]


class Operation(NamedTuple):
    """An operation that may be part of a fused kernel.

    Args:
        step: What is done.
        target: The deferred tensor that it is done to.
        other: The second tensor, if there is one.
        inplace: Whether the first argument takes the result.
    """

    step: Step
    target: Tensor
    other: Tensor | None = None
    inplace: bool = False


class Kernel(NamedTuple):
    """What one kernel computes after a batch norm, and the operations that it stands for.

    Args:
        residual: Whether a residual is added.
        activation: The activation.
        steps: The operations that the kernel replaces.
    """

    residual: bool
    activation: Activation
    steps: Steps


_SIGMOID, _TANH, _RELU6 = NAMED["sigmoid"], NAMED["tanh"], NAMED["relu6"]
_ADD_3, _OVER_6 = ("+", 3.0), ("/", 6.0)
#: Activations as people write them by hand.
_BY_HAND: dict[Steps, Activation] = {
    (_SIGMOID, TIMES_START): NAMED["silu"],
    (_ADD_3, _RELU6, _OVER_6): NAMED["hardsigmoid"],
    (_ADD_3, _RELU6, _OVER_6, TIMES_START): NAMED["hardswish"],
    (_ADD_3, _RELU6, TIMES_START, _OVER_6): NAMED["hardswish"],
    (NAMED["hardsigmoid"], TIMES_START): NAMED["hardswish"],
    (NAMED["softplus"], _TANH, TIMES_START): NAMED["mish"],
}
_BEGINNINGS = {steps[:n] for steps in _BY_HAND for n in range(len(steps))}


def kernel_of(steps: Steps) -> Kernel | None:
    """Return the kernel that computes these steps after a batch norm, or None."""
    residual = steps[:1] == (ADD,)
    rest = steps[residual:]
    if not rest:
        return Kernel(True, NONE, steps) if residual else None
    found = rest[0] if len(rest) == 1 and isinstance(rest[0], Activation) else _BY_HAND.get(rest)
    # The backward of other activations reads the residual, which user code may change.
    if found is None or (residual and found is not NAMED["relu"]):
        return None
    return Kernel(residual, found, steps)


def may_go_on(steps: Steps) -> bool:
    """Return whether one more step could make these a kernel, or another one."""
    return steps[steps[:1] == (ADD,) :] in _BEGINNINGS


def value_after(step: Step, value: Tensor, start: Tensor) -> Tensor:
    """Apply a step other than an addition to a value, in plain torch."""
    if isinstance(step, Activation):
        return step.forward(value)
    if step == TIMES_START:
        return value * start
    operator, number = cast(tuple[str, float], step)
    return value + number if operator == "+" else value / number


# ---- reading a call. A reader takes the call's arguments and returns the operation, or None for another use of the
# function. Functions of torch.nn.functional pass all arguments but the tensor by keyword.

Reader = Callable[[tuple[Any, ...], Mapping[str, Any]], "Operation | None"]


def _without_parameters(activation: Activation, inplace: bool = False) -> Reader:
    by_name = {"inplace"}

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Operation | None:
        if len(args) != 1 or (kwargs and kwargs.keys() != by_name):
            return None
        return Operation(activation, args[0], None, inplace or bool(kwargs and kwargs["inplace"]))

    return read


def _with_parameters(
    names: tuple[str, ...], defaults: tuple[Any, ...], make: Callable[..., Activation | None], inplace: bool = False
) -> Reader:
    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Operation | None:
        values = dict(zip(names, defaults, strict=True))
        if not args or len(args) > 1 + len(names) or not kwargs.keys() <= {*names, "inplace"}:
            return None
        values.update(zip(names, args[1:], strict=False))
        values.update(kwargs)
        in_place = bool(values.pop("inplace", False)) or inplace
        if not all(type(value) in (int, float, str) for value in values.values()):
            return None
        activation = make(*values.values())
        # torch refuses the backward of an activation in place that can't be told from its result.
        if activation is None or (in_place and activation.code in (3, 4) and activation.a < 0):
            return None
        return Operation(activation, args[0], None, in_place)

    return read


def _add(inplace: bool) -> Reader:
    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Operation | None:
        if kwargs or len(args) != 2:
            return None
        a, b = args
        if type(b) in (int, float):
            return Operation(("+", float(b)), a, None, inplace) if _is_deferred(a) else None
        if a is b or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return None
        if _is_deferred(a) and (a._pending.takes_residual or not _is_deferred(b)):
            return Operation(ADD, a, b, inplace)
        return None if inplace or not _is_deferred(b) else Operation(ADD, b, a)

    return read


def _mul(inplace: bool) -> Reader:
    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Operation | None:
        if kwargs or len(args) != 2:
            return None
        a, b = args
        for target, start in ((a, b), (b, a)):
            if _is_deferred(target) and target is not start and target._pending.start is start:
                return Operation(TIMES_START, target, start, inplace)
        return None

    return read


def _div(inplace: bool) -> Reader:
    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Operation | None:
        if kwargs or len(args) != 2 or type(args[1]) not in (int, float):
            return None
        return Operation(("/", float(args[1])), args[0], None, inplace)

    return read


def _dropout(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Operation | None:
    p = kwargs.get("p", -1)
    off = len(args) == 1 and type(p) in (int, float) and 0 <= p <= 1 and (p == 0 or kwargs.get("training") is False)
    return Operation(HAND_ON, args[0]) if off else None


def _is_deferred(value: Any) -> TypeGuard[Any]:
    return hasattr(type(value), "_pending")


def _by_definition(row: Definition, inplace: bool = False) -> Reader:
    activation = NAMED[row.name]
    if not row.parameters:
        return _without_parameters(activation, inplace)

    def make(*values: float) -> Activation | None:
        if row.name == "softplus" and torch.is_autocast_enabled("cuda"):
            return None  # autocast runs softplus, alone of all, in float32 on a GPU
        return Activation(row.name, activation.code, *map(float, values))

    return _with_parameters(tuple(row.parameters), tuple(row.parameters.values()), make, inplace)


_gelu = ("approximate",), ("none",), {"none": NAMED["gelu"], "tanh": NAMED["gelu_tanh"]}.get
_hardtanh = ("min_val", "max_val"), (-1.0, 1.0), lambda least, most: _RELU6 if (least, most) == (0, 6) else None

_READERS: dict[Any, Reader] = {}
for _row in TABLE[1:]:
    for _where in (F, torch, Tensor):
        for _spelling in (_row.name, f"{_row.name}_"):
            if hasattr(_where, _spelling) and not _row.options:
                _READERS[getattr(_where, _spelling)] = _by_definition(_row, inplace=_spelling.endswith("_"))
_READERS |= {
    F.hardtanh: _with_parameters(*_hardtanh), F.hardtanh_: _with_parameters(*_hardtanh, inplace=True),
    F.gelu: _with_parameters(*_gelu),
    torch.add: _add(False), Tensor.add: _add(False), Tensor.add_: _add(True),
    torch.mul: _mul(False), Tensor.mul: _mul(False), Tensor.mul_: _mul(True),
    torch.div: _div(False), Tensor.div: _div(False), Tensor.div_: _div(True),
}  # fmt: skip
for _name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"):
    _READERS[getattr(F, _name)] = _dropout


def read(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Operation | None:
    """Return the operation that a call of a torch function is, or None where it can't be fused."""
    reader = _READERS.get(function)
    return None if reader is None else reader(args, kwargs)


#: Attributes, methods and functions that do not read a tensor's values. (Autograd reads the hooks of an argument that
#: an autograd.Function changed in place.)
METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in (
        "device", "dtype", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mps", "is_quantized", "is_sparse",
        "itemsize", "layout", "nbytes", "ndim", "requires_grad", "shape",
    )]
    + [getattr(Tensor, name) for name in (
        "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point",
        "is_inference", "is_signed", "ndimension", "nelement", "numel", "size", "storage_offset", "stride",
    )]
    + [torch.is_complex, torch.is_floating_point, torch.numel]
    + [getattr(getattr(Tensor, "_backward_hooks"), name) for name in ("__get__", "__set__")]  # noqa: B009
)  # fmt: skip
