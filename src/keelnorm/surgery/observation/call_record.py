"""The record of one run of a model: the calls of modules and functions, and for each tensor who made and reads it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from keelnorm.surgery.observation.nested_tensors import tensors_in


class Value(NamedTuple):
    """What a tensor holds at one time: a function that changes it in place makes another value of it."""

    tensor: int
    version: int


@dataclass(eq=False)
class Call:
    """A call of a module or of a function of torch.

    Args:
        args, kwargs, result: What it was given, and returned.
        inside: The innermost call of a module in which it happened; None for the model's own.
        inputs: The values in its arguments.
        outputs: The values that it made: those of the result, and of arguments that it changed in place. A tensor that
            comes back as it was is none of them.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inside: ModuleCall | None
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Value, ...] = ()
    result: Any = None

    def within(self, call: Call) -> bool:
        """Whether it is ``call``, or happened while that ran."""
        outer: Call | None = self
        while outer is not None and outer is not call:
            outer = outer.inside
        return outer is not None


@dataclass(eq=False)
class ModuleCall(Call):
    """A module's call.

    Args:
        path: The module's; the first where it has several.
        module: Itself.
        hooked: Whether it had hooks besides the observation's.
    """

    path: str = ""
    module: Module = None  # type: ignore[assignment]
    hooked: bool = False

    def __str__(self) -> str:
        return f"{type(self.module).__name__} {self.path!r}"


@dataclass(eq=False)
class FunctionCall(Call):
    """A call of a function or method of torch, or of an operator of ``torch.ops``, as the model's code makes it."""

    function: Callable[..., Any] = None  # type: ignore[assignment]

    def __str__(self) -> str:
        name = getattr(self.function, "__name__", str(self.function))
        if name == "__get__":  # an attribute, such as Tensor.mT
            name = getattr(getattr(self.function, "__self__", None), "__name__", name)
        return name.partition(".")[0].strip("_")  # operators have an overload's name too


class Trace:
    """What was seen of one run of a model; see :func:`keelnorm.surgery.observation.observe.observe`.

    Attributes:
        modules: The calls of modules, in the order in which they began.
        functions: The calls of functions that take or return tensors, in their order. Those that functions of torch
            make themselves are not seen.
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
        """The function that made the value; None for what came from outside, or was made where it can't be seen."""
        return self._writers.get(value)

    def readers(self, value: Value) -> list[Call]:
        """The functions that read the value, and modules that took it and in which no function is seen to read it.

        Asking for the shape, dtype and the like reads nothing, nor does a function that only hands the tensor on, such
        as dropout in evaluation. Views and functions in place do read.
        """
        return self._readers.get(value, [])

    def holders(self, value: Value) -> list[str]:
        """Who else has the value, in words: the caller of the model, hooks, attributes of modules."""
        return list(dict.fromkeys(self._holders.get(value, [])))

    def is_given(self, value: Value) -> bool:
        """Whether the value came with the model's arguments."""
        return value in self._given

    def values(self, root: Any) -> tuple[Value, ...]:
        """The values of all tensors in ``root``, which are kept alive, so that no other gets their identity."""
        tensors = tensors_in(root)
        self._alive.append(tensors)
        with torch._C.DisableTorchFunction():
            return tuple(dict.fromkeys(Value(id(tensor), version_of(tensor)) for tensor in tensors))

    def _finish(self, call: Call, given: tuple[Value, ...]) -> None:
        """Take down what a call that has ended made: its arguments' tensors have a new version where it wrote."""
        after = (*self.values(call.result), *self.values((call.args, dict(call.kwargs))))
        call.outputs = tuple(dict.fromkeys(value for value in after if value not in given))

    def _index(self, model: Module, paths: Mapping[Module, str]) -> None:
        for function in self.functions:
            returned = set(self.values(function.result))
            for value in function.inputs:
                if value not in returned:
                    self._readers[value].append(function)
            for value in function.outputs:
                self._writers.setdefault(value, function)
        for call in reversed(self.modules):  # a module's calls come after its own
            returned = set(self.values(call.result))
            for value in call.inputs:
                if value not in returned and not any(reader.within(call) for reader in self.readers(value)):
                    self._readers[value].append(call)
            if call.hooked:
                for value in (*call.inputs, *call.outputs):
                    self._holders[value].append(f"seen by a hook of {call.path!r}")
        for value in self.values(self.output):
            self._holders[value].append("returned by the model")
        for module, path in paths.items():
            kept = [part for name, part in vars(module).items() if name != "_modules"]
            for value in self.values(kept):
                self._holders[value].append(f"kept in {path!r}" if path else "kept in the model")


def version_of(tensor: Tensor) -> int:
    if tensor.is_inference():
        raise RuntimeError(
            "a tensor that was made under torch.inference_mode does not say when it is changed, so the model can't be "
            "observed; make the example outside, and let the model's forward run without it"
        )
    return tensor._version
