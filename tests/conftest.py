"""What holds for every test: fresh memory is poisoned, randomness seeded by the test's name, state restored."""

from __future__ import annotations

import os
import random
import warnings
import zlib
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from support.forcing import KERNELS, check_ran, plainer_native, require_kernel
from support.poison import poison_fresh_memory

import keelnorm as kn
from keelnorm.engine.kernels import registry

poison_fresh_memory()

if "native" in {kernel.name for kernel in kn.kernels.available()}:  # stands for the library where it is missing
    with warnings.catch_warnings(), kn.kernels.use("auto"):
        warnings.simplefilter("ignore", RuntimeWarning)
        registry.announce_fallback()
    os.environ.setdefault("KEELNORM_KERNELS", "reference")  # for processes that tests start

# The same examples in every run. Fixtures that hold for a whole test hold for each of its examples.
settings.register_profile(
    "keelnorm",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("keelnorm")


def pytest_collectstart(collector: pytest.Collector) -> None:
    """torch's own test helpers load a profile of theirs, which would hold for the modules that are imported later."""
    settings.load_profile("keelnorm")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases that force kernels which only older machines run are long tests."""
    plainer = plainer_native()
    for item in items:
        parameters = getattr(item, "callspec", None)
        if parameters is not None and any(
            isinstance(value, str) and value in plainer for value in parameters.params.values()
        ):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seeded_and_restored(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same random numbers for a test whatever ran before it, and nothing left changed for what runs after it."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    threads, dtype, forced = torch.get_num_threads(), torch.get_default_dtype(), registry._forced
    grad_mode = torch.is_grad_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad_mode)
    kn.kernels.use(forced or "auto")


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of the kernels in turn, forced. The test fails when others ran, or none; see pytest_pyfunc_call below."""
    require_kernel(request.param)
    with kn.kernels.use(request.param):
        yield request.param


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Fail a test that asked for ``kernel`` (or was parametrized by it) and did not run it."""
    before = kn.kernels.calls()
    result = yield
    if "kernel" in pyfuncitem.fixturenames:
        check_ran(pyfuncitem.callspec.params["kernel"], before, kn.kernels.calls())
    return result
