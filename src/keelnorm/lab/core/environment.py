"""What a figure depends on besides its axes: the machine, the versions, the code."""

from __future__ import annotations

import ast
import hashlib
import platform
from collections.abc import Callable
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from keelnorm.measure.machine import describe as describe_machine

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn")

#: Files and folders of the package that can't change a measured number: a stored result stays good when they change.
NOT_MEASURED = (
    "bench/", "cli/", "engine/atomic_write.py", "lab/claims/", "lab/reading/",
    "measure/page_parts.py", "measure/page/", "measure/plain_data.py", "measure/statistics.py",
    "lab/core/claim.py", "lab/core/clusters.py", "lab/core/environment.py", "lab/core/laboratory.py",
    "lab/core/parallel.py", "lab/core/plan.py", "lab/core/progress.py", "lab/core/runner.py", "lab/core/store.py",
)  # fmt: skip


def version(package: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@cache
def _description() -> tuple[tuple[str, str], ...]:
    machine = describe_machine()
    facts = {
        "processor": machine.cpu,
        "cores": str(machine.cores),
        "system": f"{platform.system()} {platform.machine()}",
        "python": machine.python,
    }
    facts |= {"keelnorm": machine.keelnorm, "keelnorm's kernels": machine.keelnorm_kernels}
    facts |= {package: version(package) for package in PACKAGES}
    return tuple(facts.items())


def describe() -> dict[str, str]:
    """The machine and the versions, without anything that names a user, a host or a path."""
    return dict(_description())


@cache
def _package_digest() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.suffix in (".py", ".so", ".pyd", ".dylib") and not name.startswith(NOT_MEASURED):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def code_fingerprint(task: Callable[..., object]) -> str:
    """A digest of the code that a task runs.

    It covers the package (native libraries with it) except what can't change a number, and from the task's own module
    what the task uses: editing how a claim is read or worded makes no stored result stale.
    """
    digest = hashlib.sha256(_package_digest().encode())
    digest.update(source_used(task).encode())
    return digest.hexdigest()[:16]


def source_used(task: Callable[..., object]) -> str:
    """The source of a function and of all that it uses, directly or not, of its own module."""
    spec = find_spec(task.__module__)
    if spec is None or spec.origin is None:
        return task.__qualname__
    text = Path(spec.origin).read_text(encoding="utf-8")
    statements = ast.parse(text).body
    defined: dict[str, ast.stmt] = {}
    for statement in statements:
        for name in _names_defined(statement):
            defined[name] = statement
    wanted, seen = [task.__qualname__.partition(".")[0]], set()
    while wanted:
        name = wanted.pop()
        if name in seen or name not in defined:
            continue
        seen.add(name)
        wanted += [node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)]
    # In the order of the module, each statement once.
    kept = [each for each in statements if any(defined.get(name) is each for name in seen)]
    return "\n".join(ast.unparse(each) for each in kept)


def _names_defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [(each.asname or each.name).partition(".")[0] for each in statement.names]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [
        node.id for target in targets if target is not None for node in ast.walk(target) if isinstance(node, ast.Name)
    ]
