"""Kernels by name: which of them a machine can run, and whether those that were forced did run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import keelnorm as kn

ROOT = Path(__file__).parents[2]
#: The instruction sets of every family of machines, the plainest first, and whether they have kernels for all dtypes.
INSTRUCTION_SETS = {
    name: dtypes == "ALL"
    for name, dtypes in re.findall(
        r"X\((\w+), (ALL|BF16),",
        (ROOT / "src/keelnorm/engine/kernels/cpu/csrc/instruction_sets.h").read_text(encoding="utf-8"),
    )
}
NATIVE = tuple(name for name, all_dtypes in INSTRUCTION_SETS.items() if all_dtypes)
KERNELS = ("reference", *NATIVE)
#: Those for bfloat16 alone; other dtypes run on the plainer ones.
BFLOAT16_KERNELS = tuple(name for name, all_dtypes in INSTRUCTION_SETS.items() if not all_dtypes)


def require_kernel(name: str) -> None:
    """Skip the test where kernels can't run, with the reason; fail where KEELNORM_NATIVE=1 says that they must."""
    notes = {kernel.name: kernel for kernel in kn.kernels.available()}
    if name in notes and notes[name].usable:
        return
    if "native" in notes:  # stands for all native kernels where the library is missing
        if os.environ.get("KEELNORM_NATIVE") == "1":
            pytest.fail(f"KEELNORM_NATIVE=1 requires the native kernels, but {notes['native'].note}")
        pytest.skip(f"{name}: {notes['native'].note}")
    pytest.skip(f"{name}: {notes[name].note if name in notes else 'not compiled for this family of machines'}")


def usable_native() -> list[str]:
    """The native kernels that this machine runs for every dtype."""
    usable = [kernel.name for kernel in kn.kernels.available() if kernel.usable]
    return [name for name in usable if name not in ("reference", *BFLOAT16_KERNELS, "triton")]


def plainer_native() -> set[str]:
    """The native kernels that this machine runs only when they are forced: all but its best ones."""
    return set(usable_native()[:-1])


def check_ran(name: str, before: dict[str, int], after: dict[str, int]) -> None:
    """Fail unless the kernels called ``name``, and no others, ran between two readings of ``kn.kernels.calls()``."""
    ran = {kernel: count - before.get(kernel, 0) for kernel, count in after.items() if count != before.get(kernel, 0)}
    if name not in ran:
        pytest.fail(f"the kernels {name!r} were forced, but did not run (these ran: {ran or 'none'})")
    if len(ran) > 1:
        pytest.fail(f"the kernels {name!r} were forced, but others ran too: {ran}")
