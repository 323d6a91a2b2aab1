"""The results of the memory benchmark as plain data, to JSON and back without loss."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from keelnorm.measure.machine import Machine
from keelnorm.measure.plain_data import read_report

SCHEMA = 1
EAGER, CONVERTED, SAVED, CHECKPOINTED = "eager", "converted", "save_memory", "checkpointing"
#: What is measured, in this order.
PARTS = ("bytes", "step", "checkpoint", "peak", "largest")
#: The networks of the parts that take minutes for each; the other parts take all architectures.
NETWORKS_OF = {
    "checkpoint": ("ResNet-50", "MobileNetV2", "EfficientNet-B0", "DenseNet-121"),
    "peak": ("MobileNetV2", "EfficientNet-B0", "DenseNet-121"),
    "largest": ("MobileNetV2", "EfficientNet-B0", "DenseNet-121"),
}
#: The name of the comparison that comes before every part, in `MemoryRow.errors`.
CHECK = "check"


@dataclass
class Settings:
    """What a run was asked to measure.

    Args:
        samples: Samples in the batch whose bytes are counted.
        seconds: Time for the training steps of a network, all page settings together.
        rounds: The most rounds of a page setting; 0 times nothing.
        peak_samples: Samples in the batch whose peak memory is measured.
        limit_bytes: The peak memory of a process within which the largest batch has to train.
        threads: Threads; None leaves torch's choice.
        size: Height and width of the images of peak and largest batch.
    """

    samples: int = 2
    seconds: float = 10.0
    rounds: int = 15
    peak_samples: int = 32
    limit_bytes: int = 4 << 30
    threads: int | None = None
    size: int = 224


@dataclass
class KeptBytes:
    """Bytes that are kept between forward and backward, by arm.

    `kept` counts the distinct storages that autograd saves, without parameters, buffers and input; `alive` what torch's
    allocator handed out during a forward and has not got back after it, without the outputs.
    """

    samples: int
    kept: dict[str, int]
    alive: dict[str, int]

    def ratio(self, arm: str) -> float:
        """The arm's bytes over eager's."""
        return self.kept[arm] / self.kept[EAGER]

    @property
    def disagreement(self) -> float:
        """The largest relative difference of the two counts."""
        return max(abs(self.alive[arm] - kept) / max(1, kept) for arm, kept in self.kept.items())


@dataclass
class StepTimes:
    """Training steps of two arms that took turns.

    `ratio` is the time of save_memory over the other arm's, the median over rounds; `lost` is the time that threads
    waited for a core, as a part of the whole.
    """

    pages: str
    batch: int
    ratio: float
    lost: float
    samples_ms: dict[str, list[float]]


@dataclass
class Checkpointing:
    """Against activation checkpointing: how many of the network's blocks, and the bytes that both keep."""

    blocks: int
    checkpointed: int
    batch: int
    kept: dict[str, int]
    steps: list[StepTimes]


@dataclass
class Peaks:
    """Peak resident memory of training, by arm: before the first step, and above that in each step."""

    batch: int
    before: dict[str, int]
    above: dict[str, list[int]]

    def ratio(self, arm: str) -> float:
        """The arm's peak over eager's, above what there was before."""
        return max(self.above[arm]) / max(1, *self.above[EAGER])


@dataclass
class Largest:
    """The largest batch that trains within a peak of resident memory, by arm; and the peaks of what was tried."""

    limit_bytes: int
    batch: dict[str, int]
    peaks: dict[str, dict[str, int]]

    @property
    def ratio(self) -> float:
        """save_memory's batch over eager's."""
        return self.batch[SAVED] / max(1, self.batch[EAGER])


@dataclass
class MemoryRow:
    """One network: what has been measured of it, and why the rest was not, by part."""

    name: str
    package: str
    is_right: bool = False
    bytes_kept: KeptBytes | None = None
    step: list[StepTimes] = field(default_factory=list)
    checkpoint: Checkpointing | None = None
    peak: Peaks | None = None
    largest: Largest | None = None
    errors: dict[str, str] = field(default_factory=dict)

    def has(self, part: str) -> bool:
        """Whether a part has been measured."""
        return bool(getattr(self, "bytes_kept" if part == "bytes" else part))

    def was_asked(self, part: str) -> bool:
        """Whether a part has been measured, or has an error in the place of a number."""
        return self.has(part) or part in self.errors or CHECK in self.errors

    def step_ratio(self, pages: str) -> float | None:
        """The time of a step with save_memory over that without."""
        return next((one.ratio for one in self.step if one.pages == pages), None)


@dataclass
class MemoryReport:
    """All networks, on one machine. `code` identifies the code that was measured."""

    machine: Machine
    settings: Settings
    code: str
    rows: list[MemoryRow] = field(default_factory=list)
    seconds: float = 0.0
    schema: int = SCHEMA

    @property
    def failed(self) -> bool:
        """Whether anything is wrong, or could not be measured."""
        return any(row.errors for row in self.rows)

    def row(self, name: str) -> MemoryRow | None:
        """The row of a network."""
        return next((row for row in self.rows if row.name == name), None)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> MemoryReport:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text has another schema, or does not hold what such a report does.
        """
        report: MemoryReport = read_report(cls, text, SCHEMA, "a report of the memory benchmark")
        return report
