"""Facts about the machine that a measured number depends on."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import keelnorm
from keelnorm import memory
from keelnorm.engine.kernels import registry

#: Prefixes of environment variables that set the allocator, the threads or the kernels.
VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "KMP_", "GOMP_", "MKL_", "KEELNORM_")


@dataclass
class Machine:
    """The machine and the versions of a run, without anything that names a user, a host or a path.

    `caches` holds bytes by level, over all cores. `environment` holds the variables that change memory, threads or
    kernels. `revision` is git's, with `+` if the sources were changed after it.
    """

    cpu: str
    cores: int
    threads: int
    system: str
    python: str
    torch: str
    torch_capability: str
    keelnorm: str
    keelnorm_kernels: str
    load_average: float | None
    page_bytes: int
    torch_build: str = ""
    caches: dict[str, int] = field(default_factory=dict)
    memory_bytes: int | None = None
    allocator: str = ""
    revision: str | None = None
    gpu: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def describe(*, with_revision: bool = False) -> Machine:
    """Describe the machine as this process sees it now.

    Args:
        with_revision: Ask git for the revision of keelnorm's sources, which takes a moment.
    """
    return Machine(
        cpu=_cpu_model(),
        cores=cores(),
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        keelnorm=keelnorm.__version__,
        keelnorm_kernels=registry.active(),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        page_bytes=mmap.PAGESIZE,
        torch_build=_torch_build(),
        caches=caches(),
        memory_bytes=_memory_bytes(),
        allocator=memory.obstacle() or "glibc's malloc",
        revision=_revision() if with_revision else None,
        environment={name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
    )


def facts_of(machine: Machine) -> dict[str, str]:
    """The facts in words, for a page."""
    facts = asdict(machine)
    facts["environment"] = " ".join(f"{key}={value}" for key, value in machine.environment.items()) or "nothing set"
    facts["caches"] = ", ".join(f"{level} {size >> 10} KiB" for level, size in machine.caches.items()) or "unknown"
    if machine.memory_bytes:
        facts["memory"] = f"{machine.memory_bytes / 2**30:.1f} GiB"
    del facts["memory_bytes"]
    return {key.replace("_", " "): "unknown" if value is None else str(value) for key, value in facts.items()}


def available_bytes(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that programs can still take without another one losing its own; None if unknown.

    Args:
        meminfo: The system's own account.
        group: The control group of a container, which may allow less.
    """
    found = []
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    try:
        most, taken = ((group / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        found.append(max(0, int(most) - int(taken)))
    except (OSError, ValueError):  # no such group, or "max"
        pass
    return min(found, default=None)


def cores() -> int:
    """Count the cores this process may use: a container or an affinity mask allows fewer than ``os.cpu_count()``."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _torch_build() -> str:
    """The compiler and the libraries that torch was built with."""
    words = ("GCC", "Clang", "oneAPI", "MKL-DNN", "OpenMP", "CPU capability")
    lines = torch.__config__.show().splitlines()
    return "; ".join(line.strip(" -") for line in lines if any(word in line for word in words) and len(line) < 200)


def caches(folder: Path = Path("/sys/devices/system/cpu")) -> dict[str, int]:
    """Bytes of each level of cache, over all cores; empty where the system does not say."""
    found: dict[tuple[str, str], int] = {}
    units = {"K": 1 << 10, "M": 1 << 20}
    try:
        for index in sorted(folder.glob("cpu[0-9]*/cache/index[0-9]*")):
            level, kind, size, shared = (
                (index / name).read_text(encoding="ascii").strip()
                for name in ("level", "type", "size", "shared_cpu_list")
            )
            if kind != "Instruction":
                found[f"L{level}", shared] = int(size[:-1]) * units[size[-1]]
    except (OSError, KeyError, ValueError, IndexError):
        return {}
    total: dict[str, int] = {}
    for (level, _), size_bytes in found.items():
        total[level] = total.get(level, 0) + size_bytes
    return dict(sorted(total.items()))


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _revision() -> str | None:
    """The git revision of keelnorm's sources, `+` after it if they were changed; None outside a repository."""
    here = Path(keelnorm.__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    answers = []
    for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        if done.returncode != 0:
            return None
        answers.append(done.stdout.strip())
    return answers[0] + ("+" if answers[1] else "")
