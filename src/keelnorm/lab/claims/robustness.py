"""Is a network with batch normalization robust to data unlike those it was trained on? And does adapting repair it?"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

import keelnorm as kn
from keelnorm.lab.claims._robustness_figures import Percents, by_corruption, by_severity
from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan, Seeds, kind_of, seeds_text
from keelnorm.lab.core.seeds import Scalar, generator
from keelnorm.lab.data import CORRUPTIONS, corrupted, images
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.verdicts import Finding, difference_finding
from keelnorm.lab.reading.wording import signed, where_text
from keelnorm.lab.training.arms import BN, GN, NONE, arm_named
from keelnorm.lab.training.stacks import StackedCNN
from keelnorm.lab.training.train import Descent, correct, percent, train
from keelnorm.measure.page_parts import Table
from keelnorm.measure.statistics import mean

ARMS = (NONE, BN, GN)
ADAPTED = {
    "adapted": "batch norm, adapted",
    "mixed": "batch norm, each batch by itself",
    "sorted": "the same, batches sorted by label",
}
"""What is done to the trained network of the arm BN, without labels (but that the last sorts by them)."""
LABELS = {arm.name: arm.label for arm in ARMS} | ADAPTED
SMALL = (8, 16, 16), (1, 2, 2)
LARGER = (16, 32, 32), (2, 2, 2)
"""Channels and strides of the convolutions, for the 8 x 8 digits and for images of the reader's."""
BATCH, MOMENTUM = 64, 0.9
RATES, RATES_LARGER = (0.03, 0.1, 0.3), (0.1, 0.3, 1.0)
FEWER_RATES = (0.1, 0.3)
SEVERITIES = (1, 2, 3, 4, 5)
FEWER = (2, 4)
MOST_TESTED = 500
SEEDS = Seeds(quick=4, full=8)


def train_and_corrupt(
    *, data: str, arm: str, seed: int, rates: tuple[float, ...], steps: int, train_on: int, severities: tuple[int, ...]
) -> Result:
    """Train a convolutional network on clean images at every rate, and test the best one on corrupted images.

    Returns:
        validation: the accuracy on validation images by rate, of which `index` is the best; clean: that on test images;
        corrupted: by way (the arm's own name, with batch norm also those of `ADAPTED`) and corruption, a list over
        severities.
    """
    split = images(data, seed, centered=False, train=train_on or None)
    _, into, side, _ = split.train_x.shape
    shape = SMALL if side == 8 else LARGER

    def network(replicas: int) -> StackedCNN:
        draw = generator(draw="initialization", data=data, seed=seed)
        scales = torch.ones(replicas)
        return StackedCNN(into, side, *shape, split.classes, arm_named(arm), draw, scales, pool=True)

    stack = network(len(rates))
    order = generator(draw="order", data=data, seed=seed)
    how = Descent(torch.tensor(rates), momentum=MOMENTUM)
    validation = train(stack, split, how, batch=BATCH, evaluate_at=(steps,), generator=order).validation[-1]
    index = max(range(len(rates)), key=lambda each: validation[each] or 0.0)
    best = alone(stack, network(1), index).eval()
    x, y = split.test_x[:MOST_TESTED], split.test_y[:MOST_TESTED]
    found: dict[str, Percents] = {}
    for name in CORRUPTIONS:
        for severity in severities:
            draw = generator(draw="corruption", data=data, seed=seed, corruption=name, severity=severity)
            for way, accuracy in ways(best, arm, corrupted(x, name, severity, draw), y).items():
                found.setdefault(way, {}).setdefault(name, []).append(accuracy)
    return {"validation": validation, "index": index, "clean": _accuracy(best, x, y, len(y)), "corrupted": found}


def alone(stack: StackedCNN, single: StackedCNN, index: int) -> StackedCNN:
    """One replica of a stack, in a stack of one that is given."""
    every = stack.state_dict()
    with torch.no_grad():
        for name, own in single.state_dict().items():
            whole = every[name]
            own.copy_(whole if whole.dim() == 0 else whole.view(stack.replicas, -1)[index].view_as(own))
    return single


