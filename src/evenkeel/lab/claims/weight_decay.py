"""What does weight decay do to a network with batch normalization?

Ahead of a batch norm the length of the weights has no effect on what the network computes, so decay can't regularize
it in the usual sense; it keeps the weights short, and with them the effective learning rate η/‖w‖² high. If that is
all, then a network without decay whose rate follows the same effective rate must do as well.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from evenkeel.lab.arms import BN, NONE
from evenkeel.lab.cell import Cell, Result, Results
from evenkeel.lab.claim import Claim, Reading, Source
from evenkeel.lab.data import images
from evenkeel.lab.figures import Axis, Figure, Series, Table
from evenkeel.lab.networks import Stack, StackedMLP
from evenkeel.lab.phrases import listed, signed
from evenkeel.lab.plan import Plan, seeds_text
from evenkeel.lab.reading import Runs, band
from evenkeel.lab.seeds import generator
from evenkeel.lab.statistics import difference, geometric_mean, mean, ratio
from evenkeel.lab.training import batches, losses, percent, right
from evenkeel.lab.trials import where_text
from evenkeel.lab.verdicts import Finding

ARMS = {
    "none": ("no normalization, no decay", "none"),
    "none decay": ("no normalization, decay", "ln"),
    "bn": ("batch norm, no decay", "bn"),
    "bn decay": ("batch norm, decay", "other-2"),
    "bn rate": ("batch norm, no decay, the same effective rate", "other-3"),
}
SAMPLES = 500
WIDTHS = (128, 128)
BATCH = 50
RATE = 0.1
DECAY = 0.03
EQUAL = 0.5
"""Points by which the accuracies of two arms may differ and still be called equal."""
INVARIANT = 1e-3
"""Share by which outputs may change when weights ahead of a batch norm are doubled; ε keeps it from being exactly 0."""
LOOKS = 10


def decayed(*, data: str, arm: str, seed: int, steps: int) -> Result:
    """Train one arm.

    For the arm with the same effective rate, the network with decay is trained beside it on the same batches, and each
    step of each hidden layer takes η times (‖w‖ here / ‖w‖ there)², which makes η/‖w‖² the same.

    Returns:
        steps; effective: the mean of η/‖w‖² over hidden layers; test accuracy and training accuracy at the end;
        scaled: how much the outputs change, relatively, when the hidden layers' weights are doubled.
    """
    split = images(data, seed, train=SAMPLES)

    def made() -> Stack:
        return StackedMLP(
            split.train_x[0].numel(),
            WIDTHS,
            split.classes,
            NONE if arm.startswith("none") else BN,
            generator(draw="initialization", data=data, seed=seed),
        ).train()

    stack = made()
    leader = made() if arm == "bn rate" else None
    decay = DECAY if arm.endswith("decay") else 0.0
    looks: dict[str, list[float]] = {"steps": [], "effective": []}
    for step, chosen in enumerate(
        batches(len(split.train_y), BATCH, steps, generator(draw="order", data=data, seed=seed)), start=1
    ):
        x, y = split.train_x[chosen], split.train_y[chosen]
        scales = [1.0] * len(WIDTHS)
        if leader is not None:
            own, theirs = _lengths(stack), _lengths(leader)
            scales = [(mine / other) ** 2 for mine, other in zip(own, theirs, strict=True)]
            losses(leader, x, y).sum().backward()
            _step(leader, [1.0] * len(WIDTHS), DECAY)
        losses(stack, x, y).sum().backward()
        if step % max(1, steps // LOOKS) == 0:
            looks["steps"].append(step)
            effective = [RATE * scale / length**2 for scale, length in zip(scales, _lengths(stack), strict=True)]
            looks["effective"].append(float(f"{sum(effective) / len(effective):.5g}"))
        _step(stack, scales, decay)
    stack.eval()
    with torch.no_grad():
        accuracy = percent(right(stack, split.test_x, split.test_y))[0]
        training = percent(right(stack, split.train_x, split.train_y))[0]
        return {**looks, "test": accuracy, "train": training, "scaled": change_when_doubled(stack, split.test_x)}


@torch.no_grad()
def _step(stack: Stack, scales: Sequence[float], decay: float) -> None:
    """Gradient descent; hidden weights with the rate times their scale, and with decay; clears the gradients."""
    hidden = {id(weight): scale for weight, scale in zip(list(stack.weights)[:-1], scales, strict=True)}
    for parameter in stack.parameters():
        if parameter.grad is None:
            continue
        scale = hidden.get(id(parameter), 1.0)
        if id(parameter) in hidden and decay:
            parameter.mul_(1 - RATE * decay)
        parameter.add_(parameter.grad, alpha=-RATE * scale)
        parameter.grad = None


@torch.no_grad()
def _lengths(stack: Stack) -> list[float]:
    return [weight.norm().item() for weight in list(stack.weights)[:-1]]


@torch.no_grad()
def change_when_doubled(stack: Stack, x: torch.Tensor) -> float:
    """The largest change of the outputs, over the largest output, when every hidden layer's weights and biases are
    doubled.

    With batch norm the batch's own moments normalize, since the running ones belong to the weights as they were.
    """
    twice = copy.deepcopy(stack)
    for weight, bias in zip(list(twice.weights)[:-1], list(twice.biases)[:-1], strict=False):
        weight.mul_(2)
        if bias is not None:
            bias.mul_(2)
    before, after = stack.train()(x), twice.train()(x)
    return float(f"{((after - before).abs().max() / before.abs().max()).item():.3g}")


def cells(plan: Plan) -> Sequence[Cell]:
    return [cell for data in _sets(plan) for cell in _cells(plan, data)]


def _sets(plan: Plan) -> list[str]:
    return plan.sets("digits", "mnist")


def _cells(plan: Plan, data: str) -> Sequence[Cell]:
    steps = 200 if plan.quick else 400
    return [
        Cell(
            decayed,
            {"data": data, "arm": arm, "seed": seed, "steps": steps},
            cost=steps * (2.5e-3 if arm == "bn rate" else 1.2e-3),
        )
        for seed in plan.seed_range(quick=4, full=10)
        for arm in ARMS
    ]


def read(plan: Plan, results: Results) -> Reading:
    findings, figures, rows, words = [], [], [], []
    for data in _sets(plan):
        runs = Runs(_cells(plan, data), results)
        where = where_text(data, f"{SAMPLES} for training")
        found = {arm: runs.of(arm) for arm in ARMS}
        test = {arm: [each["test"] for each in histories] for arm, histories in found.items()}
        effective = {arm: [each["effective"][-1] for each in histories] for arm, histories in found.items()}
        doubled = mean([each["scaled"] for each in found["bn"]])
        kept = ratio(effective["bn decay"], effective["bn"])
        gain = difference(test["bn decay"], test["bn"])
        same = difference(test["bn decay"], test["bn rate"])
        findings += [
            Finding(
                "change of the outputs when the weights ahead of batch norm are doubled",
                where,
                doubled,
                INVARIANT,
                larger=False,
                unit="of the largest",
                digits=6,
            ),
            Finding("effective rate η/‖w‖² at the end, decay over no decay", where, kept, 1.0, unit="×", digits=2),
            Finding(
                f"decay does no more than its effective rate: test accuracy, decay − the same effective rate, at "
                f"most {EQUAL:g}",
                where,
                same,
                EQUAL,
                larger=False,
                digits=2,
            ),
            Finding("test accuracy with batch norm, decay − no decay", where, gain, 0.0, digits=2, decisive=False),
            Finding(
                "test accuracy without normalization, decay − no decay",
                where,
                difference(test["none decay"], test["none"]),
                0.0,
                digits=2,
                decisive=False,
            ),
            Finding(
                "change of the outputs when the weights are doubled, without normalization",
                where,
                mean([each["scaled"] for each in found["none"]]),
                INVARIANT,
                larger=False,
                unit="of the largest",
                digits=2,
                decisive=False,
            ),
        ]
        words.append(
            f"doubling the weights ahead of a batch norm changes its outputs by {doubled.value:.1e} of the largest, "
            f"decay keeps the effective rate "
            f"×{kept.value:.1f} as high, and in accuracy decay differs by {signed(gain, 2)} from none and by "
            f"{signed(same, 2)} from a network "
            f"without it whose rate follows the same path ({where})"
        )
        for arm, (label, _) in ARMS.items():
            rows.append(
                [
                    where,
                    label,
                    geometric_mean(effective[arm]).text(None),
                    mean([e["train"] for e in found[arm]]).text(1),
                    mean(test[arm]).text(2),
                ]
            )
        figures += [
            Figure(
                f"Effective learning rate: {where}",
                Axis("steps"),
                Axis("η/‖w‖², mean over hidden layers", scale="log"),
                [
                    band(label, style, found[arm][0]["steps"], [h["effective"] for h in found[arm]], geometric=True)
                    for arm, (label, style) in ARMS.items()
                ],
                f"The effective learning rate over training. At the end decay keeps it ×{kept.value:.1f} as high "
                f"with batch norm.",
            ),
            Figure(
                f"Test accuracy: {where}",
                Axis("arm", categories=[where]),
                Axis("test accuracy, %", limits=(min(min(v) for v in test.values()) - 0.5, 100.0)),
                [Series(label, style, [0] * len(test[arm]), test[arm]) for arm, (label, style) in ARMS.items()],
                f"A box for each arm over the seeds: "
                f"{', '.join(f'{label} {mean(test[arm]).value:.1f} %' for arm, (label, _) in ARMS.items())}.",
                kind="boxes",
            ),
        ]
    return Reading(
        f"Here, {listed(words)}.",
        findings,
        figures,
        [
            Table(
                "At the end of training",
                ["where", "arm", "effective rate", "training accuracy, %", "test accuracy, %"],
                rows,
            )
        ],
        setup=[
            (
                "Network",
                f"fully connected, {WIDTHS[0]} - {WIDTHS[1]} hidden units with ReLU, He's initialization, centred "
                f"pixels",
            ),
            (
                "Training",
                f"{SAMPLES} samples, {200 if plan.quick else 400} steps of gradient descent at {RATE:g}, batches of "
                f"{BATCH}; the same in all arms",
            ),
            (
                "Decay",
                f"{DECAY:g} on the hidden layers' weights (w ← (1 − η·{DECAY:g})·w − η·gradient); none on γ, β and "
                f"the output layer",
            ),
            (
                "The same effective rate",
                "no decay; each hidden layer's rate is multiplied, step by step, by (‖w‖ here / ‖w‖ with decay)²",
            ),
            ("Seeds", seeds_text(plan.seed_range(quick=4, full=10))),
        ],
        notes=[
            "One rate and one decay for all arms: what is tested is how decay acts, not how well each arm can be tuned."
        ],
    )


CLAIM = Claim(
    number=22,
    title="Weight decay",
    statement="In a batch-normalized network weight decay acts through the effective learning rate.",
    question="Does weight decay do more than keep the effective learning rate up?",
    literature="Van Laarhoven shows that with batch norm L2 regularization does not constrain what the network "
    "computes, since the scale of the weights "
    "is free; it sets their length, and with it the effective rate η/‖w‖². Zhang et al. measure that without decay "
    "on the output layer too most of "
    "its effect on networks with batch norm is this one. Loshchilov and Hutter couple or decouple it from the rate, "
    "which matters for tuning.",
    sources=[
        Source("van Laarhoven 2017", "https://arxiv.org/abs/1706.05350"),
        Source(
            "Zhang, Wang, Xu, Grosse 2019: Three mechanisms of weight decay regularization",
            "https://arxiv.org/abs/1810.12281",
        ),
        Source("Loshchilov, Hutter 2019: decoupled weight decay", "https://arxiv.org/abs/1711.05101"),
    ],
    criterion=f"Holds if doubling the weights ahead of batch norm changes the outputs by less than {INVARIANT:g}, "
    f"decay keeps the effective rate higher (the "
    f"ratio's interval lies above 1), and decay gains less than {EQUAL:g} points over the same effective rate "
    f"without decay (the interval's end).",
    data=("digits", "mnist"),
    cells=cells,
    read=read,
)
