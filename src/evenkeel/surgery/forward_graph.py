"""One module's forward as a torch.fx graph, its children being calls; or why there is none that could be trusted.

torch.fx runs the forward once and keeps what it did. A forward whose next run may do something else gives a graph that
is silently wrong, so whatever could make a difference is either refused here or watched later (:class:`Reads`).
Watched: attributes and children that control flow may depend on; the mode, for which there are two graphs. Refused:
control flow by gradients being recorded, by random numbers or by the type of an input; tensors made and attributes
written on the way; what is around an operation and not in the graph, such as no_grad, autocast and checkpointing.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import FrameType, FunctionType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from evenkeel.surgery.checks import raises_for, refuse
from evenkeel.surgery.unchanged import UntraceableError, unchanged

#: What torch.nn keeps in an instance, and what is looked at by other means.
INTERNAL = frozenset(nn.Module().__dict__) - {"training"} | {"forward", "_forward_hooks"}


class Reads:
    """Which modules' forwards have run, and which attributes they have read: what their course may depend on."""

    def __init__(self) -> None:
        self.names: dict[nn.Module, dict[str, None]] = {}
        self.run: set[nn.Module] = set()

    @contextmanager
    def recorded(self, modules: Collection[nn.Module]) -> Iterator[None]:
        """Inside, what is read of the modules is remembered."""
        classes = {module: type(module) for module in modules}
        try:
            for module, kind in classes.items():
                module.__class__ = self._recording(kind)
            yield
        finally:
            for module, kind in classes.items():
                module.__class__ = kind

    def _recording(self, kind: type[nn.Module]) -> type[nn.Module]:
        names = self.names

        def read(module: nn.Module, name: str) -> Any:
            if not name.startswith("__"):
                names.setdefault(module, {})[name] = None
            return kind.__getattribute__(module, name)

        return type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})


def required_names(module: nn.Module) -> list[str]:
    """The arguments that a call of the module has to have.

    Raises:
        UntraceableError: it takes ``*args``, ``**kwargs`` or has keywords without a default.
    """
    names = []
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError) as error:
        raise UntraceableError("its signature can't be read") from error
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UntraceableError("it takes any number of arguments")
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise UntraceableError(f"its keyword {parameter.name!r} has no default")
            names.append(parameter.name)
    return names


def trace(module: nn.Module, inlined: Collection[nn.Module], training: bool) -> tuple[fx.Graph, Reads]:
    """The graph of ``type(module).forward`` in a mode; arguments with a default have it.

    Args:
        inlined: Modules below whose own calls are part of the graph; all others are calls.

    Raises:
        UntraceableError: see the module's first words.
    """
    reads = Reads()
    inner = [module, *(m for m in module.modules() if m in inlined and m is not module)]
    try:
        graphs = _trace_twice(module, inner, training, reads, ())
    except UntraceableError:
        # Once more, with the functions that the forward calls taken as they are: they may do what can't be traced.
        functions = tuple(f for m in inner for f in _functions_of(m))
        if not functions:
            raise
        reads = Reads()
        graphs = _trace_twice(module, inner, training, reads, functions)
    if str(graphs[0]) != str(graphs[1]):
        raise UntraceableError("it depends on whether gradients are recorded")
    for node in graphs[0].nodes:
        # The recording classes are gone: nothing may hold on to them.
        node.type = None
    return graphs[0], reads


def _trace_twice(
    module: nn.Module, inner: list[nn.Module], training: bool, reads: Reads, functions: tuple[FunctionType, ...]
) -> list[fx.Graph]:
    """With gradients recorded, and without."""
    graphs = []
    for grad in (True, False):
        try:
            with (
                _mode(inner, training),
                torch.set_grad_enabled(grad),
                unchanged(module),
                reads.recorded(inner),
                mock.patch.object(torch.autocast, "__enter__", _refuse_autocast),
            ):
                graphs.append(_Tracer(inner, functions, reads).trace(module))
        except UntraceableError:
            raise
        except Exception as error:  # a model's own code raises anything
            words = str(error).partition("\n")[0].partition(". ")[0].strip().rstrip(".")
            raise UntraceableError(words or repr(error)) from error
    return graphs


def _refuse_autocast(_: Any) -> None:
    raise UntraceableError("it switches autocast, which the graph would not")


def _functions_of(module: nn.Module) -> list[FunctionType]:
    """Python functions outside torch that the module's forward names."""
    forward = inspect.unwrap(type(module).forward)
    named = [forward.__globals__.get(name) for name in forward.__code__.co_names]
    return [f for f in named if isinstance(f, FunctionType) and not f.__module__.startswith("torch.")]


#: Modules that may ask for a proxy's class, because they know what a proxy is.
_LOOKERS = ("torch.fx", "torch.utils", "torch.overrides", "inspect", "evenkeel.surgery")


class _Proxy(fx.Proxy):
    """A stand-in for a tensor that knows what it can't answer for."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        """What isinstance asks for, when the true type is not what it looks for."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") == nn.parameter.__name__:  # isinstance of Parameter
            frame = frame.f_back
        if frame is not None and frame.f_globals.get("__name__", "").startswith(_LOOKERS):
            return fx.Proxy
        raise UntraceableError("it asks for the type of a value")

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise AttributeError(name)  # as a tensor would
        return super().__getattr__(name)


class _Tracer(fx.Tracer):
    def __init__(self, inlined: Collection[nn.Module], functions: tuple[FunctionType, ...], reads: Reads) -> None:
        super().__init__(autowrap_functions=functions)
        self._inlined = inlined
        self._reads = reads
        self._grad = torch.is_grad_enabled()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._inlined

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if m in self._inlined:
            self._reads.run.add(m)
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        names = required_names(self.root)
        self._reads.run.add(self.root)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def to_bool(self, obj: fx.Proxy) -> bool:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__", "").startswith("torch.fx"):
            frame = frame.f_back
        found = None if frame is None else raises_for(frame)
        if found is None:
            return super().to_bool(obj)
        if any(node.op == "call_module" for node in self.graph.nodes):
            raise UntraceableError("it checks a value after it has called a module")
        self.create_proxy("call_function", refuse, (obj, found), {})
        return not found

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, *args: Any, **keywords: Any) -> fx.Node:
        if torch.is_grad_enabled() != self._grad:
            raise UntraceableError("it switches the recording of gradients, which the graph would not")
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not _trace_twice.__code__:
            if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
                raise UntraceableError("it checkpoints activations, which the graph would not")
            frame = frame.f_back
        return super().create_node(kind, *args, **keywords)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            raise UntraceableError("it makes a tensor on the way, which the graph would keep")
        return super().create_arg(a)


@contextmanager
def _mode(modules: Collection[nn.Module], training: bool) -> Iterator[None]:
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = training
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode
