"""Does batch normalization reach a target accuracy in fewer steps?

How much it gains depends on what it is compared with, so the comparison is made twice: with pixels and
initial weights as they come, and with both prepared by the book. In each, every arm has the learning
rate that suits it best on validation data.
"""

from __future__ import annotations

from collections.abc import Sequence

from evenkeel.lab.arms import EVENKEEL, NONE, TORCH, Arm
from evenkeel.lab.cell import Cell, Result, Results
from evenkeel.lab.experiment import Plan
from evenkeel.lab.figures import Axis, Figure, Measure, Section, Series, Table
from evenkeel.lab.networks import LABELS
from evenkeel.lab.phrases import listed, steps
from evenkeel.lab.protocol import (
    ARMS,
    DATA,
    NETWORKS,
    NETWORKS_TEXT,
    OPTIMIZER,
    PLAIN,
    PREPARED,
    TARGET,
    curve_cells,
    marks,
    rates,
    seeds_text,
)
from evenkeel.lab.reading import Runs, band, column
from evenkeel.lab.statistics import Interval, Speedup, geometric_mean, speedup
from evenkeel.lab.tuning import Tuned, tune

PREPARATIONS = ("plain", "prepared")


class Convergence:
    """Training curves and steps to a target accuracy, each arm at its best learning rate."""

    name = "convergence"
    title = "Convergence"
    question = f"Does batch normalization reach {TARGET:.0f} % accuracy in fewer steps?"
    order = 1

    def cells(self, plan: Plan) -> Sequence[Cell]:
        return [cell for preparation in PREPARATIONS for cell in curve_cells(plan, preparation)]

    def read(self, plan: Plan, results: Results) -> Section:
        measures: list[Measure] = []
        figures: list[Figure] = []
        tables: list[Table] = []
        notes: list[str] = []
        agreements: list[str] = []
        answers: dict[str, list[str]] = {preparation: [] for preparation in PREPARATIONS}
        for preparation in PREPARATIONS:
            runs = Runs(curve_cells(plan, preparation), results)
            tried = rates(plan, preparation)
            for network in NETWORKS:
                by_arm = {arm.name: runs.of(network, arm.name) for arm in ARMS}
                tuned = {name: tune(rows, tried, TARGET) for name, rows in by_arm.items()}
                horizon = float(marks(plan, network, preparation)[-1])
                gains = {arm.name: _gain(tuned, arm, horizon) for arm in (TORCH, EVENKEEL)}
                where = f"{LABELS[network]}, {preparation}"
                measures.append(_measure(where, tuned, gains, horizon))
                figures += [
                    _accuracy(where, by_arm, tuned),
                    _loss(where, by_arm, tuned),
                ]
                tables.append(_row(where, tuned, tried, horizon))
                answers[preparation].append(f"{steps(gains[EVENKEEL.name])} on the {LABELS[network]} network")
                agreements.append(f"{_agreement(tuned, horizon)} ({where})")
                notes += [
                    f"{where}: the best rate of {arm.label}, {tuned[arm.name].rate:g}, lies at the "
                    "edge of the grid; a wider one might do better."
                    for arm in ARMS
                    if tuned[arm.name].at_edge
                ]
        notes.append(f"Steps of evenkeel over those of torch.nn: {listed(agreements)}.")
        return Section(
            self.name,
            self.title,
            self.question,
            f"With pixels and initial weights as they come, evenkeel's batch norm needs "
            f"{listed(answers['plain'])} to reach {TARGET:.0f} %; with both prepared by the book, it "
            f"needs {listed(answers['prepared'])}.",
            setup=[
                ("Data", DATA),
                ("Networks", NETWORKS_TEXT),
                ("Plain", PLAIN),
                ("Prepared", PREPARED),
                ("Training", OPTIMIZER),
                (
                    "Learning rate",
                    "for each arm the one with the fewest steps to the target on validation data; the "
                    "tables show the whole row",
                ),
                (
                    "Steps to target",
                    "on test data, linear between evaluations; compared by the ratio's logarithm, "
                    "paired by seed. A run that does not get there counts at its last step, and the "
                    "ratio is then a bound",
                ),
                ("Seeds", seeds_text(plan)),
            ],
            measures=measures,
            figures=figures,
            tables=tables,
            notes=[
                *notes,
                "Running moments start at (0, 1) and lag in the first steps; the faint curve shows the "
                "same network normalizing with the test batch's own moments.",
            ],
        )


def _gain(tuned: dict[str, Tuned], arm: Arm, horizon: float) -> Speedup:
    return speedup(tuned[arm.name].steps, tuned[NONE.name].steps, horizon)


