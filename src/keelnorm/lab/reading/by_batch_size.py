"""Arms compared at several batch sizes, each arm at each size at its best learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from keelnorm.lab.reading.best_rates import Best, best_by_arm, edge_notes
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.series import with_intervals
from keelnorm.measure.page_parts import Axis, Figure, Series, Table
from keelnorm.measure.statistics import mean

BestBySize = Mapping[int, Mapping[str, Best]]


def best_by_size(runs: Runs, arms: Mapping[int, Sequence[str]], rates: Sequence[float]) -> BestBySize:
    """By size, the best rate of each of its arms; `runs` has the arms "arm" and "batch"."""
    return {size: best_by_arm({arm: runs.of((arm, size)) for arm in each}, rates) for size, each in arms.items()}


def size_series(label: str, arm: str, best: BestBySize) -> Series:
    """Test accuracy over the size, where the arm was run."""
    sizes = [size for size in best if arm in best[size]]
    return with_intervals(label, arm, sizes, [mean(best[size][arm].test) for size in sizes])


def size_row(where: str, label: str, arm: str, best: BestBySize) -> list[str]:
    """A row of `size_table`."""
    texts = [f"{mean(each[arm].test).text(1)} ({each[arm].rate:g})" if arm in each else "-" for each in best.values()]
    return [where, label, *texts]


def size_notes(where: str, label: str, arm: str, best: BestBySize) -> list[str]:
    """A note for each size at which the best rate lies at the edge of the grid."""
    return [
        note
        for size, each in best.items()
        if arm in each
        for note in edge_notes(f"{where}, batch {size}", {f"of {label}": each[arm]})
    ]


def size_table(sizes: Sequence[int], rows: Sequence[Sequence[str]]) -> Table:
    """Test accuracy and rate of every arm, a column for each size."""
    return Table(
        "Test accuracy in percent by batch size, with the rate chosen on validation data",
        ["where", "arm", *map(str, sizes)],
        rows,
    )


def size_figure(where: str, series: Sequence[Series], description: str) -> Figure:
    """Test accuracy over the batch size in training."""
    return Figure(
        f"Test accuracy by batch size: {where}",
        Axis("samples in a batch", scale="log"),
        Axis("test accuracy, %"),
        series,
        description,
    )
