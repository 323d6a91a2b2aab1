"""A description of the machine, for whoever reads the numbers later."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
from pathlib import Path

import torch

import keelnorm
from keelnorm import memory
from keelnorm.bench.results import Machine
from keelnorm.engine.kernels import registry
from keelnorm.measure import machine

#: Prefixes of environment variables that set the allocator, the threads or the kernels.
VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "KMP_", "GOMP_", "MKL_", "KEELNORM_")


def describe() -> Machine:
    """The machine as this process sees it now."""
    return Machine(
        cpu=machine.cpu_model(),
        cores=machine.cores(),
        threads=torch.get_num_threads(),
        system=machine.system(),
        python=platform.python_version(),
        torch=torch.__version__,
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        keelnorm=keelnorm.__version__,
        keelnorm_kernels=registry.active(),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        page_bytes=mmap.PAGESIZE,
        torch_build=build(),
        caches=caches(),
        memory_bytes=memory_bytes(),
        allocator=memory.obstacle() or "glibc's malloc",
        revision=revision(),
        environment={name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
    )


def build() -> str:
    """The compiler and the libraries that torch was built with, as far as they matter here."""
    words = ("GCC", "Clang", "oneAPI", "MKL-DNN", "OpenMP", "CPU capability")
    lines = torch.__config__.show().splitlines()
    return "; ".join(line.strip(" -") for line in lines if any(word in line for word in words) and len(line) < 200)


def caches(folder: Path = Path("/sys/devices/system/cpu")) -> dict[str, int]:
    """Bytes of each level of cache, over all cores; empty where the system does not tell."""
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


def memory_bytes() -> int | None:
    """The machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def revision() -> str | None:
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
