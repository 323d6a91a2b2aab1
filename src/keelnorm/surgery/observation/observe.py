"""Running a model once and taking down what happens: which module or function makes each tensor, and who reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from keelnorm.engine.fusion import scope as fusion
from keelnorm.engine.fusion.operations import METADATA
from keelnorm.surgery.observation.call_record import FunctionCall, ModuleCall, Trace, version_of
from keelnorm.surgery.observation.nested_tensors import tensors_in

_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
#: Attributes, methods and functions that ask about a tensor, and not what is in it; or make one like it.
_METADATA = METADATA | {
    *(getattr(Tensor, name).__get__ for name in ("_version", "grad_fn")),
    *(getattr(Tensor, f"new_{name}") for name in ("empty", "full", "ones", "tensor", "zeros")),
    *(getattr(torch, f"{name}_like") for name in ("empty", "full", "ones", "rand", "randn", "zeros")),
}
#: Functions that take the shape or dtype of their second tensor, and nothing else of it.
_LIKE_ANOTHER = frozenset((Tensor.expand_as, Tensor.reshape_as, Tensor.type_as, Tensor.view_as))


def has_hooks(module: Module) -> bool:
    """Whether calling the module runs hooks: its own, or those set for all modules."""
    return fusion.has_hooks(module) or any(getattr(torch_module, f"_global_{name}") for name in _HOOKS)


class _Recorder(TorchFunctionMode):
    """Takes down calls of functions, and the modules' that it watches."""

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
        """Call it; take it down unless it runs within another one, or only asks about a tensor."""
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
        """Hook a module's calls; gives the handles."""
        hooked = has_hooks(module)

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


class _Below(TorchDispatchMode):
    """Takes down the operators that run unseen by a ``TorchFunctionMode``: those of scripted functions, say."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, function: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.recorder.run(function, args, kwargs or {})


def observe(model: Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Trace:
    """Run a model once, without gradients and in the mode it has, and note who makes and who reads each tensor.

    Modules are watched by hooks, functions by a ``TorchFunctionMode``, and by a ``TorchDispatchMode`` those that run
    where that does not see. Afterwards hooks, buffers, random generators and the arguments' tensors are as before.

    Args:
        model: Any module.
        args, kwargs: Of its call.

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
        with recorder, _Below(recorder):
            trace.output = model(*args, **kwargs)
        trace._index(model, paths)
    return trace


@contextmanager
def preserved(model: Module, given: Any = ()) -> Iterator[None]:
    """Inside, nothing needs a gradient; buffers, random generators and the tensors in ``given`` are put back after."""
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = {value for _, named in buffers for value in named.values() if value is not None and not is_lazy(value)}
    copies = {value: value.detach().clone() for value in values}
    arguments = [(tensor, version_of(tensor), tensor.detach().clone()) for tensor in tensors_in(given)]
    devices = {value.device.index for value in (*model.parameters(), *values) if value.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
        try:
            yield
        finally:
            for module, named in buffers:
                module._buffers.clear()
                module._buffers.update(named)
            for value, copy in copies.items():
                value.copy_(copy)
            for tensor, version, copy in arguments:
                if tensor._version != version:  # one that was expanded could not be written, nor need be
                    tensor.copy_(copy)
