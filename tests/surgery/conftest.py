"""Fixtures for the tests of operations on models."""

from __future__ import annotations

import pytest

from keelnorm.engine.fusion import call


@pytest.fixture(autouse=True)
def _small_results_wait_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "smallest", [0, 0])
