"""What the suites of the kernels share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_seeded_and_restored: None) -> None:
    """The tensors are small and the results the same for any number of threads, which test_determinism shows."""
    torch.set_num_threads(1)
