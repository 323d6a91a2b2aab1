"""Fixtures for the tests of functions and layers."""

from collections.abc import Iterator

import pytest
from support.forcing import require_kernel

import keelnorm as kn
from keelnorm.engine.fusion import call


@pytest.fixture(params=("auto", "reference"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels that a user gets, then plain torch."""
    if request.param != "auto":
        require_kernel(request.param)
    with kn.kernels.use(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _small_results_wait_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "smallest", [0, 0])
