"""The record of one run of a model: calls of modules and functions, and which of them make and read each tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module

from keelnorm.engine.torch_internals import without_torch_function_and_modes
from keelnorm.surgery.observation.nested_tensors import tensors_in


class Value(NamedTuple):
    """A tensor's contents at one time: a change in place makes another value of the same tensor."""

    tensor: int
    version: int


@dataclass(eq=False)
class Call:
    """A call of a module or of a function of torch.

    Args:
        args: Its positional arguments.
        kwargs: Its keywords.
        inside: The innermost module call that contains it; None for the model's own.
        inputs: The values in its arguments.
        outputs: The values that it made, in its result and in arguments that it changed in place. A tensor that it
            returns unchanged is not among them.
        result: What it returned.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inside: ModuleCall | None
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Value, ...] = ()
    result: Any = None

    def within(self, call: Call) -> bool:
        """Whether it is ``call`` itself, or was made while that ran."""
        outer: Call | None = self
        while outer is not None and outer is not call:
            outer = outer.inside
        return outer is not None


@dataclass(eq=False)
class ModuleCall(Call):
    """A module's call.

    Args:
        path: The module's path; the first if there are several.
        module: The module.
        hooked: Whether it had hooks of its own, besides the recorder's.
    """

    path: str = ""
    module: Module = None  # type: ignore[assignment]
    hooked: bool = False

    def __str__(self) -> str:
        return f"{type(self.module).__name__} {self.path!r}"


@dataclass(eq=False)
class FunctionCall(Call):
    """A call of a function or method of torch, or of an operator of ``torch.ops``."""

    function: Callable[..., Any] = None  # type: ignore[assignment]

    def __str__(self) -> str:
        name = getattr(self.function, "__name__", str(self.function))
        if name == "__get__":  # an attribute, such as Tensor.mT
            name = getattr(getattr(self.function, "__self__", None), "__name__", name)
        return name.partition(".")[0].strip("_")  # operators have an overload's name too


class Trace:
    """The calls in one run of a model; see :func:`keelnorm.surgery.observation.observe.observe`.

    Attributes:
        modules: Calls of modules, in the order in which they began.
        functions: Calls of functions that take or return tensors, in order. Calls inside functions of torch are not
            recorded.
        output: What the model returned.
    """

    def __init__(self) -> None:
        self.modules: list[ModuleCall] = []
        self.functions: list[FunctionCall] = []
        self.output: Any = None
        self._alive: list[Any] = []
        self._given: set[Value] = set()
        self._writers: dict[Value, FunctionCall] = {}
        self._readers: dict[Value, list[Call]] = defaultdict(list)
        self._holders: dict[Value, list[str]] = defaultdict(list)

    def calls_of(self, module: Module) -> list[ModuleCall]:
        """The module's calls."""
        return [call for call in self.modules if call.module is module]

    def writer(self, value: Value) -> FunctionCall | None:
        """The function that made the value; None if it came from outside or was made by an unrecorded call."""
        return self._writers.get(value)

    def readers(self, value: Value) -> list[Call]:
        """The functions that read the value, and the modules that took it with no recorded function reading it inside.

        Looking up the shape or dtype is no reading, and neither is a function that returns the tensor unchanged, as
        dropout in evaluation does. Views and functions in place do read.
        """
        return self._readers.get(value, [])

    def holders(self, value: Value) -> list[str]:
        """What else has the value, in words: the model's caller, hooks, attributes of modules."""
        return list(dict.fromkeys(self._holders.get(value, [])))

    def is_given(self, value: Value) -> bool:
        """Whether the value came with the model's arguments."""
        return value in self._given

    def values(self, root: Any) -> tuple[Value, ...]:
        """The values of all tensors in ``root``, which are kept alive so that their ``id`` stays theirs."""
        tensors = tensors_in(root)
        self._alive.append(tensors)
        with without_torch_function_and_modes():
            return tuple(dict.fromkeys(Value(id(tensor), version_of(tensor)) for tensor in tensors))

    def _finish(self, call: Call, given: tuple[Value, ...]) -> None:
        """Record the outputs of a call that has ended; arguments that it wrote to have a new version."""
        after = (*self.values(call.result), *self.values((call.args, dict(call.kwargs))))
        call.outputs = tuple(dict.fromkeys(value for value in after if value not in given))

    def _index(self, paths: Mapping[Module, str]) -> None:
        """Note for each value which calls made it and read it, and what else has it."""
        for function in self.functions:
            returned = set(self.values(function.result))
            for value in function.inputs:
                if value not in returned:
                    self._readers[value].append(function)
            for value in function.outputs:
                self._writers.setdefault(value, function)
        for call in reversed(self.modules):  # calls inside a module come after the module's own
            self._index_module(call)
        for value in self.values(self.output):
            self._holders[value].append("returned by the model")
        for module, path in paths.items():
            kept = [part for name, part in vars(module).items() if name != "_modules"]
            for value in self.values(kept):
                self._holders[value].append(f"kept in {path!r}" if path else "kept in the model")

    def _index_module(self, call: ModuleCall) -> None:
        returned = set(self.values(call.result))
        for value in call.inputs:
            if value not in returned and not any(reader.within(call) for reader in self.readers(value)):
                self._readers[value].append(call)
        if call.hooked:
            for value in (*call.inputs, *call.outputs):
                self._holders[value].append(f"seen by a hook of {call.path!r}")


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been changed in place.

    Raises:
        RuntimeError: The tensor was made under ``torch.inference_mode``, where changes are not counted.
    """
    if tensor.is_inference():
        raise RuntimeError(
            "the model can't be observed: a tensor was made under torch.inference_mode, which counts no changes in "
            "place. Make the example outside of it, and let the model's forward run without it"
        )
    return tensor._version
