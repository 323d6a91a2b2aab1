"""Over which learning rates does a network learn at all?"""

from __future__ import annotations

from collections.abc import Sequence

from evenkeel.lab.arms import EVENKEEL, NONE, TORCH
from evenkeel.lab.cell import Cell, Result, Results
from evenkeel.lab.experiment import Plan
from evenkeel.lab.figures import Axis, Figure, Measure, Section, Table
from evenkeel.lab.networks import LABELS
from evenkeel.lab.phrases import listed, times
from evenkeel.lab.protocol import (
    ARMS,
    DATA,
    NETWORKS,
    NETWORKS_TEXT,
    OPTIMIZER,
    PREPARED,
    TARGET,
    curve_cells,
    marks,
    rates,
    seeds_text,
)
from evenkeel.lab.reading import Runs, band
from evenkeel.lab.statistics import Interval, geometric_mean, mean, ratio

PREPARATION = "prepared"


def largest(result: Result, tried: Sequence[float]) -> float | None:
    """The largest rate whose final test accuracy reaches the target; None where none does."""
    good = [rate for rate, final in zip(tried, result["test"][-1], strict=True) if final >= TARGET]
    return max(good, default=None)


def usable_share(result: Result) -> float:
    """The share of the rates, in percent, whose final test accuracy reaches the target."""
    final: list[float] = result["test"][-1]
    return 100.0 * sum(each >= TARGET for each in final) / len(final)


class LearningRate:
    """Final accuracy over a grid of learning rates from 0.001 to 10."""

    name = "learning_rate"
    title = "Learning rate"
    question = "Does batch normalization allow higher learning rates?"
    order = 2

    def cells(self, plan: Plan) -> Sequence[Cell]:
        return curve_cells(plan, PREPARATION)

    def read(self, plan: Plan, results: Results) -> Section:
        runs = Runs(self.cells(plan), results)
        tried = rates(plan, PREPARATION)
        measures: list[Measure] = []
        figures: list[Figure] = []
        tables: list[Table] = []
        answers: list[str] = []
        notes: list[str] = []
        for network in NETWORKS:
            where = LABELS[network]
            by_arm = {arm.name: runs.of(network, arm.name) for arm in ARMS}
            top = {name: [largest(row, tried) for row in rows] for name, rows in by_arm.items()}
            gains = {arm.name: _gain(top[arm.name], top[NONE.name]) for arm in (TORCH, EVENKEEL)}
            gain = gains[EVENKEEL.name]
            words = (
                "can't be compared, as some runs learn at no rate"
                if gain is None
                else times(gain, "higher", "lower", "not clearly different")
            )
            answers.append(f"{words} on the {where} network")
            share = {name: mean([usable_share(r) for r in rows]) for name, rows in by_arm.items()}
            measures.append(
                Measure(
                    f"Largest learning rate that reaches {TARGET:.0f} %",
                    where,
                    {name: _geometric(values) for name, values in top.items()},
                    {name: _rate_text(values) for name, values in top.items()},
                    "-" if gain is None else f"×{gain.text()} higher",
                    {
                        "ratio": gain,
                        "ratio torch": gains[TORCH.name],
                        **{f"usable share {name}": value for name, value in share.items()},
                    },
                )
            )
            finals = {name: [r["test"][-1] for r in rows] for name, rows in by_arm.items()}
            ends = listed([f"{arm.label} {_rate_text(top[arm.name])}" for arm in ARMS])
            figures.append(
                Figure(
                    f"Accuracy by learning rate: {where}",
                    Axis("learning rate", scale="log"),
                    Axis("test accuracy, %", limits=(0.0, 100.0)),
                    [band(arm.label, arm.name, tried, finals[arm.name]) for arm in ARMS],
                    f"Test accuracy of the {where} network after "
                    f"{marks(plan, network)[-1]} steps over learning rates from {tried[0]:g} to "
                    f"{tried[-1]:g}. Largest rate with {TARGET:.0f} %, geometric mean over seeds: "
                    f"{ends}.",
                    reference=(TARGET, f"{TARGET:.0f} %"),
                )
            )
            rows = [
                [
                    arm.label,
                    *(mean(list(each)).text(1) for each in zip(*finals[arm.name], strict=True)),
                    share[arm.name].text(0),
                ]
                for arm in ARMS
            ]
            tables.append(
                Table(
                    f"Test accuracy in % by learning rate ({where})",
                    ["arm", *(f"{rate:g}" for rate in tried), f"rates with {TARGET:.0f} %, %"],
                    rows,
                )
            )
            differ = sum(a != b for a, b in zip(top[TORCH.name], top[EVENKEEL.name], strict=True))
            if differ:
                notes.append(
                    f"{where}: torch.nn and evenkeel differ in the largest rate of {differ} of "
                    f"{len(top[TORCH.name])} seeds. At the edge of stability, rounding can decide a run."
                )
            notes += [
                f"{where}: {arm.label} still learns at the largest rate tried in some runs; its limit lies higher."
                for arm in ARMS
                if tried[-1] in top[arm.name]
            ]
        notes.append(
            "A largest rate is one of the grid's; an interval of no width says that every seed ended at the same one."
        )
        return Section(
            self.name,
            self.title,
            self.question,
            f"The largest learning rate that still gives {TARGET:.0f} % is, with evenkeel's batch "
            f"norm, {listed(answers)}.",
            setup=[
                ("Data", DATA),
                ("Networks", NETWORKS_TEXT),
                ("Preparation", PREPARED),
                ("Training", OPTIMIZER),
                (
                    "Steps",
                    listed([f"{marks(plan, name)[-1]} ({LABELS[name]})" for name in NETWORKS])
                    + ": the lowest rates would get further with more",
                ),
                ("Seeds", seeds_text(plan)),
            ],
            measures=measures,
            figures=figures,
            tables=tables,
            notes=notes,
        )


def _gain(rates_of: list[float | None], baseline: list[float | None]) -> Interval | None:
    first = [rate for rate in rates_of if rate is not None]
    second = [rate for rate in baseline if rate is not None]
    if len(first) < len(rates_of) or len(second) < len(baseline):
        return None
    return ratio(first, second)


def _geometric(values: list[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return geometric_mean(known) if len(known) == len(values) else None


def _rate_text(values: list[float | None]) -> str:
    typical = _geometric(values)
    if typical is not None:
        return typical.text(2)
    known = [value for value in values if value is not None]
    return f"{len(known)} of {len(values)} runs learn at some rate"


EXPERIMENT = LearningRate()
