"""Which kernels run: the list of kernels, and how to force one.

A back end supplies four operators (``stats``, ``apply``, ``grad_stats``, ``grad_input``); the fast ones add a fused
forward and backward. ``reference`` is plain torch and runs everywhere. The native CPU back end is compiled for several
instruction sets, and runs the best that the machine supports. ``triton`` runs on GPUs. ``KEELNORM_KERNELS`` or
:func:`use` forces one.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from keelnorm.engine.error_messages import describe
from keelnorm.engine.kernels import cpu, reference, triton

ENVIRONMENT_VARIABLE = "KEELNORM_KERNELS"


@dataclass(frozen=True)
class Kernel:
    """One choice of kernels, as :func:`available` lists it.

    Args:
        name: Its name, for :func:`use` and the environment variable.
        usable: Whether it runs on this machine.
        note: What it is, or why it can't be used.
    """

    name: str
    usable: bool
    note: str


_unavailable = cpu.load()
_forced: str | None = None
_log = logging.getLogger("keelnorm")
#: The devices and dtypes whose fallback has been announced.
_announced: set[str | torch.dtype] = set()
#: The dtypes of the native operators, on the CPU.
DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
#: Whether tensors of these dtypes on the CPU run on the native operators. Read on every call.
native_enabled = False
#: Whether tensors on the CPU run on Triton's kernels, in its interpreter.
_interpreting = False


def available() -> list[Kernel]:
    """List all kernels that this build of keelnorm knows, the plainest first.

    Example:
        >>> available()[0].name
        'reference'
    """
    found = [Kernel("reference", True, "plain torch; any device, dtype and layout")]
    if _unavailable is not None:
        found.append(Kernel("native", False, f"the native CPU library is missing: {_unavailable}"))
    for name, supported, note in cpu.instruction_sets():
        found.append(Kernel(name, supported, note if supported else "this machine lacks the instructions"))
    lacking = triton.unusable()
    return [*found, Kernel("triton", lacking is None, lacking or "Triton; float32, float16 and bfloat16 on GPUs")]


def active(device: torch.device | str = "cpu") -> str:
    """The kernels that floating-point tensors on a device run on; for a dtype that they lack, ``reference`` runs."""
    kind = _kind("active", device)
    if kind == "cuda":
        return "triton" if _forced != "reference" and triton.missing() is None else "reference"
    if kind != "cpu":
        return "reference"
    if _interpreting:
        return "triton"
    return (cpu.active() or "reference") if native_enabled else "reference"


def chosen_by(device: torch.device | str = "cpu") -> str:
    """Why :func:`active` is what it is, in a few words."""
    on_gpu = _kind("chosen_by", device) == "cuda"
    if _forced == "reference" or (_forced is not None and (_forced == "triton") == (on_gpu or _interpreting)):
        return f"forced by kn.kernels.use or {ENVIRONMENT_VARIABLE}"
    if on_gpu:
        return triton.missing() or "the only fast kernels for GPUs"
    if _unavailable is not None:
        return f"the native CPU library is missing: {_unavailable}"
    return "the best that this machine supports"


def _kind(what: str, device: torch.device | str) -> str:
    try:
        return torch.device(device).type
    except (TypeError, ValueError, RuntimeError):  # RuntimeError for a name or number that there is not
        raise ValueError(
            f"{what}: device must be a torch.device or its name, as 'cpu'; got {describe(device)}"
        ) from None


def calls() -> dict[str, int]:
    """How many operators each of the kernels has run in this process; it proves which kernels ran.

    Example:
        >>> before = calls()["reference"]
        >>> calls()["reference"] - before
        0
    """
    return {"reference": reference.calls, **cpu.calls(), "triton": triton.calls()}


class use:  # noqa: N801 - reads as a verb, with or without `with`
    """Force kernels from now on; as a context manager, until the end of the ``with`` block.

    Args:
        name: One of :func:`available`, or ``"auto"`` for the best of each device. An instruction set is forced for
            tensors on the CPU. ``"triton"`` runs on GPUs anyway; when forced, torch.compile keeps its operators in
            models on GPUs, see docs/gpu.md, and with TRITON_INTERPRET=1 it runs CPU tensors too. ``"reference"`` is
            forced for all devices.

    Raises:
        ValueError: There are no such kernels, or they can't run here; nothing changes.

    Example:
        >>> with use("reference"):
        ...     active()
        'reference'
    """

    def __init__(self, name: str) -> None:
        self._before = _forced
        _force(name)

    def __enter__(self) -> None:
        """Nothing is bound by ``as``: the kernels were forced by the constructor."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Force the kernels that were forced before."""
        _force(self._before or "auto")


def _force(name: str) -> None:
    global _forced, native_enabled, _interpreting
    known = isinstance(name, str)
    if not known or name not in ("auto", "reference"):
        usable = [kernel.name for kernel in available() if kernel.usable]
        if not known or name not in usable:
            notes = {kernel.name: kernel.note for kernel in available()}
            why = f" ({notes[name]})" if known and name in notes else ""
            raise ValueError(f"kernels {name!r} can't be used{why}; this machine has {', '.join(usable)}, and 'auto'")
    _forced = None if name == "auto" else name
    _interpreting = name == "triton" and triton.interpreted()
    native_enabled = _unavailable is None and name != "reference" and not _interpreting
    cpu.force(name if native_enabled and name not in ("auto", "triton") else None)


def announce_fallback(device: str = "cpu") -> None:
    """Warn that a device's fast back end is missing: once a device, at the first call that would have used it."""
    lacking = _unavailable if device == "cpu" else triton.missing()
    if device in _announced or lacking is None or _forced == "reference":
        return
    _announced.add(device)
    what, remedy = "", "Install Triton, which torch for GPUs brings along on Linux"
    if device == "cpu":
        what, remedy = "the native CPU library is missing, ", "Install a C++ compiler and reinstall keelnorm"
    warnings.warn(
        f"keelnorm runs on its reference back end, which is slower: {what}{lacking}. "
        f"{remedy}, or choose this with {ENVIRONMENT_VARIABLE}=reference.",
        RuntimeWarning,
        stacklevel=2,
    )


def operators(x: Tensor) -> Any | None:
    """The fast operators for x, with the names of keelnorm/engine/ops.py; None where the reference back end runs.

    They may still refuse a rare case, such as mixed dtypes.
    """
    if x.is_cpu:
        if native_enabled:
            return torch.ops.keelnorm if x.dtype in DTYPES else None
        if _interpreting:
            return _on_triton(x)
        if x.dtype in DTYPES:
            announce_fallback()
        return None
    if not x.is_cuda or _forced == "reference":
        return None
    return _on_triton(x)


def _on_triton(x: Tensor) -> Any | None:
    if x.dtype not in triton.DTYPES:
        if x.dtype in DTYPES and x.dtype not in _announced:
            _announced.add(x.dtype)
            _log.warning("Triton's kernels do not take %s: the reference back end runs, which is slower", x.dtype)
        return None
    found = triton.load()
    if found is None:
        announce_fallback("cuda")
    return found


def in_compiled_code(device: torch.device) -> bool:
    """Whether torch.compile keeps keelnorm's operators on a device; otherwise it gets torch's, which it fuses."""
    return native_enabled if device.type == "cpu" else device.type == "cuda" and _forced == "triton"


_force(os.environ.get(ENVIRONMENT_VARIABLE) or "auto")
