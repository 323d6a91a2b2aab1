"""The kernels without torch, against their definition: driver.cpp on this machine, and on an emulated ARM."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import build_driver
import pytest
from support.forcing import BFLOAT16_KERNELS

DTYPES = ("f32", "f64", "bf16", "f16")


def run_driver(which: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, build_driver.__file__, which, *arguments], capture_output=True, text=True, timeout=900
    )


def skip_where_missing(tools: Callable[[], object]) -> None:
    try:
        tools()
    except build_driver.MissingToolError as missing:
        pytest.skip(str(missing))


def checked(output: str) -> dict[str, list[str]]:
    """The dtypes that passed, for each instruction set."""
    found: dict[str, list[str]] = {}
    for name, dtype in re.findall(r"^(\w+) +(\w+) +\d+ checks ok$", output, re.M):
        found.setdefault(name, []).append(dtype)
    return found


@pytest.fixture(scope="module")
def native() -> subprocess.CompletedProcess[str]:
    skip_where_missing(build_driver.compiler)
    return run_driver("native", "--quick")


def test_every_table_is_right(native: subprocess.CompletedProcess[str]) -> None:
    assert native.returncode == 0, native.stdout + native.stderr
    tables = checked(native.stdout)
    assert "baseline" in tables
    bfloat16_alone = {name: tables.pop(name) for name in BFLOAT16_KERNELS if name in tables}
    assert all(dtypes == ["bf16"] for dtypes in bfloat16_alone.values()), bfloat16_alone
    assert all(dtypes == list(DTYPES) for dtypes in tables.values()), tables


@pytest.mark.slow
def test_every_table_is_right_on_arm() -> None:
    """One dtype, because emulation is slow; ``make arm`` checks all dtypes."""
    skip_where_missing(build_driver.arm_tools)
    outcome = run_driver("arm", "--quick", "--dtype", DTYPES[0])
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert checked(outcome.stdout) == {"baseline": [DTYPES[0]]}
