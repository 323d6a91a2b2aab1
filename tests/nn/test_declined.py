"""What the native kernels decline runs on the reference, which is said once for each reason."""

from __future__ import annotations

import logging

import pytest
import torch
from support.forcing import require_kernel

import keelnorm as kn
from keelnorm.engine import fast_operators


@pytest.fixture
def said(caplog, monkeypatch):
    require_kernel("baseline")
    monkeypatch.setattr(fast_operators, "_announced", set())
    caplog.set_level(logging.WARNING, logger="keelnorm")
    with kn.kernels.use("auto"):
        yield lambda: [record.getMessage() for record in caplog.records]


def test_a_residual_of_another_dtype_is_announced_once(said):
    layer, x = kn.BatchNorm1d(3), torch.randn(5, 3)
    before = kn.kernels.calls()["reference"]
    for _ in range(3):
        layer(x, residual=x.double(), activation="relu")
    assert kn.kernels.calls()["reference"] > before
    [message] = said()
    assert "residual" in message
    assert "reference" in message


def test_what_they_take_is_not(said):
    layer = kn.BatchNorm1d(3)
    for dtype in (torch.float32, torch.bfloat16):
        layer(torch.randn(5, 3, dtype=dtype), activation="gelu").sum().backward()
    with torch.no_grad():
        layer(torch.randn(0, 3))  # nothing to compute, whoever runs
    assert said() == []


def test_an_illegal_argument_is_an_error_and_no_fallback(said):
    with pytest.raises(ValueError, match="residual"):
        kn.BatchNorm1d(3)(torch.randn(5, 3), residual=torch.randn(4, 3))
    assert said() == []
