"""What the package's extras bring, and how to install what of it is missing."""

from __future__ import annotations

import re
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

_DISTRIBUTION = "keelnorm"
#: Modules whose packages are called otherwise.
_PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}


def lacking(extra: str, *modules: str) -> str | None:
    """Those of an extra's modules that are missing and what installs them, in words; None where all are there.

    The packages are named themselves, not ``keelnorm[extra]``: that holds for however keelnorm came here, be it from a
    folder, a wheel or an index.
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
    """The packages that an extra brings, with their versions, as the installed metadata has them; [] without any."""
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
    """What installs packages for this Python, whichever one the shell finds first."""
    if not _is_installed("pip"):  # as in the environments of uv
        return f"uv pip install --python {quote(sys.executable)}"
    pip = shutil.which("pip")
    beside = pip is not None and Path(pip).parent == Path(sys.executable).parent
    return "pip install" if beside else f"{quote(sys.executable)} -m pip install"
