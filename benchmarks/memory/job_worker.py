"""One job of the memory benchmark in a process of its own: reads it from the command line, answers in a line of JSON.

A process for each network, because page settings, peaks and free ranges of the heap belong to a whole process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.architectures import ARCHITECTURES
from benchmarks.memory.checkpointed_blocks import against_checkpointing
from benchmarks.memory.interleaved_steps import step_times
from benchmarks.memory.kept_bytes import count_bytes
from benchmarks.memory.memory_results import CHECK
from benchmarks.memory.same_results import check_bits
from benchmarks.memory.training_peak import train
from keelnorm.bench.session import Failure, attempt

Job = Mapping[str, Any]


def _check(job: Job) -> bool:
    check_bits(ARCHITECTURES[job["network"]])
    return True


def _bytes(job: Job) -> dict[str, Any]:
    return asdict(count_bytes(ARCHITECTURES[job["network"]], job["samples"]))


def _step(job: Job) -> list[dict[str, Any]]:
    return [asdict(one) for one in step_times(ARCHITECTURES[job["network"]], job["seconds"], job["rounds"])]


def _checkpoint(job: Job) -> dict[str, Any]:
    return asdict(against_checkpointing(ARCHITECTURES[job["network"]], job["seconds"], job["rounds"]))


def _train(job: Job) -> dict[str, Any]:
    return asdict(train(job["network"], job["arm"], job["batch"], job["size"], job["steps"]))


TASKS: dict[str, Callable[[Job], Any]] = {
    CHECK: _check, "bytes": _bytes, "step": _step, "checkpoint": _checkpoint, "train": _train,
}  # fmt: skip


def answer(job: Job) -> dict[str, dict[str, Any]]:
    """Do the tasks of a job in order; by task the value, or the error. After a failed check nothing follows."""
    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    found: dict[str, dict[str, Any]] = {}
    for task in job["tasks"]:
        value = attempt(partial(TASKS[task], job))
        if isinstance(value, Failure):
            found[task] = {"error": value.error or value.skipped}
            if task == CHECK:
                break
        else:
            found[task] = {"value": value}
    return found


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))), flush=True)
