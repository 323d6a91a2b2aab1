"""Memory: pages that are reused for large tensors, and outputs that are not kept for the backward."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from keelnorm.engine import saved_outputs
from keelnorm.engine.error_messages import check_module

__all__ = ["is_active", "obstacle", "reuse_memory", "save_memory"]

# malloc.h's names for what mallopt sets.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
LARGEST_INT = 2**31 - 1  # mallopt takes a C int
NEVER = -1  # as a trim threshold: keep everything
MIB = 1 << 20
# The ends of the range over which glibc adjusts the thresholds by itself, on machines of 64 bits.
MMAP_THRESHOLD, TRIM_THRESHOLD, MMAP_MAX = 32 * MIB, 64 * MIB, 65536

#: Environment variables that set the same thresholds; if one is set, they stay the user's.
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_TUNABLES = ("glibc.malloc.mmap_threshold", "glibc.malloc.mmap_max", "glibc.malloc.trim_threshold")

_log = logging.getLogger("keelnorm")
_lock = threading.Lock()
_holders = 0
_warned = False


class reuse_memory:  # noqa: N801 - reads as a verb, with or without `with`
    """Keep the memory of freed tensors for the next ones, until the end of a ``with`` block or ``undo()``.

    glibc maps a tensor of more than 32 MiB at every allocation and unmaps it when it is freed. The system then has to
    zero every page again, which costs more than the arithmetic of a batch norm. While this is active, tensors of up to
    2 GiB are allocated in memory that stays with the process. It may be nested; the outermost one counts.

    About the first seven allocations of a size still use new memory: the remainders of their alignment do not merge
    with neighboring free memory until the C library's cache of such pieces is full. Warm up before measuring.

    It changes the whole process, keeps memory at its peak until it is undone, and is never active by default. The
    logger ``keelnorm`` reports changes at level INFO. If it is not available (a C library other than glibc, another
    allocator, thresholds set by the environment) nothing happens, and a warning is issued once.

    Afterwards free memory returns to the system, and the thresholds are 32 MiB (mapping) and 64 MiB (trimming). These
    are the largest that glibc reaches by itself, not always the previous ones: glibc does not report its thresholds,
    and stops adjusting them once they have been set. Free ranges in the middle of the heap can serve later tensors even
    then. So to compare with and without, measure without first, or in another process.

    Attributes:
        active: Whether this object keeps the memory.
        reason: Why, or why not.

    Warns:
        RuntimeWarning: Once per process, if memory can't be reused.

    Example:
        >>> with reuse_memory() as reuse:
        ...     assert reuse.active or reuse.reason
        >>> reuse.active, reuse.reason
        (False, 'undone')

    Source:
        mallopt(3), and "Tunables" in The GNU C Library Reference Manual.
    """

    active: bool
    reason: str

    def __init__(self) -> None:
        global _holders
        with _lock:
            why_not = obstacle()
            if why_not is None and _holders == 0 and not _raise_thresholds():
                why_not = "the C library refuses the thresholds"
            self.active = why_not is None
            self.reason = why_not or "thresholds of glibc's malloc are raised"
            _holders += self.active
        if self.active:
            _log.info("memory of freed tensors is reused: %s", self.reason)
        else:
            _warn_once(self.reason)

    def undo(self) -> None:
        """Return the memory to the system and restore glibc's thresholds; a second call does nothing."""
        global _holders
        with _lock:
            if self.active:
                _holders -= 1
                if _holders == 0:
                    _restore_thresholds()
                    _log.info("memory of freed tensors goes back to the system")
            self.active, self.reason = False, "undone"

    def __enter__(self) -> reuse_memory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<reuse_memory: {'active' if self.active else 'not active'}, {self.reason}>"


@dataclass(frozen=True)
class _Begin:
    """A forward pre-hook, which is copied and pickled with its model."""

    longest: int

    def __call__(self, module: nn.Module, _: Any) -> None:
        saved_outputs.enter(module, self.longest, _end)


def _end(module: nn.Module, _: Any, __: Any) -> None:
    saved_outputs.leave(module)


