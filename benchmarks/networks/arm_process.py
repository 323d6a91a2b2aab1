"""The arms of a network's comparison, each a process that works only when it is told to."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Arm:
    """Whose layers, in which layout, with which setting of the allocator."""

    layers: str
    layout: str
    pages: str

    @property
    def name(self) -> str:
        """A label, and the key of ratios."""
        return f"{self.layers} {self.layout} {self.pages}"


class ArmError(RuntimeError):
    """An arm's process has ended before its work did."""


class Worker:
    """A process that runs one arm's steps, see `worker`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.networks.arm_worker", json.dumps(config)],
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
            pass  # the answer says why
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
            status = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            raise ArmError(said[-1] if said else f"its process ended with status {status}, out of memory perhaps")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def workers(arms: Sequence[Arm], settings: dict[str, Any]) -> Iterator[dict[str, Worker | str]]:
    """A worker for each arm by its name, or why there is none; all end with the block."""
    with ExitStack() as stack:
        found: dict[str, Worker | str] = {}
        for arm in arms:
            config = settings | {"layers": arm.layers, "layout": arm.layout, "pages": arm.pages}
            try:
                worker = Worker(config)
            except ArmError as error:
                found[arm.name] = str(error)
                continue
            stack.callback(worker.close)
            found[arm.name] = worker
        yield found
