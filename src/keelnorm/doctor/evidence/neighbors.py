"""What stands beside each batch norm: from a run of the model, or from the order of an ``nn.Sequential``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from keelnorm import nn as keelnorm_nn
from keelnorm.engine.torch_internals import ConvBase, DropoutBase
from keelnorm.surgery.known_layers import is_norm
from keelnorm.surgery.observation.call_record import Call, FunctionCall, ModuleCall, Trace, Value

#: Dropouts that keep mean and variance, for self-normalizing networks.
_KEEPS_VARIANCE = (nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPS = frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"))
_WEIGHS = re.compile(r"conv|linear|matmul|bmm|einsum|addmm|^mm$")
_JOINS = frozenset(("add", "mul", "sub"))
_NORMALIZES = re.compile(r"(batch|layer|group|instance|rms)_norm")
_NORM_CLASS = re.compile(r"Norm(\dd)?$")
#: Functions that only give a tensor another shape.
_SHAPES = frozenset(
    ("contiguous", "flatten", "movedim", "permute", "reshape", "squeeze", "transpose", "unflatten", "unsqueeze", "view")
)


@dataclass(frozen=True)
class Neighbor:
    """A layer without submodules, or a function that the code of a module calls.

    Args:
        name: In words: "Conv2d '0'", "add".
        function: The function, such as "conv2d"; empty where it was not observed.
        path: The layer's path; None for a function.
        module: The layer; None for a function.
    """

    name: str
    function: str = ""
    path: str | None = None
    module: nn.Module | None = None


@dataclass(frozen=True)
class Dropped:
    """A dropout in front of a batch norm.

    Args:
        name: In words: "Dropout '2'", or "dropout" for a function.
        rate: The share of values that it sets to 0.
        path: The path of the layer, or of the module whose code calls the function.
        is_layer: Whether it is a layer, and not a function.
        attribute: For a function, the name of the module's attribute with the rate, if there is one.
    """

    name: str
    rate: float
    path: str
    is_layer: bool = True
    attribute: str | None = None


@dataclass(frozen=True)
class Surroundings:
    """What stands beside one batch norm.

    Args:
        observed: Whether a run showed it; otherwise the order of an ``nn.Sequential``.
        calls: How often the layer was called in the run.
        before: What makes its input; several if it is called several times.
        alone: Whether nothing else reads that.
        after: What reads its output.
        returned: Whether the model returns its output, and nothing else reads it.
        dropouts: Dropouts in front, with at most one convolution or linear layer, one sum, and no normalization in
            between.
    """

    observed: bool = True
    calls: int = 1
    before: tuple[Neighbor, ...] = ()
    alone: bool = True
    after: tuple[Neighbor, ...] = ()
    returned: bool = False
    dropouts: tuple[Dropped, ...] = ()


def from_run(
    trace: Trace, layers: Iterable[nn.Module], paths: Mapping[nn.Module, str]
) -> dict[nn.Module, Surroundings]:
    """The surroundings of the layers that the run has called, in the order of their first calls."""
    wanted = set(layers)
    calls: dict[nn.Module, list[ModuleCall]] = {}
    for call in trace.modules:
        if call.module in wanted and call.inputs and call.outputs:
            calls.setdefault(call.module, []).append(call)
    unchanged = _dropouts_of_values(trace)
    return {layer: _surroundings(trace, made, paths, unchanged) for layer, made in calls.items()}


def _surroundings(
    trace: Trace, calls: list[ModuleCall], paths: Mapping[nn.Module, str], unchanged: Mapping[Value, list[FunctionCall]]
) -> Surroundings:
    befores: dict[str, Neighbor] = {}
    afters: dict[str, Neighbor] = {}
    dropouts: dict[str, Dropped] = {}
    alone, returned = True, False
    for call in calls:
        value, made = call.inputs[0], call.outputs[0]
        writer = trace.writer(value)
        if writer is not None:
            found = neighbor_of(writer, paths)
            befores[found.name] = found
        alone &= all(reader.within(call) for reader in trace.readers(value)) and not trace.holders(value)
        afters |= {found.name: found for found in (neighbor_of(reader, paths) for reader in trace.readers(made))}
        returned |= _is_returned(trace, made)
        dropouts |= {found.name: found for found in _dropouts_before(trace, value, paths, unchanged)}
    return Surroundings(
        True, len(calls), tuple(befores.values()), alone, tuple(afters.values()), returned, tuple(dropouts.values())
    )


def neighbor_of(call: Call, paths: Mapping[nn.Module, str] | None = None) -> Neighbor:
    """The layer that a call belongs to, if it has no submodules; else the function that is called.

    Args:
        call: A call of a module or of a function.
        paths: Paths of modules, where they differ from those of the run.
    """
    layer = call if isinstance(call, ModuleCall) else call.inside
    function = str(call) if isinstance(call, FunctionCall) else ""
    is_own = layer is not None and layer.path and all(name == "parametrizations" for name, _ in _children(layer))
    if layer is None or not is_own:
        return Neighbor(str(call), function)
    path = (paths or {}).get(layer.module, layer.path)
    return Neighbor(f"{type(layer.module).__name__} {path!r}", function, path, layer.module)


def _children(call: ModuleCall) -> Iterator[tuple[str, nn.Module]]:
    return call.module.named_children()


def _is_returned(trace: Trace, value: Value) -> bool:
    """Whether the model returns a value, perhaps in another shape, and nothing else reads it."""
    readers = trace.readers(value)
    if not readers:
        return "returned by the model" in trace.holders(value)
    shaped = all(isinstance(reader, FunctionCall) and str(reader) in _SHAPES and reader.outputs for reader in readers)
    return shaped and all(_is_returned(trace, reader.outputs[0]) for reader in readers)


def _dropouts_of_values(trace: Trace) -> dict[Value, list[FunctionCall]]:
    """Dropouts that were off in the run, and returned a value unchanged, by that value."""
    found: dict[Value, list[FunctionCall]] = {}
    for call in trace.functions:
        if str(call) in _DROPS and call.inputs and not call.outputs:
            found.setdefault(call.inputs[0], []).append(call)
    return found


def _dropouts_before(
    trace: Trace, value: Value, paths: Mapping[nn.Module, str], unchanged: Mapping[Value, list[FunctionCall]]
) -> Iterator[Dropped]:
    """Dropouts between a value and what normalizes, or weighs or joins branches for the second time, before it.

    Each sum with another branch dilutes the shift of a dropout; along the additions of a residual network the search
    would go back to its beginning.
    """
    seen = set()
    stack = [(value, 0, 0)]
    while stack:
        value, weighed, joined = state = stack.pop()
        if state in seen:
            continue
        seen.add(state)
        for call in unchanged.get(value, ()):
            yield from _dropped(call, paths)
        writer = trace.writer(value)
        if writer is None or _normalizes(writer):
            continue
        if str(writer) in _DROPS and _is_layer(writer):  # a function that drops in evaluation shifts nothing
            yield from _dropped(writer, paths)
        weighed += _WEIGHS.search(str(writer)) is not None
        joined += str(writer) in _JOINS and len(writer.inputs) > 1
        if max(weighed, joined) <= 1:
            stack += [(source, weighed, joined) for source in writer.inputs]


def _is_layer(call: FunctionCall) -> bool:
    return call.inside is not None and isinstance(call.inside.module, DropoutBase)


def _dropped(call: FunctionCall, paths: Mapping[nn.Module, str]) -> Iterator[Dropped]:
    if call.inside is None or isinstance(call.inside.module, _KEEPS_VARIANCE):
        return
    module, path = call.inside.module, paths.get(call.inside.module, call.inside.path)
    rate = call.kwargs.get("p", call.args[1] if len(call.args) > 1 else 0.5)
    if not (isinstance(rate, float | int) and 0 < rate < 1):
        return
    if _is_layer(call):
        yield Dropped(f"{type(module).__name__} {path!r}", float(rate), path)
        return
    names = [name for name, value in vars(module).items() if isinstance(value, float) and value == rate]
    attribute = next((name for name in names if "drop" in name), None)
    yield Dropped(f"A {call} in {type(module).__name__} {path!r}", float(rate), path, False, attribute)


def _normalizes(call: FunctionCall) -> bool:
    if _NORMALIZES.search(str(call)):
        return True
    outer = call.inside
    while outer is not None:
        if is_norm(outer.module) or _NORM_CLASS.search(type(outer.module).__name__):
            return True
        outer = outer.inside
    return False


def from_sequence(
    model: nn.Module, layers: Iterable[nn.Module], paths: Mapping[nn.Module, str]
) -> dict[nn.Module, Surroundings]:
    """The surroundings of layers in an ``nn.Sequential``, as far as its order shows them."""
    wanted, inner = set(layers), set()
    found = {}
    for module in model.modules():
        if not _is_sequence(module) or module in inner:
            continue
        inner |= {part for part in module.modules() if _is_sequence(part)}
        chain = list(_chain(module))
        for index, layer in enumerate(chain):
            if layer in wanted and chain.count(layer) == 1:
                found[layer] = _in_chain(chain, index, paths, is_all=module is model)
    return found


def _is_sequence(module: nn.Module) -> bool:
    """Whether calling a module calls its children one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward in (
        nn.Sequential.forward,
        keelnorm_nn.Sequential.forward,
    )


