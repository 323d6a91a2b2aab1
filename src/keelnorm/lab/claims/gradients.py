"""Does batch normalization keep gradients from vanishing and from exploding?

At initialization the gradient of the loss with respect to each layer's input is compared from layer to layer: in deep
networks it changes by a factor a layer. Then a deep network is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import ByForm, Plan, Seeds, seeds_text
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.data import images
from keelnorm.lab.reading.best_rates import accuracies, best_by_arm, edge_notes
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.series import band
from keelnorm.lab.reading.verdicts import Finding, difference_findings
from keelnorm.lab.reading.wording import ACTIVATION_NAMES, inverse, listed, where_text
from keelnorm.lab.training.arms import BN, NONE, arm_named
from keelnorm.lab.training.stacks import Initialization, StackedMLP
from keelnorm.lab.training.train import batches, losses, rounded
from keelnorm.lab.training.trials import trial_cell
from keelnorm.measure.page_parts import Axis, Figure, Table
from keelnorm.measure.statistics import Interval, geometric_mean, mean

ARMS = (NONE, BN)
ACTIVATIONS: dict[str, Initialization] = {"sigmoid": "xavier", "tanh": "xavier", "relu": "he"}
DEPTH = 50
SKIPPED = 5
"""Layers at either end that are left out of the factor: the middle has settled."""
WIDTH = 64
BATCH = 128
TRAINED_DEPTH = {"sigmoid": 30, "relu": 20}
TRAINED_ACTIVATIONS = ByForm(quick=("sigmoid",), full=("sigmoid", "relu"))
RATES = ByForm(quick=(0.03, 0.1, 0.3), full=(0.01, 0.03, 0.1, 0.3, 1.0))
SEEDS = Seeds(quick=5, full=20)
TRAINED_SEEDS = Seeds(quick=3, full=5)
THEORY = math.sqrt(math.pi / (math.pi - 1))
"""Yang et al. (2019): the gradient's factor a layer with ReLU and batch norm, for wide layers and large batches."""
MARGIN = 10 ** (1 / DEPTH)
"""A factor a layer beyond 1/1.047 … 1.047 is called vanishing or exploding: tenfold in 50 layers."""


def gradient_norms(*, data: str, activation: str, arm: str, seed: int) -> Result:
    """The norm of the loss's gradient with respect to each hidden layer's input, at initialization."""
    split = images(data, seed)
    stack = StackedMLP(
        split.train_x[0].numel(),
        (WIDTH,) * DEPTH,
        split.classes,
        arm_named(arm),
        generator(draw="initialization", data=data, seed=seed),
        activation=activation,
        initialization=ACTIVATIONS[activation],
    )
    kept: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        inputs[0].retain_grad()
        kept.append(inputs[0])

    for block in stack.blocks:
        block.register_forward_pre_hook(keep)
    chosen = next(batches(len(split.train_y), BATCH, 1, generator(draw="order", data=data, seed=seed)))
    # In float64: what vanishes is measured, not lost.
    losses(stack.double(), split.train_x[chosen].double(), split.train_y[chosen]).sum().backward()
    norms = torch.stack([x.grad.norm() for x in kept if x.grad is not None])
    middle = norms[SKIPPED:-SKIPPED]
    factor = (middle[0] / middle[-1]) ** (1 / (len(middle) - 1))
    return {"log10": rounded(norms.log10(), 4), "factor": rounded(factor.view(1), 6)[0]}


def _norm_cells(plan: Plan, data: str) -> list[Cell]:
    return [
        Cell(gradient_norms, {"data": data, "activation": activation, "arm": arm.name, "seed": seed}, cost=0.1)
        for activation in ACTIVATIONS
        for seed in SEEDS.of(plan)
        for arm in ARMS
    ]


def _training_cells(plan: Plan, data: str) -> list[Cell]:
    return [
        trial_cell(
            1.2e-2 if arm is BN else 8e-3,
            data=data,
            arm=arm.name,
            seed=seed,
            rates=RATES.of(plan),
            evaluate_at=(0, 40 if plan.quick else 200),
            widths=(WIDTH,) * TRAINED_DEPTH[activation],
            activation=activation,
            initialization=ACTIVATIONS[activation],
            batch=BATCH,
        )
        for activation in TRAINED_ACTIVATIONS.of(plan)
        for seed in TRAINED_SEEDS.of(plan)
        for arm in ARMS
    ]


def read(plan: Plan, results: Results) -> Reading:
    """The gradient's factor a layer at initialization, and accuracies of trained deep networks."""
    findings: list[Finding] = []
    figures, rows, trained_rows, words, notes = [], [], [], [], []
    changes: dict[tuple[str, str], list[str]] = {}
    for data in CLAIM.sets(plan):
        runs = Runs(_norm_cells(plan, data), results, where=("activation",))
        for activation in ACTIVATIONS:
            by_arm = {arm.name: runs.of(arm.name, activation) for arm in ARMS}
            where = where_text(data, ACTIVATION_NAMES[activation])
            factors = {name: geometric_mean([run["factor"] for run in found]) for name, found in by_arm.items()}
            none, bn = factors[NONE.name], factors[BN.name]
            changes.setdefault((_fate(none), _fate(bn)), []).append(where)
            findings += _factor_findings(where, bn, none)
            words.append(f"×{none.value:.2f} → ×{bn.value:.2f} with {ACTIVATION_NAMES[activation]}")
            rows += [[where, arm.label, factors[arm.name].text(3)] for arm in ARMS]
            figures.append(_norm_figure(where, by_arm, factors))
        trained = Runs(_training_cells(plan, data), results, where=("activation",))
        for activation in TRAINED_ACTIVATIONS.of(plan):
            where = where_text(data, ACTIVATION_NAMES[activation], f"{TRAINED_DEPTH[activation]} layers")
            best = best_by_arm({arm.name: trained.of(arm.name, activation) for arm in ARMS}, RATES.of(plan))
            gain = {"test accuracy after training, batch norm − none": (BN.name, NONE.name)}
            findings += difference_findings(where, accuracies(best), gain, decisive=False)
            trained_rows.append(
                [where, *(f"{mean(each.test).text()} % (rate {each.rate:g})" for each in best.values())]
            )
            notes += edge_notes(where, {f"of {arm.label}": best[arm.name] for arm in ARMS})
    said = f"Going back a layer multiplies the gradient by {', '.join(words)} (without → with batch norm)"
    return Reading(
        f"{said}: {_said(changes)}. Theory gives ×{THEORY:.2f} for ReLU with batch norm.",
        findings,
        figures,
        [
            Table(
                "Factor of the gradient for each layer that it goes back, at initialization",
                ["where", "arm", "factor"],
                rows,
            ),
            Table(
                "Trained deep networks: test accuracy at the rate chosen on validation data",
                ["where", *(arm.label for arm in ARMS)],
                trained_rows,
            ),
        ],
        setup=_setup(plan),
        notes=[
            *notes,
            "A factor is measured at initialization. Training can start from exploding gradients where the rate is "
            "small enough, and a skip connection takes the growth away.",
        ],
    )


