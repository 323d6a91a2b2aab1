"""Private names of torch: one module of the package has them all, and the installed torch has each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from keelnorm.engine import torch_internals

PACKAGE = Path(torch_internals.__file__).parents[1]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "torch_internals.py")
LISTED = {name.partition(".")[2] for name in torch_internals.ATTRIBUTES}
OWNERS: dict[str, Any] = {
    "Tensor": torch.zeros(1),
    "UntypedStorage": torch.zeros(1).untyped_storage(),
    "Module": nn.Module(),
    "OptimizedModule": SimpleNamespace(_orig_mod=None),  # the class has it in instances alone
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def dotted(node: ast.expr) -> list[str]:
    """Return the names of ``a.b.c``, or [] for another expression."""
    if isinstance(node, ast.Name):
        return [node.id]
    return [*dotted(node.value), node.attr] if isinstance(node, ast.Attribute) and dotted(node.value) else []


def private_names_of_torch(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (f"{path.name}:{node.lineno} {node.module}.{name}" for name in names if is_private(name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            names = dotted(node)
            if names[:1] in (["torch"], ["nn"], ["F"]) and names[1:2] != ["ops"]:
                yield f"{path.name}:{node.lineno} {'.'.join(names)}"


def private_attributes(path: Path) -> Iterator[tuple[str, str]]:
    """Private attributes of something other than self that tensors or modules of torch have too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Attribute)
            and is_private(node.attr)
            and any(hasattr(owner, node.attr) for owner in OWNERS.values())
        ):
            yield node.attr, f"{path.name}:{node.lineno} {node.attr}"


def test_no_other_module_has_a_private_name_of_torch() -> None:
    assert [found for path in FILES for found in private_names_of_torch(path)] == []


def test_the_private_attributes_that_are_used_are_listed() -> None:
    used = [found for path in FILES for found in private_attributes(path)]
    assert [where for name, where in used if name not in LISTED] == []
    assert LISTED - {name for name, _ in used} == set(), "listed, and used no more"


def test_the_installed_torch_has_them() -> None:
    missing = []
    for entry in torch_internals.ATTRIBUTES:
        owner, _, name = entry.partition(".")
        if not hasattr(OWNERS[owner], name):
            missing.append(entry)
    assert missing == []


def test_every_name_has_its_reason() -> None:
    """Each import, assignment and function is preceded by a comment, or has a docstring."""
    lines = Path(torch_internals.__file__).read_text(encoding="utf-8").splitlines()
    assert all(reason for reason in torch_internals.ATTRIBUTES.values())
    assignments = [i for i, line in enumerate(lines) if ": Callable[" in line and line[:1].isalpha()]
    assert len(assignments) > 8
    for i in assignments:
        above = next(line for line in reversed(lines[:i]) if ": Callable[" not in line)
        assert above.startswith("#"), lines[i]
