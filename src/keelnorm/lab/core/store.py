"""Results on disk: one JSON line each, written as they come.

A line is written whole or not at all at the end of the file and forced to the disk, so a run that is
killed, or finds the disk full, loses the cell in hand and nothing else. What such a kill, or an editor,
leaves behind is tolerated: a line that can't be read is named in `warnings` and its cell is run again.

A record is used again only where it was measured by the same code and versions on the same machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from keelnorm.engine.atomic_write import naming
from keelnorm.lab.core.cell import Cell, Result
from keelnorm.lab.core.environment import code_fingerprint, describe

FORMAT = 1
Order = dict[str, Any]
"""What a run was asked for, as plain data."""


class Store:
    """Results of cells, in the file `path`, or in memory alone where it is None.

    Without `reuse` nothing is read, and what is measured is added to the file; of two results of a cell
    the later one counts. `warnings` tells what was found wrong in the file, a sentence each; `order` is
    what the last run was asked for; `was_cut_short` says whether it was stopped or killed.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        reuse: bool = True,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.path = path
        self.environment = describe() if environment is None else environment
        self.warnings: list[str] = []
        self.order: Order | None = None
        self.was_cut_short = False
        self._id = _digest(self.environment)
        self._results: dict[tuple[str, str], tuple[Result, float]] = {}
        self._described = False
        if reuse and path is not None and path.exists():
            self._read(path)

    def get(self, cell: Cell) -> tuple[Result, float] | None:
        """The stored result of a cell and the seconds it took; None where there is none that is still valid."""
        return self._results.get((cell.key, code_fingerprint(cell.task)))

    def remember(self, order: Order) -> None:
        """Keep what was asked for, for a later report."""
        if order != self.order:
            self._append({"order": order})
            self.order = order

    def put(self, cell: Cell, result: Result, seconds: float) -> None:
        """Keep the result of a cell."""
        code = code_fingerprint(cell.task)
        if not self._described:
            self._append({"environment": self._id, "is": self.environment, "format": FORMAT})
            self._described = True
        self._append(
            {
                "cell": cell.key,
                "environment": self._id,
                "code": code,
                "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "seconds": round(seconds, 3),
                "result": result,
            }
        )
        self._results[cell.key, code] = json.loads(json.dumps(result)), round(seconds, 3)

    def begin(self) -> None:
        """Note that a run begins; whoever reads this and no `end` after it knows that it was cut short."""
        self._append({"run": "begun"})

    def end(self) -> None:
        """Note that the run has ended by itself."""
        self._append({"run": "ended"})

    def _read(self, path: Path) -> None:
        with naming(path):
            content = path.read_bytes()
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                self._take(json.loads(line, parse_constant=_number, parse_float=_number))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                self.warnings.append(
                    f"{path.name}, line {number}, is not a whole result (a run may have been stopped "
                    "while it was written); it is left out and its cell runs again"
                )

    def _take(self, record: dict[str, Any]) -> None:
        """Read one record.

        Raises:
            ValueError, KeyError, TypeError, OverflowError: it is no record that this class writes.
        """
        if "order" in record:
            self.order = _of(dict, record["order"])
        elif "run" in record:
            self.was_cut_short = ("ended", "begun").index(record["run"]) == 1
        elif "is" in record:
            self._described |= record["environment"] == self._id
        elif record["environment"] == self._id:
            key = _of(str, record["cell"]), _of(str, record["code"])
            self._results[key] = _of(dict, record["result"]), float(_of((int, float), record["seconds"]))

    def _append(self, record: dict[str, Any]) -> None:
        if self.path is None:
            return
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if end:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        line = b"\n" + line  # a torn line must not swallow this one
                try:
                    rest = memoryview(line)
                    while rest:
                        rest = rest[file.write(rest) :]  # a disk that gets full takes a part, and says so afterwards
                    os.fsync(file.fileno())
                except BaseException:
                    file.truncate(end)
                    raise


def _of(kind: type | tuple[type, ...], value: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"it holds a {type(value).__name__}")
    return value


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number")
    return value


def _digest(environment: dict[str, str]) -> str:
    text = json.dumps(environment, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
