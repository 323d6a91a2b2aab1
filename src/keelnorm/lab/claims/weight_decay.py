"""What does weight decay do to a network with batch normalization?

Ahead of a batch norm the length of the weights has no effect on what the network computes, so decay can't regularize
it in the usual sense; it keeps the weights short, and with them the effective learning rate η/‖w‖² high. If that is
all, then a network without decay whose rate follows the same effective rate must become the same. What an optimizer
decays by default is more: the output layer's weights, γ and β, which no batch norm makes indifferent.
"""

from __future__ import annotations

from keelnorm.lab.claims._weight_decay_reading import ARMS, EQUAL, INVARIANT, LEFT, NETWORKS, Tuned, Twins
from keelnorm.lab.claims._weight_decay_training import (
    BATCH,
    DECAY,
    RATE,
    SAMPLES,
    WIDTHS,
    WRONG,
    settings,
    train_at_one_setting,
    train_at_settings,
)
from keelnorm.lab.core.cell import Cell, Results
from keelnorm.lab.core.claim import Claim, EarlierCriterion, Reading, Source
from keelnorm.lab.core.plan import ByForm, Plan, Seeds, seeds_text
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.lab.reading.wording import listed, signed, where_text
from keelnorm.lab.training.arms import BN, NONE
from keelnorm.measure.page_parts import Table

GRID: ByForm[dict[str, tuple[float, ...]]] = ByForm(
    quick={"rates": (0.03,), "decays": (0.1,), "between": (0.017,)},
    full={"rates": (0.01, 0.03, 0.1), "decays": (0.03, 0.1, 0.3), "between": (0.003, 0.0055, 0.017, 0.055)},
)
"""Between the rates are more without decay, so that it is not worse for having fewer settings to choose from."""
STEPS = ByForm(quick=(60, 350), full=(500, 500))
"""Of the arms that are compared at one setting, and of those that are tried at many."""
SEEDS = Seeds(quick=3, full=7)


def _twins(plan: Plan, data: str) -> list[Cell]:
    """One network each; with another beside it where it has the same effective rate."""
    steps, _ = STEPS.of(plan)
    return [
        Cell(
            train_at_one_setting,
            {"data": data, "arm": arm, "seed": seed, "steps": steps},
            cost=steps * (1.6e-3 if arm.endswith("rate") else 0.8e-3),
        )
        for seed in SEEDS.of(plan)
        for arm in ARMS
    ]


def _grid(plan: Plan, data: str) -> list[Cell]:
    """All settings of a network side by side."""
    axes, (_, steps) = GRID.of(plan), STEPS.of(plan)
    return [
        Cell(
            train_at_settings,
            {"data": data, "arm": network.name, "seed": seed, "steps": steps, **axes},
            cost=steps * (1e-3 + 1.5e-4 * len(settings(**axes))),
        )
        for seed in SEEDS.of(plan)
        for network in NETWORKS
    ]


def read(plan: Plan, results: Results) -> Reading:
    """What decay does beyond keeping the effective rate high, and what it gains at the best settings."""
    findings, asides, figures, rows, tuned_rows, words, edges = [], [], [], [], [], [], []
    names = settings(**GRID.of(plan))
    for data in CLAIM.sets(plan):
        where = where_text(data, f"{SAMPLES} for training")
        runs = Runs(_twins(plan, data), results)
        twins = Twins(where, {arm: runs.of(arm) for arm in ARMS})
        tuned = Tuned.of(where, Runs(_grid(plan, data), results), names)
        beyond = tuned.beyond()
        quantity = f"test accuracy with batch norm, decay of all parameters − of hidden weights, at most {EQUAL:g}"
        of_bn, of_none = twins.of_outputs(BN, decisive=True), twins.of_outputs(NONE, decisive=False)
        findings += of_bn
        findings.append(Finding(quantity, f"{where}, all parameters", beyond, EQUAL, larger=False, digits=2))
        asides += [*of_none, *twins.asides(), *tuned.asides()]
        words.append(
            f"{of_bn[1].effect.text(None)} % of what decay of the hidden weights does to the outputs is left when only "
            f"the effective rate is kept the same ({of_none[1].effect.text(0)} % without batch norm), and decay of all "
            f"parameters gains {signed(beyond, 1)} of accuracy over that of the hidden weights ({where})"
        )
        rows += twins.rows()
        tuned_rows += tuned.rows()
        edges += [] if plan.quick else tuned.edges(names)
        figures += [tuned.figure(), twins.figure()]
    at_edges = f"Best settings at the edge of their grid, beyond which better ones might lie: {'; '.join(edges)}."
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
                tuned_rows,
            ),
        ],
        setup=_setup(plan),
        notes=[
            *([at_edges] if edges else []),
            "What is left with batch norm comes from ε, the one term that is not indifferent to the weights' length; "
            "training makes a small difference grow. In double precision with ε = 1e-12 nothing is left.",
        ],
    )


def _setup(plan: Plan) -> dict[str, str]:
    return {
        "Network": f"fully connected, {WIDTHS[0]} - {WIDTHS[1]} hidden units with ReLU, He's initialization",
        "Data": f"{SAMPLES} centered training samples, of which {WRONG:.0%} have a wrong label, so that there is "
        "something to regularize; validation and test labels are right",
        "Training": f"gradient descent, batches of {BATCH}; {STEPS.of(plan)[0]} steps of the arms at one rate, "
        f"{STEPS.of(plan)[1]} of those that are tuned",
        "Decay": "w ← (1 − η·λ)·w − η·gradient: of the hidden weights, which stand ahead of a batch norm; of all "
        "weights, the output layer's with them; of all parameters, γ, β and biases with them",
        "The same effective rate": "no decay; each hidden layer's rate is η·(‖w‖ here / ‖w‖ with decay)² / (1 − η·λ), "
        "step by step, which by calculation keeps the direction of the weights the same; outputs are compared on test "
        "samples, with the batch's moments",
        "Seeds": seeds_text(SEEDS.of(plan)),
    }


CLAIM: Claim = Claim(
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
    earlier=(
        EarlierCriterion(
            "2026-11-27",
            f"Holds if doubling the weights ahead of batch norm changes the outputs by less than {INVARIANT:g}, decay "
            "keeps the effective rate higher (the ratio's interval lies above 1), and decay gains less than "
            f"{EQUAL:g} points over the same effective rate without decay (the interval's end).",
            "Accuracies at the same effective rate differ by less than their intervals; what decay does to the outputs "
            "can be resolved, against a twin that has the effective rate of each step.",
        ),
    ),
    data=("digits", "mnist"),
    cells=lambda plan: [cell for data in CLAIM.sets(plan) for cell in (*_twins(plan, data), *_grid(plan, data))],
    read=read,
)
