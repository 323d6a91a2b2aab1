"""Triton's kernels: on a GPU where there is one, else on CPU tensors in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import keelnorm as kn
from keelnorm.engine.kernels import triton

# Triton decides whether to interpret when it is first imported, and other tests may have imported it without that. On
# machines without a GPU, test_triton_interpreted.py runs these files in new processes.
INTERPRETED = ("test_triton_contract.py", "test_triton_layers.py", "test_triton_tuning.py")
HERE = triton.missing() is not None or torch.cuda.is_available() or triton.interpreted()
collect_ignore = [] if HERE else list(INTERPRETED)


@pytest.fixture
def device() -> Iterator[str]:
    """The device of the tensors. The test fails if other kernels than Triton's ran there, or none."""
    if triton.missing() is not None:
        pytest.skip(f"{triton.missing()}, so that its kernels can't run")
    where = "cuda" if torch.cuda.is_available() else "cpu"
    # The interpreter computes with numpy, which warns where a GPU does not, of Inf − Inf, say.
    with kn.kernels.use("triton"), np.errstate(all="ignore"):
        before = kn.kernels.calls()
        yield where
        after = kn.kernels.calls()
    assert after["triton"] > before["triton"], "Triton's kernels were forced, but did not run"
    assert after["reference"] == before["reference"], "Triton's kernels were forced, but the reference back end ran"
