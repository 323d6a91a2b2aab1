"""How much of batch normalization's cost does keelnorm remove?"""

from __future__ import annotations

from keelnorm.lab.core.cell import Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan
from keelnorm.lab.reading.figures import Axis, Figure, Series, Table
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.lab.reading.wording import listed
from keelnorm.lab.training.cost_measurement import by_size, cost_cells
from keelnorm.measure.statistics import Interval, geometric_mean

FREE = 1.05
"""Folded inference is called free where it takes at most this times the time of the network without batch norm."""


def read(plan: Plan, results: Results) -> Reading:
    found = by_size(plan, results)

    def ratio_of(size: str, part: str, pair: str) -> Interval:
        return geometric_mean([each[part][pair] for each in found[size]])

    def bytes_of(size: str, first: str, second: str) -> Interval:
        return geometric_mean([each["bytes"][first] / each["bytes"][second] for each in found[size]])

    findings = []
    for size in found:
        findings += [
            Finding(
                "a training step, keelnorm over torch.nn",
                size,
                ratio_of(size, "step", "keelnorm/torch"),
                1.0,
                larger=False,
                unit="×",
                digits=2,
            ),
            Finding(
                "bytes kept for the backward, keelnorm over torch.nn",
                size,
                bytes_of(size, "keelnorm", "torch"),
                1.0,
                larger=False,
                unit="×",
                digits=2,
                decisive=False,
            ),
            Finding(
                "folded inference over the network without batch norm",
                size,
                ratio_of(size, "inference", "folded/none"),
                FREE,
                larger=False,
                unit="×",
                digits=2,
            ),
            Finding(
                "a training step, keelnorm over none: what is left",
                size,
                ratio_of(size, "step", "keelnorm/none"),
                1.0,
                larger=False,
                unit="×",
                digits=2,
                decisive=False,
            ),
            Finding(
                "inference, folded over torch.nn's batch norm",
                size,
                ratio_of(size, "inference", "folded/torch"),
                1.0,
                larger=False,
                unit="×",
                digits=2,
                decisive=False,
            ),
        ]
    bars = {
        "torch.nn over none": ("torch", {size: ratio_of(size, "step", "torch/none") for size in found}),
        "keelnorm over none": ("keelnorm", {size: ratio_of(size, "step", "keelnorm/none") for size in found}),
    }
    words = listed(
        [
            f"×{ratio_of(size, 'step', 'torch/none').value:.2f} with torch.nn's batch norm and "
            f"×{ratio_of(size, 'step', 'keelnorm/none').value:.2f} "
            f"with keelnorm's ({size})"
            for size in found
        ]
    )
    folded = listed([f"×{ratio_of(size, 'inference', 'folded/none').value:.2f}" for size in found])
    return Reading(
        f"A training step takes, over one without batch norm, {words}; folded inference takes {folded}.",
        findings,
        [
            Figure(
                "Time of a training step over one without batch norm",
                Axis("network", categories=list(found)),
                Axis("times as long as without"),
                [
                    Series(
                        name,
                        style,
                        list(range(len(found))),
                        [each.value for each in intervals.values()],
                        [each.low for each in intervals.values()],
                        [each.high for each in intervals.values()],
                    )
                    for name, (style, intervals) in bars.items()
                ],
                f"A training step takes, over one without batch norm, {words}.",
                kind="bars",
                reference=(1.0, "without"),
            )
        ],
        [
            Table(
                "Ratios of times, and of bytes kept for the backward",
                [
                    "network",
                    "step: torch.nn / none",
                    "step: keelnorm / none",
                    "step: keelnorm / torch.nn",
                    "bytes: torch.nn / none",
                    "bytes: keelnorm / none",
                    "inference: folded / none",
                    "inference: folded / torch.nn",
                ],
                [
                    [
                        size,
                        *(
                            f"×{ratio_of(size, 'step', pair).text(2)}"
                            for pair in ("torch/none", "keelnorm/none", "keelnorm/torch")
                        ),
                        *(f"×{bytes_of(size, arm, 'none').text(2)}" for arm in ("torch", "keelnorm")),
                        *(f"×{ratio_of(size, 'inference', pair).text(2)}" for pair in ("folded/none", "folded/torch")),
                    ]
                    for size in found
                ],
            )
        ],
        setup=[
            (
                "Networks",
                "digits of 8 × 8 pixels, for the convolutional network enlarged to 32 × 32; keelnorm's are "
                "torch.nn's after kn.convert, which fuses batch norm and ReLU",
            ),
            (
                "Checked",
                "keelnorm's and torch.nn's losses in the first steps, and the folded network's outputs, agree before "
                "anything is timed",
            ),
            (
                "Time",
                "on one thread; arms take turns within a run, each round gives a ratio, and their median is a seed's",
            ),
            ("Bytes", "of the distinct tensors that the forward keeps for the backward, without parameters and input"),
            ("Seeds", f"{len(next(iter(found.values())))}; intervals are 95 % t-intervals of the logarithm"),
        ],
        notes=[
            "In the fully connected networks a batch norm's values fit into a cache, and its time is that of calls, "
            "of which keelnorm's layer makes no "
            "fewer; `keelnorm bench` and `make models` time large layers "
            "and published architectures.",
        ],
    )


CLAIM = Claim(
    number=20,
    title="Cost removed",
    statement="Fused kernels and folding remove batch normalization's cost.",
    question="What is left of the cost with keelnorm's layers, and after folding?",
    literature="Batch norm and ReLU together need to move no more bytes than ReLU alone when a channel's values stay "
    "in the cache; fusing the two, as "
    "Jung et al. do, removes most of the cost. At inference a batch norm that follows a linear layer can be folded "
    "into it (Jacob et al. 2018).",
    sources=[
        Source("Jung, Jung, Kim, Chung, Chang 2019", "https://arxiv.org/abs/1807.01702"),
        Source("Jacob et al. 2018: Quantization and training, section 3.2", "https://arxiv.org/abs/1712.05877"),
        Source("Rota Bulò, Porzi, Kontschieder 2018: In-place activated BatchNorm", "https://arxiv.org/abs/1712.02616"),
    ],
    criterion=f"Holds if, in every network, a training step with keelnorm's batch norm takes less time than with "
    f"torch.nn's (the ratio's interval lies below "
    f"1), and folded inference takes less than {FREE:g} times what the network without batch norm takes; depends if "
    f"some of these hold.",
    data=("digits",),
    cells=cost_cells,
    read=read,
)
