"""Random calls of every kernel against float64: results, gradients, running statistics.

``KERNEL_FUZZ=10000`` runs that many calls; ``KERNEL_FUZZ_SEED`` begins at a seed, such as that of a failure.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels.differential import check
from kernels.random_cases import draw
from torch import Tensor

from keelnorm.engine import fallback
from keelnorm.engine.kernels import reference
from keelnorm.engine.running_statistics import update_running

#: Calls of a run, half of them with fresh seeds, in parts that run side by side.
CALLS = int(os.environ.get("KERNEL_FUZZ", "480"))
PARTS = 4
FRESH = int(os.environ.get("KERNEL_FUZZ_SEED") or random.SystemRandom().randrange(10**9))


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("first", [0, FRESH], ids=["the same seeds", "fresh seeds"])
def test_calls(first: int, part: int) -> None:
    size = CALLS // (2 * PARTS)
    for seed in range(first + part * size, first + (part + 1) * size):
        told = check(draw(seed))
        assert told is None, f"KERNEL_FUZZ_SEED={seed}\n{told}"


def test_every_option_is_drawn() -> None:
    """Within the calls of an ordinary run."""
    seen: Counter[tuple[str, object]] = Counter()
    for seed in range(480):
        case = draw(seed)
        seen.update((name, str(value)) for name, value in vars(case).items() if name not in ("seed", "shape"))
        seen.update(("layout", layout) for layout in case.layouts)
        seen["rank", len(case.shape)] += 1
    assert min(seen.values()) >= 1
    few = [what for what, times in seen.items() if what[0] != "layouts" and times < 4]
    assert not few, few
    assert {rank for what, rank in seen if what == "rank"} == {2, 3, 4, 5}


# ---- that the fuzz sees faults

Function = Callable[..., Any]


def _changed(function: Function, change: Function) -> Function:
    return lambda *arguments, **named: change(function(*arguments, **named))


def _of_x(change: Function) -> Function:
    return lambda moments: dataclasses.replace(moments, mean=change(moments.mean, moments.var.sqrt()))


def _without_last(operator: Function) -> Function:
    def grad_input(*arguments: Any) -> Tensor:
        *others, means, act = arguments
        return operator(*others, None if means is None else (means[0], torch.zeros_like(means[1])), act)

    return grad_input


def _biased(state: Any, mean: Tensor, var: Tensor, count: Any) -> None:
    return update_running(state, mean, var * (1 - 1 / count), count)


#: Each puts a small fault into the reference back end.
FAULTS: dict[str, tuple[Any, str, Function]] = {
    "mean": (reference, "stats", lambda f: _changed(f, _of_x(lambda mean, deviation: mean + 1e-3 * deviation))),
    "y": (reference, "apply", lambda f: _changed(f, lambda y: y * (1 + 0.03))),
    "sum of g": (reference, "grad_stats", lambda f: _changed(f, lambda sums: (sums[0] + 0.01 * sums[1], sums[1]))),
    "sum of g x": (reference, "grad_stats", lambda f: _changed(f, lambda sums: (sums[0], sums[1] + 0.01 * sums[0]))),
    "a term of dx": (reference, "grad_input", _without_last),
    "dresidual": (reference, "grad_residual", lambda f: lambda dy, *others: dy),
    "x from y": (reference, "invert", lambda f: _changed(f, lambda x: x * 1.05)),
    "running variance": (fallback, "update_running", lambda f: _biased),
    "padding": (fallback, "counted", lambda f: lambda counts, values, padding=None: f(counts, values)),
    "mask": (reference, "stats", lambda f: lambda x, mask=None: f(x.nan_to_num())),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 200 calls, none of which tells of anything without the fault."""
    cases = [dataclasses.replace(draw(seed), kernel="reference") for seed in range(200)]
    module, function, fault = FAULTS[name]
    monkeypatch.setattr(module, function, fault(getattr(module, function)))
    told = next((case for case in cases if check(case) is not None), None)
    assert told is not None
    monkeypatch.undo()
    assert check(told) is None
