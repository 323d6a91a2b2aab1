"""The equations of batch-normalized LSTM and GRU, and functions that cells and layers share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keelnorm.engine.activations import NAMED
from keelnorm.engine.error_messages import describe, is_count
from keelnorm.engine.layout import check_kind
from keelnorm.nn.recurrent.stepwise import Run, StepwiseBatchNorm

_TANH = NAMED["tanh"]
State = tuple[Tensor, ...]


class Weights(NamedTuple):
    """The parameters of one layer in one direction, as ``torch.nn.LSTM`` has them."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None


class Equations(NamedTuple):
    """The differences between the two kinds of recurrent layers.

    Args:
        name: "LSTM" or "GRU".
        gates: Rows of the weights, in units of the hidden size.
        states: Names of the states that are passed from step to step; the first is the output.
        normalized: What is normalized besides the input and the hidden term: "c", the LSTM's cell state.
        step: (input term W_x x_t, state, weights, runs of the normalizations or None, t) -> new state. Without runs
            the input term includes its bias.
    """

    name: str
    gates: int
    states: tuple[str, ...]
    normalized: tuple[str, ...]
    step: Callable[[Tensor, State, Weights, list[Run] | None, int], State]


def _lstm_step(gx: Tensor, state: State, weights: Weights, runs: list[Run] | None, t: int) -> State:
    h, c = state
    if runs is None:
        gates = gx + F.linear(h.to(weights.hh.dtype), weights.hh, weights.bias_hh)
    else:
        gh = runs[1](F.linear(h.to(weights.hh.dtype), weights.hh), t, weights.bias_hh)
        gates = runs[0](gx, t, weights.bias_ih, residual=gh)
    i, f, g, o = gates.to(c.dtype).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    squashed = c.tanh() if runs is None else runs[2](c.to(gx.dtype), t, runs[2].layer.bias, act=_TANH).to(c.dtype)
    return o.sigmoid() * squashed, c


def _gru_step(gx: Tensor, state: State, weights: Weights, runs: list[Run] | None, t: int) -> State:
    (h,) = state
    if runs is None:
        gh = F.linear(h.to(weights.hh.dtype), weights.hh, weights.bias_hh)
    else:
        gh = runs[1](F.linear(h.to(weights.hh.dtype), weights.hh), t, weights.bias_hh)
        gx = runs[0](gx, t, weights.bias_ih)
    (rx, zx, nx), (rh, zh, nh) = gx.to(h.dtype).chunk(3, 1), gh.to(h.dtype).chunk(3, 1)
    z = (zx + zh).sigmoid()
    n = (nx + (rx + rh).sigmoid() * nh).tanh()
    return (n + z * (h - n),)


LSTM = Equations("LSTM", 4, ("h", "c"), ("c",), _lstm_step)
GRU = Equations("GRU", 3, ("h",), (), _gru_step)


def add_normalizations(
    module: nn.Module, kind: Equations, hidden_size: int, suffix: str, options: dict[str, Any]
) -> None:
    """Give ``module`` the normalizations ``norm_ih``, ``norm_hh`` and, in an LSTM, ``norm_c`` of one layer.

    The first two have no β: the biases of the recurrent layer serve as β.
    """
    for name in ("ih", "hh"):
        module.add_module(f"norm_{name}{suffix}", StepwiseBatchNorm(kind.gates * hidden_size, bias=False, **options))
    for name in kind.normalized:
        module.add_module(f"norm_{name}{suffix}", StepwiseBatchNorm(hidden_size, **options))


def normalizations(module: nn.Module, kind: Equations, suffix: str = "") -> list[StepwiseBatchNorm]:
    """The normalizations of :func:`add_normalizations`, in the order of the equations."""
    return [getattr(module, f"norm_{name}{suffix}") for name in ("ih", "hh", *kind.normalized)]


def add_weights(
    module: nn.Module,
    kind: Equations,
    input_size: int,
    hidden_size: int,
    bias: bool,
    suffix: str,
    options: dict[str, Any],
) -> None:
    """Give ``module`` torch's parameters of one layer, not yet initialized."""
    rows = kind.gates * hidden_size
    shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, input_size), "weight_hh": (rows, hidden_size)}
    if bias:
        shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
    for name, shape in shapes.items():
        module.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, **options)))


def weights(module: nn.Module, suffix: str = "") -> Weights:
    """The parameters of :func:`add_weights`."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return Weights(*(getattr(module, name + suffix, None) for name in names))  # type: ignore[arg-type]


def initialize(module: nn.Module, hidden_size: int) -> None:
    """Initialize the weights as torch does, and reset the normalizations."""
    bound = 1 / math.sqrt(hidden_size)
    for parameter in module.parameters(recurse=False):
        nn.init.uniform_(parameter, -bound, bound)
    for child in module.children():
        child.reset_parameters()  # type: ignore[operator]


def check_size(what: str, name: str, value: Any) -> None:
    """Raise unless ``value`` is a positive integer."""
    if not is_count(value):
        raise ValueError(f"{what}: {name} is an integer from 1 on; got {describe(value)}")


def check_features(what: str, x: Any, size: int, weight: Tensor, ranks: tuple[int, ...]) -> None:
    """Raise unless the layer's weights can be applied to ``x``."""
    legal = " or ".join(map(str, ranks))
    if not isinstance(x, Tensor):
        raise TypeError(f"{what}: the input must be a tensor of {legal} dimensions; got {describe(x)}")
    check_kind(what, "the input", x)
    if not x.is_floating_point() or (x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise TypeError(
            f"{what}: the input must have the dtype of the weights, {str(weight.dtype).removeprefix('torch.')}; got "
            f"{describe(x)}. Convert one of them, as with x.to(dtype) or layer.to(dtype)"
        )
    if x.dim() not in ranks or x.shape[-1] != size:
        raise ValueError(
            f"{what}: the input must have {legal} dimensions, the last of size {size} (input_size); got {describe(x)}"
        )
    if x.device != weight.device:
        raise ValueError(
            f"{what}: the weights are on {weight.device}, so the input must be there too; got {describe(x)}"
        )


def check_state(what: str, kind: Equations, hx: Any, shape: tuple[int, ...], x: Tensor) -> State:
    """The initial state as a tuple, zeros if ``hx`` is None; raise unless each part has the shape."""
    if hx is None:
        return tuple(x.new_zeros(shape) for _ in kind.states)
    parts = hx if len(kind.states) > 1 else (hx,)
    if not isinstance(parts, tuple | list) or len(parts) != len(kind.states):
        came = f"{len(parts)} values" if isinstance(parts, tuple | list) else describe(hx)
        raise TypeError(f"{what}: the initial state is a tuple ({', '.join(kind.states)}); got {came}")
    for name, part in zip(kind.states, parts, strict=True):
        if (
            not isinstance(part, Tensor)
            or part.is_nested
            or part.shape != shape
            or part.device != x.device
            or part.dtype != x.dtype
        ):
            dtype = str(x.dtype).removeprefix("torch.")
            raise (ValueError if isinstance(part, Tensor) else TypeError)(
                f"{what}: the initial state {name} must be a {dtype} tensor of shape {shape} on {x.device}; got "
                f"{describe(part)}"
            )
        check_kind(what, f"the initial state {name}", part)
    return tuple(parts)
