"""Every activation of the table in engine/activations.py is known wherever it has to be; see docs/kernels.md."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.activations import FUNCTIONS, MODULES

import keelnorm as kn
from keelnorm.engine import activations
from keelnorm.engine.activations import NAMED, TABLE, Definition, resolve
from keelnorm.engine.arguments import check_inplace

ROOT = Path(__file__).parents[2]
KERNELS = Path("src/keelnorm/engine/kernels")

each = pytest.mark.parametrize("row", TABLE[1:], ids=lambda row: row.name)
invertible = pytest.mark.parametrize("row", [row for row in TABLE[1:] if row.inverse], ids=lambda row: row.name)


def text(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_list_in_cpp_is_the_table() -> None:
    path = KERNELS / "cpu/csrc/activation_list.h"
    rows = [(name, inverse == "true") for name, inverse in re.findall(r"X\((\w+), \w+, (true|false)\)", text(path))]
    assert rows == [(row.name, row.inverse is not None) for row in TABLE], f"{path} and engine/activations.py differ"


@each
def test_triton_has_it(row: Definition) -> None:
    path = KERNELS / "triton/elementwise.py"
    parts = dict(re.findall(r"def (activate|gradient|inverse)\((.*?)\n    return", text(path), re.DOTALL))
    for function in ("activate", "gradient", "inverse") if row.inverse else ("activate", "gradient"):
        assert f'ACT == "{row.name}"' in parts[function], f"{function}() in {path} lacks {row.name!r}"


@each
def test_the_native_driver_has_it(row: Definition) -> None:
    path = "tests/native/functions.h"
    count = text(path).count(f"case Activation::{row.name}:")
    assert count >= 2, f"value() or slope() in {path} lacks {row.name!r}"


@each
def test_the_tests_have_it(row: Definition) -> None:
    path = "tests/support/activations.py"
    assert row.name in FUNCTIONS, f"FUNCTIONS in {path} lacks {row.name!r}"
    assert NAMED[row.name] in [resolve("", module) for module in MODULES], f"MODULES in {path} lack {row.name!r}"


@each
def test_its_module_stands_for_it(row: Definition) -> None:
    assert resolve("", row.module(**row.options, **row.parameters)) == NAMED[row.name]


@each
def test_torchs_function_of_the_same_name_is_fused(row: Definition) -> None:
    assert hasattr(F, row.name) or row.options, (
        f"torch.nn.functional has no {row.name!r}: _READERS in engine/fusion/operations.py needs an entry for it"
    )


def test_its_name_is_in_the_type() -> None:
    names = ", ".join(f'"{row.name}"' for row in TABLE[1:])
    found = re.search(r"ActivationName: TypeAlias = Literal\[(.*?),\s*\]", inspect.getsource(activations), re.DOTALL)
    assert found is not None
    assert " ".join(found[1].split()) == names, "ActivationName in engine/activations.py differs from TABLE"


@each
def test_it_is_documented(row: Definition) -> None:
    arguments = ", ".join([*(f'"{value}"' for value in row.options.values()), *row.parameters])
    formula = row.formula.replace("|", r"\|")
    line = f'| `"{row.name}"` | `{row.module.__name__}({arguments})` | {formula} |'
    assert line in text("docs/layers.md"), f"docs/layers.md lacks the line {line}"
    found = f'``"{row.name}"``' in inspect.getdoc(kn.functional.batch_norm)
    assert found, f"the docstring of batch_norm in functional.py lacks {row.name!r}"


@invertible
def test_it_is_named_where_a_result_may_take_the_memory_of_x(row: Definition) -> None:
    with pytest.raises(ValueError, match="inplace=True") as caught:
        check_inplace("BatchNorm2d", torch.zeros(2, 3), None, NAMED["relu"])
    assert repr(row.name) in str(caught.value), f"check_inplace in engine/arguments.py lacks {row.name!r}"
