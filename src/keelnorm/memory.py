"""Reuse of freed memory: large tensors are allocated in pages that the process already has."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import warnings
from pathlib import Path
from types import TracebackType

__all__ = ["is_active", "obstacle", "reuse_memory"]

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
