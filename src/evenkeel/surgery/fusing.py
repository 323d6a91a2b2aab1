"""Which modules of a model get a fused forward, from the innermost outwards."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from evenkeel.surgery.fused_forward import Plan
from evenkeel.surgery.kinds import will_fuse
from evenkeel.surgery.unchanged import UntraceableError


class Outcome(NamedTuple):
    """What became of one batch norm.

    Args:
        activation, by, residual: As in :class:`evenkeel.surgery.patterns.Fused`; None where nothing was fused.
        module: The path of the module whose forward runs it so, or could not.
        reason: Why nothing was fused, where there is more to say than that nothing follows.
    """

    module: str
    activation: str | None = None
    by: str | None = None
    residual: bool = False
    reason: str | None = None


def plan_all(model: nn.Module, sync: bool | None = None) -> tuple[dict[str, Plan], dict[str, Outcome]]:
    """The forwards to fuse, by module path, and what becomes of each batch norm, by its path."""
    plans: dict[nn.Module, Plan] = {}
    opened: dict[nn.Module, str] = {}
    found: dict[str, Plan] = {}
    outcomes: dict[str, Outcome] = {}
    modules = dict(model.named_modules())
    for path in sorted(modules, key=lambda path: -path.count(".") if path else 1):
        module = modules[path]
        own = _own_layers(module, sync)
        if not own and not any(part in opened for part in module.modules() if part is not module):
            continue
        try:
            plan = Plan(module, opened.keys() & set(module.modules()) - {module}, sync)
        except UntraceableError as error:
            where = f"{path!r}, a {type(module).__name__}," if path else f"the {type(module).__name__}"
            for layer in (*own, *_open_ends(module, opened)):
                _put(outcomes, path, layer, Outcome(path, reason=f"the forward of {where} can't be traced: {error}"))
            continue
        if plan.end is not None and not _has_hooks(module):
            opened[module] = plan.end
        for refused in plan.refused:
            _put(outcomes, path, refused.layer, Outcome(path, reason=refused.reason))
        if plan.fuses():
            plans[module] = found[path] = plan
            for one in {fused: None for mode in (True, False) for fused in plan.fused[mode]}:
                by = ".".join(filter(None, (path, one.by))) if one.by and not one.by.endswith("()") else one.by
                _put(outcomes, path, one.layer, Outcome(path, one.activation, by, one.residual))
    return found, outcomes


def _open_ends(module: nn.Module, opened: dict[nn.Module, str]) -> list[str]:
    """The batch norms that the module's children end with, which it may have fused with what it does next."""
    children = [(name, child) for name, child in module.named_modules() if child in opened and child is not module]
    outer = [
        (name, child) for name, child in children if not any(name.startswith(f"{other}.") for other, _ in children)
    ]
    return [f"{name}.{opened[child]}" for name, child in outer]


def _put(outcomes: dict[str, Outcome], path: str, layer: str, outcome: Outcome) -> None:
    name = ".".join(filter(None, (path, layer)))
    if outcome.reason is None or name not in outcomes:
        outcomes[name] = outcome


def _own_layers(module: nn.Module, sync: bool | None) -> list[str]:
    """The batch norms that the module's own forward calls, if any does: children, and those in containers."""
    found = []
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            found += [f"{name}.{inner}" for inner in _own_layers(child, sync)]
        elif will_fuse(child, sync):
            found.append(name)
    return [] if isinstance(module, nn.ModuleList | nn.ModuleDict) and not found else found


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
