"""One call of a batch norm whose result waits for the next operation, and whether it may wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from sys import _getframe
from typing import Any, NoReturn
from weakref import ref

import torch
from torch import Tensor, nn

from keelnorm.engine import saved_outputs
from keelnorm.engine.activations import NONE, Activation
from keelnorm.engine.dispatch import PLAIN, note_output
from keelnorm.engine.error_messages import locate, module_path
from keelnorm.engine.fusion.deferred_tensor import defer, without_memory
from keelnorm.engine.fusion.expectations import ATTRIBUTE, NEVER, Memory
from keelnorm.engine.fusion.graph import BatchNormNode, Shared, after
from keelnorm.engine.fusion.operations import ADD, TIMES_START, Kernel
from keelnorm.engine.fusion.pending import Observed, promise
from keelnorm.engine.fusion.scope import Scope, current
from keelnorm.engine.layout import dense
from keelnorm.engine.normalization_steps import Normalization
from keelnorm.engine.recomputation import second_run
from keelnorm.engine.torch_internals import plain_apply, running_backward, saved_tensor_hooks, transforms_active

#: The number of values from which results wait, in evaluation and in training. Below, waiting costs more than fusing
#: saves, as measured on two cores with AVX-512.
smallest = [2**18, 3 * 2**15]

_SMALL = "its result is small: fusing would cost more than it saves"
_HOOK = "has a hook, or is called in a checkpoint or another mode in which nothing waits"
#: Files whose frames lie between a layer's caller and here: the layers' own, and that of ``Module.__call__``.
_INSIDE = {nn.modules.module.__file__}


@contextmanager
def all_sizes_wait() -> Iterator[None]:
    """Let small results wait too, to count what could be fused, and for tests."""
    before, smallest[:] = tuple(smallest), (0, 0)
    try:
        yield
    finally:
        smallest[:] = before


def passes_by(file: str) -> None:
    """Skip the frames of a file when the caller of a layer is looked up."""
    _INSIDE.add(file)


class Call:
    """The inputs of one call of a layer, and the circumstances.

    Args:
        layer: The batch norm.
        plain: The layer's forward.
        memory: What the layer has learned about its successors.
        scope: The call of the model within which the result may wait.
        x: Its input, contiguous or channels-last.
        kernel: The operations that are expected to follow, and run together with it.
        normalization: The batch norm in two steps.
        hooks: The hooks on saved tensors that were active.
    """

    residual: tuple[Tensor, int] | None = None
    """The residual and its version, once added."""
    result: Tensor | None = None
    """The kernel's output, until it is taken."""
    saved: Tensor
    shared: Shared | None = None
    node: Any = None
    root: ref[Tensor] | None = None

    def __init__(
        self, layer: nn.Module, plain: Callable[..., Tensor], memory: Memory, scope: Scope, x: Tensor, kernel: Kernel,
        normalization: Normalization, hooks: Any,
    ) -> None:  # fmt: skip
        self.layer, self.plain, self.memory, self.scope, self.kernel = layer, plain, memory, scope, kernel
        self.normalization, self.hooks = normalization, hooks
        self.x = self.like = x
        self.weight, self.bias = normalization.weight, normalization.bias
        self.training, self.grad = layer.training, torch.is_grad_enabled()
        self.versions = self._versions()
        caller = _getframe(2)
        while caller.f_code.co_filename in _INSIDE and caller.f_back is not None:
            caller = caller.f_back
        self.code, self.offset = caller.f_code, caller.f_lasti

    def _versions(self) -> tuple[int | None, ...]:
        weight, bias = self.weight, self.bias
        return (
            self.x._version, None if weight is None else weight._version, None if bias is None else bias._version
        )  # fmt: skip

    def start(self) -> Tensor:
        """Update the running statistics, compute what can be computed, and return the tensor that waits."""
        inputs = self.x, self.weight, self.bias
        if self.grad and any(t is not None and t.requires_grad for t in inputs):
            self.shared = Shared()
            return promise(self, 0, *_batch_norm_node(self, *inputs))
        self.run()
        return promise(self, 0, without_memory(self.like), None)

    def run(self) -> None:
        """Run the kernel, which updates the running statistics. There is no result where an addition is expected."""
        act = None if self.kernel.residual else self.kernel.activation
        self.result, self.saved = self.normalization.run(self.x, self.weight, self.bias, act)
        if self.result is not None:
            self.like = self.result

    def add(self, residual: Tensor) -> None:
        """Compute the expected result, now that the residual is known."""
        self.result = self.apply(residual, self.kernel.activation)
        self.residual = residual, residual._version

    def apply(self, residual: Tensor | None, act: Activation) -> Tensor:
        """Return ``act(bn(x) + residual)`` with the statistics found."""
        return self.normalization.apply(self.x, residual, self.weight, self.bias, self.saved, act)

    def take_result(self) -> Tensor:
        """Return the kernel's result, once."""
        result, self.result = self.result, None
        assert result is not None
        return result

    def take_noted_result(self) -> Tensor:
        """Return the kernel's result, once, after noting how it is computed, so that it need not be kept."""
        result = self.take_result()
        if saved_outputs.calls and self.is_unchanged():  # since the kernel ran, which may be some operations ago
            residual = None if self.residual is None else self.residual[0]
            note_output(
                result, self.x, residual, self.weight, self.bias, self.saved, self.normalization.state,
                self.kernel.activation, self.normalization.by_reference,
            )  # fmt: skip
        return result

    def is_unchanged(self) -> bool:
        """Return whether nothing that the result depends on was changed in place."""
        residual = self.residual
        return self._versions() == self.versions and (residual is None or residual[0]._version == residual[1])

    def is_computed_again(self, y: Tensor) -> bool:
        """Return whether computing the result again gives the same: not if x changed through ``.data``."""
        if not self.is_unchanged():
            return False
        with second_run(), torch.no_grad():
            again = self.plain(self.layer, self.x, activation=NONE)
        return torch.equal(again.nan_to_num(), y.detach().nan_to_num())

    def value_after(self, done: int) -> Tensor:
        """Return the value after ``done`` steps, without a graph.

        Raises:
            RuntimeError: an input was changed in place, so that the value is lost.
        """
        if not self.is_unchanged():
            self._refuse()
        steps = self.kernel.steps[:done]
        with torch.inference_mode(False), torch.no_grad():
            if steps[:1] == (ADD,):
                assert self.residual is not None
                return self.apply(self.residual[0], NONE)  # only ReLU can follow, as the last step
            return after(steps, self.apply(None, NONE))

    def _refuse(self) -> NoReturn:
        self.memory.give_up(self.training, "what it is computed from is changed before its result is used", True)
        lines = [line for begin, end, line in self.code.co_lines() if begin <= self.offset < end and line]
        raise RuntimeError(
            f"{type(self.layer).__name__} {module_path(self.layer)!r}, called at {self.code.co_filename}:"
            f"{lines[0] if lines else self.code.co_firstlineno}: its input, weight, bias or what was added to its "
            "result was changed in place before the result was used, which so far was used at once, and the result "
            "can't be computed any more. From the next call on this layer computes it at once; to begin with that, "
            "leave the layer out with kn.convert(model, where=...), or convert with fuse=False"
        )