def ways(network: StackedCNN, arm: str, x: Tensor, y: Tensor) -> dict[str, float]:
    """The accuracy in percent of a network as it is and, with batch norm, adapted in each way; it is left as it was.

    A batch is a tenth of the images, so that one sorted by label holds one or two of ten classes.
    """
    size = max(1, len(y) // 10)
    found = {arm: _accuracy(network, x, y, len(y))}
    if arm == BN.name:
        own = copy.deepcopy(network)
        kn.adapt(own, [x], progress=False)
        found["adapted"] = _accuracy(own, x, y, len(y))
        kn.adapt(own, mode="batch")
        found["mixed"] = _accuracy(own, x, y, size)
        by_label = y.argsort(stable=True)
        found["sorted"] = _accuracy(own, x[by_label], y[by_label], size)
    return found


@torch.no_grad()
def _accuracy(network: StackedCNN, x: Tensor, y: Tensor, size: int) -> float:
    return percent(correct(network, x, y, size))[0] or 0.0


def _severities(plan: Plan, data: str) -> tuple[int, ...]:
    return (3,) if plan.quick else SEVERITIES if kind_of(data) == "digits" else FEWER


def _steps(plan: Plan, data: str) -> int:
    return (100 if plan.quick else 300) if kind_of(data) == "digits" else (150 if plan.quick else 400)


def _rates(plan: Plan, data: str) -> tuple[float, ...]:
    return FEWER_RATES if plan.quick else RATES if kind_of(data) == "digits" else RATES_LARGER


def _cells(plan: Plan, data: str) -> Sequence[Cell]:
    bundled = kind_of(data) == "digits"
    steps = _steps(plan, data)
    size: dict[str, Scalar | tuple[Scalar, ...]] = {
        "rates": _rates(plan, data),
        "steps": steps,
        "train_on": 0 if bundled else 4000,
        "severities": _severities(plan, data),
    }
    return [
        Cell(
            train_and_corrupt,
            {"data": data, "arm": arm.name, "seed": seed, **size},
            cost=steps * (4.5e-3 if bundled else 1.4e-2) + (0.02 if arm is BN else 0.003) * len(CORRUPTIONS) * 5,
        )
        for seed in SEEDS.of(plan)
        for arm in ARMS
    ]


def _average(by_corruption: Percents) -> float:
    """The mean over corruptions and severities."""
    values = [value for each in by_corruption.values() for value in each]
    return sum(values) / len(values)


def read(plan: Plan, results: Results) -> Reading:
    """Accuracies on clean and on corrupted images, and what adapting brings back."""
    findings, figures, rows, words, tuning, notes = [], [], [], [], [], []
    for data in CLAIM.sets(plan):
        where = where_text(data)
        runs = Runs(_cells(plan, data), results)
        found = {arm.name: runs.of(arm.name) for arm in ARMS}
        source = {way: BN.name if way in ADAPTED else way for way in LABELS}
        by_way = {way: [each["corrupted"][way] for each in found[arm]] for way, arm in source.items()}
        corrupt = {way: [_average(each) for each in by_seed] for way, by_seed in by_way.items()}
        clean = {arm: [each["clean"] for each in each_seed] for arm, each_seed in found.items()}
        own = _findings(where, clean, corrupt)
        findings += own
        means = {way: mean(values).value for way, values in corrupt.items()}
        words.append(
            f"{means['bn']:.1f} % with batch norm, {means['none']:.1f} % without (difference "
            f"{signed(own[0].effect, 1)}), {means['adapted']:.1f} % with batch norm adapted to them ({where})"
        )
        rows += [
            [where, LABELS[way], mean(clean[arm]).text(1) if way == arm else "", mean(corrupt[way]).text(1)]
            for way, arm in source.items()
        ]
        rates = _rates(plan, data)
        tuning += [[where, arm.label, *_tuned(found[arm.name], rates)] for arm in ARMS]
        if not plan.quick:
            indices = [each["index"] for by_seed in found.values() for each in by_seed]
            at_edge = sum(index in (0, len(rates) - 1) for index in indices)
            notes.append(f"{where}: the rate chosen lies at the edge of the grid in {at_edge} of {len(indices)} runs.")
        figures += [by_corruption(where, by_way, LABELS), by_severity(where, _severities(plan, data), by_way)]
    return Reading(
        f"Of the corrupted images the network names right: {'; '.join(words)}.",
        findings,
        figures,
        [
            Table(
                "Accuracy in percent, on clean images and as the mean over corruptions and severities",
                ["where", "arm", "clean", "corrupted"],
                rows,
            ),
            Table(
                "Accuracy in percent on validation data by learning rate, and how many seeds chose it",
                ["where", "arm", "lowest rate", *(["middle one"] if not plan.quick else []), "highest rate"],
                tuning,
            ),
        ],
        setup=_setup(plan),
        notes=[
            *notes,
            "How much batches sorted by label cost depends on the network. It is much here, where the last layer sees "
            "each channel's mean over positions, which the moments of such a batch take away.",
        ],
    )


def _findings(where: str, clean: dict[str, list[float]], corrupt: dict[str, list[float]]) -> list[Finding]:
    lost = {arm: [a - b for a, b in zip(clean[arm], corrupt[arm], strict=True)] for arm in clean}
    aside = {
        "accuracy on clean images, batch norm − none": (clean["bn"], clean["none"]),
        "accuracy that corruption costs, none − batch norm": (lost["none"], lost["bn"]),
        "accuracy on corrupted images, batch norm − group norm": (corrupt["bn"], corrupt["gn"]),
        "the remedy: adapted − not adapted": (corrupt["adapted"], corrupt["bn"]),
        "the remedy: adapted − none": (corrupt["adapted"], corrupt["none"]),
        "its limit: each batch by itself, sorted by label − mixed": (corrupt["sorted"], corrupt["mixed"]),
    }
    return [
        difference_finding("accuracy on corrupted images, batch norm − none", where, corrupt["bn"], corrupt["none"]),
        *(difference_finding(what, where, *pair, decisive=False) for what, pair in aside.items()),
    ]


def _setup(plan: Plan) -> dict[str, str]:
    severities = f"severity {', '.join(map(str, _severities(plan, 'digits')))}"
    fewer = "" if plan.quick else f" ({', '.join(map(str, FEWER))} on larger images)"
    return {
        "Network": "three convolutions of 8, 16 and 16 channels (for larger images 16, 32 and 32) with ReLU, the mean "
        "over positions, one linear layer; pixels from 0 to 1; normalization ahead of the activation",
        "Training": f"{_steps(plan, 'digits')} steps ({_steps(plan, 'images')} on larger images, 4,000 of them) of "
        f"gradient descent with momentum {MOMENTUM:g}, batches of {BATCH}, on clean images",
        "Learning rate": "for each arm and seed the one with the highest accuracy on clean validation images",
        "Test": f"on at most {MOST_TESTED} images",
        "Corruptions": f"{', '.join(CORRUPTIONS)}; {severities}{fewer}",
        "Adapted": "kn.adapt: the running statistics are those of the corrupted test images, without labels",
        "Each batch by itself": "kn.adapt(mode='batch'): a tenth of the test images at a time, normalized with its own "
        "moments; sorted by label, such a batch holds one or two of ten classes",
        "Seeds": seeds_text(SEEDS.of(plan)),
    }


def _tuned(by_seed: Sequence[Result], rates: Sequence[float]) -> list[str]:
    """For each rate the mean validation accuracy, and how often it was the best."""
    chosen = [each["index"] for each in by_seed]
    means = [sum(each["validation"][at] or 0.0 for each in by_seed) / len(by_seed) for at in range(len(rates))]
    return [f"{rates[at]:g}: {value:.1f} ({chosen.count(at)})" for at, value in enumerate(means)]


CLAIM: Claim = Claim(
    number=9,
    title="Robustness out of distribution",
    statement="Networks with batch normalization are more robust to data unlike those in training.",
    question="Is a network with batch norm right more often on corrupted images?",
    literature="It is often inferred from better generalization on clean data. Galloway and others find that batch "
    "norm makes networks more vulnerable to noise and to adversarial changes. Schneider and others, and Nado and "
    "others, show that much of what image corruptions cost comes from running statistics that no longer fit, and that "
    "the moments of the new data bring it back where batches are large and mix the classes.",
    sources=[
        Source(
            "Galloway et al. 2019: Batch normalization is a cause of adversarial vulnerability",
            "https://arxiv.org/abs/1905.02161",
        ),
        Source("Schneider et al. 2020, section 3: adapted moments", "https://arxiv.org/abs/2006.16971"),
        Source("Nado et al. 2020: moments of the test batch", "https://arxiv.org/abs/2006.10963"),
        Source("Hendrycks, Dietterich 2019: corruptions and severities", "https://arxiv.org/abs/1903.12261"),
    ],
    criterion="Holds if, on every data set, the mean accuracy over corruptions and severities is higher with batch "
    "norm than without (the interval lies above 0); does not hold if it is lower. Clean accuracy, what adapted moments "
    "bring back, and what batches sorted by label do to that are shown beside.",
    data=("digits", "mnist", "images"),
    cells=lambda plan: [cell for data in CLAIM.sets(plan) for cell in _cells(plan, data)],
    read=read,
)
