"""What the memory benchmark is to reach, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import geometric_mean

from benchmarks.memory.memory_results import EAGER, NETWORKS_OF, SAVED, MemoryReport, MemoryRow

MEAN_BYTES = 0.60
BYTES = {"ResNet-50": 0.70, "MobileNetV2": 0.40, "EfficientNet-B0": 0.36, "DenseNet-121": 0.55}
MEAN_STEP = {"reused": 1.06, "fresh": 1.10}
PEAK = {"MobileNetV2": 0.58, "EfficientNet-B0": 0.52, "DenseNet-121": 0.72}
LARGEST = {"MobileNetV2": 1.6, "EfficientNet-B0": 1.8, "DenseNet-121": 1.35}
CHECKPOINT = 0.9


@dataclass(frozen=True)
class Target:
    """A figure and its bound. `value` is None where it was not measured."""

    what: str
    value: float | None
    bound: float
    at_least: bool = False

    @property
    def is_met(self) -> bool | None:
        """Whether the figure is within its bound; None where it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def mean_of(values: Iterable[float | None]) -> float | None:
    """The geometric mean; None where there are no values, or one has no number."""
    found = list(values)
    known = [value for value in found if value is not None]
    return geometric_mean(known) if known and len(known) == len(found) else None


def asked(report: MemoryReport, part: str) -> list[MemoryRow]:
    """The networks that have a number in a part, or an error in its place."""
    return [row for row in report.rows if row.was_asked(part)]


def mean_bytes(report: MemoryReport, arm: str = SAVED) -> float | None:
    """The mean of the bytes kept over eager's, of all networks whose bytes were asked for."""
    return mean_of(row.bytes_kept.ratio(arm) if row.bytes_kept else None for row in asked(report, "bytes"))


def mean_step(report: MemoryReport, pages: str) -> float | None:
    """The mean of the time of a step with save_memory over that without, of all networks whose steps were asked for."""
    return mean_of(row.step_ratio(pages) for row in asked(report, "step"))


def targets(report: MemoryReport) -> Iterator[Target]:
    """All figures that have a bound."""
    counted, timed = len(asked(report, "bytes")), len(asked(report, "step"))
    rows = {row.name: row for row in report.rows}
    yield Target(f"bytes / {EAGER}, mean of {counted}", mean_bytes(report), MEAN_BYTES)
    for name, bound in BYTES.items():
        kept = rows[name].bytes_kept if name in rows else None
        yield Target(f"bytes / {EAGER}, {name}", kept.ratio(SAVED) if kept else None, bound)
    for pages, bound in MEAN_STEP.items():
        yield Target(f"step / converted, {pages} pages, mean of {timed}", mean_step(report, pages), bound)
    for name, bound in PEAK.items():
        peak = rows[name].peak if name in rows else None
        yield Target(f"peak / {EAGER}, {name}", peak.ratio(SAVED) if peak else None, bound)
    for name, bound in LARGEST.items():
        largest = rows[name].largest if name in rows else None
        yield Target(f"largest batch / {EAGER}, {name}", largest.ratio if largest else None, bound, at_least=True)
    for name in NETWORKS_OF["checkpoint"]:
        found = rows[name].checkpoint if name in rows else None
        for pages in MEAN_STEP:
            ratio = next((one.ratio for one in found.steps if one.pages == pages), None) if found else None
            yield Target(f"step / checkpointing, {pages} pages, {name}", ratio, CHECKPOINT)
