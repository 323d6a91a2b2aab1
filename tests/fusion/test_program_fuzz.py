"""Random programs through convert: nobody can tell a converted module from its twin.

``FUSION_FUZZ=100000`` runs that many programs; ``FUSION_FUZZ_SEED`` begins at a seed, such as that of a failure.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from fusion.differential import check
from fusion.mutants import MUTANTS
from fusion.programs import program

from keelnorm.engine.fusion import call

#: Programs of a run, all with fresh seeds, in parts that run side by side.
PROGRAMS = int(os.environ.get("FUSION_FUZZ", "800"))
PARTS = 8
FRESH = int(os.environ.get("FUSION_FUZZ_SEED") or random.SystemRandom().randrange(10**9))
#: The first program, counted from 0, in which each mutant shows.
FOUND = {
    "stale mode": 245, "stale parameter": 534, "stale activation": 35, "runs twice": 0, "statistics later": 16,
    "input changed": 83, "in place is not": 6, "sum elsewhere": 80, "plain containers": 12, "left waiting": 42,
    "copies share": 16, "any dtype": 105, "twice": 683, "no history": 0,  "grad mode": 23,
    "second addition": 854, "exchanged arguments": 23,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small_tensors_wait(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(call, "smallest", [0, 0])
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("part", range(PARTS), ids=lambda part: f"fresh seeds, part {part}")
def test_programs(part: int) -> None:
    """Results, gradients, buffers, side effects, aliases and exceptions are the twin's."""
    seen: Counter[str] = Counter()
    size = PROGRAMS // PARTS
    for seed in range(FRESH + part * size, FRESH + (part + 1) * size):
        told = check(program(seed), seen)
        assert told is None, f"FUSION_FUZZ_SEED={seed}\n{told}"
    assert seen["fused"] > 2 * size
    assert seen["calls"] > 6 * size
    assert seen["refused"] + seen["ill-conditioned"] < size / 20


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzz sees each of these faults, and within 5,000 programs: in the one that is named for it."""
    seed = FOUND[name]
    assert seed < 5000
    assert check(program(seed)) is None
    MUTANTS[name](monkeypatch)
    try:
        told = check(program(seed))
    except (AttributeError, RuntimeError, TypeError) as error:
        told = f"the comparison itself raises {error}"
    assert told
