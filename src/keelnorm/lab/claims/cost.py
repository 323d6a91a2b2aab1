"""What does batch normalization cost, as torch.nn has it?"""

from __future__ import annotations

from keelnorm.lab.core.cell import Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan
from keelnorm.lab.reading.figures import Axis, Figure, Series, Table
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.lab.reading.wording import listed
from keelnorm.lab.training.cost_measurement import by_size, cost_cells
from keelnorm.measure.statistics import geometric_mean

QUANTITIES = {
    "a training step": lambda result: result["step"]["torch/none"],
    "bytes kept for the backward": lambda result: result["bytes"]["torch"] / result["bytes"]["none"],
    "inference": lambda result: result["inference"]["torch/none"],
    "inference after folding": lambda result: result["inference"]["folded/none"],
}
STYLES = ("torch", "other-1", "other-2", "other-3")


def read(plan: Plan, results: Results) -> Reading:
    found = by_size(plan, results)
    intervals = {
        name: {size: geometric_mean([value(each) for each in found[size]]) for size in found}
        for name, value in QUANTITIES.items()
    }
    findings = [
        Finding(
            f"{name}, torch.nn's batch norm over none",
            size,
            intervals[name][size],
            1.0,
            unit="×",
            digits=2,
            decisive=name == "a training step",
        )
        for name in QUANTITIES
        for size in found
    ]
    words = listed([f"×{intervals['a training step'][size].text(2)} ({size})" for size in found])
    return Reading(
        f"With torch.nn's batch norm a training step takes {words} the time of one without.",
        findings,
        [
            Figure(
                "Cost of torch.nn's batch norm over none",
                Axis("network", categories=list(found)),
                Axis("times as much as without"),
                [
                    Series(
                        name,
                        style,
                        list(range(len(found))),
                        [each.value for each in intervals[name].values()],
                        [each.low for each in intervals[name].values()],
                        [each.high for each in intervals[name].values()],
                    )
                    for (name, style) in zip(QUANTITIES, STYLES, strict=True)
                ],
                "Time and memory with torch.nn's batch norm relative to the same network without. "
                + " ".join(
                    f"{name}: {', '.join(f'{size} ×{each.value:.2f}' for size, each in by.items())}."
                    for name, by in intervals.items()
                ),
                kind="bars",
                reference=(1.0, "without"),
            )
        ],
        [
            Table(
                "torch.nn's batch norm over none",
                ["network", *QUANTITIES, "a step without, ms"],
                [
                    [
                        size,
                        *(f"×{intervals[name][size].text(2)}" for name in QUANTITIES),
                        geometric_mean([each["milliseconds"]["none"] for each in found[size]]).text(2),
                    ]
                    for size in found
                ],
            )
        ],
        setup=[
            (
                "Networks",
                "digits of 8 × 8 pixels, for the convolutional network enlarged to 32 × 32; the batch norms stand "
                "between every hidden layer and its ReLU",
            ),
            (
                "Time",
                "on one thread; arms take turns within a run, each round gives a ratio, and their median is a seed's",
            ),
            ("Bytes", "of the distinct tensors that the forward keeps for the backward, without parameters and input"),
            (
                "Folding",
                "kn.fold takes every batch norm into the layer ahead of it; its outputs are checked against the "
                "network's",
            ),
            ("Seeds", f"{len(next(iter(found.values())))}; intervals are 95 % t-intervals of the logarithm"),
        ],
        notes=["Ratios are of this machine: with more cores or a GPU they differ."],
    )


CLAIM = Claim(
    number=13,
    title="Cost",
    statement="Batch normalization costs computation and memory.",
    question="How much longer is a training step with torch.nn's batch norm?",
    literature="Batch norm has few operations, and moves the whole activation through memory several times: twice or "
    "more in the forward, again in "
    "the backward. Jung et al. measure that in training such layers take a large part of the time of modern "
    "convolutional networks. At inference it is "
    "one multiplication and addition, which can be folded into the layer ahead.",
    sources=[
        Source(
            "Jung, Jung, Kim, Chung, Chang 2019: Restructuring batch normalization", "https://arxiv.org/abs/1807.01702"
        ),
    ],
    criterion="Holds if the time of a training step with torch.nn's batch norm over that without lies above 1 in "
    "every network; depends if in some. "
    "Memory and inference are shown beside.",
    data=("digits",),
    cells=cost_cells,
    read=read,
)
