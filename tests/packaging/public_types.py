"""Asks pyright whether each public name is exported and its type known; the names that are not are printed.

Public are the names in ``keelnorm.__all__`` and in the ``__all__`` of the modules there; of classes their members too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import keelnorm


def public_names() -> dict[str, Any]:
    """Public objects by the names that a user gives them."""
    found: dict[str, Any] = {f"keelnorm.{name}": getattr(keelnorm, name) for name in keelnorm.__all__}
    for name, module in list(found.items()):
        if isinstance(module, ModuleType):
            found |= {f"{name}.{inner}": getattr(module, inner) for inner in module.__all__}
    return found


def definitions(value: Any) -> Iterator[str]:
    """Where a public object is defined: itself, and for a class also what it inherits from."""
    for owner in value.__mro__ if isinstance(value, type) else [value]:
        module = getattr(owner, "__module__", None) or ""
        if module.partition(".")[0] == "keelnorm" and hasattr(owner, "__qualname__"):
            yield f"{module}.{owner.__qualname__}"


def pyright(*words: str, folder: str | None = None) -> Any:
    """What pyright answers, in JSON; run in a folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # it asks `python` what is installed
    command = [sys.executable, "-m", "pyright", "--outputjson", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path}, cwd=folder)
    try:
        return json.loads(done.stdout)
    except ValueError:
        sys.exit(f"pyright failed: {done.stdout}{done.stderr}")


def unknown_types(names: dict[str, Any]) -> Iterator[str]:
    """Public names and members whose types a checker doesn't know, or would have to infer."""
    wanted = {place for value in names.values() for place in definitions(value)} | names.keys()
    classes = tuple(f"{place}." for value in names.values() if isinstance(value, type) for place in definitions(value))
    for symbol in pyright("--verifytypes", "keelnorm", "--ignoreexternal")["typeCompleteness"]["symbols"]:
        name = symbol["name"]
        if symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"]:
            continue
        if name in wanted or name.startswith(classes):
            why = "; ".join(one["message"].splitlines()[0] for one in symbol["diagnostics"])
            yield f"{name}: {why or 'its type depends on others that are listed'}"


def unusable_names(names: dict[str, Any]) -> Iterator[str]:
    """What pyright says of a program that mentions every public name."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        program.write_text("import keelnorm\n" + "".join(f"print({name})\n" for name in names), encoding="utf-8")
        for one in pyright(program.name, folder=folder)["generalDiagnostics"]:
            yield one["message"].splitlines()[0]


if __name__ == "__main__":
    everything = public_names()
    if problems := [*unknown_types(everything), *unusable_names(everything)]:
        sys.exit("\n".join(problems))
