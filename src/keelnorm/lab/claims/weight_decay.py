"""What does weight decay do to a network with batch normalization?

Ahead of a batch norm the length of the weights has no effect on what the network computes, so decay can't regularize
it in the usual sense; it keeps the weights short, and with them the effective learning rate η/‖w‖² high. If that is
all, then a network without decay whose rate follows the same effective rate must become the same. What an optimizer
decays by default is more: the output layer's weights, γ and β, which no batch norm makes indifferent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from keelnorm.lab.claims._decay import (
    BATCH,
    DECAY,
    KINDS,
    RATE,
    SAMPLES,
    WIDTHS,
    WRONG,
    change_when_doubled,
    decayed,
    settings,
    tried,
)  # fmt: skip
from keelnorm.lab.claims._decay_figures import ARMS, DECAYING, NETWORKS, effective_figure, gains_figure
from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan, seeds_text
from keelnorm.lab.reading.figures import Table
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.lab.reading.wording import listed, signed
from keelnorm.lab.training.arms import BN, NONE
from keelnorm.lab.training.trials import where_text
from keelnorm.measure.statistics import Interval, difference, geometric_mean, mean, ratio

__all__ = ["CLAIM", "change_when_doubled", "decayed"]

INVARIANT = 1e-3
"""Share by which outputs may change when weights ahead of a batch norm are doubled; ε keeps it from being exactly 0."""
LEFT = 10.0
"""Percent of what decay does to the outputs that may be left when only the effective rate is the same."""
EQUAL = 0.5
"""Points by which two accuracies may differ and still be called equal."""
DECAYS = (0.03, 0.1, 0.3)
RATES = (0.01, 0.03, 0.1)
BETWEEN = (0.003, 0.0055, 0.017, 0.055)
"""More rates without decay, so that it is not worse for having fewer settings to choose from."""


def cells(plan: Plan) -> Sequence[Cell]:
    return [cell for data in _sets(plan) for cell in (*_twins(plan, data), *_grid(plan, data))]


def _sets(plan: Plan) -> list[str]:
    return plan.sets("digits", "mnist")


def _seeds(plan: Plan) -> range:
    return plan.seed_range(quick=3, full=7)


def _steps(plan: Plan) -> tuple[int, int]:
    """Of the arms that are compared at one setting, and of those that are tried at many."""
    return (60, 350) if plan.quick else (500, 500)


def _twins(plan: Plan, data: str) -> list[Cell]:
    """One network each; with another beside it where it has the same effective rate."""
    steps, _ = _steps(plan)
    return [
        Cell(
            decayed,
            {"data": data, "arm": arm, "seed": seed, "steps": steps},
            cost=steps * (1.6e-3 if arm.endswith("rate") else 0.8e-3),
        )
        for seed in _seeds(plan)
        for arm in ARMS
    ]


def _axes(plan: Plan) -> dict[str, tuple[float, ...]]:
    if plan.quick:
        return {"rates": (0.03,), "decays": (0.1,), "between": (0.017,)}
    return {"rates": RATES, "decays": DECAYS, "between": BETWEEN}


def _grid(plan: Plan, data: str) -> list[Cell]:
    """All settings of a network side by side."""
    axes, (_, steps) = _axes(plan), _steps(plan)
    return [
        Cell(
            tried,
            {"data": data, "arm": network.name, "seed": seed, "steps": steps, **axes},
            cost=steps * (1e-3 + 1.5e-4 * len(settings(**axes))),
        )
        for seed in _seeds(plan)
        for network in NETWORKS
    ]


def left_over(found: dict[str, list[Result]], network: str) -> Interval:
    """‖decay − the same effective rate‖ over ‖decay − no decay‖, between the outputs, in percent, by seed."""
    shares = []
    for with_decay, twin, without in zip(*(found[f"{network}{how}"] for how in (" decay", " rate", "")), strict=True):
        apart = math.dist(with_decay["outputs"], without["outputs"])
        shares.append(100.0 * max(math.dist(with_decay["outputs"], twin["outputs"]), 1e-9) / max(apart, 1e-9))
    return mean(shares)


def chosen(results: Sequence[Result], names: Sequence[tuple[str, float, float]], kind: str) -> int:
    """The setting of a kind with the highest validation accuracy, on average over seeds."""
    among = [index for index, (name, _, _) in enumerate(names) if name == kind]
    return max(among, key=lambda index: math.fsum(result["validation"][index] for result in results))


def read(plan: Plan, results: Results) -> Reading:
    findings, asides, figures, rows, grid_rows, words, edges = [], [], [], [], [], [], []
    names = settings(**_axes(plan))
    for data in _sets(plan):
        runs, grid = Runs(_twins(plan, data), results), Runs(_grid(plan, data), results)
        where = where_text(data, f"{SAMPLES} for training")
        found = {arm: runs.of(arm) for arm in ARMS}
        effective = {arm: [each["effective"][-1] for each in histories] for arm, histories in found.items()}
        test = {arm: [each["test"] for each in histories] for arm, histories in found.items()}
        doubled = {network.name: mean([each["scaled"] for each in found[network.name]]) for network in NETWORKS}
        left = {network.name: left_over(found, network.name) for network in NETWORKS}
        kept = ratio(effective["bn decay"], effective["bn"])
        accuracy: dict[tuple[str, str], list[float]] = {}
        for network in NETWORKS:
            by_seed = grid.of(network.name)
            for kind in ("none", *KINDS):
                at = chosen(by_seed, names, kind)
                accuracy[network.name, kind] = [result["test"][at] for result in by_seed]
                training = mean([result["train"][at] for result in by_seed])
                _, rate, decay = names[at]
                grid_rows.append(
                    [where, network.label, DECAYING.get(kind, "none"), f"{rate:g}", f"{decay:g}", training.text(1),
                     mean(accuracy[network.name, kind]).text(1)]
                )  # fmt: skip
                edges += _edges(plan, f"{where}, {network.label}, {DECAYING.get(kind, 'no decay')}", names, at)
        gains = {
            (network.name, kind): difference(accuracy[network.name, kind], accuracy[network.name, "none"])
            for network in NETWORKS
            for kind in KINDS
        }
        beyond = difference(accuracy[BN.name, "all"], accuracy[BN.name, "hidden"])
        same = difference(test["bn decay"], test["bn rate"])
        findings += [
            _changed(where, doubled[BN.name], "batch norm"),
            _left(f"{where}, hidden weights", left[BN.name], "batch norm"),
            Finding(
                f"test accuracy with batch norm, decay of all parameters − of hidden weights, at most {EQUAL:g}",
                f"{where}, all parameters", beyond, EQUAL, larger=False, digits=2,
            ),
        ]  # fmt: skip
        asides += [
            _changed(where, doubled[NONE.name], NONE.label, decisive=False),
            _left(f"{where}, hidden weights", left[NONE.name], NONE.label, decisive=False),
            Finding("effective rate η/‖w‖² at the end with batch norm, decay over no decay", where, kept, 1.0,
                    unit="×", digits=2, decisive=False),
            Finding("test accuracy with batch norm, decay − the same effective rate", f"{where}, hidden weights", same,
                    0.0, digits=2, decisive=False),
        ]  # fmt: skip
        asides += [
            Finding(f"test accuracy at the best settings, {network.label}, decay − no decay",
                    f"{where}, {DECAYING[kind]}", gains[network.name, kind], 0.0, digits=2, decisive=False)
            for network in NETWORKS
            for kind in KINDS
        ]  # fmt: skip
        words.append(
            f"{left[BN.name].text(None)} % of what decay of the hidden weights does to the outputs is left when only "
            f"the effective rate is kept the same ({left[NONE.name].text(0)} % without batch norm), and decay of all "
            f"parameters gains {signed(beyond, 1)} of accuracy over that of the hidden weights ({where})"
        )
        rows += [
            [where, label, geometric_mean(effective[arm]).text(None), mean([e["train"] for e in found[arm]]).text(1),
             mean(test[arm]).text(2)]
            for arm, (label, _) in ARMS.items()
        ]  # fmt: skip
        figures += [gains_figure(where, gains), effective_figure(where, found, kept)]
    return Reading(
        f"With batch norm, {listed(words)}.",
        [*findings, *asides],
        figures,
        [
            Table(
                f"At the end of training, at rate {RATE:g} and decay {DECAY:g} of the hidden weights",
                ["where", "arm", "effective rate", "training accuracy, %", "test accuracy, %"],
                rows,
            ),
            Table(
                "At the rate and decay with the highest validation accuracy",
                ["where", "network", "what decays", "rate", "decay", "training accuracy, %", "test accuracy, %"],
                grid_rows,
            ),
        ],
        setup=[
            ("Network", f"fully connected, {WIDTHS[0]} - {WIDTHS[1]} hidden units with ReLU, He's initialization"),
            (
                "Data",
                f"{SAMPLES} centred training samples, of which {WRONG:.0%} have a wrong label, so that there is "
                "something to regularize; validation and test labels are right",
            ),
            (
                "Training",
                f"gradient descent, batches of {BATCH}; {_steps(plan)[0]} steps of the arms at one rate, "
                f"{_steps(plan)[1]} of those that are tuned",
            ),
            (
                "Decay",
                "w ← (1 − η·λ)·w − η·gradient: of the hidden weights, which stand ahead of a batch norm; of all "
                "weights, the output layer's with them; of all parameters, γ, β and biases with them",
            ),
            (
                "The same effective rate",
                "no decay; each hidden layer's rate is η·(‖w‖ here / ‖w‖ with decay)² / (1 − η·λ), step by step, which "
                "by calculation keeps the direction of the weights the same; outputs are compared on test samples, "
                "with the batch's moments",
            ),
            ("Seeds", seeds_text(_seeds(plan))),
        ],
        notes=[
            *(
                [f"Best settings at the edge of their grid, beyond which better ones might lie: {'; '.join(edges)}."]
                if edges
                else []
            ),
            "What is left with batch norm comes from ε, the one term that is not indifferent to the weights' length; "
            "training makes a small difference grow. In double precision with ε = 1e-12 nothing is left.",
        ],
    )


def _changed(where: str, effect: Interval, label: str, decisive: bool = True) -> Finding:
    quantity = f"change of the outputs when the hidden weights are doubled, {label}"
    return Finding(quantity, where, effect, INVARIANT, larger=False, unit="of the largest", digits=6, decisive=decisive)


def _left(where: str, effect: Interval, label: str, decisive: bool = True) -> Finding:
    quantity = f"part of decay's effect on the outputs that the effective rate leaves unexplained, {label}"
    return Finding(quantity, where, effect, LEFT, larger=False, unit="%", digits=2, decisive=decisive)


def _edges(plan: Plan, what: str, names: Sequence[tuple[str, float, float]], at: int) -> list[str]:
    """Which of the best rate and decay lies at the edge of the full grid, in words."""
    kind, rate, decay = names[at]
    rates = [each for name, each, _ in names if name == kind]
    edges = [f"rate {rate:g}"] if rate in (min(rates), max(rates)) else []
    edges += [f"decay {decay:g}"] if kind != "none" and decay in (DECAYS[0], DECAYS[-1]) else []
    return [] if plan.quick or not edges else [f"{what}, {' and '.join(edges)}"]


CLAIM = Claim(
    number=22,
    title="Weight decay",
    statement="In a batch-normalized network weight decay acts through the effective learning rate.",
    question="Does weight decay do more than keep the effective learning rate up?",
    literature="Van Laarhoven shows that with normalization L2 regularization has no regularizing effect of its own, "
    "since the scale of the weights is free; it sets their length, and with it the effective rate η/‖w‖². Zhang et al. "
    "name a higher effective rate as one of three mechanisms of weight decay. The argument covers only weights "
    "ahead of a normalization; optimizers decay the output layer, γ and β, too, unless told otherwise.",
    sources=[
        Source("van Laarhoven 2017", "https://arxiv.org/abs/1706.05350"),
        Source(
            "Zhang, Wang, Xu, Grosse 2019: Three mechanisms of weight decay regularization",
            "https://arxiv.org/abs/1810.12281",
        ),
        Source("Loshchilov, Hutter 2019: decoupled weight decay", "https://arxiv.org/abs/1711.05101"),
    ],
    criterion=f"Holds if doubling the weights ahead of batch norm changes the outputs by less than {INVARIANT:g}, less "
    f"than {LEFT:g} % of what decay of these weights does to the outputs is left when only the effective rate is the "
    f"same, and decay of all parameters gains less than {EQUAL:g} points over that of these weights, each at its "
    "best settings (the intervals' ends); depends if some of these do.",
    data=("digits", "mnist"),
    cells=cells,
    read=read,
)
