"""What disturbs a measurement: other programs on the cores, and memory that arrives fresh.

A parallel loop ends when its last thread does. Once another program takes one of the cores, every
loop waits a turn of the scheduler, several milliseconds, whatever it computes: such samples say
nothing about the code, so they have to be known.

A large tensor that the allocator takes from the system and returns at every call costs a page fault
for every page of it, which can take longer than the arithmetic. Whether that happens depends on
what the process has allocated before, so that has to be known too.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

TASKS = Path("/proc/self/task")
STATUS = Path("/proc/self/status")


def run_delay() -> float | None:
    """Seconds that this process's threads were ready to run and had no core; None if unknown."""
    total_ns = 0
    try:
        for task in TASKS.iterdir():
            # Fields: time on a core, time waiting for one (both ns), turns.
            total_ns += int((task / "schedstat").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):  # not Linux, or a thread that has just ended
        return None
    return total_ns / 1e9


def page_faults() -> int:
    """Pages that this process has had to be given so far; 0 where that is not counted."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


def peak_bytes() -> int | None:
    """The most memory that this process has had resident so far; None if unknown.

    Not `ru_maxrss` where it can be helped: on Linux a process starts with that of the one it was
    started from.
    """
    try:
        for line in STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    if resource is None or sys.platform == "linux":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)  # kilobytes, but on macOS