def _agreement(tuned: dict[str, Tuned], horizon: float) -> str:
    return speedup(tuned[TORCH.name].steps, tuned[EVENKEEL.name].steps, horizon).text()


def _typical(needed: list[float | None]) -> Interval | None:
    known = [max(value, 1.0) for value in needed if value is not None]
    return geometric_mean(known) if len(known) == len(needed) else None


def _measure(where: str, tuned: dict[str, Tuned], gains: dict[str, Speedup], horizon: float) -> Measure:
    values = {name: _typical(each.steps) for name, each in tuned.items()}
    gain = gains[EVENKEEL.name]
    return Measure(
        f"Steps to {TARGET:.0f} % accuracy",
        where,
        values,
        {name: _reached(each.steps, horizon) for name, each in tuned.items()},
        f"{gain.text()} fewer" if gain.bound != "unknown" else gain.text(),
        {
            "ratio": gain.ratio,
            "bound": gain.bound,
            "ratio torch": gains[TORCH.name].ratio,
            "bound torch": gains[TORCH.name].bound,
        },
    )


def _reached(needed: list[float | None], horizon: float) -> str:
    known = [max(value, 1.0) for value in needed if value is not None]
    if not known:
        return f"none in {horizon:.0f}"
    if len(known) < len(needed):
        return f"{geometric_mean(known).value:.0f} ({len(known)} of {len(needed)})"
    return geometric_mean(known).text(0)


def _accuracy(where: str, by_arm: dict[str, list[Result]], tuned: dict[str, Tuned]) -> Figure:
    series: list[Series] = []
    for arm in ARMS:
        best, rows = tuned[arm.name], by_arm[arm.name]
        curves = [column(row["test"][1:], best.index) for row in rows]
        label = f"{arm.label}, rate {best.rate:g}"
        series.append(band(label, arm.name, rows[0]["steps"][1:], curves))
    rows, best = by_arm[EVENKEEL.name], tuned[EVENKEEL.name]
    lagless = [column(row["test_batch"][1:], best.index) for row in rows]
    series.append(band("evenkeel, batch's moments", EVENKEEL.name, rows[0]["steps"][1:], lagless, faint=True))
    described = listed([f"{arm.label} takes {_reached(tuned[arm.name].steps, rows[0]['steps'][-1])}" for arm in ARMS])
    return Figure(
        f"Test accuracy: {where}",
        Axis("steps", scale="log"),
        Axis("test accuracy, %", limits=(0.0, 100.0)),
        series,
        f"Test accuracy over training steps, {where}, each arm at its best learning rate. "
        f"Steps to {TARGET:.0f} %: {described}.",
        reference=(TARGET, f"{TARGET:.0f} %"),
    )


def _loss(where: str, by_arm: dict[str, list[Result]], tuned: dict[str, Tuned]) -> Figure:
    series = []
    for arm in ARMS:
        best, rows = tuned[arm.name], by_arm[arm.name]
        curves = [column(row["loss"][1:], best.index) for row in rows]
        label = f"{arm.label}, rate {best.rate:g}"
        series.append(band(label, arm.name, rows[0]["steps"][1:], curves, geometric=True))
    last = listed([f"{each.label}: {each.y[-1]:.3f}" for each in series if each.y[-1] is not None])
    return Figure(
        f"Training loss: {where}",
        Axis("steps", scale="log"),
        Axis("cross-entropy", scale="log"),
        series,
        f"Training loss over steps, {where}, on a logarithmic scale. At the end: {last}.",
    )


def _row(where: str, tuned: dict[str, Tuned], tried: Sequence[float], horizon: float) -> Table:
    runs = len(next(iter(tuned.values())).steps)
    rows = []
    for arm in ARMS:
        each = tuned[arm.name]
        cells = []
        for index, (typical, reached) in enumerate(each.row):
            text = "-" if typical is None else f"{typical:.0f}"
            if 0 < reached < runs:
                text += f" ({reached} of {runs})"
            cells.append(f"{text} *" if index == each.index else text)
        late = _reached(each.steps_batch, horizon)
        rows.append([arm.label, *cells, _reached(each.steps, horizon), late])
    return Table(
        f"Steps to {TARGET:.0f} % on validation data by learning rate ({where}); - : no run gets there "
        f"in {horizon:.0f}; * : the rate chosen, with its steps on test data",
        ["arm", *(f"{rate:g}" for rate in tried), "test", "test, batch's moments"],
        rows,
    )


EXPERIMENT = Convergence()
