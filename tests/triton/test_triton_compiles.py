"""The kernels compile for GPUs, which the interpreter does not show; on NVIDIA's registers suffice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keelnorm.engine.kernels import triton

pytestmark = [pytest.mark.triton, pytest.mark.slow]

KERNELS = {
    "part_kernel", "merge_kernel", "coefficient_kernel", "apply_kernel", "forward_kernel", "grad_part_kernel",
    "grad_merge_kernel", "slope_kernel", "grad_input_kernel", "backward_kernel", "invert_kernel",
}  # fmt: skip
A_FEW_BYTES = 16


@pytest.mark.skipif(triton.missing() is not None, reason=f"{triton.missing()}")
@pytest.mark.parametrize("target", [("cuda", "90"), ("hip", "gfx942")], ids="-".join)
def test_every_kernel_compiles(tmp_path, target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    asked = [sys.executable, "-W", "ignore", "-m", "support.compiling", *target]
    run = subprocess.run(asked, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert {each["kernel"] for each in found} == KERNELS
    if target[0] == "cuda":
        assert max(each["spilled"] for each in found) <= A_FEW_BYTES
