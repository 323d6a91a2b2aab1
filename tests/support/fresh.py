"""Runs pieces of Python in processes where keelnorm has not been imported yet.

Each scenario has a process of its own, forked from one that has imported torch, which is what takes long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple


class Scenario(NamedTuple):
    """What to run: source, environment variables, and a folder to import from before all others."""

    code: str
    environment: dict[str, str] | None = None
    folder: str | None = None


class Outcome(NamedTuple):
    """How a scenario ended."""

    status: int
    output: str
    errors: str


def run_fresh(scenarios: dict[str, Scenario]) -> dict[str, Outcome]:
    """The outcome of each scenario, by name."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("KEELNORM_") or name == "KEELNORM_LIBRARY"  # the kernels that are under test
    }
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, folder],
            input=json.dumps(scenarios),
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            raise RuntimeError(f"the scenarios could not be run: {done.stderr}")
        return {
            name: Outcome(status, Path(folder, f"{i}.out").read_text(), Path(folder, f"{i}.err").read_text())
            for i, (name, status) in enumerate(json.loads(done.stdout).items())
        }


def _run_in_child(scenario: Scenario, output: str, errors: str) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        for descriptor, path in ((1, output), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
        os.environ.update(scenario.environment or {})
        if scenario.folder is not None:
            sys.path.insert(0, scenario.folder)
        exec(compile(scenario.code, "scenario", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    import torch  # noqa: F401 - shared by all scenarios

    given = {name: Scenario(*fields) for name, fields in json.load(sys.stdin).items()}
    statuses = {
        name: _run_in_child(scenario, f"{sys.argv[1]}/{i}.out", f"{sys.argv[1]}/{i}.err")
        for i, (name, scenario) in enumerate(given.items())
    }
    print(json.dumps(statuses))
