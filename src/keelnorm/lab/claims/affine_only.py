"""Can a network learn with γ and β alone, all other weights left at random?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import ByForm, Plan, Seeds, seeds_text
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.data import images
from keelnorm.lab.reading.best_rates import CHOSEN_BY_VALIDATION, accuracies, edge_notes, highest_accuracy
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.series import with_intervals
from keelnorm.lab.reading.verdicts import Finding, difference_finding, difference_findings
from keelnorm.lab.reading.wording import listed, where_text
from keelnorm.lab.training.arms import BN
from keelnorm.lab.training.stacks import StackedMLP
from keelnorm.lab.training.train import train
from keelnorm.measure.page_parts import Axis, Figure, Table
from keelnorm.measure.statistics import mean

ARMS = {
    "affine": ("γ and β alone", "bn"),
    "output": ("the output layer alone", "other-1"),
    "all": ("everything", "none"),
}
DEPTHS = ByForm(quick=(2, 8), full=(2, 4, 8))
WIDTH = 128
BATCH = 60
RATES = {
    "affine": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    "output": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    "all": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
}
CHANCE = 10.0
STEPS = ByForm(quick=100, full=400)
SEEDS = Seeds(quick=3, full=5)


def train_partly(*, data: str, arm: str, depth: int, seed: int, rates: tuple[float, ...], steps: int) -> Result:
    """Train the parameters that the arm names, and leave the others at their random start."""
    split = images(data, seed)
    stack = StackedMLP(
        split.train_x[0].numel(),
        (WIDTH,) * depth,
        split.classes,
        BN,
        generator(draw="initialization", data=data, seed=seed),
        torch.ones(len(rates)),
    )
    own = {"affine": list(stack.blocks.parameters()), "output": [stack.weights[-1], stack.biases[-1]]}
    if arm != "all":
        stack.requires_grad_(False)
        for parameter in own[arm]:
            parameter.requires_grad_(True)
    order = generator(draw="order", data=data, seed=seed)
    history = train(stack, split, torch.tensor(rates), batch=BATCH, evaluate_at=(steps,), generator=order)
    trained = sum(p.numel() for p in stack.parameters() if p.requires_grad) // len(rates)
    total = sum(p.numel() for p in stack.parameters()) // len(rates)
    return dict(vars(history)) | {"trained": trained, "total": total}


def _conditions(plan: Plan) -> list[tuple[str, int]]:
    return [(data, depth) for data in CLAIM.sets(plan) for depth in DEPTHS.of(plan)]


def _rates(plan: Plan, arm: str) -> tuple[float, ...]:
    return RATES[arm][2:4] if plan.quick else RATES[arm]


def _cells(plan: Plan, data: str, depth: int) -> Sequence[Cell]:
    steps = STEPS.of(plan)
    return [
        Cell(
            train_partly,
            {"data": data, "arm": arm, "depth": depth, "seed": seed, "rates": _rates(plan, arm), "steps": steps},
            cost=steps * depth * len(_rates(plan, arm)) * 3e-4,
        )
        for seed in SEEDS.of(plan)
        for arm in ARMS
    ]


def read(plan: Plan, results: Results) -> Reading:
    """Accuracy with γ and β alone by depth, against chance, the output layer alone and everything."""
    findings: list[Finding] = []
    rows, words, notes = [], [], []
    by_depth: dict[str, dict[int, dict[str, list[float]]]] = {}
    for data, depth in _conditions(plan):
        where = where_text(data, f"{depth} layers")
        runs = Runs(_cells(plan, data, depth), results)
        best = {arm: highest_accuracy(runs.of(arm), _rates(plan, arm)) for arm in ARMS}
        test = by_depth.setdefault(data, {})[depth] = accuracies(best)
        findings += _findings(where, test)
        words.append(
            f"{mean(test['affine']).value:.1f} % ({where}; the output layer alone {mean(test['output']).value:.1f} %)"
        )
        for arm, (label, _) in ARMS.items():
            counts = "{trained:,} of {total:,}".format(**runs.of(arm)[0])
            rows.append([where, label, counts, f"{best[arm].rate:g}", mean(test[arm]).text(1)])
        if not plan.quick:
            notes += edge_notes(where, {f"for {ARMS[arm][0]}": each for arm, each in best.items()})
    return Reading(
        f"With all weights left at random, γ and β alone reach {listed(words)}.",
        findings,
        [_figure(where_text(data), by_arm, words) for data, by_arm in by_depth.items()],
        [
            Table(
                "Test accuracy in percent at the rate chosen on validation data",
                ["where", "trained", "parameters", "rate", "accuracy"],
                rows,
            )
        ],
        setup={
            "Network": f"fully connected, hidden layers of {WIDTH} with ReLU behind batch norm, He's initialization, "
            "centered pixels",
            "Training": f"{STEPS.of(plan)} steps of gradient descent, batches of {BATCH}; what is not trained stays as "
            "it was drawn",
            "Learning rate": CHOSEN_BY_VALIDATION,
            "Seeds": seeds_text(SEEDS.of(plan)),
        },
        notes=[*notes, "With γ and β alone the output layer is random too."],
    )


def _findings(where: str, test: dict[str, list[float]]) -> list[Finding]:
    chance = [CHANCE] * len(test["affine"])
    asides = {
        "test accuracy, γ and β alone − the output layer alone": ("affine", "output"),
        "test accuracy, γ and β alone − everything": ("affine", "all"),
    }
    return [
        difference_finding("test accuracy, γ and β alone − chance", where, test["affine"], chance),
        *difference_findings(where, test, asides, decisive=False),
    ]


def _figure(where: str, by_depth: dict[int, dict[str, list[float]]], words: Sequence[str]) -> Figure:
    # Each depth by its own seeds: where a cell has failed they are not the same.
    return Figure(
        f"Test accuracy by depth: {where}",
        Axis("hidden layers"),
        Axis("test accuracy, %", limits=(0.0, 100.0)),
        [
            with_intervals(label, style, list(by_depth), [mean(test[arm]) for test in by_depth.values()])
            for arm, (label, style) in ARMS.items()
        ],
        f"Test accuracy over depth when only a part of the parameters is trained. With γ and β alone: {listed(words)}.",
        reference=(CHANCE, "chance"),
    )


CLAIM: Claim = Claim(
    number=18,
    title="γ and β alone",
    statement="The affine parameters of batch normalization alone can learn.",
    question="How far does a network get when only γ and β are trained?",
    literature="Frankle, Schwab and Morcos train only γ and β of randomly initialized residual networks and reach 82 % "
    "on CIFAR-10 with a very deep one, far more than by training as many other parameters. The γ often goes to zero: "
    "random features are switched off.",
    sources=[Source("Frankle, Schwab, Morcos 2020", "https://arxiv.org/abs/2003.00152")],
    criterion="Holds if, at every depth, the test accuracy with γ and β alone lies above chance. How it compares "
    "with training the output layer alone, which has 1,290 parameters where γ and β have 256 a layer, and with "
    "everything is shown beside.",
    data=("digits", "mnist"),
    cells=lambda plan: [cell for data, depth in _conditions(plan) for cell in _cells(plan, data, depth)],
    read=read,
)
