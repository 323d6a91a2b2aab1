"""Every private name of torch that this package uses, each with its reason; seen in torch 2.10 to 2.13.

Nothing else in the package names one: a new torch is checked here. Private attributes of tensors and modules, which
can't be imported, stand in :data:`ATTRIBUTES`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any

import torch

# torch.compiler.disable as a decorator, which does not load the compiler before it is needed.
from torch._compile import _disable_dynamo as disable_compiler
from torch.autograd import Function, forward_ad
from torch.nn.modules import module as torch_module

# The base class of torch.nn.BatchNorm1d, 2d, 3d and SyncBatchNorm, by which tools recognize a batch norm.
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase

# The same of lazy layers, and of all layers with running statistics, torch.nn.InstanceNorm2d and others too.
from torch.nn.modules.batchnorm import _LazyNormBase as LazyNormBase
from torch.nn.modules.batchnorm import _NormBase as NormBase

# The base classes of convolutions and of instance normalization.
from torch.nn.modules.conv import _ConvNd as ConvBase
from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeBase

# The base class of dropouts.
from torch.nn.modules.dropout import _DropoutNd as DropoutBase
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNormBase

# The modes that see each call of a function of torch, and the one of them that torch.set_default_device enters.
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils._device import DeviceContext as DeviceContext

# Sees every operation on tensors; documented by torch, though in a private module.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# Maps a function over nested containers, as torch's own dispatch modes do.
from torch.utils._pytree import tree_map as tree_map

__all__ = [
    "ATTRIBUTES",
    "BatchNormBase",
    "ConvBase",
    "ConvTransposeBase",
    "DeviceContext",
    "DropoutBase",
    "InstanceNormBase",
    "LazyNormBase",
    "NormBase",
    "TorchDispatchMode",
    "at_end_of_backward",
    "called_while_tracing",
    "compiled_original",
    "compiler",
    "disable_compiler",
    "dispatch_mode_count",
    "forward_ad_active",
    "function_mode_count",
    "function_modes",
    "functorch_is_active",
    "global_backward_hooks",
    "global_forward_hooks",
    "graph_break",
    "increment_version",
    "is_batched_by_vmap",
    "is_batched_gradient",
    "is_transformed",
    "outside_of_transforms",
    "plain_apply",
    "run_uncompiled",
    "running_backward",
    "saved_tensor_hooks",
    "swap_tensors",
    "throw_on_mutable_data_pointer",
    "transform_stack",
    "transforms_active",
    "tree_map",
    "without_torch_function",
    "without_torch_function_and_modes",
]

# The innermost transform of torch.func at work, or None. Not under torch.compile, which can't trace it.
transform_stack: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
# The same as a boolean, which torch.compile evaluates while it traces.
functorch_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
# Gradients of torch.autograd.grad(..., is_grads_batched=True).
is_batched_gradient: Callable[[torch.Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
# The number of the backward that runs in this thread, -1 without one: activation checkpointing recomputes in there.
running_backward: Callable[[], int] = torch._C._current_graph_task_id
# Tells autograd that an operator without a mutating schema has written to tensors.
increment_version: Callable[[list[torch.Tensor]], None] = torch._C._increment_version
# What sees the tensors that are saved for the backward, as torch.utils.checkpoint does.
saved_tensor_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks
# Exchanges the insides of two tensors, as torch.utils.swap_tensors does with fewer conditions.
swap_tensors: Callable[[torch.Tensor, torch.Tensor], None] = torch._C._swap_tensor_impl
# Makes reading the memory of a tensor that has none an error.
throw_on_mutable_data_pointer: Callable[[torch.Tensor], None] = torch._C._set_throw_on_mutable_data_ptr
# How many modes see each operation: code within them must not be fused.
dispatch_mode_count: Callable[[], int] = torch._C._len_torch_dispatch_stack
function_mode_count: Callable[[], int] = torch._C._len_torch_function_stack
# Inside, __torch_function__ of a subclass is not asked; with the second, that of modes is not asked either.
without_torch_function: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunctionSubclass
without_torch_function_and_modes: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunction

#: Private attributes of instances, as "class.attribute", with the reason.
ATTRIBUTES: dict[str, str] = {
    "Tensor._version": "how often a tensor was changed in place; public only through saved tensors' errors",
    "Tensor._is_view": "in-place results may not overwrite a view of another tensor",
    "Tensor._use_count": "whether C++ still holds a tensor whose inside was exchanged",
    "Tensor._make_wrapper_subclass": "a tensor with a shape and no memory",
    "Tensor._post_accumulate_grad_hooks": "a gradient that accumulates may start an optimizer's step",
    "UntypedStorage._cdata": "the identity of a storage, as torch.multiprocessing uses it",
    "Module._parameters": "replaced in place, so that references stay",
    "Module._buffers": "restored when a call raises",
    "Module._modules": "children are replaced where they stand",
    "Module._forward_hooks": "a layer whose hooks see its output is not fused",
    "Module._forward_pre_hooks": "the same for its input",
    "Module._backward_hooks": "the same for gradients",
    "Module._backward_pre_hooks": "the same for gradients",
    "Module._forward_hooks_always_called": "closing a scope after an exception",
    "Module._forward_hooks_with_kwargs": "removed together with its hook",
    "Module._forward_pre_hooks_with_kwargs": "removed together with its hook",
    "Module._save_to_state_dict": "a variant with rows saves torch's buffers too",
    "Module._compiled_call_impl": "whether Module.compile was called",
    "Module._load_from_state_dict": "older checkpoints lack num_batches_tracked",
    "Module._replicate_for_data_parallel": "update counts follow replicas",
    "Module._apply": "update counts follow .to() and .cuda()",
}


def is_transformed() -> bool:
    """Return whether torch.func or forward-mode differentiation is at work, which see only torch's own operators.

    torch.compile differentiates what it traced, and is not one of these.
    """
    if torch.compiler.is_compiling():
        return False
    return transform_stack() is not None or forward_ad._current_level >= 0


def transforms_active() -> bool:
    """Return :func:`is_transformed` for a caller that knows that nothing is being compiled."""
    return transform_stack() is not None or forward_ad._current_level >= 0


def forward_ad_active() -> bool:
    """Return whether a level of forward-mode differentiation is open."""
    return forward_ad._current_level >= 0


def is_batched_by_vmap(x: torch.Tensor) -> bool:
    """Return whether x is batched by torch.func.vmap, which hides a dimension."""
    if torch.compiler.is_compiling():  # where x itself can't be inspected
        return functorch_is_active()
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def compiler() -> Any | None:
    """Return torch._dynamo if it has been loaded, which takes seconds; else None."""
    return sys.modules.get("torch._dynamo")


def outside_of_transforms() -> AbstractContextManager[Any]:
    """Write to tensors outside of the transforms of torch.func that are at work."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def plain_apply(function: type[Function]) -> Callable[..., Any]:
    """Return ``function.apply`` without its preparations for torch.func.

    They cost as much as a kernel takes on a small tensor, and are not needed where :func:`is_transformed` is False.
    """
    return super(Function, function).apply  # type: ignore[misc,no-any-return]


