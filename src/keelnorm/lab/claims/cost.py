"""What does batch normalization cost, as torch.nn has it?"""

from __future__ import annotations

from collections.abc import Callable

from keelnorm.lab.claims._cost_reading import Ratios, measured_setup, ratios_by_size
from keelnorm.lab.core.cell import Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan
from keelnorm.lab.reading.series import bars
from keelnorm.lab.reading.verdicts import ratio_finding
from keelnorm.lab.reading.wording import listed
from keelnorm.lab.training.cost_measurement import cost_cells
from keelnorm.measure.page_parts import Axis, Figure, Table
from keelnorm.measure.statistics import Interval, geometric_mean

STEP = "a training step"
QUANTITIES: dict[str, Callable[[Ratios], Interval]] = {
    STEP: lambda ratios: ratios.step("torch/none"),
    "bytes kept for the backward": lambda ratios: ratios.bytes_kept("torch/none"),
    "inference": lambda ratios: ratios.inference("torch/none"),
    "inference after folding": lambda ratios: ratios.inference("folded/none"),
}
STYLES = ("torch", "other-1", "other-2", "other-3")


def read(plan: Plan, results: Results) -> Reading:
    """Time and bytes with torch.nn's batch norm relative to the network without, by size of network."""
    found = ratios_by_size(plan, results)
    intervals = {
        name: {size: quantity(ratios) for size, ratios in found.items()} for name, quantity in QUANTITIES.items()
    }
    words = listed([f"×{each.text(2)} ({size})" for size, each in intervals[STEP].items()])
    milliseconds = {
        size: geometric_mean([each["milliseconds"]["none"] for each in ratios.by_seed])
        for size, ratios in found.items()
    }
    return Reading(
        f"With torch.nn's batch norm a training step takes {words} the time of one without.",
        [
            ratio_finding(f"{name}, torch.nn's batch norm over none", size, each, decisive=name == STEP)
            for name, by_network in intervals.items()
            for size, each in by_network.items()
        ],
        [_figure(intervals)],
        [
            Table(
                "torch.nn's batch norm over none",
                ["network", *QUANTITIES, "a step without, ms"],
                [
                    [size, *(f"×{intervals[name][size].text(2)}" for name in QUANTITIES), milliseconds[size].text(2)]
                    for size in found
                ],
            )
        ],
        setup={
            "Networks": "digits of 8 × 8 pixels, for the convolutional network enlarged to 32 × 32; the batch norms "
            "stand between every hidden layer and its ReLU",
            "Folding": "kn.fold takes every batch norm into the layer ahead of it; its outputs are checked against the "
            "network's",
            **measured_setup(found),
        },
        notes=["Ratios are of this machine: with more cores or a GPU they differ."],
    )


def _figure(intervals: dict[str, dict[str, Interval]]) -> Figure:
    said = " ".join(
        f"{name}: {', '.join(f'{size} ×{each.value:.2f}' for size, each in by_network.items())}."
        for name, by_network in intervals.items()
    )
    return Figure(
        "Cost of torch.nn's batch norm over none",
        Axis("network", categories=list(intervals[STEP])),
        Axis("times as much as without"),
        [
            bars(name, style, list(by_network.values()))
            for (name, by_network), style in zip(intervals.items(), STYLES, strict=True)
        ],
        f"Time and memory with torch.nn's batch norm relative to the same network without. {said}",
        kind="bars",
        reference=(1.0, "without"),
    )


CLAIM = Claim(
    number=13,
    title="Cost",
    statement="Batch normalization costs computation and memory.",
    question="How much longer is a training step with torch.nn's batch norm?",
    literature="Batch norm has few operations, and moves the whole activation through memory several times: twice or "
    "more in the forward, again in the backward. Jung et al. measure that in training such layers take a large part of "
    "the time of modern convolutional networks. At inference it is one multiplication and addition, which can be "
    "folded into the layer ahead.",
    sources=[
        Source(
            "Jung, Jung, Kim, Chung, Chang 2019: Restructuring batch normalization", "https://arxiv.org/abs/1807.01702"
        ),
    ],
    criterion="Holds if the time of a training step with torch.nn's batch norm over that without lies above 1 in every "
    "network; depends if in some. Memory and inference are shown beside.",
    data=("digits",),
    cells=cost_cells,
    read=read,
)
