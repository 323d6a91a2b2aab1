"""All scenarios run once, before the first test that looks at one."""

from __future__ import annotations

import pytest
from processes import Scenarios, run_all


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Scenarios:
    return run_all(tmp_path_factory.mktemp("ranks"))
