"""Does batch normalization keep gradients from vanishing and from exploding?

At initialization the gradient of the loss with respect to each layer's input is compared from layer to layer: in deep
networks it changes by a factor a layer. Then a deep network is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan, kind_of, seeds_text
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.data import images
from keelnorm.lab.reading.figures import Axis, Figure, Table
from keelnorm.lab.reading.results_by_arm import Runs, band
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.lab.training.arms import BN, NONE, arm_named
from keelnorm.lab.training.learning_rates import Best, best
from keelnorm.lab.training.networks import Initialization, StackedMLP
from keelnorm.lab.training.train import batches, losses, plain, train
from keelnorm.measure.statistics import Interval, difference, geometric_mean, mean

ARMS = (NONE, BN)
ACTIVATIONS: dict[str, Initialization] = {"sigmoid": "xavier", "tanh": "xavier", "relu": "he"}
NAMES = {"sigmoid": "sigmoid", "tanh": "tanh", "relu": "ReLU"}
DEPTH = 50
SKIPPED = 5
"""Layers at either end that are left out of the factor: the middle has settled."""
WIDTH = 64
BATCH = 128
TRAINED_DEPTH = {"sigmoid": 30, "relu": 20}
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
QUICK_RATES = (0.03, 0.1, 0.3)
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
    return {"log10": plain(norms.log10(), 4), "factor": plain(factor.view(1), 6)[0]}


def deep_training(*, data: str, activation: str, arm: str, seed: int, steps: int, rates: tuple[float, ...]) -> Result:
    """Train a deep network at every learning rate side by side, and return the curves."""
    split = images(data, seed)
    stack = StackedMLP(
        split.train_x[0].numel(),
        (WIDTH,) * TRAINED_DEPTH[activation],
        split.classes,
        arm_named(arm),
        generator(draw="initialization", data=data, seed=seed),
        torch.ones(len(rates)),
        activation=activation,
        initialization=ACTIVATIONS[activation],
    )
    order = generator(draw="order", data=data, seed=seed)
    history = train(stack, split, torch.tensor(rates), batch=BATCH, evaluate_at=(0, steps), generator=order)
    return dict(vars(history))


def _norm_cells(plan: Plan, data: str) -> list[Cell]:
    return [
        Cell(gradient_norms, {"data": data, "activation": activation, "arm": arm.name, "seed": seed}, cost=0.1)
        for activation in ACTIVATIONS
        for seed in _seeds(plan)
        for arm in ARMS
    ]


def _training_cells(plan: Plan, data: str) -> list[Cell]:
    steps = 40 if plan.quick else 200
    rates = QUICK_RATES if plan.quick else RATES
    return [
        Cell(
            deep_training,
            {"data": data, "activation": activation, "arm": arm.name, "seed": seed, "steps": steps, "rates": rates},
            cost=steps * (1.2e-2 if arm is BN else 8e-3),
        )
        for activation in _trained_activations(plan)
        for seed in _training_seeds(plan)
        for arm in ARMS
    ]


def _trained_activations(plan: Plan) -> list[str]:
    return ["sigmoid"] if plan.quick else list(TRAINED_DEPTH)


def _seeds(plan: Plan) -> range:
    return plan.seed_range(quick=5, full=20)


def _training_seeds(plan: Plan) -> range:
    return plan.seed_range(quick=3, full=5)


def _sets(plan: Plan) -> list[str]:
    return plan.sets("digits", "mnist")


def cells(plan: Plan) -> Sequence[Cell]:
    return [cell for data in _sets(plan) for cell in (*_norm_cells(plan, data), *_training_cells(plan, data))]


def read(plan: Plan, results: Results) -> Reading:
    findings: list[Finding] = []
    figures: list[Figure] = []
    rows: list[list[str]] = []
    words: list[str] = []
    notes: list[str] = []
    cured = True
    for data in _sets(plan):
        runs = Runs(_norm_cells(plan, data), results, where=("activation",))
        for activation in ACTIVATIONS:
            by_arm = {arm.name: runs.of(arm.name, activation) for arm in ARMS}
            where = f"{kind_of(data)}, {NAMES[activation]}"
            factors = {name: geometric_mean([r["factor"] for r in results_]) for name, results_ in by_arm.items()}
            cured = cured and _cures(activation, factors[BN.name])
            findings += _factor_findings(where, factors[BN.name], factors[NONE.name])
            words.append(f"×{factors[NONE.name].value:.2f} → ×{factors[BN.name].value:.2f} with {NAMES[activation]}")
            rows += [[where, arm.label, factors[arm.name].text(3)] for arm in ARMS]
            figures.append(_norm_figure(where, by_arm, factors))
        trained = Runs(_training_cells(plan, data), results, where=("activation",))
        accuracies = []
        for activation in _trained_activations(plan):
            depth = TRAINED_DEPTH[activation]
            where = f"{kind_of(data)}, {NAMES[activation]}, {depth} layers"
            histories = {arm.name: trained.of(arm.name, activation) for arm in ARMS}
            rates = _training_cells(plan, data)[0].axes["rates"]
            assert isinstance(rates, tuple)
            tuned = {name: best(each, [float(rate) for rate in rates]) for name, each in histories.items()}
            gain = difference(tuned[BN.name].test, tuned[NONE.name].test)
            findings.append(
                Finding("test accuracy after training, batch norm − none", where, gain, 0.0, decisive=False)
            )
            accuracies.append(_trained(where, tuned))
            notes += [
                f"{where}: the best rate of {arm.label}, {tuned[arm.name].rate:g}, lies at the edge of the grid."
                for arm in ARMS
                if tuned[arm.name].at_edge
            ]
    return Reading(
        f"Going back a layer multiplies the gradient by {', '.join(words)} (without → with batch norm): it cures "
        f"vanishing, "
        f"and makes deep plain ReLU networks explode (theory: ×{THEORY:.2f})."
        if cured
        else f"Going back a layer multiplies the gradient by {', '.join(words)} (without → with batch norm).",
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
                accuracies,
            ),
        ],
        setup=[
            (
                "Network",
                f"fully connected, {DEPTH} hidden layers of {WIDTH}; Xavier's initialization with sigmoid and tanh, "
                f"He's with ReLU",
            ),
            (
                "Factor",
                f"the norm of the loss's gradient with respect to what a layer's activation block receives, over "
                f"that one layer "
                f"later; geometric mean without the first and last {SKIPPED} layers, on a batch of {BATCH}, in float64",
            ),
            (
                "Vanishing, exploding",
                f"a factor below 1/{MARGIN:.3f} or above {MARGIN:.3f}: tenfold over {DEPTH} layers",
            ),
            (
                "Trained",
                f"{' and '.join(f'{depth} layers with {NAMES[a]}' for a, depth in TRAINED_DEPTH.items())}, gradient "
                f"descent, "
                f"batches of {BATCH}, the rate with the highest validation accuracy for each arm",
            ),
            ("Seeds", seeds_text(_seeds(plan))),
        ],
        notes=[
            *notes,
            "A factor is measured at initialization. Training can start from exploding gradients where the rate is "
            "small enough, and a "
            "skip connection takes the growth away.",
        ],
    )


def _factor_findings(where: str, bn: Interval, none: Interval) -> list[Finding]:
    return [
        Finding(
            "factor a layer with batch norm, or its inverse where that is larger",
            where,
            _away_from_one(bn),
            MARGIN,
            larger=False,
            unit="×",
            digits=3,
        ),
        Finding(
            "the same without",
            where,
            _away_from_one(none),
            MARGIN,
            larger=False,
            unit="×",
            digits=3,
            decisive=False,
        ),
    ]


def _away_from_one(factor: Interval) -> Interval:
    """The factor, turned over where it lies below 1: how much a layer changes the gradient, whichever way."""
    return factor if factor.value >= 1 else Interval(1 / factor.value, 1 / factor.high, 1 / factor.low, factor.n)


def _cures(activation: str, bn: Interval) -> bool:
    """Whether a factor with batch norm is what the sentence says: vanishing cured, and with ReLU an explosion."""
    return bn.low > (MARGIN if activation == "relu" else 1 / MARGIN)


def _trained(where: str, tuned: dict[str, Best]) -> list[str]:
    return [where, *(f"{mean(tuned[arm.name].test).text()} % (rate {tuned[arm.name].rate:g})" for arm in ARMS)]


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
        f"layer that it goes "
        f"back it is multiplied by {factors[NONE.name].text(2)} without batch norm and by {factors[BN.name].text(2)} "
        f"with it.",
        reference=(0.0, "unchanged"),
    )


CLAIM = Claim(
    number=4,
    title="Vanishing and exploding gradients",
    statement="Batch normalization prevents vanishing and exploding gradients.",
    question="Does batch norm keep the gradient's size from layer to layer?",
    literature="Ioffe and Szegedy give it as a reason why higher rates work. Yang et al. compute the opposite for "
    "deep plain "
    "networks: with ReLU, batch norm multiplies the gradient by √(π/(π − 1)) ≈ 1.21 a layer at initialization, so "
    "that it "
    "explodes, unless there are skip connections.",
    sources=[
        Source("Ioffe, Szegedy 2015, section 3.3", "https://arxiv.org/abs/1502.03167"),
        Source("Yang, Pennington, Rao, Sohl-Dickstein, Schoenholz 2019", "https://arxiv.org/abs/1902.08129"),
    ],
    criterion=f"Holds if, with each activation, the factor a layer with batch norm, or its inverse where that is "
    f"larger, lies below {MARGIN:.3f} with its whole interval; depends if with some; does not hold if it lies above "
    "with some and below with none.",
    data=("digits", "mnist"),
    cells=cells,
    read=read,
)
