"""Which kernels run: discovery, and forcing one.

A back end supplies four operators (``stats``, ``apply``, ``grad_stats``, ``grad_input``); the native one adds a fused
forward and backward. ``reference`` is plain torch and runs everywhere. The native CPU back end comes in several
instruction sets, of which the best that the machine supports is taken. ``EVENKEEL_KERNELS`` or :func:`use` force one.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from evenkeel.kernels import cpu, reference

__all__ = ["Kernel", "active", "available", "calls", "chosen_by", "use"]

ENVIRONMENT_VARIABLE = "EVENKEEL_KERNELS"


@dataclass(frozen=True)
class Kernel:
    """One choice of kernels, as :func:`available` lists it.

    Args:
        name: What :func:`use` and the environment variable call it.
        usable: Whether it runs on this machine.
        note: What it is, or why it can't be used.
    """

    name: str
    usable: bool
    note: str


_NOTES = {
    "reference": "plain torch; any device, dtype and layout",
    "baseline": "native, the plainest instructions of the machine's family; floating-point on the CPU",
    "avx2": "native, AVX2 and FMA; floating-point on the CPU",
    "avx512": "native, AVX-512 (F, BW, DQ, VL); floating-point on the CPU",
    "avx512_bf16": "native, AVX-512 and its bfloat16 conversion; bfloat16 on the CPU, the rest as avx512",
}

_unavailable = cpu.load()
_forced: str | None = None
_announced = False
#: What the native operators take, on the CPU.
DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
#: Whether such tensors do take the native operators. Read on every call.
native_enabled = False


def available() -> list[Kernel]:
    """All kernels that this build of evenkeel knows, the plainest first.

    Example:
        >>> available()[0].name
        'reference'
    """
    found = [Kernel("reference", True, _NOTES["reference"])]
    if _unavailable is not None:
        return [*found, Kernel("native", False, f"the native CPU library is missing: {_unavailable}")]
    for name, usable in cpu.instruction_sets().items():
        found.append(Kernel(name, usable, _NOTES[name] if usable else "this machine lacks the instructions"))
    return found


def active() -> str:
    """The kernels that floating-point tensors on the CPU run on; everything else runs on ``reference``."""
    return (cpu.active() or "reference") if native_enabled else "reference"


def chosen_by() -> str:
    """Why :func:`active` is what it is, in a few words."""
    if _forced is not None:
        return f"forced by ek.kernels.use or {ENVIRONMENT_VARIABLE}"
    if _unavailable is not None:
        return f"the native CPU library is missing: {_unavailable}"
    return "the best that this machine supports"


def calls() -> dict[str, int]:
    """How many operators each of the kernels has run in this process: proof of what ran.

    Example:
        >>> before = calls()["reference"]
        >>> calls()["reference"] - before
        0
    """
    return {"reference": reference.calls, **cpu.calls()}


class use:  # noqa: N801 - reads as a verb, with or without `with`
    """Force the kernels of floating-point tensors on the CPU, at once and until the end of a ``with`` block, if any.

    Args:
        name: One of :func:`available`, or ``"auto"`` for the best of this machine.

    Raises:
        ValueError: there are no such kernels, or they can't run here; nothing changes.

    Example:
        >>> with use("reference"):
        ...     active()
        'reference'
    """

    def __init__(self, name: str) -> None:
        self._before = _forced
        _force(name)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _force(self._before or "auto")


def _force(name: str) -> None:
    global _forced, native_enabled
    usable = [kernel.name for kernel in available() if kernel.usable]
    if name != "auto" and name not in usable:
        notes = {kernel.name: kernel.note for kernel in available()}
        why = f" ({notes[name]})" if name in notes else ""
        raise ValueError(f"kernels {name!r} can't be used{why}; this machine has {', '.join(usable)}, and 'auto'")
    _forced = None if name == "auto" else name
    native_enabled = _unavailable is None and name != "reference"
    cpu.force(name if native_enabled and name != "auto" else None)


def announce_fallback() -> None:
    """Warn once, at the first call that the native back end would have taken, that it is missing."""
    global _announced
    if _announced or _unavailable is None or _forced == "reference":
        return
    _announced = True
    warnings.warn(
        f"evenkeel runs on its reference back end, which is slower: the native CPU library is missing, {_unavailable}. "
        "Install a C++ compiler and reinstall evenkeel, or choose this with EVENKEEL_KERNELS=reference.",
        RuntimeWarning,
        stacklevel=2,
    )


def native_takes(x: Tensor) -> bool:
    """Whether ``x`` goes to the native back end (which may still decline a rare case, such as mixed dtypes)."""
    if x.dtype not in DTYPES or not x.is_cpu:
        return False
    if not native_enabled:
        announce_fallback()
    return native_enabled


_force(os.environ.get(ENVIRONMENT_VARIABLE) or "auto")