def _setup(plan: Plan) -> dict[str, str]:
    trained = " and ".join(f"{depth} layers with {ACTIVATION_NAMES[name]}" for name, depth in TRAINED_DEPTH.items())
    return {
        "Network": f"fully connected, {DEPTH} hidden layers of {WIDTH}; Xavier's initialization with sigmoid and tanh, "
        "He's with ReLU",
        "Factor": "the norm of the loss's gradient with respect to what a layer's activation block receives, over that "
        f"one layer later; geometric mean without the first and last {SKIPPED} layers, on a batch of {BATCH}, in "
        "float64",
        "Vanishing, exploding": f"a factor below 1/{MARGIN:.3f} or above {MARGIN:.3f}: tenfold over {DEPTH} layers",
        "Trained": f"{trained}, gradient descent, batches of {BATCH}, the rate with the highest validation accuracy "
        "for each arm",
        "Seeds": seeds_text(SEEDS.of(plan)),
    }


def _factor_findings(where: str, bn: Interval, none: Interval) -> list[Finding]:
    below = partial(Finding, where=where, threshold=MARGIN, larger=False, unit="×", digits=3)
    with_bn = "factor a layer with batch norm, or its inverse where that is larger"
    return [
        below(with_bn, effect=_away_from_one(bn)),
        below("the same without", effect=_away_from_one(none), decisive=False),
    ]


def _away_from_one(factor: Interval) -> Interval:
    """The factor, or its inverse where it lies below 1: how much a layer changes the gradient, whichever way."""
    return factor if factor.value >= 1 else inverse(factor)


def _fate(factor: Interval) -> str:
    """What becomes of a gradient with such a factor a layer, as far as the interval tells."""
    if factor.high < 1 / MARGIN:
        return "vanishes"
    if factor.low > MARGIN:
        return "explodes"
    return "keeps its size" if factor.low > 1 / MARGIN and factor.high < MARGIN else "is not resolved"


def _said(changes: Mapping[tuple[str, str], Sequence[str]]) -> str:
    """What batch norm changes: by what happens without and with it, the conditions."""
    words = [
        f"it {without} with and without it ({'; '.join(where)})"
        if without == having
        else f"it {without} without batch norm and {having} with it ({'; '.join(where)})"
        for (without, having), where in changes.items()
    ]
    return listed(words)


def _norm_figure(where: str, by_arm: dict[str, list[Result]], factors: dict[str, Interval]) -> Figure:
    series = [
        band(
            arm.label,
            arm.name,
            list(range(1, DEPTH + 1)),
            [[value - history["log10"][-1] for value in history["log10"]] for history in by_arm[arm.name]],
        )
        for arm in ARMS
    ]
    return Figure(
        f"Gradient by layer: {where}",
        Axis("layer, from the input"),
        Axis("gradient over that of the last layer, powers of ten"),
        series,
        f"The gradient's norm at each layer relative to the last hidden layer, {where}, in powers of ten. For each "
        f"layer that it goes back it is multiplied by {factors[NONE.name].text(2)} without batch norm and by "
        f"{factors[BN.name].text(2)} with it.",
        reference=(0.0, "unchanged"),
    )


CLAIM: Claim = Claim(
    number=4,
    title="Vanishing and exploding gradients",
    statement="Batch normalization prevents vanishing and exploding gradients.",
    question="Does batch norm keep the gradient's size from layer to layer?",
    literature="Ioffe and Szegedy give it as a reason why higher rates work. Yang et al. compute the opposite for deep "
    "plain networks: with ReLU, batch norm multiplies the gradient by √(π/(π − 1)) ≈ 1.21 a layer at initialization, "
    "so that it explodes, unless there are skip connections.",
    sources=[
        Source("Ioffe, Szegedy 2015, section 3.3", "https://arxiv.org/abs/1502.03167"),
        Source("Yang, Pennington, Rao, Sohl-Dickstein, Schoenholz 2019", "https://arxiv.org/abs/1902.08129"),
    ],
    criterion="Holds if, with each activation, the factor a layer with batch norm, or its inverse where that is "
    f"larger, lies below {MARGIN:.3f} with its whole interval; depends if with some; does not hold if it lies above "
    "with some and below with none.",
    data=("digits", "mnist"),
    cells=lambda plan: [
        cell for data in CLAIM.sets(plan) for cell in (*_norm_cells(plan, data), *_training_cells(plan, data))
    ],
    read=read,
)
