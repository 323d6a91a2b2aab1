"""What the tests of hostile files share."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def peak_bytes() -> Iterator[Callable[[], int]]:
    """The most memory that Python has asked for since the test began, touched or not."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
