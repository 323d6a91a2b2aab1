"""Optional packages: which are missing, and the command that installs them."""

from __future__ import annotations

import re
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

_DISTRIBUTION = "keelnorm"
#: Packages whose names differ from their modules.
_PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}


def lacking(extra: str, *modules: str) -> str | None:
    """Name the missing modules of an extra and the command that installs them; None if none is missing.

    The command names the packages, not ``keelnorm[extra]``: it works however keelnorm was installed, from a folder, a
    wheel or an index.
    """
    missing = missing_modules(*modules)
    if not missing:
        return None
    wanted = required_by(extra)
    wanted = [one for one in wanted if not _is_installed(one)] or wanted
    words = wanted or [_PACKAGES.get(module, module) for module in missing]
    return f"{', '.join(missing)}: {' '.join([_installer(), *map(quote, words)])}"


def missing_modules(*modules: str) -> list[str]:
    """Those of the modules that are not installed."""
    return [module for module in modules if find_spec(module) is None]


def required_by(extra: str) -> list[str]:
    """The packages of an extra, with their versions, from the installed metadata; [] without metadata."""
    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []  # on the path, not installed
    found: list[str] = []
    for line in lines:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", marker) is None:
            continue
        own = re.match(rf"{_DISTRIBUTION}\[([\w, -]+)\]", requirement)
        found += [one for other in own[1].split(",") for one in required_by(other.strip())] if own else [requirement]
    return list(dict.fromkeys(found))


def _is_installed(requirement: str) -> bool:
    try:
        metadata.distribution(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
    except metadata.PackageNotFoundError:
        return False
    return True


def _installer() -> str:
    """The command that installs packages for this Python, even if the shell finds another one first."""
    if not _is_installed("pip"):  # as in the environments of uv
        return f"uv pip install --python {quote(sys.executable)}"
    pip = shutil.which("pip")
    beside = pip is not None and Path(pip).parent == Path(sys.executable).parent
    return "pip install" if beside else f"{quote(sys.executable)} -m pip install"
