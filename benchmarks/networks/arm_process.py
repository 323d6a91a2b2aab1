"""The arms of a network's comparison, each in a process that runs a step when it is told to."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Arm:
    """The layers, the layout, and the allocator's setting."""

    layers: str
    layout: str
    pages: str

    @property
    def name(self) -> str:
        """A label, and the key in `NetworkRow.ratios`."""
        return f"{self.layers} {self.layout} {self.pages}"


class ArmError(RuntimeError):
    """The process of an arm ended too early."""


class Worker:
    """A process that runs the steps of one arm, see `arm_worker`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.networks.arm_worker", json.dumps(config)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.baseline_bytes: int | None = self._answer()["baseline_bytes"]
        except BaseException:
            self.close()
            raise

    def step(self, mode: str) -> tuple[float, int | None]:
        """Run one step; seconds, and the process's peak memory so far."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(mode + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _answer says why
        answer = self._answer()
        return answer["seconds"], answer["peak_bytes"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ArmError(why_it_ended(self._process.wait(), self._errors))
        answer: dict[str, Any] = json.loads(line)
        return answer


def why_it_ended(status: int, errors: IO[bytes]) -> str:
    """Why a process ended too early: by a signal, or as the last line of its standard error stream says."""
    errors.seek(0)
    said = errors.read().decode(errors="replace").strip().splitlines()
    if status >= 0:
        return said[-1] if said else f"its process ended with status {status}"
    return f"its process was ended by signal {-status}; it may have run out of memory" + (
        f" (it last said: {said[-1]})" if said else ""
    )


@contextmanager
def workers(arms: Sequence[Arm], settings: dict[str, Any]) -> Iterator[dict[str, Worker | ArmError]]:
    """Start a worker for each arm; an arm whose process failed has the error instead. All end with the block."""
    with ExitStack() as stack:
        found: dict[str, Worker | ArmError] = {}
        for arm in arms:
            config = settings | {"layers": arm.layers, "layout": arm.layout, "pages": arm.pages}
            try:
                worker = Worker(config)
            except ArmError as error:
                found[arm.name] = error
                continue
            stack.callback(worker.close)
            found[arm.name] = worker
        yield found
