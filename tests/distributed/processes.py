"""Runs scenarios on several ranks of torch.distributed: real processes, forked from one that has imported torch."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

#: Seconds after which a scenario's processes are killed.
PATIENCE = 60.0


class Outcome(NamedTuple):
    """What a rank's scenario returned, or the traceback of what it raised; both None for one that died."""

    value: Any
    error: str | None


class Scenarios:
    """Outcomes by the scenario's name and the rank."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str) -> list[Any]:
        """What each rank returned; raises what a rank raised."""
        outcomes = self.outcomes(name)
        failed = [f"rank {rank} of {name}:\n{outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
        if failed:
            raise AssertionError("\n".join(failed))
        return [outcome.value for outcome in outcomes]

    def outcomes(self, name: str) -> list[Outcome]:
        import torch

        files = sorted(self._folder.glob(f"{name}.*.pt"), key=lambda path: int(path.suffixes[0][1:]))
        assert files, f"no scenario {name!r} was run"
        return [Outcome(*torch.load(path, weights_only=False)) for path in files]


def run_all(folder: Path) -> Scenarios:
    """Run every scenario of ``scenarios.SCENARIOS``, one after the other."""
    environment = {name: value for name, value in os.environ.items() if name != "KEELNORM_SYNC_DEBUG"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"the scenarios could not be run: {done.stdout}{done.stderr}")
    return Scenarios(folder)


def _child(name: str, rank: int, ranks: int, folder: Path, timeout: float) -> None:
    import scenarios
    import torch
    import torch.distributed as dist

    value, error = None, None
    try:
        warnings.simplefilter("error")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{name}.store",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=timeout),
        )
        torch.manual_seed(0)
        value = scenarios.SCENARIOS[name].run()
    except BaseException:
        error = traceback.format_exc()
    torch.save((value, error), folder / f"{name}.{rank}.pt")


def _fork(name: str, ranks: int, folder: Path, timeout: float) -> None:
    import torch

    children = []
    for rank in range(ranks):
        torch.save((None, None), folder / f"{name}.{rank}.pt")
        child = os.fork()
        if child == 0:
            try:
                _child(name, rank, ranks, folder, timeout)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        children.append(child)
    deadline = time.monotonic() + PATIENCE
    for child in children:
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, 9)
            time.sleep(0.01)


if __name__ == "__main__":
    import scenarios as found
    import torch._dynamo  # noqa: F401 - once for all

    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
        for name, scenario in found.SCENARIOS.items():
            start = time.monotonic()
            _fork(name, scenario.ranks, Path(sys.argv[1]), scenario.timeout)
            print(f"{name}: {time.monotonic() - start:.2f} s")
