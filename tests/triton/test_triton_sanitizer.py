"""The kernels under NVIDIA's compute-sanitizer: no access out of bounds, no race."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.triton

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_found(tmp_path, tool):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU here")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, which comes with NVIDIA's CUDA toolkit, is not installed")
    checks = ["-m", "benchmarks.gpu", "--seconds", "0", "--network", "none", "--out", str(tmp_path / "none.json")]
    asked = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, *checks]
    run = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "0 errors" in run.stdout or "0 hazards" in run.stdout