def _chain(module: nn.Module) -> Iterator[nn.Module]:
    for child in module._modules.values():
        if child is not None and _is_sequence(child):
            yield from _chain(child)
        elif child is not None and type(child) is not nn.Identity:
            yield child


def _in_chain(chain: list[nn.Module], index: int, paths: Mapping[nn.Module, str], *, is_all: bool) -> Surroundings:
    def named(module: nn.Module) -> str:
        return f"{type(module).__name__} {paths[module]!r}"

    def neighbor(at: int) -> tuple[Neighbor, ...]:
        there = chain[at : at + 1] if at >= 0 else []
        return tuple(Neighbor(named(one), _FUNCTION.get(type(one), ""), paths[one], one) for one in there)

    dropouts, weighed = [], 0
    for module in reversed(chain[:index]):
        if isinstance(module, DropoutBase) and not isinstance(module, _KEEPS_VARIANCE):
            if 0 < module.p < 1:
                dropouts.append(Dropped(named(module), float(module.p), paths[module]))
            continue
        weighed += isinstance(module, ConvBase | nn.Linear | nn.Bilinear)
        if weighed > 1 or is_norm(module) or _NORM_CLASS.search(type(module).__name__) or any(module.children()):
            break
    last = all(isinstance(module, nn.Flatten | nn.Unflatten) for module in chain[index + 1 :])
    return Surroundings(
        observed=False,
        before=neighbor(index - 1),
        after=neighbor(index + 1),
        returned=is_all and last,
        dropouts=tuple(dropouts),
    )


#: The function that a layer of torch calls.
_FUNCTION: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    **{getattr(nn, f"Conv{n}d"): f"conv{n}d" for n in (1, 2, 3)},
    **{getattr(nn, f"ConvTranspose{n}d"): f"conv_transpose{n}d" for n in (1, 2, 3)},
}
