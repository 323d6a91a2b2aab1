"""How much does batch normalization depend on the batch's size?"""

from __future__ import annotations

from collections.abc import Sequence

from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan, seeds_text
from keelnorm.lab.reading.figures import Axis, Figure, Table
from keelnorm.lab.reading.results_by_arm import Runs, band
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.lab.reading.wording import listed
from keelnorm.lab.training.arms import BN, GN, NONE
from keelnorm.lab.training.learning_rates import Best
from keelnorm.lab.training.trials import trial_cell, tuned, where_text
from keelnorm.measure.statistics import difference, mean

ARMS = (NONE, BN, GN)
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
QUICK_SIZES = (2, 4, 64)
LARGE = 64
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
QUICK_RATES = (0.01, 0.1, 0.3)
STEPS = {2: 2400, 4: 1600, 8: 1000, 16: 600, 32: 400, 64: 300, 128: 200, 256: 150}
"""Small batches get more steps and yet see fewer samples: see the note."""


def cells(plan: Plan) -> Sequence[Cell]:
    return [cell for data in _sets(plan) for size in _sizes(plan) for cell in _cells(plan, data, size)]


def _sets(plan: Plan) -> list[str]:
    return plan.sets("digits", "mnist")


def _sizes(plan: Plan) -> tuple[int, ...]:
    return QUICK_SIZES if plan.quick else SIZES


def _rates(plan: Plan) -> tuple[float, ...]:
    return QUICK_RATES if plan.quick else RATES


def _cells(plan: Plan, data: str, size: int) -> Sequence[Cell]:
    steps = STEPS[size] // 5 if plan.quick else STEPS[size]
    return [
        trial_cell(
            1e-3 + size * 2e-5,
            data=data,
            arm=arm.name,
            seed=seed,
            rates=_rates(plan),
            evaluate_at=(steps,),
            widths=(64, 64),
            batch=size,
        )
        for seed in _seeds(plan)
        for arm in ARMS
    ]


def _seeds(plan: Plan) -> range:
    return plan.seed_range(quick=3, full=5)


