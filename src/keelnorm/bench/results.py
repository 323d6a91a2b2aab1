"""What a run yields, as plain data: to JSON and back without loss."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from keelnorm.measure.plain_data import read

SCHEMA = 2


@dataclass
class Machine:
    """Where a run took place; `environment` holds the variables that change memory and threads.

    `caches` are bytes by level, of the whole machine; `revision` is git's, with `+` for changes on it.
    """

    cpu: str
    cores: int
    threads: int
    system: str
    python: str
    torch: str
    torch_capability: str
    keelnorm: str
    keelnorm_kernels: str
    load_average: float | None
    page_bytes: int
    torch_build: str = ""
    caches: dict[str, int] = field(default_factory=dict)
    memory_bytes: int | None = None
    allocator: str = ""
    revision: str | None = None
    gpu: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Settings:
    """What was asked for."""

    batch: int
    layouts: list[str]
    variants: list[str]
    modes: list[str]
    shapes: list[str]
    peers: list[str]
    rounds: int
    min_time_ms: float
    threads: int | None = None
    quick: bool = False
    gradients: list[str] = field(default_factory=lambda: ["matching"])
    dtypes: list[str] = field(default_factory=lambda: ["float32"])
    pages: list[str] = field(default_factory=lambda: ["fresh"])


@dataclass
class Row:
    """One peer on one case in one mode.

    `ratios` holds this peer's time over each other's: below 1, this one is faster.
    `spread` is the quartiles' distance over the median, `disturbed` the share of rounds in which
    other programs interfered, `page_faults` a count for one whole call (forward and backward, in
    training). A row with `error` has no number; one with `skipped` has none either, since its peer
    does not do such a case. `copied_bytes` is what the copy moves in the same time: against
    `least_bytes` it says how many bytes the time is worth.
    """

    suite: str
    shape: str
    layout: str
    variant: str
    mode: str
    peer: str
    gradient: str = "matching"
    dtype: str = "float32"
    pages: str = "fresh"
    error: str | None = None
    skipped: str | None = None
    error_eps: float | None = None
    median_us: float | None = None
    spread: float | None = None
    disturbed: float | None = None
    page_faults: float | None = None
    tensor_bytes: int | None = None
    least_bytes: int | None = None
    copied_bytes: int | None = None
    gbps: float | None = None
    copy_fraction: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    samples_us: list[float] = field(default_factory=list)


@dataclass
class Mean:
    """Geometric means over a suite's shapes; `ratios` and `copy_fraction` as in `Row`."""

    suite: str
    layout: str
    variant: str
    mode: str
    peer: str
    shapes: int
    ratios: dict[str, float]
    copy_fraction: float | None
    gradient: str = "matching"
    dtype: str = "float32"
    pages: str = "fresh"


@dataclass
class Total:
    """The time of all of a network's batch norms, each with what follows it there."""

    network: str
    layout: str
    mode: str
    peer: str
    layers: int
    total_ms: float
    pages: str = "fresh"


@dataclass
class NetworkRow:
    """One arm of a network: whole steps, in a process of its own.

    `step_ms` is the median, `peak_bytes` the most memory that the process had resident up to then,
    and `baseline_bytes` what it had before the first step. `agreement` is the largest error against
    float64 as a multiple of eager's. A row with `error` has no number.
    """

    network: str
    arm: str
    layers: str
    layout: str
    pages: str
    mode: str
    batch: int
    size: int
    error: str | None = None
    agreement: float | None = None
    step_ms: float | None = None
    spread: float | None = None
    peak_bytes: int | None = None
    baseline_bytes: int | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    samples_ms: list[float] = field(default_factory=list)


@dataclass
class VariantRow:
    """One variant of batch normalization on one input: a training step, forward and backward.

    `ratio` is its time over plain batch norm's, the median over rounds; `forward_ratio` that of the forwards alone.
    `spread`, `disturbed`, `error` and `skipped` as in `Row`.
    """

    variant: str
    suite: str
    shape: str
    layout: str
    dtype: str
    pages: str = "fresh"
    error: str | None = None
    skipped: str | None = None
    median_us: float | None = None
    forward_us: float | None = None
    ratio: float | None = None
    forward_ratio: float | None = None
    spread: float | None = None
    disturbed: float | None = None
    samples_us: list[float] = field(default_factory=list)


@dataclass
class Report:
    """A whole run."""

    machine: Machine
    settings: Settings
    rows: list[Row]
    means: list[Mean] = field(default_factory=list)
    totals: list[Total] = field(default_factory=list)
    seconds: float = 0.0
    schema: int = SCHEMA
    networks: list[NetworkRow] = field(default_factory=list)
    variants: list[VariantRow] = field(default_factory=list)

    def is_fresh(self, row: Row) -> bool:
        """Whether a call's tensors came as fresh pages, for a good part at least.

        One page in four of a tensor of the size of x is enough.
        """
        if not row.page_faults or not row.tensor_bytes:
            return False
        return row.page_faults * self.machine.page_bytes > row.tensor_bytes / 4

    @property
    def disturbed(self) -> float:
        """The share of all rounds in which other programs interfered."""
        shares = [row.disturbed for row in self.rows if row.disturbed is not None]
        return sum(shares) / len(shares) if shares else 0.0

    @property
    def errors(self) -> list[Row]:
        """The rows that have no number because something is wrong."""
        return [row for row in self.rows if row.error is not None]

    @property
    def failed(self) -> bool:
        """Whether anything is wrong, in kernels, in networks or in variants."""
        rows: list[Row | NetworkRow | VariantRow] = [*self.rows, *self.networks, *self.variants]
        return any(row.error is not None for row in rows)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text has another schema, or does not hold what such a report does.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if not isinstance(data, dict) or data.get("schema") != SCHEMA:
                there = data.get("schema") if isinstance(data, dict) else None
                raise ValueError(f"expected a report of schema {SCHEMA}, got {there!r}")
            report: Report = read(cls, data)
        except (RecursionError, OverflowError) as error:
            raise ValueError(str(error)) from None
        return report
