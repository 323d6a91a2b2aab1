"""Triton's kernels: on a GPU where there is one, else on CPU tensors in Triton's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import evenkeel as ek
from evenkeel.kernels import triton

#: Modules with kernels, or that hold some.
WITH_KERNELS = (
    "activation", "apply", "gate", "grad_input", "grad_stats", "invert", "launches", "on_chip", "operators", "stats",
    "tile",
)  # fmt: skip


def interpret() -> None:
    """Import the kernels for the interpreter. Whether they are for it is settled when they are imported, and whatever
    imports all modules, as tests of docstrings do, has imported them for a GPU.
    """
    from triton.runtime.interpreter import InterpretedFunction

    launches = sys.modules.get("evenkeel.kernels.triton.launches")
    if launches is None or isinstance(launches.apply_kernel, InterpretedFunction):
        return
    for name in WITH_KERNELS:
        sys.modules.pop(f"evenkeel.kernels.triton.{name}", None)
    triton._operators = None


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the tensors go. The kernels are forced there: a test fails when they did not run, or plain torch ran."""
    if triton.missing() is not None:
        pytest.skip(f"{triton.missing()}, so that its kernels can't run")
    where = "cuda" if torch.cuda.is_available() else "cpu"
    if where == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        interpret()
    # The interpreter computes with numpy, which warns of what a GPU takes in silence: Inf − Inf, say.
    with ek.kernels.use("triton"), np.errstate(all="ignore"):
        before = ek.kernels.calls()
        yield where
        after = ek.kernels.calls()
    assert after["triton"] > before["triton"], "Triton's kernels were forced, but did not run"
    assert after["reference"] == before["reference"], "Triton's kernels were forced, but the reference back end ran"
