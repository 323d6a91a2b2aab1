"""Arms compared at several batch sizes, each arm at each size at its best learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from keelnorm.lab.reading.best_rates import Best, best_by_arm, edge_notes
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.series import with_intervals
from keelnorm.measure.page_parts import Axis, Figure, Series, Table
from keelnorm.measure.statistics import mean

BestBySize = Mapping[int, Mapping[str, Best]]


def best_by_size(runs: Runs, arms: Mapping[int, Sequence[str]], rates: Sequence[float]) -> BestBySize:
    """By size, the best rate of each of its arms; `runs` has the arms "arm" and "batch"."""
    return {size: best_by_arm({arm: runs.of((arm, size)) for arm in each}, rates) for size, each in arms.items()}


@dataclass
class SizeParts:
    """What a claim shows of arms at several batch sizes: figures, rows of its table and notes, by condition.

    Args:
        sizes: the batch sizes.
        edges: whether the notes say which best rates lie at the edge of the grid.
    """

    sizes: Sequence[int]
    edges: bool
    figures: list[Figure] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, where: str, labels: Mapping[str, str], best: BestBySize, description: str, *more: Series) -> None:
        """Add a condition: each arm at the sizes at which it was run, then more curves for the figure."""
        series = []
        for arm, label in labels.items():
            own = {size: each[arm] for size, each in best.items() if arm in each}
            series.append(with_intervals(label, arm, list(own), [mean(each.test) for each in own.values()]))
            texts = {size: f"{mean(each.test).text(1)} ({each.rate:g})" for size, each in own.items()}
            self.rows.append([where, label, *(texts.get(size, "-") for size in best)])
            for size, each in own.items() if self.edges else ():
                self.notes += edge_notes(f"{where}, batch {size}", {f"of {label}": each})
        title, y = f"Test accuracy by batch size: {where}", Axis("test accuracy, %")
        self.figures.append(Figure(title, Axis("samples in a batch", scale="log"), y, [*series, *more], description))

    def table(self) -> Table:
        """Test accuracy and rate of every arm, a column for each size."""
        return Table(
            "Test accuracy in percent by batch size, with the rate chosen on validation data",
            ["where", "arm", *map(str, self.sizes)],
            self.rows,
        )
