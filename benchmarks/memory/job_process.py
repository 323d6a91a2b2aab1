"""Run a job of the memory benchmark in a process of its own, and stop it when it takes too much memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from time import sleep
from typing import Any

from benchmarks.networks.arm_process import ROOT, why_it_ended
from keelnorm.measure.disturbance import peak_bytes

#: Seconds between two looks at a process that has a limit.
LOOK_EVERY = 0.02


class JobError(RuntimeError):
    """The process of a job ended without an answer."""


class TooLargeError(JobError):
    """The process took more memory than its limit, and was ended."""


def run_job(job: Mapping[str, Any], *, limit: int | None = None) -> dict[str, dict[str, Any]]:
    """Run a job, see `job_worker.answer`.

    Args:
        job: What to do.
        limit: The most bytes that its process may have resident; beyond, it is ended. None watches nothing.

    Raises:
        TooLargeError: It took more than the limit.
        JobError: It ended without an answer.
    """
    command = [sys.executable, "-m", "benchmarks.memory.job_worker", json.dumps(job)]
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=errors)
        try:
            if limit is None:
                process.wait()
            else:
                _watch(process, limit)
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
        if process.returncode != 0 or not lines:
            raise JobError(why_it_ended(process.returncode, errors))
    found: dict[str, dict[str, Any]] = json.loads(lines[-1])  # a package may have printed before
    return found


def _watch(process: subprocess.Popen[bytes], limit: int) -> None:
    """Wait until a process ends.

    Raises:
        TooLargeError: It took more than the limit, and was ended.
    """
    while process.poll() is None:
        peak = peak_bytes(process.pid)
        if peak is not None and peak > limit:
            process.kill()
            raise TooLargeError(f"its process had more than {limit / 2**30:.2f} GiB resident, and was ended")
        sleep(LOOK_EVERY)
