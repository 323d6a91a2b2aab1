"""What do the remedies for small batches repair, and what not?

Each remedy is trained at batches from 2 to 256, with the same samples seen as batch normalization at that size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan, seeds_text
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.data import images
from keelnorm.lab.reading.figures import Axis, Figure, Table
from keelnorm.lab.reading.results_by_arm import Runs, band
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.lab.reading.wording import listed, signed
from keelnorm.lab.training.arms import BN, GN, NONE, Arm
from keelnorm.lab.training.learning_rates import Best
from keelnorm.lab.training.networks import StackedMLP
from keelnorm.lab.training.train import train
from keelnorm.lab.training.trials import tuned, where_text
from keelnorm.measure.statistics import difference, mean

WIDTHS = (64, 64)
SIZES = (2, 4, 8, 32, 256)
QUICK_SIZES = (2, 64)
RATES = (0.01, 0.03, 0.1, 0.3)
QUICK_RATES = (0.03, 0.1)
STEPS = {2: 800, 4: 600, 8: 400, 32: 200, 64: 150, 256: 150}
ACCUMULATED = 8
"""Micro-batches, or processes, whose moments are pooled in the synchronized arm."""
WINDOW = 8
GHOST = 16


def _layer(make: Callable[[int], nn.Module]) -> Callable[[int, int, int], nn.Module]:
    return lambda spatial, channels, replicas: make(replicas * channels)


def _renorm(channels: int) -> nn.Module:
    # The paper's ramps last 40,000 batches; these trainings are shorter than its first phase.
    return kn.BatchRenorm(
        channels, r_max=kn.LinearRamp(1.0, 3.0, 50, 250), d_max=kn.LinearRamp(0.0, 5.0, 50, 250), momentum=0.02
    )


ARMS: dict[str, Arm] = {
    "none": NONE,
    "bn": BN,
    "ghost": Arm("ghost", "ghost batch norm", _layer(partial(kn.GhostBatchNorm, ghost_size=GHOST))),
    "renorm": Arm("renorm", "batch renormalization", _layer(_renorm)),
    "cross": Arm(
        "cross",
        "cross-iteration",
        _layer(partial(kn.CrossIterationBatchNorm, window=WINDOW, burn_in=50, momentum=0.02)),
    ),
    "moving": Arm(
        "moving", "moving average", _layer(partial(kn.MovingAverageBatchNorm, window=WINDOW, burn_in=50, momentum=0.02))
    ),
    "sync": Arm("sync", f"synchronized over {ACCUMULATED}", BN.normalization),
    "gn": GN,
}
REMEDIES = ("renorm", "cross", "moving", "sync")


class RemedyStack(StackedMLP):
    """A stack whose layers get what some remedies need beside x."""

    def linear(self, layer: int, x: Tensor) -> Tensor:
        """(R, n, in) -> (R, n, out); for the moving average with centred weights, as `kn.center_weights` makes them."""
        if self.arm.name != "moving" or layer == len(self.blocks):
            return super().linear(layer, x)
        weight = self.weights[layer] - self.weights[layer].mean(dim=1, keepdim=True)
        return torch.bmm(x, weight.view(self.replicas, -1, x.shape[2]).transpose(1, 2))

    def hidden(self, layer: int, z: Tensor) -> Tensor:
        """Normalization and ReLU; cross-iteration is told the weight that made z."""
        if self.arm.name != "cross":
            return super().hidden(layer, z)
        block = self.blocks[layer]
        assert isinstance(block, nn.Sequential)
        y: Tensor = block[0](z, producer_weight=self.weights[layer], activation="relu")
        return y


def remedied(*, data: str, arm: str, batch: int, seed: int, rates: tuple[float, ...], steps: int) -> Result:
    """Train one arm at one batch size and every learning rate; the synchronized arm in fewer, larger steps.

    What synchronization over k processes of b samples computes is one batch of k·b: that is what runs here.
    """
    split = images(data, seed)
    draw = generator(draw="initialization", data=data, seed=seed)
    stack = RemedyStack(
        split.train_x[0].numel(),
        WIDTHS,
        split.classes,
        ARMS[arm],
        draw,
        torch.ones(len(rates)),
        initialization="xavier",
    )
    if arm == "sync":
        batch, steps = batch * ACCUMULATED, max(1, steps // ACCUMULATED)
    order = generator(draw="order", data=data, seed=seed)
    return dict(vars(train(stack, split, torch.tensor(rates), batch=batch, evaluate_at=(steps,), generator=order)))


def cells(plan: Plan) -> Sequence[Cell]:
    return [cell for data in _sets(plan) for size in _sizes(plan) for cell in _cells(plan, data, size)]


def _sets(plan: Plan) -> list[str]:
    return plan.sets("digits", "mnist")


def _sizes(plan: Plan) -> tuple[int, ...]:
    return QUICK_SIZES if plan.quick else SIZES


def _rates(plan: Plan) -> tuple[float, ...]:
    return QUICK_RATES if plan.quick else RATES


def _steps(plan: Plan, size: int) -> int:
    return STEPS[size] * 3 // 8 if plan.quick else STEPS[size]


def _arms(size: int) -> list[str]:
    """The arms at a size: synchronized ones only where the pooled batch is not most of the training part."""
    return [name for name in ARMS if name != "sync" or size * ACCUMULATED <= 256]


def _cells(plan: Plan, data: str, size: int) -> Sequence[Cell]:
    slow = {"cross": 3.0, "moving": 2.0, "renorm": 2.0}
    return [
        Cell(
            remedied,
            {
                "data": data,
                "arm": arm,
                "batch": size,
                "seed": seed,
                "rates": _rates(plan),
                "steps": _steps(plan, size),
            },
            cost=_steps(plan, size) * (1e-3 + size * 2e-5) * slow.get(arm, 1.0),
        )
        for seed in plan.seed_range(quick=3, full=5)
        for arm in _arms(size)
    ]


def read(plan: Plan, results: Results) -> Reading:
    findings, figures, rows, words, notes = [], [], [], [], []
    sizes = _sizes(plan)
    large = sizes[-1]
    for data in _sets(plan):
        chosen: dict[int, dict[str, Best]] = {}
        # Sizes are compared with each other too: a seed counts where it has a result for every arm at every size.
        every = [cell for size in sizes for cell in _cells(plan, data, size)]
        runs = Runs(every, results, arms=("arm", "batch"))
        for size in sizes:
            chosen[size] = tuned({arm: runs.of((arm, size)) for arm in _arms(size)}, _rates(plan))
        where = where_text(data)
        for size in (each for each in sizes if each <= 8):
            best = chosen[size]
            for remedy in REMEDIES:
                gain = difference(best[remedy].test, best["bn"].test)
                findings.append(
                    Finding(
                        f"test accuracy, {ARMS[remedy].label} − batch norm",
                        f"{where}, batch {size}",
                        gain,
                        0.0,
                        decisive=size == 2,
                    )
                )
            for other in ("ghost", "gn"):
                gain = difference(best[other].test, best["bn"].test)
                findings.append(
                    Finding(
                        f"test accuracy, {ARMS[other].label} − batch norm",
                        f"{where}, batch {size}",
                        gain,
                        0.0,
                        decisive=False,
                    )
                )
            for remedy in REMEDIES:
                left = difference(best[remedy].test, chosen[large]["bn"].test)
                findings.append(
                    Finding(
                        f"what is left: {ARMS[remedy].label} − batch norm at batch {large}",
                        f"{where}, batch {size}",
                        left,
                        0.0,
                        decisive=False,
                    )
                )
        repaired = [
            f"{ARMS[r].label} by {signed(difference(chosen[2][r].test, chosen[2]['bn'].test), 1)}" for r in REMEDIES
        ]
        words.append(
            f"batch norm reaches {mean(chosen[2]['bn'].test).value:.1f} % at batch 2 and "
            f"{mean(chosen[large]['bn'].test).value:.1f} % at "
            f"batch {large}; {listed(repaired)} change the former ({where})"
        )
        series = []
        for name, arm in ARMS.items():
            fit = [size for size in sizes if name in _arms(size)]
            by_seed = [list(v) for v in zip(*(chosen[size][name].test for size in fit), strict=True)]
            series.append(band(arm.label, name, fit, by_seed))
            rows.append(
                [
                    where,
                    arm.label,
                    *(
                        f"{mean(chosen[s][name].test).text(1)} ({chosen[s][name].rate:g})" if s in fit else "-"
                        for s in sizes
                    ),
                ]
            )
            if not plan.quick:
                notes += [
                    f"{where}, batch {size}: the best rate of {arm.label}, {chosen[size][name].rate:g}, lies at the "
                    f"edge of the grid."
                    for size in fit
                    if chosen[size][name].at_edge
                ]
        figures.append(
            Figure(
                f"Test accuracy by batch size: {where}",
                Axis("samples in a batch", scale="log"),
                Axis("test accuracy, %"),
                series,
                f"Test accuracy over the batch size, each arm and size at its best rate: {words[-1]}.",
            )
        )
    return Reading(
        f"With small batches, {'; '.join(words)}.",
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
            (
                "Network",
                f"fully connected, {WIDTHS[0]} - {WIDTHS[1]} hidden units with ReLU, Xavier's initialization, "
                f"centred pixels",
            ),
            (
                "Training",
                "gradient descent; " + ", ".join(f"{_steps(plan, size)} steps at batch {size}" for size in sizes),
            ),
            (
                "Batch renormalization",
                "kn.BatchRenorm, r_max from 1 to 3 and d_max from 0 to 5 between batch 50 and 250",
            ),
            ("Cross-iteration", f"kn.CrossIterationBatchNorm over {WINDOW} batches, told the weight ahead of it"),
            ("Moving average", f"kn.MovingAverageBatchNorm over {WINDOW} batches, weights ahead of it centred"),
            (
                "Synchronized",
                f"what kn.SyncBatchNorm computes on {ACCUMULATED} processes, or kn.backward_as_one_batch with "
                f"{ACCUMULATED} "
                f"micro-batches: the moments of {ACCUMULATED} batches; the same samples in {ACCUMULATED} times fewer "
                f"steps",
            ),
            ("Ghost", f"kn.GhostBatchNorm with groups of {GHOST}: a remedy for large batches, shown as a control"),
            (
                "Learning rate",
                f"for each arm and size the one with the highest validation accuracy, of "
                f"{', '.join(f'{r:g}' for r in _rates(plan))}",
            ),
            ("Seeds", seeds_text(plan.seed_range(quick=3, full=5))),
        ],
        notes=notes,
    )


CLAIM = Claim(
    number=19,
    title="Remedies for small batches",
    statement="What batch normalization loses with small batches, its remedies bring back.",
    question="Which remedy repairs batch norm at batches of 2 to 8?",
    literature="Batch renormalization corrects the batch's moments to the running ones, cross-iteration and "
    "moving-average batch norm take "
    "the last batches' moments in, synchronization those of other processes. Their papers report accuracies near "
    "those of large batches, "
    "mostly on ImageNet with 2 to 32 samples of many positions each; a fully connected layer has no positions, and "
    "at batch 2 two values "
    "a channel. Group norm does not look at the batch at all.",
    sources=[
        Source("Ioffe 2017: batch renormalization", "https://arxiv.org/abs/1702.03275"),
        Source("Yao, Cao, Zheng, Huang, Lin 2021: cross-iteration", "https://arxiv.org/abs/2002.05712"),
        Source("Yan et al. 2020: moving average", "https://arxiv.org/abs/2001.06838"),
        Source("Hoffer, Hubara, Soudry 2017: ghost", "https://arxiv.org/abs/1705.08741"),
        Source("Wu, He 2018: group normalization", "https://arxiv.org/abs/1803.08494"),
    ],
    criterion="Holds if at batch 2 every remedy (renormalization, cross-iteration, moving average, synchronization) "
    "has a higher test accuracy than "
    "batch norm (each interval above 0); depends if some have. What they gain at 4 and 8, and what is left to batch "
    "norm with a large batch, "
    "is shown beside.",
    data=("digits", "mnist"),
    cells=cells,
    read=read,
)
