"""What the package shows of itself: to dir, to `import *`, and to type checkers (`make check` asks pyright)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

import keelnorm as kn
from keelnorm.engine import activations, arguments, masking

ROOT = Path(__file__).parents[2]
MODULES = [getattr(kn, name) for name in kn.__all__ if isinstance(getattr(kn, name), ModuleType)]


def test_dir_has_the_public_names_and_nothing_else() -> None:
    shown = [name for name in dir(kn) if name not in dir(ModuleType("empty"))]
    extra = {"__all__", "__builtins__", "__cached__", "__dir__", "__file__", "__getattr__", "__path__"}
    assert set(shown) - extra == set(kn.__all__)
    assert {"convert", "fold", "surgery", "BatchNorm2d"} <= set(shown)


def test_all_is_sorted_and_complete() -> None:
    assert kn.__all__ == sorted(set(kn.__all__))
    operations = set(kn.surgery.__all__) - {"register"}  # which says of classes what they are, and is asked for there
    assert {*kn.nn.__all__, *operations, "surgery", "nn"} <= set(kn.__all__)
    assert all(getattr(kn, name) is getattr(kn.surgery, name) for name in operations)
    assert {name for name in kn.control.__all__ if name[0].islower()} <= set(kn.__all__)
    with pytest.raises(AttributeError, match="module 'keelnorm' has no attribute 'nope'"):
        _ = kn.nope  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_public_modules_say_what_is_public(module: ModuleType) -> None:
    assert module.__all__
    assert all(hasattr(module, name) for name in module.__all__)


def test_what_the_pages_use_is_public() -> None:
    used = set()
    for page in (*ROOT.glob("docs/*.md"), ROOT / "README.md", *ROOT.glob("examples/**/*.py")):
        used |= set(re.findall(r"\bkn\.([A-Za-z]\w*)(?:\.([a-z]\w*))?", page.read_text(encoding="utf-8")))
    assert len(used) > 50
    assert not [name for name, _ in used if name not in kn.__all__]
    inner = [(getattr(kn, name), part) for name, part in used if part and isinstance(getattr(kn, name), ModuleType)]
    assert inner
    assert not [f"{module.__name__}.{part}" for module, part in inner if part not in module.__all__]


def test_what_a_string_may_be_is_in_its_type() -> None:
    assert set(get_args(activations.ActivationName)) == {name for name in activations.NAMED if name is not None}
    assert get_args(masking.TooFew) == masking.TOO_FEW == ("error", "running", "skip")
    assert get_args(arguments.Padding) == arguments.PADDINGS == ("zero", "keep")


def functions() -> Iterator[tuple[str, Any]]:
    """Public functions, and the constructors and forwards of public classes."""
    for owner in (kn, *MODULES):
        for name in owner.__all__:
            value = getattr(owner, name)
            parts = {f"{name}.{part}": getattr(value, part, None) for part in ("__init__", "forward")}
            for label, function in (parts if isinstance(value, type) else {name: value}).items():
                if inspect.isfunction(function) and function.__module__.startswith("keelnorm"):
                    yield label, function


#: Strings that may be anything: the names of kernels, of what was called, and the like.
FREE = {"what", "name", "prefix", "device"}


def test_no_choice_is_a_mere_string() -> None:
    found = 0
    for name, function in functions():
        for parameter, value in inspect.signature(function).parameters.items():
            found += 1
            if isinstance(value.default, str) and parameter not in FREE:
                assert value.annotation not in ("str", str), f"{name}({parameter}: str)"
            if parameter == "activation":
                assert value.annotation == "ActivationLike", name
    assert found > 200
