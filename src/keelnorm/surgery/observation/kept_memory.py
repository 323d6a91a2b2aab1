"""How much memory each layer of a model keeps between forward and backward."""

from __future__ import annotations

from sys import _getframe
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from keelnorm.engine.error_messages import RefusedValueError, check_module, describe
from keelnorm.engine.output_recipes import Packed, held_by
from keelnorm.engine.saved_outputs import check_longest, recorded
from keelnorm.surgery.observation.nested_tensors import call_of, tensors_in
from keelnorm.surgery.report import Report
from keelnorm.surgery.snapshot import preserved

_MB = 1e6


def kept_memory(model: nn.Module, example: Any, *, longest: int = 8, limit: float | None = None) -> Report:
    """Measure what each layer keeps for the backward, as the model is and with :func:`kn.save_memory`.

    The model runs twice in training mode, with gradients. Bytes are those of distinct storages, without parameters,
    buffers and the example; a storage counts for the module whose code saves it first. Run a converted model two steps
    before, so that its layers have learned what follows them.

    Args:
        model: Any module. Buffers, random generators and the example are as before afterwards.
        example: The model's argument: a tensor, a tuple of arguments, or a mapping of keywords.
        longest: As in :func:`kn.save_memory`.
        limit: Memory in bytes, for which the largest batch is estimated: parameters twice (for their gradients),
            buffers, and what is kept per sample. The batch is the first dimension of the example's first tensor.

    Returns:
        A report: for each module the megabytes (10⁶ bytes) that it keeps, and the same with ``save_memory``.

    Raises:
        TypeError: ``model`` is not a module, or ``example`` is of another kind.
        ValueError: ``longest`` is not an integer from 1 to 64, or ``limit`` is not positive.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        >>> report = kept_memory(model, torch.zeros(2, 3, 50, 50))
        >>> [(row["path"], row["kept MB"]) for row in report.rows]
        [('1', 0.08), ('2', 0.08)]
    """
    check_module("kept_memory", model)
    args, keywords = call_of("kept_memory", example)
    check_longest("kept_memory", longest)
    if limit is not None and not (isinstance(limit, int | float) and limit > 0):
        raise RefusedValueError(f"kept_memory: limit is a positive number of bytes, or None; got {describe(limit)}")
    found = [_kept_by_path(model, args, keywords, chain) for chain in (0, longest)]
    paths = {name: type(module).__name__ for name, module in model.named_modules() if any(name in by for by in found)}
    rows = [
        {
            "path": path,
            "kind": kind,
            "kept MB": round(found[0].get(path, 0) / _MB, 3),
            "with save_memory": round(found[1].get(path, 0) / _MB, 3),
        }
        for path, kind in paths.items()
    ]
    totals = [sum(by.values()) for by in found]
    summary: dict[str, Any] = {"kept MB": round(totals[0] / _MB, 3), "with save_memory": round(totals[1] / _MB, 3)}
    if limit is not None:
        samples = next((t.shape[0] for t in tensors_in((args, keywords)) if t.dim() > 0), 1) or 1
        fixed = 2 * sum(_size(p) for p in model.parameters()) + sum(_size(b) for b in model.buffers())
        for name, total in zip(("largest batch", "largest batch with save_memory"), totals, strict=True):
            summary[name] = max(int((limit - fixed) / max(total / samples, 1)), 0)
    return Report("kept_memory", summary, rows, [])


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _kept_by_path(model: nn.Module, args: Any, keywords: dict[str, Any], longest: int) -> dict[str, int]:
    """Bytes by the path of the module that saves them first."""
    own = {_key(t) for t in (*model.parameters(), *model.buffers(), *tensors_in((args, keywords)))}
    names = {module: name for name, module in model.named_modules()}
    kept: dict[str, int] = {}
    alive: list[Packed] = []  # so that no storage is freed and its address counted for another one

    def record(_: Tensor, packed: Packed) -> None:
        alive.append(packed)
        path = _path_of_caller(names)
        for tensor in held_by(packed):
            key = _key(tensor)
            if key not in own:
                own.add(key)
                kept[path] = kept.get(path, 0) + tensor.untyped_storage().nbytes()

    with preserved(model, (args, keywords)), torch.enable_grad(), recorded(model, longest, record):
        model.train()
        model(*args, **keywords)
    return kept


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _path_of_caller(names: dict[nn.Module, str]) -> str:
    """The path of the module whose code runs, by the stack."""
    frame: FrameType | None = _getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in names:
            return names[owner]
        frame = frame.f_back
    return ""
