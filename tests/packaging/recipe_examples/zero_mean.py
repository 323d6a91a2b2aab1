"""Does batch normalization give outputs of mean zero?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import keelnorm as kn
from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan, Seeds
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.measure.page_parts import Axis, Figure, Series, Table
from keelnorm.measure.statistics import mean


def output_mean(*, seed: int, size: int) -> Result:
    """The largest mean of a channel."""
    x = 3 + torch.randn(size, 4, generator=generator(draw="values", seed=seed))
    return {"mean": float(kn.BatchNorm1d(4)(x).mean(0).abs().max().detach())}


def cells(plan: Plan) -> Sequence[Cell]:
    size = 16 if plan.quick else 1024
    seeds = Seeds(quick=3, full=20).of(plan)
    return [Cell(output_mean, {"seed": seed, "size": size}, cost=0.001 * size) for seed in seeds]


def read(plan: Plan, results: Results) -> Reading:
    values = [result["mean"] for _, result in results.of(cells(plan))]
    found = mean(values)
    series = Series("batch norm", "bn", list(range(len(values))), values)
    return Reading(
        f"The largest mean is {found.value:.1e}.",
        [Finding("largest mean of a channel", "normal values", found, 1e-5, larger=False, unit="", digits=8)],
        [Figure("Means", Axis("seed"), Axis("mean"), [series], "The largest mean of a channel, for each seed.")],
        [Table("Means", ["seed", "mean"], [[str(seed), f"{value:.1e}"] for seed, value in enumerate(values)])],
        setup={"Values": "normal, of mean 3"},
    )


CLAIM = Claim(
    number=24,
    title="Zero mean",
    statement="The outputs of batch normalization have mean zero.",
    question="Is the mean of the outputs zero?",
    literature="It is by definition.",
    sources=[Source("Ioffe, Szegedy 2015", "https://arxiv.org/abs/1502.03167")],
    criterion="Holds if the mean is below a hundred thousandth.",
    data=("none",),
    cells=cells,
    read=read,
)
