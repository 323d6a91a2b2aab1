"""The GPU kernels' tests in Triton's interpreter, each file in a process of its own; see conftest.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from keelnorm.engine.kernels import triton

FOLDER = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize(
    "asked",
    [
        ("test_triton_contract.py", "-k", "walked"),
        ("test_triton_contract.py", "-k", "not walked"),
        ("test_triton_layers.py",),
        ("test_triton_tuning.py",),
    ],
    ids=" ".join,
)
def test_they_pass(asked):
    if triton.missing() is not None:
        pytest.skip(triton.missing())
    if torch.cuda.is_available() or triton.interpreted():
        pytest.skip("they run in this process")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    name, *chosen = asked
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-q",
        str(FOLDER / name),
        *chosen,
    ]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=FOLDER.parents[1], env=environment | {"TRITON_INTERPRET": "1"}
    )
    assert run.returncode == 0, run.stdout[-5000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout
    assert int(passed[1]) >= 13
    assert "skipped" not in run.stdout
