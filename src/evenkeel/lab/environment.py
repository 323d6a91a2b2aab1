"""What a figure depends on besides its axes: the machine, the versions, the code."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn")

# What can't change a measured number: a stored result stays good when these are edited.
_NOT_MEASURED = ("cli.py", "report/", "audit/", "bench/", "lab/experiments/")


def version(package: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@cache
def _description() -> tuple[tuple[str, str], ...]:
    import evenkeel
    from evenkeel import kernels, machine

    facts = {
        "processor": machine.cpu_model(),
        "cores": str(machine.cores()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    facts |= {"evenkeel": evenkeel.__version__, "evenkeel's kernels": kernels.active()}
    facts |= {package: version(package) for package in PACKAGES}
    return tuple(facts.items())


def describe() -> dict[str, str]:
    """The machine and the versions, without anything that names a user, a host or a path."""
    return dict(_description())


@cache
def code_fingerprint(module: str) -> str:
    """A digest of the code that a task defined in `module` runs.

    It covers the package (native libraries with it) except what can't change a number, and the file of
    `module` itself: editing one experiment makes that experiment's stored results stale, and no other's.
    """
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.suffix not in (".py", ".so", ".pyd", ".dylib") or name.startswith(_NOT_MEASURED):
            continue
        digest.update(name.encode() + b"\0" + path.read_bytes())
    spec = find_spec(module)
    if spec is not None and spec.origin is not None:
        digest.update(Path(spec.origin).read_bytes())
    return digest.hexdigest()[:16]
