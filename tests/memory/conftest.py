from __future__ import annotations

from collections.abc import Iterator

import pytest

from keelnorm.engine import saved_outputs
from keelnorm.engine.fusion.call import all_sizes_wait
from keelnorm.engine.torch_internals import saved_tensor_hooks


@pytest.fixture(autouse=True)
def _small_results_wait_and_no_hooks_stay() -> Iterator[None]:
    with all_sizes_wait():
        yield
    assert saved_outputs._here.frame is None
    assert saved_outputs.calls == 0
    assert saved_tensor_hooks(True) is None