_batch_norm_node = plain_apply(BatchNormNode)


def begin(layer: Any, x: Tensor, plain: Callable[..., Tensor]) -> Tensor | None:
    """Return the waiting result of a layer's call; None where the layer computes it at once.

    Args:
        layer: A batch norm that is called with its input alone, while a model runs.
        plain: The layer's own forward.
    """
    attributes = layer.__dict__
    memory: Memory | None = attributes.get(ATTRIBUTE)
    if memory is None:
        return None
    training = layer.training
    if type(x) in PLAIN and (x.layout is not torch.strided or x.is_nested):
        return None  # the layer says that it takes no such tensor
    if type(x) not in PLAIN or x.numel() < smallest[training]:
        memory.excuse(training, _SMALL)
        return None
    kernel = memory.next_expected(training)
    scope = None if kernel is NEVER else current()
    if scope is None:
        return None
    hooks = saved_tensor_hooks(True)
    if _is_watched(attributes, hooks) or not scope.is_open():
        memory.excuse(training, _HOOK)
        return None
    if training and not layer.defers_in_training:
        memory.give_up(True, f"a {type(layer).__name__} takes what follows only as arguments of its call", True)
        return None
    normalization = layer.normalization(x)
    if normalization is None:
        return None
    if kernel is None:
        call = Call(layer, plain, memory, scope, x, NEVER, normalization, hooks)
        result = plain(layer, x, activation=NONE)
        if type(result) is Tensor:
            scope.track(defer(result, Observed(call, (), None)))
        return result
    x = x if x.is_contiguous() else dense(x)
    call = Call(layer, plain, memory, scope, x, kernel, normalization, hooks)
    try:
        tensor = call.start()
    except (TypeError, ValueError, RuntimeError) as error:
        locate(error, layer)
        raise
    if TIMES_START in kernel.steps:
        call.root = ref(tensor)
    return tensor


def _is_watched(attributes: dict[str, Any], hooks: Any) -> bool:
    """Return whether hooks of the layer, a checkpoint, a transform or another mode must see its plain result."""
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or running_backward() != -1
        or torch.is_inference_mode_enabled()
        or transforms_active()
        or (hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint")  # which counts what is kept
    )
