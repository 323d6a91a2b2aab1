"""A random program as it is and converted: whether anybody could tell the two apart."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fusion.program_parts import CHANNELS
from fusion.programs import Program
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.engine.fusion import pending as fusion

#: Relative to the largest value of a tensor.
TOLERANCE = 1e-7
#: Our error where a value can't be computed rightly any more.
REFUSED = "was changed in place before the result was used"
#: torch's error where a backward finds that what it needs was changed.
CHANGED = "modified by an inplace operation"


def _history(x: Tensor) -> tuple[bool, bool, bool] | str:
    """Whether a tensor requires a gradient, is a leaf and has a node.

    The error where torch forbids to ask, as of a view that a custom function returned, once its base has changed.
    """
    try:
        return x.requires_grad, x.is_leaf, x.grad_fn is not None
    except RuntimeError as error:
        return type(error).__name__


#: What is compared of two tensors beside their values.
LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: x.shape,
    "dtype": lambda x: x.dtype,
    "strides": Tensor.stride,
    "requires_grad, is_leaf, has grad_fn": _history,
}


@dataclass
class Outcome:
    """What one call showed.

    Args:
        result: What the forward returned, or the exception.
        gradients: Of the input and the parameters, or the exception.
        state: Buffers, log and attributes afterwards.
        shared: Which of the tensors share memory.
    """

    result: Any
    gradients: Any = None
    state: list[Any] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)


def run(model: nn.Module, x: Tensor, record: bool, seed: int) -> Outcome:
    """Call a model and look at everything there is to see."""
    x = x.clone().requires_grad_(record)
    torch.default_generator.manual_seed(seed)  # and no other device
    try:
        with torch.set_grad_enabled(record):
            result = model(x)
    except Exception as error:
        return Outcome(error, state=_state(model))
    tensors = _tensors(result)
    outcome = Outcome(result, state=_state(model), shared=_sharing([x, *tensors, *_tensors(model.feature)]))
    if record:
        generator = torch.Generator().manual_seed(seed)
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        try:
            loss = sum(
                (t * torch.rand(t.shape, dtype=t.dtype, generator=generator)).sum() for t in tensors if t.requires_grad
            )
            if isinstance(loss, Tensor):
                outcome.gradients = list(torch.autograd.grad(loss, leaves, allow_unused=True))
        except RuntimeError as error:
            outcome.gradients = error
    return outcome


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def _state(model: nn.Module) -> list[Any]:
    buffers = [b.detach().clone() for b in model.buffers()]
    parts = [(type(part).__name__, part.training) for part in model.modules()]
    return [buffers, model.steps, list(model.log), model.branch.calls, model.feature, model.ends.features, parts,
            torch.get_rng_state()]  # fmt: skip


def _sharing(tensors: list[Tensor]) -> list[int]:
    places: dict[int, int] = {}
    return [places.setdefault(t.untyped_storage().data_ptr(), len(places)) for t in tensors]


def difference(found: Any, wanted: Any, where: str = "") -> str | None:
    """The first thing that differs; None where nothing does."""
    if type(found) is not type(wanted):
        return f"{where}: a {type(found).__name__} and not a {type(wanted).__name__}: {found!r} / {wanted!r}"
    if isinstance(wanted, Exception):
        return None
    if isinstance(wanted, Tensor):
        return _tensor_difference(found, wanted, where)
    if isinstance(wanted, dict):
        if list(found) != list(wanted):
            return f"{where}: keys {list(found)} and not {list(wanted)}"
        found, wanted = list(found.values()), list(wanted.values())
    if isinstance(wanted, list | tuple):
        if len(found) != len(wanted):
            return f"{where}: {len(found)} items and not {len(wanted)}"
        parts = (difference(f, w, f"{where}[{i}]") for i, (f, w) in enumerate(zip(found, wanted, strict=True)))
        return next((part for part in parts if part), None)
    if isinstance(wanted, float) or hasattr(wanted, "dtype"):
        return _tensor_difference(torch.tensor(float(found)), torch.tensor(float(wanted)), where)
    return None if found == wanted else f"{where}: {found!r} and not {wanted!r}"


def _tensor_difference(found: Tensor, wanted: Tensor, where: str) -> str | None:
    for name, (is_, was) in {name: (read(found), read(wanted)) for name, read in LOOKS.items()}.items():
        if is_ != was:
            return f"{where}: {name} {is_} and not {was}"
    found, wanted = found.detach().double(), wanted.detach().double()
    if not torch.equal(found.isnan(), wanted.isnan()):
        return f"{where}: NaN elsewhere"
    error = (found - wanted).nan_to_num(0.0).abs().max() if wanted.numel() else torch.zeros(())
    scale = 1 + wanted.nan_to_num(0.0).abs().max() if wanted.numel() else 1
    return f"{where}: off by {error:.3g} of {scale:.3g}" if error > TOLERANCE * scale else None


def compare(found: Outcome, wanted: Outcome, seen: Counter[str]) -> str | None:
    """The first thing that differs between two calls, leaving out what is allowed to.

    Allowed are our named error, and a backward that succeeds where torch's would need a value that was changed.
    """
    if isinstance(found.result, RuntimeError) and REFUSED in str(found.result):
        seen["refused"] += 1
        return "" if not isinstance(wanted.result, Exception) else None
    if isinstance(wanted.result, RuntimeError) and CHANGED in str(wanted.result):
        seen["changed"] += 1
        return None if isinstance(found.result, Exception) else ""
    parts = [(found.result, wanted.result, "result"), (found.state, wanted.state, "state")]
    if isinstance(found.gradients, RuntimeError) and REFUSED in str(found.gradients):
        seen["refused"] += 1
    elif isinstance(wanted.gradients, RuntimeError) and CHANGED in str(wanted.gradients):
        seen["changed"] += 1
    else:
        parts.append((found.gradients, wanted.gradients, "gradients"))
    parts.append((found.shared, wanted.shared, "shared memory"))
    return next((told for part in parts if (told := difference(*part))), None)


def check(program: Program, seen: Counter[str] | None = None) -> str | None:
    """Run a program and its converted twin; what tells them apart, in words, or None.

    Args:
        seen: Counts calls, exceptions and fused kernels.
    """
    seen = Counter() if seen is None else seen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _check(program, seen)


def _check(program: Program, seen: Counter[str]) -> str | None:
    plain = _twin(program)
    model, _ = kn.convert(program.make())
    before = fusion.completed
    for call, record in enumerate(program.graph):
        for one in (model, plain):
            program.act(one, call)
        generator = torch.Generator().manual_seed(program.seed + call)
        x = torch.randn(2 + program.seed % 3, CHANNELS, 2, 2, dtype=torch.float64, generator=generator)
        found, wanted = (run(one, x, record, program.seed) for one in (model, plain))
        told = compare(found, wanted, seen)
        if told == "":
            break  # refused, rightly: the two have parted
        if told and not _ill_conditioned(program, call, x, record, wanted):
            return f"call {call}: {told}\n{program}"
        if told:
            seen["ill-conditioned"] += 1
            break
        if type(found.gradients) is not type(wanted.gradients):
            both: tuple[Any, Any] = (model, plain)
            for one in both:  # hooks ran in one backward as far as the error, and in the other to its end
                one.log[:] = [entry for entry in one.log if not isinstance(entry, str) or entry != "backward"]
        seen["calls"] += 1
        seen["exceptions"] += isinstance(wanted.result, Exception)
    seen["fused"] += fusion.completed - before
    return None


def _twin(program: Program) -> nn.Module:
    """The module as it is; with keelnorm's layers where a checkpoint would make torch's count a batch twice."""
    plain = program.make()
    return kn.convert(plain, fuse=False)[0] if "checkpoint" in program.source else plain


def _ill_conditioned(program: Program, call: int, x: Tensor, record: bool, wanted: Outcome) -> bool:
    """Whether roundings alone give something else: the plain program's input moved by some, or keelnorm's layers with
    nothing fused."""
    for shift in range(8):
        plain = _twin(program)
        if shift == 0:
            plain, _ = kn.convert(plain, fuse=False)
        for earlier in range(call + 1):
            program.act(plain, earlier)
            if earlier < call:
                generator = torch.Generator().manual_seed(program.seed + earlier)
                given = torch.randn(x.shape, dtype=x.dtype, generator=generator)
                run(plain, given, program.graph[earlier], program.seed)
        noise = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(shift)) - 0.5
        moved = run(plain, x * (1 + noise * 2**-49) if shift else x, record, program.seed)
        if compare(moved, wanted, Counter()):
            return True
    return False
