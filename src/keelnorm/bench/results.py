"""The results of a run as plain data, to JSON and back without loss."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from keelnorm.bench.cases import Case, variant_label
from keelnorm.measure.machine import Machine
from keelnorm.measure.plain_data import read_report

SCHEMA = 2
#: The arm of a network that plain torch is: the default layout and the default allocator.
DEFAULT_ARM = "eager contiguous fresh"


@dataclass
class Settings:
    """What a run was asked to measure."""

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

    `ratios` holds this peer's time over each other peer's: below 1, this peer is faster.
    `spread` is the interquartile range over the median, `disturbed` the share of rounds in which
    other programs interfered, `page_faults` a count for one whole call (forward and backward, in
    training). A row with `error` or `skipped` has no number: a mistake was found, or the peer does
    not do such a case. `copied_bytes` is what the copy moves in the same time; `least_bytes` is
    what the operation has to move at least.
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

    @property
    def label(self) -> str:
        """The variant, with the gradient's format and the dtype where they are not the usual ones."""
        return variant_label(self.variant, self.gradient, self.dtype)


def blank_row(case: Case, mode: str, peer: str) -> Row:
    """A row of a case without a number."""
    return Row(
        suite=case.shape.suite,
        shape=case.shape.name,
        layout=case.layout,
        variant=case.variant,
        mode=mode,
        peer=peer,
        gradient=case.gradient,
        dtype=case.dtype,
    )


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

    @property
    def label(self) -> str:
        """As `Row.label`."""
        return variant_label(self.variant, self.gradient, self.dtype)


@dataclass
class Total:
    """The time of all batch norms of a network, each with the operations that follow it there."""

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
    and `baseline_bytes` what it had before the first step. `agreement` is the error against float64
    as a multiple of eager's. A row with `error` has no number.
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

    @property
    def eager_arm(self) -> str:
        """The arm that differs from this one only in the layers."""
        return f"eager {self.layout} {self.pages}"


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
        """Whether a call's tensors came largely as fresh pages: at least one page in four of a tensor of x's size."""
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
        report: Report = read_report(cls, text, SCHEMA, "a report")
        return report