def run_uncompiled(code: CodeType) -> None:
    """Let torch.compile run a function, and all that it calls, as ordinary Python."""
    frames: Any = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))


def graph_break() -> None:
    """End the graph that torch.compile is tracing."""
    torch._dynamo.graph_break()


def called_while_tracing(
    function: Callable[[], bool],
) -> Callable[[], bool]:
    """Mark a function that torch.compile calls while it traces, in place of putting the call into the graph.

    What ``torch.compiler.assume_constant_result`` does after loading the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def at_end_of_backward(
    function: Callable[[], None],
) -> None:
    """Call a function when the backward that runs in this thread has ended, unless an exception ends it."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def compiled_original(module: torch.nn.Module) -> torch.nn.Module | None:
    """Return the module that torch.compile's module wraps; None for any other."""
    compiled = sys.modules.get("torch._dynamo.eval_frame")  # not loaded before torch.compile is used
    if compiled is None or not isinstance(module, compiled.OptimizedModule):
        return None
    original: torch.nn.Module = module._orig_mod
    return original


def global_backward_hooks() -> bool:
    """Return whether hooks for the backward of all modules are registered."""
    return bool(torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks)


def global_forward_hooks() -> list[Any]:
    """Return the hooks for the forward of all modules."""
    return [*torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values()]
