"""The stored report that a run goes on with, if it was measured in the same way."""

from __future__ import annotations

import hashlib
from pathlib import Path

from benchmarks.memory import job_worker
from benchmarks.memory.memory_results import MemoryReport, Settings
from benchmarks.networks.arm_process import ROOT
from keelnorm.bench.session import threads
from keelnorm.lab.core.environment import code_fingerprint
from keelnorm.measure.machine import describe

#: Facts of a machine that change from run to run, and are not compared.
CHANGING = ("load_average", "revision")
#: Files that read results, and can't change a number.
READING = (
    "memory_markdown.py", "memory_page.py", "memory_store.py", "memory_table.py", "memory_targets.py", "__main__.py",
)  # fmt: skip


def new_report(settings: Settings) -> MemoryReport:
    """An empty report of this machine and code."""
    with threads(settings.threads):
        return MemoryReport(describe(with_revision=True), settings, code_digest())


def code_digest() -> str:
    """A digest of the package and of what measures here."""
    digest = hashlib.sha256(code_fingerprint(job_worker.answer).encode())
    folders = ("benchmarks", "benchmarks/memory", "benchmarks/networks")
    for path in sorted(path for folder in folders for path in (ROOT / folder).glob("*.py")):
        if path.name not in READING:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def stored_report(path: Path, fresh: MemoryReport) -> tuple[MemoryReport, list[str]]:
    """The report in a file to go on with; or the fresh one where code or machine differ, and in what.

    Args:
        path: The file; it need not exist.
        fresh: An empty report of this machine, code and settings.

    Raises:
        ValueError: The file holds something else, or was measured with other settings.
    """
    if not path.exists():
        return fresh, []
    found = MemoryReport.from_json(path.read_text(encoding="utf-8"))
    unlike = [] if found.code == fresh.code else ["code"]
    unlike += [name for name in _unlike(found.machine, fresh.machine) if name not in CHANGING]
    if unlike:
        return fresh, unlike
    if other := _unlike(found.settings, fresh.settings):
        said = ", ".join(f"{name} {vars(found.settings)[name]}, not {vars(fresh.settings)[name]}" for name in other)
        raise ValueError(f"it was measured with {said}")
    return found, []


def _unlike(one: object, other: object) -> list[str]:
    return [name for name, value in vars(one).items() if value != vars(other)[name]]