def read(plan: Plan, results: Results) -> Reading:
    findings, figures, rows, words, notes = [], [], [], [], []
    sizes = _sizes(plan)
    for data in _sets(plan):
        chosen: dict[int, dict[str, Best]] = {}
        lagless: dict[int, list[float]] = {}
        # Sizes are compared with each other too: a seed counts where it has a result for every arm at every size.
        every = [cell for size in sizes for cell in _cells(plan, data, size)]
        runs = Runs(every, results, arms=("arm", "batch"))
        for size in sizes:
            by_arm = {arm.name: runs.of((arm.name, size)) for arm in ARMS}
            chosen[size] = tuned(by_arm, _rates(plan))
            lagless[size] = _with_batch_moments(by_arm[BN.name], chosen[size][BN.name])
        where = where_text(data)
        loss = {size: difference(chosen[LARGE][BN.name].test, chosen[size][BN.name].test) for size in (2, 4)}
        spared = {size: difference(chosen[LARGE][NONE.name].test, chosen[size][NONE.name].test) for size in (2, 4)}
        findings += [
            Finding(f"test accuracy of batch norm, batch {LARGE} − batch 2", where, loss[2], 0.0),
            Finding(
                "what batch 2 costs: batch norm − none",
                where,
                difference(
                    [a - b for a, b in zip(chosen[LARGE][BN.name].test, chosen[2][BN.name].test, strict=True)],
                    [a - b for a, b in zip(chosen[LARGE][NONE.name].test, chosen[2][NONE.name].test, strict=True)],
                ),
                0.0,
            ),
            Finding(f"test accuracy of batch norm, batch {LARGE} − batch 4", where, loss[4], 0.0, decisive=False),
            Finding(
                f"test accuracy of no normalization, batch {LARGE} − batch 2", where, spared[2], 0.0, decisive=False
            ),
            Finding(
                "at batch 2, test data normalized by their own moments − by the running ones",
                where,
                difference(lagless[2], chosen[2][BN.name].test),
                0.0,
                decisive=False,
            ),
        ]
        words.append(
            f"batch norm reaches {mean(chosen[2][BN.name].test).text(1)} % at batch 2 and "
            f"{mean(chosen[LARGE][BN.name].test).text(1)} % "
            f"at {LARGE} (without normalization {mean(chosen[2][NONE.name].test).value:.1f} and "
            f"{mean(chosen[LARGE][NONE.name].test).value:.1f} %; {where})"
        )
        series = [
            band(arm.label, arm.name, sizes, _by_seed([chosen[size][arm.name].test for size in sizes])) for arm in ARMS
        ]
        series.append(
            band(
                "batch norm, test batch's moments",
                BN.name,
                sizes,
                _by_seed([lagless[size] for size in sizes]),
                faint=True,
            )
        )
        figures.append(
            Figure(
                f"Test accuracy by batch size: {where}",
                Axis("samples in a batch", scale="log"),
                Axis("test accuracy, %"),
                series,
                f"Test accuracy over the batch size in training, each arm and size at its best rate: {words[-1]}.",
            )
        )
        for arm in ARMS:
            rows.append(
                [
                    where,
                    arm.label,
                    *(f"{mean(chosen[s][arm.name].test).text(1)} ({chosen[s][arm.name].rate:g})" for s in sizes),
                ]
            )
            notes += [
                f"{where}, batch {size}: the best rate of {arm.label}, {chosen[size][arm.name].rate:g}, lies at the "
                f"edge of the grid."
                for size in sizes
                if chosen[size][arm.name].at_edge and not plan.quick
            ]
    return Reading(
        f"In accuracy, {listed(words)}.",
        findings,
        figures,
        [
            Table(
                "Test accuracy in percent by batch size, with the rate chosen on validation data",
                ["where", "arm", *map(str, sizes)],
                rows,
            )
        ],
        setup=[
            ("Network", "fully connected, 64 - 64 hidden units with ReLU, Xavier's initialization, centred pixels"),
            ("Training", "gradient descent; " + ", ".join(f"{_steps(plan, s)} steps at batch {s}" for s in sizes)),
            (
                "Learning rate",
                f"for each arm and size the one with the highest validation accuracy, of "
                f"{', '.join(f'{r:g}' for r in _rates(plan))}",
            ),
            ("Seeds", seeds_text(_seeds(plan))),
        ],
        notes=[
            *notes,
            "Small batches get more steps and yet see fewer samples; arms are compared at the same size, with the "
            "same steps. The faint curve "
            "evaluates the same networks with the test data's own moments: where it is as low, the training itself "
            "was hurt.",
        ],
    )


def _steps(plan: Plan, size: int) -> int:
    return STEPS[size] // 5 if plan.quick else STEPS[size]


def _with_batch_moments(histories: Sequence[Result], best: Best) -> list[float]:
    return [history["test_batch"][-1][best.index] for history in histories]


def _by_seed(by_size: Sequence[Sequence[float]]) -> list[list[float]]:
    """(size, seed) -> (seed, size)."""
    return [list(values) for values in zip(*by_size, strict=True)]


CLAIM = Claim(
    number=11,
    title="Dependence on the batch's size",
    statement="Batch normalization depends on the batch's size, and fails with very small batches.",
    question="What does batch norm lose with small batches?",
    literature="Wu and He show that ResNet-50's error rises steeply below 16 samples a batch, and propose group "
    "norm; Ioffe's batch "
    "renormalization is about the same. With two samples a normalized value can only be +1 or −1 times a factor: "
    "what the network learns from "
    "is the order of the two.",
    sources=[
        Source("Wu, He 2018: group normalization, figure 1", "https://arxiv.org/abs/1803.08494"),
        Source("Ioffe 2017: batch renormalization", "https://arxiv.org/abs/1702.03275"),
    ],
    criterion=f"Holds if the accuracy of batch norm at batch 2 is lower than at {LARGE}, and loses more than the "
    f"network without "
    "normalization does (both intervals above 0); depends if one is.",
    data=("digits", "mnist"),
    cells=cells,
    read=read,
)