class save_memory:  # noqa: N801 - reads as a verb, with or without `with`
    """Recompute outputs of a model's batch norms in the backward instead of keeping them, until ``undo()``.

    For y = act(bn(x) + residual), autograd keeps x for the batch norm and y for whatever reads it. Only x is kept then:
    the backward computes y from x once more, which costs one pass over x. Outputs, gradients and running statistics
    are the same bit for bit. A residual that is itself such an output is recomputed too, in chains of ``longest``.

    It is about the fused operation: an activation behind a batch norm that runs by itself is kept as before. So convert
    the model first (:func:`kn.convert`), or give layers their ``activation=``. Masks, sample weights and nearly all
    variants are included, and synchronized layers ask no other rank again; docs/memory.md lists what is kept.

    Args:
        model: A module whose calls are concerned. It is not changed, but for two hooks, which a copy of it has too.
        longest: The longest chain of outputs that are computed from one another, 1 to 64. A longer chain keeps less and
            computes more.

    Differs:
        From activation checkpointing: convolutions are not computed again. Inside of a checkpoint, or of other hooks on
        saved tensors (``torch.autograd.graph.save_on_cpu``), inside or outside the model, these act alone. Under
        torch.compile and torch.func nothing is done, which is logged once. A change of an output through ``.data`` is
        not seen.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``longest`` is not an integer from 1 to 64.
        RuntimeError: In the backward, in torch's words: what an output is computed from was changed in place;
            also where torch would not look, as for a mask or a residual's buffer that is used again.

    Example:
        >>> import torch
        >>> layer = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> with save_memory(layer):
        ...     layer(torch.randn(2, 3, 8, 8)).sum().backward()

    Source:
        Rota Bulò, Porzi, Kontschieder (2018), arXiv:1712.02616, section 3 ("checkpointing" of BN and activation);
        Chen and others (2016), arXiv:1604.06174, for recomputation in general.
    """

    def __init__(self, model: nn.Module, *, longest: int = 8) -> None:
        check_module("save_memory", model)
        saved_outputs.check_longest("save_memory", longest)
        self.model = model
        last = model.register_forward_hook(_end, always_call=True)
        self._handles = model.register_forward_pre_hook(_Begin(longest)), last

    def undo(self) -> None:
        """Keep outputs again; a second call does nothing. Graphs that exist stay as they are.

        A call that runs in another thread ends as it began.
        """
        saved_outputs.stop(self.model, *self._handles)

    def __enter__(self) -> save_memory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def is_active() -> bool:
    """Whether any object keeps the memory."""
    return _holders > 0


def obstacle() -> str | None:
    """Why memory can't be reused on this machine and in this environment; None if it can."""
    try:
        process = ctypes.CDLL(None)
        process.gnu_get_libc_version, process.mallopt, process.malloc_trim  # noqa: B018 - checks that they exist
    except (AttributeError, OSError, TypeError):
        return "the C library is not glibc"
    owner = _owner_of_allocations(process)
    if owner is not None and not owner.startswith("libc"):
        return f"memory comes from {owner}, not from glibc"
    for name in _VARIABLES:
        if name in os.environ:
            return f"the environment sets {name}"
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(name in tunables for name in _TUNABLES):
        return "the environment sets malloc's thresholds in GLIBC_TUNABLES"
    return None


class _Symbol(ctypes.Structure):
    """dlfcn.h's Dl_info."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _owner_of_allocations(process: ctypes.CDLL) -> str | None:
    """The library that allocates tensors: a preloaded allocator, if there is one.

    torch calls posix_memalign. The address of malloc would mislead: in a program at fixed addresses, such as Debian's
    python3, it is a stub in the program itself.
    """
    symbol = _Symbol()
    try:
        found = process.dladdr(ctypes.cast(process.posix_memalign, ctypes.c_void_p), ctypes.byref(symbol))
    except AttributeError:
        return None
    return Path(symbol.file.decode()).name if found and symbol.file else None


def _raise_thresholds() -> bool:
    process = ctypes.CDLL(None)
    # Older releases refuse a threshold above 32 MiB, but accept a limit of 0 mappings.
    mapped = process.mallopt(M_MMAP_THRESHOLD, LARGEST_INT) or process.mallopt(M_MMAP_MAX, 0)
    return bool(mapped and process.mallopt(M_TRIM_THRESHOLD, NEVER))


def _restore_thresholds() -> None:
    process = ctypes.CDLL(None)
    process.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    process.mallopt(M_MMAP_MAX, MMAP_MAX)
    process.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
    process.malloc_trim(0)


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"memory of freed tensors is not reused: {reason}", RuntimeWarning, stacklevel=3)
