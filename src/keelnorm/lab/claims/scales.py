"""Does batch normalization take care of inputs whose features differ in scale?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import keelnorm as kn
from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import ByForm, Plan, Seeds, seeds_text
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.data import Split, table
from keelnorm.lab.reading.best_rates import (
    CHOSEN_BY_VALIDATION,
    accuracies,
    best_by_arm,
    edge_notes,
    rate_row,
    rate_table,
)
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.series import boxes
from keelnorm.lab.reading.verdicts import difference_findings
from keelnorm.lab.reading.wording import listed
from keelnorm.lab.training.arms import BN, NONE
from keelnorm.lab.training.stacks import StackedMLP
from keelnorm.lab.training.train import train
from keelnorm.measure.page_parts import Axis, Figure
from keelnorm.measure.statistics import mean

ARMS = {
    "raw": ("raw values", "none"),
    "input": ("batch norm on the input", "bn"),
    "hidden": ("batch norm in hidden layers only", "other-1"),
    "standardized": ("standardized beforehand", "other-2"),
}
NAMES = {"wine": "wine", "cancer": "breast cancer"}
WIDTHS = (32, 32)
BATCH = 16
RATES = ByForm(
    quick=(0.0003, 0.001, 0.003, 0.03, 0.1, 0.3), full=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
)
STEPS = ByForm(quick=200, full=300)
SEEDS = Seeds(quick=4, full=16)


class NormalizedInput(StackedMLP):
    """The same network behind a batch norm without γ and β, one for all replicas, which see the same input."""

    def __init__(self, features: int, *given: object, **how: object) -> None:
        super().__init__(features, *given, **how)  # type: ignore[arg-type]
        self.input_norm = kn.BatchNorm1d(features, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of every replica."""
        return super().forward(self.input_norm(x))


def standardized(split: Split) -> Split:
    """Every column minus its mean over its standard deviation, both of the training part."""
    mean_, width = split.train_x.mean(dim=0), split.train_x.std(dim=0, correction=0).clamp(min=1e-12)
    return split.with_inputs(lambda x: (x - mean_) / width)


def train_on_table(*, data: str, arm: str, seed: int, rates: tuple[float, ...], steps: int) -> Result:
    """Train one arm at every learning rate on a table of measurements."""
    split = table(data, seed)
    split = standardized(split) if arm == "standardized" else split
    kind = NormalizedInput if arm == "input" else StackedMLP
    stack = kind(
        split.train_x.shape[1],
        WIDTHS,
        split.classes,
        BN if arm == "hidden" else NONE,
        generator(draw="initialization", data=data, seed=seed),
        torch.ones(len(rates)),
        initialization="torch",
    )
    order = generator(draw="order", data=data, seed=seed)
    return dict(vars(train(stack, split, torch.tensor(rates), batch=BATCH, evaluate_at=(steps,), generator=order)))


def _cells(plan: Plan, data: str) -> Sequence[Cell]:
    steps = STEPS.of(plan)
    return [
        Cell(
            train_on_table,
            {"data": data, "arm": arm, "seed": seed, "rates": RATES.of(plan), "steps": steps},
            cost=steps * 8e-4,
        )
        for seed in SEEDS.of(plan)
        for arm in ARMS
    ]


def read(plan: Plan, results: Results) -> Reading:
    """What batch norm on the input gains on each table, every arm at its best rate."""
    findings, rows, words, notes, tests = [], [], [], [], []
    gain = {"test accuracy, batch norm on the input − raw": ("input", "raw")}
    asides = {
        "test accuracy, batch norm in hidden layers only − raw": ("hidden", "raw"),
        "test accuracy, batch norm on the input − in hidden layers only": ("input", "hidden"),
        "test accuracy, batch norm on the input − standardized beforehand": ("input", "standardized"),
    }
    for data, name in NAMES.items():
        runs = Runs(_cells(plan, data), results)
        best = best_by_arm({arm: runs.of(arm) for arm in ARMS}, RATES.of(plan))
        test = accuracies(best)
        tests.append(test)
        findings += difference_findings(name, test, gain) + difference_findings(name, test, asides, decisive=False)
        means = {arm: mean(values).value for arm, values in test.items()}
        words.append(
            f"from {means['raw']:.1f} to {means['input']:.1f} % ({name}; {means['standardized']:.1f} % standardized "
            f"beforehand, {means['hidden']:.1f} % with batch norm in hidden layers only)"
        )
        rows += [rate_row(name, label, best[arm]) for arm, (label, _) in ARMS.items()]
        notes += [] if plan.quick else edge_notes(name, {f"of {ARMS[arm][0]}": each for arm, each in best.items()})
    return Reading(
        f"With features of different scales, batch norm on the input takes the test accuracy {listed(words)}.",
        findings,
        [
            Figure(
                "Test accuracy at the best rate",
                Axis("data", categories=list(NAMES.values())),
                Axis("test accuracy, %"),
                [boxes(label, style, [test[arm] for test in tests]) for arm, (label, style) in ARMS.items()],
                f"A box for each arm over the seeds. Batch norm on the input: {listed(words)}.",
                kind="boxes",
            )
        ],
        [rate_table(RATES.of(plan), rows)],
        setup={
            "Data": "scikit-learn's wine (178 samples, 13 columns with deviations from 0.12 to 315) and breast cancer "
            "(569 samples, 30 columns, from 0.0026 to 569), as they come; half is for training, a fifth for validation",
            "Network": f"fully connected, {WIDTHS[0]} - {WIDTHS[1]} hidden units with ReLU, the initialization of "
            "torch.nn",
            "Arms": "batch norm on the input has no γ and β; standardized: with the training part's mean and deviation",
            "Training": f"{STEPS.of(plan)} steps of gradient descent, batches of {BATCH}",
            "Learning rate": CHOSEN_BY_VALIDATION,
            "Seeds": seeds_text(SEEDS.of(plan)),
        },
        notes=notes,
    )


CLAIM: Claim = Claim(
    number=8,
    title="Inputs of different scales",
    statement="Batch normalization handles inputs whose features differ in scale.",
    question="Does a network learn from raw, unscaled features with batch norm?",
    literature="LeCun and others recommend inputs that have mean zero and about the same variance in every feature, "
    "for faster convergence. A batch norm on the input gives that during training, with no pass over the data before. "
    "One in a hidden layer scales a unit's sum over all features, and leaves their shares in it as they are.",
    sources=[
        Source(
            "LeCun, Bottou, Orr, Müller 1998: Efficient BackProp, section 4.3",
            "https://doi.org/10.1007/3-540-49430-8_2",
        ),
        Source("Ioffe, Szegedy 2015", "https://arxiv.org/abs/1502.03167"),
    ],
    criterion="Holds if, on both tables, the test accuracy with batch norm on the input is higher than with raw "
    "values (each interval above 0), every arm at its best rate. What batch norm in hidden layers alone does, and "
    "standardizing beforehand, is shown beside.",
    data=("wine", "breast cancer"),
    cells=lambda plan: [cell for data in NAMES for cell in _cells(plan, data)],
    read=read,
)
