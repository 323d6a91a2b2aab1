"""How much of batch normalization's cost does keelnorm remove?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from keelnorm.lab.claims._cost_reading import Ratios, measured_setup, ratios_by_size
from keelnorm.lab.core.cell import Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan
from keelnorm.lab.reading.series import bars
from keelnorm.lab.reading.verdicts import Finding, ratio_finding
from keelnorm.lab.reading.wording import listed
from keelnorm.lab.training.cost_measurement import cost_cells
from keelnorm.measure.page_parts import Axis, Figure, Table
from keelnorm.measure.statistics import Interval

FREE = 1.05
"""Folded inference is called free where it takes at most this times the time of the network without batch norm."""


def read(plan: Plan, results: Results) -> Reading:
    """Ratios of times and of bytes, by size of network."""
    found = ratios_by_size(plan, results)
    words = listed(
        [
            f"×{ratios.step('torch/none').value:.2f} with torch.nn's batch norm and "
            f"×{ratios.step('keelnorm/none').value:.2f} with keelnorm's ({size})"
            for size, ratios in found.items()
        ]
    )
    folded = listed([f"×{ratios.inference('folded/none').value:.2f}" for ratios in found.values()])
    figure = Figure(
        "Time of a training step over one without batch norm",
        Axis("network", categories=list(found)),
        Axis("times as long as without"),
        [
            bars(f"{label} over none", style, [ratios.step(f"{style}/none") for ratios in found.values()])
            for style, label in (("torch", "torch.nn"), ("keelnorm", "keelnorm"))
        ],
        f"A training step takes, over one without batch norm, {words}.",
        kind="bars",
        reference=(1.0, "without"),
    )
    return Reading(
        f"A training step takes, over one without batch norm, {words}; folded inference takes {folded}.",
        [finding for size, ratios in found.items() for finding in _findings(size, ratios)],
        [figure],
        [
            Table(
                "Ratios of times, and of bytes kept for the backward",
                ["network", *COLUMNS],
                [
                    [size, *(f"×{column(ratios).text(2)}" for column in COLUMNS.values())]
                    for size, ratios in found.items()
                ],
            )
        ],
        setup={
            "Networks": "digits of 8 × 8 pixels, for the convolutional network enlarged to 32 × 32; keelnorm's are "
            "torch.nn's after kn.convert, which fuses batch norm and ReLU",
            "Checked": "keelnorm's and torch.nn's losses in the first steps, and the folded network's outputs, agree "
            "before anything is timed",
            **measured_setup(found),
        },
        notes=[
            "In the fully connected networks a batch norm's values fit into a cache, and its time is that of calls, of "
            "which keelnorm's layer makes no fewer; `keelnorm bench` and `make models` time large layers and "
            "published architectures.",
        ],
    )


COLUMNS: dict[str, Callable[[Ratios], Interval]] = {
    "step: torch.nn / none": lambda ratios: ratios.step("torch/none"),
    "step: keelnorm / none": lambda ratios: ratios.step("keelnorm/none"),
    "step: keelnorm / torch.nn": lambda ratios: ratios.step("keelnorm/torch"),
    "bytes: torch.nn / none": lambda ratios: ratios.bytes_kept("torch/none"),
    "bytes: keelnorm / none": lambda ratios: ratios.bytes_kept("keelnorm/none"),
    "inference: folded / none": lambda ratios: ratios.inference("folded/none"),
    "inference: folded / torch.nn": lambda ratios: ratios.inference("folded/torch"),
}


def _findings(size: str, ratios: Ratios) -> list[Finding]:
    less = partial(ratio_finding, where=size, larger=False)
    folded = "folded inference over the network without batch norm"
    return [
        less("a training step, keelnorm over torch.nn", effect=ratios.step("keelnorm/torch")),
        less(
            "bytes kept for the backward, keelnorm over torch.nn",
            effect=ratios.bytes_kept("keelnorm/torch"),
            decisive=False,
        ),
        Finding(folded, size, ratios.inference("folded/none"), FREE, larger=False, unit="×", digits=2),
        less("a training step, keelnorm over none: what is left", effect=ratios.step("keelnorm/none"), decisive=False),
        less("inference, folded over torch.nn's batch norm", effect=ratios.inference("folded/torch"), decisive=False),
    ]


CLAIM = Claim(
    number=20,
    title="Cost removed",
    statement="Fused kernels and folding remove batch normalization's cost.",
    question="What is left of the cost with keelnorm's layers, and after folding?",
    literature="Batch norm and ReLU together need to move no more bytes than ReLU alone when a channel's values stay "
    "in the cache; fusing the two, as Jung et al. do, removes most of the cost. At inference a batch norm that follows "
    "a linear layer can be folded into it (Jacob et al. 2018).",
    sources=[
        Source("Jung, Jung, Kim, Chung, Chang 2019", "https://arxiv.org/abs/1807.01702"),
        Source("Jacob et al. 2018: Quantization and training, section 3.2", "https://arxiv.org/abs/1712.05877"),
        Source("Rota Bulò, Porzi, Kontschieder 2018: In-place activated BatchNorm", "https://arxiv.org/abs/1712.02616"),
    ],
    criterion="Holds if, in every network, a training step with keelnorm's batch norm takes less time than with "
    f"torch.nn's (the ratio's interval lies below 1), and folded inference takes less than {FREE:g} times what the "
    "network without batch norm takes; depends if some of these hold.",
    data=("digits",),
    cells=cost_cells,
    read=read,
)
