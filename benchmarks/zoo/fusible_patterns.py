"""Count the batch norms that could be fused or folded, without the code that fuses and folds."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.engine.activations import NAMED
from keelnorm.surgery.observation.call_record import Call, FunctionCall, ModuleCall, Trace, Value
from keelnorm.surgery.observation.observe import observe

_ACTIVATIONS = {spelling for name in NAMED if name for spelling in (name, f"{name}_")}
#: Endings of the names of modules that are activations, whatever functions they call.
_ENDINGS = ("swish", "sigmoid", "mish", "silu", "gelu", "relu", "relu6")
_ADDITIONS = {"add", "add_", "iadd", "radd", "__add__", "__iadd__"}
_PRODUCERS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"}


def count_patterns(model: nn.Module, x: Any) -> tuple[int, int]:
    """Count fusible calls and foldable batch norms in one run of a model.

    A call is fusible if an addition or an activation follows that alone reads its result. A batch norm is foldable if
    it alone reads the result of a convolution or linear layer.

    Args:
        model: The model, in evaluation mode.
        x: Its argument.
    """
    trace = observe(model, (x,))
    calls = [call for call in trace.modules if isinstance(call.module, _BatchNorm)]
    outputs = {value for call in calls for value in call.outputs}
    # Folding leaves out a module that has several names.
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    additions: set[int] = set()
    fusible = foldable = 0
    for call in calls:
        foldable += names[id(call.module)] == 1 and _is_behind_a_producer(trace, call)
        (value,) = call.outputs or (None,)
        if value is None or trace.holders(value):
            continue
        addition = _only_reader(trace, value, _ADDITIONS)
        if addition is not None and len(addition.inputs) == 2 and _same_shape(addition):
            fusible += id(addition) not in additions  # one addition runs with one of two batch norms
            additions.add(id(addition))
        else:
            fusible += _has_activation(trace, value)
    assert outputs or not calls
    return fusible, foldable


def _is_behind_a_producer(trace: Trace, call: ModuleCall) -> bool:
    value = call.inputs[0]
    writer = trace.writer(value)
    return (
        writer is not None
        and _name(writer) in _PRODUCERS
        and not trace.holders(value)
        and all(reader.within(call) for reader in trace.readers(value))
    )


def _has_activation(trace: Trace, value: Value) -> bool:
    if _only_reader(trace, value, _ACTIVATIONS) is not None:
        return True
    readers = _readers(trace, value)
    insides = {reader.inside for reader in readers}
    if {_name(reader) for reader in readers} == {"sigmoid", "mul"}:
        return True
    if len(insides) != 1 or (inside := insides.pop()) is None:
        return False
    kind = type(inside.module).__name__.lower()
    return not list(inside.module.parameters()) and kind.endswith(_ENDINGS) and kind != "prelu"


def _only_reader(trace: Trace, value: Value, names: set[str]) -> FunctionCall | None:
    readers = _readers(trace, value)
    if len(readers) != 1 or not isinstance(readers[0], FunctionCall) or _name(readers[0]) not in names:
        return None
    return readers[0]


def _readers(trace: Trace, value: Value) -> list[Call]:
    """The calls that read a value, without dropout, which in evaluation is the identity."""
    return [reader for reader in trace.readers(value) if _name(reader) != "dropout"]


def _same_shape(call: FunctionCall) -> bool:
    shapes = {tuple(value.shape) for value in call.args if hasattr(value, "shape")}
    return len(shapes) == 1


def _name(call: Call) -> str:
    return str(getattr(call.function, "__name__", call.function)) if isinstance(call, FunctionCall) else ""
