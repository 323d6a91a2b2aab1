"""Read what a measurement depends on beside the code: other programs on the cores, fresh pages, resident memory.

A parallel loop ends when its last thread does. When another program takes one of the cores, every
loop waits several milliseconds for the scheduler, whatever it computes. Such samples say nothing
about the code.

A large tensor that the allocator takes from the system and returns at every call costs a page fault
per page, which can take longer than the arithmetic. Whether that happens depends on what the
process has allocated before.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

TASKS = Path("/proc/self/task")
PROCESSES = Path("/proc")


def run_delay() -> float | None:
    """Seconds that threads of this process were ready to run but had no core; None if unknown."""
    total_ns = 0
    try:
        for task in TASKS.iterdir():
            # Fields: time on a core, time waiting for one (both ns), turns.
            total_ns += int((task / "schedstat").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):  # not Linux, or a thread has just ended
        return None
    return total_ns / 1e9


def page_faults() -> int:
    """Page faults of this process so far; 0 where they are not counted."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


def peak_bytes(process: int | None = None) -> int | None:
    """The most memory that a process has had resident so far; None if unknown.

    `ru_maxrss` is not used on Linux, where a process inherits it from its parent.

    Args:
        process: Its number; None for this process. Of another one it is known on Linux only, and while it runs.
    """
    try:
        status = PROCESSES / ("self" if process is None else str(process)) / "status"
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    if resource is None or process is not None or sys.platform == "linux":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)  # kilobytes, except on macOS


def reset_peak() -> bool:
    """Begin the peak of this process again, at what is resident now; False where the system does not do so."""
    try:
        (PROCESSES / "self" / "clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
    except OSError:
        return False
    return True
