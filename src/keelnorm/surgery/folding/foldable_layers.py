"""Decide which single layers may be folded: plain batch norms, and plain convolutions and linear layers."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from keelnorm.engine.torch_internals import BatchNormBase, ConvBase, ConvTransposeBase
from keelnorm.nn._shared.variant import Variant
from keelnorm.surgery.known_layers import computes_as, is_frozen, is_norm, registration_mismatch
from keelnorm.surgery.observation.call_record import ModuleCall, Trace, Value
from keelnorm.surgery.observation.observe import runs_hooks

#: Layers that a batch norm can be folded into.
LINEAR: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear
)  # fmt: skip
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Layers:
    """The layers of one model, and one run of it.

    Args:
        model: The model.
        trace: The record of the run.
    """

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.trace = trace
        self.paths: dict[nn.Module, list[str]] = defaultdict(list)
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths[module].append(path)
        self._owners = Counter(
            id(parameter) for module in self.paths for parameter in module._parameters.values() if parameter is not None
        )

    def norm_refusal(self, layer: BatchNormBase) -> str | None:
        """Why a batch norm can't be folded, whatever its neighbours are; None if it can."""
        if self.paths[layer] == [""]:
            return "is the model itself"
        kind = type(layer)
        if computes_as(kind) is None:
            return (
                f"is a {kind.__name__}, which may compute more than batch norm by running statistics; "
                f"kn.surgery.register({kind.__name__}, ...) says what it computes"
            )
        if (mismatch := registration_mismatch(layer)) is not None:
            return mismatch
        if isinstance(layer, Variant) and layer.own_evaluation is not None:
            return f"is a {kind.__name__}, which evaluates {layer.own_evaluation}"
        if layer.training and not is_frozen(layer):
            return "is in training mode; call its eval()"
        if layer.running_mean is None or layer.running_var is None:
            return "has no running statistics (track_running_stats=False)"
        return self._refusal(layer) or _bad_values(layer) or self._call_refusal(layer)

    def linear_refusal(self, module: nn.Module) -> str | None:
        """Why no batch norm can be folded into a layer, whichever it is; None if one can."""
        return self._refusal(module) or _bad_weight(module)

    def _refusal(self, module: nn.Module) -> str | None:
        calls = self.trace.calls_of(module)
        if not calls:
            return "was not called on the example"
        if is_parametrized(module):
            return "has a parametrization (torch.nn.utils.parametrize.remove_parametrizations removes it)"
        if runs_hooks(module):
            return "has hooks (weight_norm and spectral_norm of torch.nn.utils add some)"
        if "forward" in vars(module) or not (is_norm(module) or _is_plain_linear(module)):
            return f"has a forward of its own ({type(module).__name__})"
        if module._modules and isinstance(module, LINEAR):
            return "has modules of its own"
        if len(self.paths[module]) > 1:
            return f"is one module at several paths ({', '.join(self.paths[module])})"
        if len(calls) > 1:
            return f"is called {len(calls)} times"
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if self._owners[id(parameter)] > 1:
                return f"shares its {name} with another module"
            value = Value(id(parameter), parameter._version)
            if any(not reader.within(calls[0]) for reader in self.trace.readers(value)):
                return f"has a {name} that is read outside its forward"
        return None

    def _call_refusal(self, layer: BatchNormBase) -> str | None:
        call = self.trace.calls_of(layer)[0]
        x = input_of(call)
        if x is None:
            return f"is called with more than its input ({', '.join(_extra(call)) or 'no tensor'})"
        if len(call.inputs) != 1 or len(call.outputs) != 1 or not isinstance(call.result, torch.Tensor):
            return "does not make one tensor from one"
        if call.result.dtype != x.dtype:
            return f"makes {call.result.dtype} of {x.dtype}"
        return None


def is_whole(module: nn.Module) -> bool:
    """Whether folding looks at the module's call as one, and not at the functions that it calls."""
    return isinstance(module, ConvBase | nn.Linear) or is_norm(module)


def channels_of(layer: nn.Module) -> int:
    """How many channels a batch norm has; not all classes of other packages have ``num_features``."""
    return len(layer.running_mean) if is_frozen(layer) else layer.num_features  # type: ignore[arg-type, return-value]


def input_of(call: ModuleCall) -> torch.Tensor | None:
    """The only argument of a layer's call; None if there are others, or it is no tensor."""
    given = [*call.args, *call.kwargs.values()]
    legal = len(given) == 1 and set(call.kwargs) <= {"input"} and isinstance(given[0], torch.Tensor)
    return given[0] if legal else None


def _extra(call: ModuleCall) -> list[str]:
    positional = [f"argument {i + 1}" for i in range(1, len(call.args))]
    return positional + [f"{name}=" for name in call.kwargs if name != "input"]


def _is_plain_linear(module: nn.Module) -> bool:
    kind = type(module)
    return any(
        isinstance(module, known)
        and kind.forward is known.forward
        and getattr(kind, "_conv_forward", None) is getattr(known, "_conv_forward", None)
        and getattr(kind, "_output_padding", None) is getattr(known, "_output_padding", None)
        for known in LINEAR
    )


def _bad_values(layer: BatchNormBase) -> str | None:
    """What is wrong with a batch norm's statistics and parameters; None for nothing."""
    named = {name: getattr(layer, name) for name in ("running_mean", "running_var", "weight", "bias")}
    present = {name: value for name, value in named.items() if value is not None}
    for name, value in present.items():
        if is_lazy(value):
            return f"is lazy and has no {name} yet"
        if tuple(value.shape) != (channels_of(layer),):
            return f"has a {name} of shape {tuple(value.shape)}, and {channels_of(layer)} channels"
        if value.is_meta:
            return f"has a {name} without data (on the meta device)"
        if not bool(value.isfinite().all()):
            return f"has a {name} that is not finite"
    if bool((present["running_var"].double() + layer.eps <= 0).any()):
        return "has a running_var that is not positive with eps added"
    if len({value.device for value in present.values()}) > 1:
        return "has its parameters and buffers on several devices"
    return None


def _bad_weight(module: nn.Module) -> str | None:
    """What is wrong with the parameters of a convolution or linear layer; None for nothing."""
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.layout != torch.strided:
        return "has a weight that is no plain parameter"
    if weight.dtype not in _DTYPES:
        return f"has a weight of {str(weight.dtype).removeprefix('torch.')}"
    if not all(bool(value.isfinite().all()) for value in module._parameters.values() if value is not None):
        return "has parameters that are not finite"
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether the layer is a transposed convolution."""
    return isinstance(module, ConvTransposeBase)


def pads_with_zeros(module: nn.Module) -> bool:
    """Whether the layer pads its input with zeros."""
    if isinstance(module, nn.Linear):
        return False
    assert isinstance(module, ConvBase)
    if isinstance(module.padding, str):
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        pads = module.padding == "same" and any(reach)
    else:
        pads = any(module.padding)
    return pads and module.padding_mode == "zeros"
