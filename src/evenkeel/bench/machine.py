"""A description of the machine, for whoever reads the numbers later."""

from __future__ import annotations

import mmap
import os
import platform

import torch

import evenkeel
from evenkeel import kernels, machine

from .results import Machine

#: Prefixes of environment variables that set the allocator, the threads or the kernels.
VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "KMP_", "GOMP_", "MKL_", "EVENKEEL_")


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
        evenkeel=evenkeel.__version__,
        evenkeel_kernels=kernels.active(),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        page_bytes=mmap.PAGESIZE,
        environment={name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
    )
