"""Run a model once and record which module or function makes each tensor, and which reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from keelnorm.engine.fusion.operations import METADATA
from keelnorm.engine.fusion.scope import has_global_hooks, has_hooks
from keelnorm.engine.torch_internals import TorchDispatchMode
from keelnorm.surgery.observation.call_record import FunctionCall, ModuleCall, Trace
from keelnorm.surgery.snapshot import preserved

#: Attributes, methods and functions that read a tensor's metadata and not its values, or make one like it.
_METADATA = METADATA | {
    *(getattr(Tensor, name).__get__ for name in ("_version", "grad_fn")),
    *(getattr(Tensor, f"new_{name}") for name in ("empty", "full", "ones", "tensor", "zeros")),
    *(getattr(torch, f"{name}_like") for name in ("empty", "full", "ones", "rand", "randn", "zeros")),
}
#: Functions that read nothing but the shape or dtype of their second tensor.
_LIKE_ANOTHER = frozenset((Tensor.expand_as, Tensor.reshape_as, Tensor.type_as, Tensor.view_as))


def runs_hooks(module: Module) -> bool:
    """Whether calling the module runs hooks: its own, or those set for all modules."""
    return has_hooks(module) or has_global_hooks()


class _Recorder(TorchFunctionMode):
    """Records calls of functions, and of the modules that it watches."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.inside: list[ModuleCall] = []
        self._running = False

    def __torch_function__(
        self, function: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.run(function, args, kwargs or {})

    def run(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the function; record it unless it runs within another one, or only asks for a tensor's metadata."""
        if self._running:
            return function(*args, **kwargs)
        self._running = True
        try:
            if function in _METADATA:
                return function(*args, **kwargs)
            given = self.trace.values((args, dict(kwargs)))
            read = self.trace.values(args[:1]) if function in _LIKE_ANOTHER else given
            call = FunctionCall(args, kwargs, self.inside[-1] if self.inside else None, read, function=function)
            call.result = function(*args, **kwargs)
        finally:
            self._running = False
        self.trace._finish(call, given)
        if call.inputs or call.outputs:
            self.trace.functions.append(call)
        return call.result

    def watch(self, module: Module, path: str) -> Iterable[Any]:
        """Record a module's calls by hooks, whose handles are returned."""
        hooked = runs_hooks(module)

        def enter(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inside = self.inside[-1] if self.inside else None
            values = self.trace.values((args, kwargs))
            call = ModuleCall(args, kwargs, inside, values, path=path, module=module, hooked=hooked)
            self.trace.modules.append(call)
            self.inside.append(call)

        def leave(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            call = self.inside.pop()
            call.result = result
            self.trace._finish(call, call.inputs)

        yield module.register_forward_pre_hook(enter, with_kwargs=True)
        yield module.register_forward_hook(leave, with_kwargs=True, always_call=True)


class _OperatorRecorder(TorchDispatchMode):
    """Records operators that a ``TorchFunctionMode`` does not see, as those of scripted functions."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, function: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.recorder.run(function, args, kwargs or {})


def observe(
    model: Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    run: Callable[[], Any] | None = None,
) -> Trace:
    """Run a model once and record which calls make and read each tensor.

    The run is without gradients, in the mode that the model has. Hooks record the calls of modules, a
    ``TorchFunctionMode`` those of functions, and a ``TorchDispatchMode`` those that the former does not see. Afterwards
    hooks, buffers, random generators and the arguments' tensors are as before.

    Args:
        model: Any module.
        args: The positional arguments of its call.
        kwargs: The keywords of its call.
        run: Runs the model where it is not called so; ``args`` and ``kwargs`` are then what it is given.

    Returns:
        The trace. It keeps all tensors of the run alive.

    Numerics:
        Hooks make ``kn.Sequential`` run its pairs unfused, so that each module's call is seen.

    Raises:
        RuntimeError: A tensor was made under ``torch.inference_mode``.
        Whatever the model raises.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()).eval()
        >>> trace = observe(model, (torch.zeros(1, 2),))
        >>> [(call.path, str(call)) for call in trace.modules[1:]]
        [('0', "Linear '0'"), ('1', "ReLU '1'")]
        >>> [made] = trace.modules[1].outputs
        >>> [str(reader) for reader in trace.readers(made)], str(trace.writer(made))
        (['relu'], 'linear')
    """
    kwargs = kwargs or {}
    trace = Trace()
    recorder = _Recorder(trace)
    paths = {module: path for path, module in model.named_modules()}
    with preserved(model, (args, kwargs)), ExitStack() as stack:
        trace._given.update(trace.values((args, kwargs)))
        for module, path in paths.items():
            for handle in recorder.watch(module, path):
                stack.callback(handle.remove)
        with recorder, _OperatorRecorder(recorder):
            trace.output = model(*args, **kwargs) if run is None else run()
        trace._index(paths)
    return trace
