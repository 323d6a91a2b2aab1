"""The native CPU back end: loads the library, says which instruction sets it has, forces one.

KEELNORM_LIBRARY names another library than the one in the package, such as one built with sanitizers.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_WISHED = os.environ.get("KEELNORM_LIBRARY")
_LIBRARY = Path(_WISHED) if _WISHED else Path(__file__).with_name("libkeelnorm.so")
_REASON = Path(__file__).with_name("not_built.txt")
_library: ctypes.CDLL | None = None
_failure: str | None = None


def load() -> str | None:
    """Load the library and with it the operators. Returns why it can't be had, or None when it is there."""
    global _library, _failure
    if _library is not None or _failure is not None:
        return _failure
    if _WISHED and not _LIBRARY.exists():
        _failure = f"KEELNORM_LIBRARY names {_WISHED}, which does not exist"
        return _failure
    if not _LIBRARY.exists():
        detail = f" ({_REASON.read_text().strip()})" if _REASON.exists() else ""
        _failure = f"it was not built when keelnorm was installed{detail}"
        return _failure
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:
        _failure = f"it does not load into this torch: {error}"
        return _failure
    library.keelnorm_kernels_name.restype = ctypes.c_char_p
    library.keelnorm_kernels_calls.restype = ctypes.c_longlong
    _library = library
    return None


def instruction_sets() -> dict[str, bool]:
    """The compiled instruction sets from the plainest on, and whether this machine supports each."""
    if _library is None:
        return {}
    count = _library.keelnorm_kernels_count()
    return {_name(_library, i): bool(_library.keelnorm_kernels_supported(i)) for i in range(count)}


def calls() -> dict[str, int]:
    """How many operators each instruction set has run in this process."""
    if _library is None:
        return {}
    return {name: int(_library.keelnorm_kernels_calls(i)) for i, name in enumerate(instruction_sets())}


def active() -> str | None:
    """The instruction set that runs."""
    return _name(_library, _library.keelnorm_kernels_active()) if _library is not None else None


def force(name: str | None) -> None:
    """Run the named instruction set; None chooses the best of this machine again."""
    if _library is not None:
        _library.keelnorm_kernels_force(-1 if name is None else list(instruction_sets()).index(name))


def _name(library: ctypes.CDLL, i: int) -> str:
    return str(library.keelnorm_kernels_name(i).decode())
