"""The native CPU back end: loads the library, lists its instruction sets, and forces one.

KEELNORM_LIBRARY names a library to load instead of the package's, such as one built with sanitizers.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import NamedTuple

_WISHED = os.environ.get("KEELNORM_LIBRARY")
_LIBRARY = Path(_WISHED) if _WISHED else Path(__file__).with_name("libkeelnorm.so")
_REASON = Path(__file__).with_name("not_built.txt")
_library: ctypes.CDLL | None = None
_failure: str | None = None


class InstructionSet(NamedTuple):
    """An instruction set that the library was compiled for.

    Args:
        name: Its name.
        supported: Whether this machine has it.
        note: What it is, for users.
    """

    name: str
    supported: bool
    note: str


def load() -> str | None:
    """Load the library, which registers the operators. Returns why it is missing, or None."""
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
    library.keelnorm_kernels_name.restype = library.keelnorm_kernels_note.restype = ctypes.c_char_p
    library.keelnorm_kernels_calls.restype = ctypes.c_longlong
    _library = library
    return None


def instruction_sets() -> list[InstructionSet]:
    """The compiled instruction sets, the plainest first."""
    if _library is None:
        return []
    return [
        InstructionSet(
            _library.keelnorm_kernels_name(i).decode(),
            bool(_library.keelnorm_kernels_supported(i)),
            _library.keelnorm_kernels_note(i).decode(),
        )
        for i in range(_library.keelnorm_kernels_count())
    ]


def calls() -> dict[str, int]:
    """How many operators each instruction set has run in this process."""
    if _library is None:
        return {}
    return {each.name: int(_library.keelnorm_kernels_calls(i)) for i, each in enumerate(instruction_sets())}


def active() -> str | None:
    """The name of the instruction set that runs; None without the library."""
    return None if _library is None else _library.keelnorm_kernels_name(_library.keelnorm_kernels_active()).decode()


def force(name: str | None) -> None:
    """Run the named instruction set; None chooses the best of this machine again."""
    if _library is not None:
        names = [each.name for each in instruction_sets()]
        _library.keelnorm_kernels_force(-1 if name is None else names.index(name))
