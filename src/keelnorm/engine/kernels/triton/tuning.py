"""Tile sizes by timing, which is optional, and the file that keeps them for the next process.

Without timing the rule of `tiling` holds. ``KEELNORM_AUTOTUNE=1`` or :func:`autotune` turns timing on: the first
forward of each shape then times some cuts, which takes some milliseconds and memory for two more tensors like x.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keelnorm.engine.atomic_write import write_text
from keelnorm.engine.kernels.triton import tiling
from keelnorm.engine.kernels.triton.availability import Choice, by_rule
from keelnorm.engine.kernels.triton.device import processors
from keelnorm.engine.kernels.triton.tiling import Tiling, View

_FORMAT = 1
_WARM_UPS, _RUNS = 2, 7
_log = logging.getLogger("keelnorm")
_enabled = os.environ.get("KEELNORM_AUTOTUNE") == "1"
_trial: Choice | None = None
_found: dict[str, dict[str, Choice]] = {}

Timer = Callable[[Callable[[], None]], float]


def autotune(enabled: bool = True) -> None:
    """Turn timing on or off; see :func:`keelnorm.kernels.autotune`.

    Results are kept in ``KEELNORM_CACHE``, by default ``~/.cache/keelnorm``, one file for each kind of GPU and version
    of Triton. Under CUDA graph capture nothing is timed, and the rule holds for shapes that were not timed before.
    """
    global _enabled
    _enabled = enabled


def choose(view: View, x: Tensor) -> Choice:
    """Choose the cuts for x."""
    if _trial is not None:
        return _trial
    rule = by_rule(view, x.element_size(), processors(x))
    if not _enabled or not x.is_cuda:
        return rule
    known = _known(x.device)
    key = f"{view.n}x{view.c}x{view.s} {'last' if view.last else 'first'} {str(x.dtype).removeprefix('torch.')}"
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return rule
        known[key] = fastest(view, x, options(view, x), _by_events)
        _write(x.device, known)
    return known[key]


def options(view: View, x: Tensor) -> list[Choice]:
    """List the choices to time, the rule's first; on chip and in two passes, where both are possible."""
    rule = by_rule(view, x.element_size(), processors(x))
    cuts = tiling.candidates(view, x.element_size(), processors(x))
    found = [replace(rule, reduction=reduction, elementwise=elementwise) for reduction, elementwise in cuts]
    if rule.forward is not None:
        found = [rule, *(replace(each, forward=None, backward=None) for each in found)]
    return found


def fastest(view: View, x: Tensor, among: list[Choice], timer: Timer) -> Choice:
    """Find the choice with the shortest forward and backward."""
    from keelnorm.engine.kernels.triton import launches  # which imports this module

    global _trial
    y, dx = torch.empty_like(x), torch.empty_like(x)
    call = launches.Call(x, view, launches.Act("relu"))

    def run() -> None:
        saved = launches.forward(call, None, y, launches.Running(), training=True, eps=1e-5)
        inputs = launches.GradientInputs(x, None, None)
        launches.backward(call, inputs, dx, None, saved, training=True, need_vectors=True)

    times = []
    for choice in among:
        _trial = choice
        try:
            times.append(timer(run))
        except RuntimeError as error:  # too many registers, say: another choice is used
            _log.debug("keelnorm: %s was not timed: %s", choice, error)
            times.append(float("inf"))
        finally:
            _trial = None
    return among[min(range(len(among)), key=times.__getitem__)]


def _by_events(run: Callable[[], None]) -> float:
    for _ in range(_WARM_UPS):
        run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_RUNS)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in marks))


def cache_folder() -> Path:
    """The folder of the files of timings."""
    given = os.environ.get("KEELNORM_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(base) if base else Path.home() / ".cache") / "keelnorm"


def _file(device: torch.device) -> Path:
    import triton

    name = "-".join(torch.cuda.get_device_name(device).split())
    return cache_folder() / f"tiles-{name}-triton{triton.__version__}.json"


def _known(device: torch.device) -> dict[str, Choice]:
    name = str(_file(device))
    if name not in _found:
        _found[name] = read(Path(name))
    return _found[name]


def _write(device: torch.device, known: dict[str, Choice]) -> None:
    try:
        write(_file(device), known)
    except OSError as error:
        _log.warning("tile sizes that were found by timing can't be kept for the next process: %s", error)


def read(path: Path) -> dict[str, Choice]:
    """Read the choices in a file; none if it is missing, of another version, or broken."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["format"] != _FORMAT:
            return {}
        return {key: _choice(each) for key, each in found["choices"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _log.warning("%s is not read, and tile sizes are timed anew: %s", path, error)
        return {}


def write(path: Path, choices: dict[str, Choice]) -> None:
    """Write all choices to one file, whole or not at all."""
    found = {"format": _FORMAT, "choices": {key: asdict(each) for key, each in choices.items()}}
    write_text(path, json.dumps(found, indent=1))


def _choice(given: dict[str, dict[str, int] | None]) -> Choice:
    for cut in given.values():
        if cut is not None and not all(type(size) is int and size > 0 for size in cut.values()):
            raise ValueError(f"{cut} is not a cut")
    return Choice(**{name: None if cut is None else Tiling(**cut) for name, cut in given.items()})  # type: ignore[arg-type]
