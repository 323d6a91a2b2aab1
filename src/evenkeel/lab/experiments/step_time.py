"""What does a training step cost with batch normalization?

Arms alternate within every round, so that what disturbs the machine disturbs all of them, and each round
gives one ratio. No time is given for a wrong result: the two batch norms must first train alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from evenkeel.lab.arms import EVENKEEL, NONE, TORCH, Arm
from evenkeel.lab.cell import Cell, Result, Results
from evenkeel.lab.data import digits
from evenkeel.lab.experiment import Plan
from evenkeel.lab.figures import Axis, Figure, Measure, Section, Series, Table
from evenkeel.lab.networks import cnn, mlp
from evenkeel.lab.phrases import listed
from evenkeel.lab.protocol import ARMS, seeds_text
from evenkeel.lab.seeds import seed_from
from evenkeel.lab.statistics import Interval, geometric_mean
from evenkeel.lab.threads import one_thread
from evenkeel.lab.timing import disagreement, median_ratio, stepper, take_turns

RATE = 0.05
CHECKED_STEPS = 5
TOLERANCE = 1e-3
"""Relative difference of the losses of the two batch norms over the checked steps."""
SIZES: dict[str, tuple[str, tuple[int, ...], int]] = {
    "fully connected 3 × 100": ("mlp", (100, 100, 100), 60),
    "fully connected 3 × 512": ("mlp", (512, 512, 512), 120),
    "convolutional 8-16-16": ("cnn", (8, 16, 16), 60),
    "convolutional 16-32-32": ("cnn", (16, 32, 32), 120),
}


def step_times(*, network: str, widths: tuple[int, ...], batch: int, seed: int, budget: float) -> Result:
    """Time training steps of all arms, alternating.

    Args:
        network: "mlp" or "cnn".
        widths: the widths or channels of the hidden layers.
        batch: samples in the batch.
        seed: draws data and weights.
        budget: about how many seconds to measure.

    Returns:
        Median milliseconds a step by arm, the median over rounds of each arm's ratio to no
        normalization and of evenkeel's to torch.nn's, and how many rounds there were.

    Raises:
        ArithmeticError: when the two batch norms do not train alike.
    """
    with one_thread(), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed_from(draw="step time", network=network, seed=seed))
        build: Callable[[Arm, tuple[int, ...]], nn.Module] = mlp if network == "mlp" else cnn
        models = {arm.name: build(arm, widths).train() for arm in ARMS}
        models[EVENKEEL.name].load_state_dict(models[TORCH.name].state_dict())
        split = digits(seed)
        images, labels = split.train_x[:batch], split.train_y[:batch]
        steps = {name: stepper(model, images, labels, RATE) for name, model in models.items()}
        difference = disagreement(steps[TORCH.name], steps[EVENKEEL.name], CHECKED_STEPS)
        if not difference <= TOLERANCE:
            raise ArithmeticError(
                f"the losses of torch.nn's and evenkeel's batch norm differ by {difference:.1e} in "
                f"{CHECKED_STEPS} steps (allowed: {TOLERANCE:.0e}); no time is given for a wrong result"
            )
        taken = take_turns(steps, budget)
    return {
        "milliseconds": {name: 1e3 * statistics.median(times) for name, times in taken.items()},
        "to_none": {name: median_ratio(times, taken[NONE.name]) for name, times in taken.items()},
        "to_torch": median_ratio(taken[EVENKEEL.name], taken[TORCH.name]),
        "disagreement": difference,
        "rounds": len(taken[NONE.name]),
    }


class StepTime:
    """Time of a training step, relative to the network without normalization."""

    name = "step_time"
    title = "Time per step"
    question = "What does a training step cost with batch normalization?"
    order = 5

    def cells(self, plan: Plan) -> Sequence[Cell]:
        budget = 0.1 if plan.quick else 0.3
        return [
            Cell(
                step_times,
                {
                    "network": network,
                    "widths": widths,
                    "batch": batch,
                    "seed": seed,
                    "budget": budget,
                },
                exclusive=True,
                cost=budget + 0.1,
            )
            for network, widths, batch in SIZES.values()
            for seed in range(plan.seeds)
        ]

    def read(self, plan: Plan, results: Results) -> Section:
        by_size: dict[str, list[Result]] = {size: [] for size in SIZES}
        sizes = {(network, widths): size for size, (network, widths, _) in SIZES.items()}
        for axes, result in results.of(self.cells(plan)):
            by_size[sizes[axes["network"], axes["widths"]]].append(result)  # type: ignore[index]
        by_size = {size: rows for size, rows in by_size.items() if rows}
        if not by_size:
            raise ValueError("no size has a result")
        to_none = {
            arm.name: {size: _interval(rows, arm) for size, rows in by_size.items()} for arm in (TORCH, EVENKEEL)
        }
        to_torch = {size: geometric_mean([row["to_torch"] for row in rows]) for size, rows in by_size.items()}
        overall = {name: _overall(by_size, name) for name in (TORCH.name, EVENKEEL.name)}
        return Section(
            self.name,
            self.title,
            self.question,
            f"Over {len(by_size)} networks, and relative to the same network without normalization, a "
            f"training step takes ×{overall[TORCH.name].text(2)} the time with torch.nn's batch norm "
            f"and ×{overall[EVENKEEL.name].text(2)} with evenkeel's.",
            setup=[
                (
                    "Step",
                    "forward, cross-entropy, backward and gradient descent on one batch of digits; batches of "
                    + listed([f"{batch} ({size})" for size, (_, _, batch) in SIZES.items()]),
                ),
                (
                    "Order",
                    "the arms take turns within a round, in rotating order; a round gives one ratio, a "
                    "seed the median of its rounds, and intervals are over seeds",
                ),
                (
                    "Before timing",
                    f"the losses of the two batch norms over {CHECKED_STEPS} steps from the same weights "
                    f"agree to {TOLERANCE:.0e}; largest difference seen: "
                    f"{max(row['disagreement'] for rows in by_size.values() for row in rows):.0e}",
                ),
                ("Threads", "one, with nothing else of the run at work"),
                ("Seeds", seeds_text(plan)),
            ],
            measures=[_measure(size, rows, to_none, to_torch[size]) for size, rows in by_size.items()],
            figures=[_figure(list(by_size), to_none)],
            tables=[_table(by_size, to_none, to_torch)],
        )


def _overall(by_size: Mapping[str, list[Result]], arm: str) -> Interval:
    """The geometric mean over the networks, seed by seed, then over the seeds."""
    seeds = min(len(rows) for rows in by_size.values())
    return geometric_mean(
        [geometric_mean([rows[seed]["to_none"][arm] for rows in by_size.values()]).value for seed in range(seeds)]
    )


def _interval(rows: list[Result], arm: Arm) -> Interval:
    return geometric_mean([row["to_none"][arm.name] for row in rows])


def _milliseconds(rows: list[Result], arm: Arm) -> Interval:
    return geometric_mean([row["milliseconds"][arm.name] for row in rows])


def _measure(
    size: str,
    rows: list[Result],
    to_none: dict[str, dict[str, Interval]],
    to_torch: Interval,
) -> Measure:
    times = {arm.name: _milliseconds(rows, arm) for arm in ARMS}
    return Measure(
        "Milliseconds a step",
        size,
        times,
        {name: each.text(None) for name, each in times.items()},
        f"×{to_none[EVENKEEL.name][size].text(2)}",
        {
            "ratio": to_none[EVENKEEL.name][size],
            "ratio torch": to_none[TORCH.name][size],
            "evenkeel over torch": to_torch,
        },
    )


def _figure(sizes: list[str], to_none: dict[str, dict[str, Interval]]) -> Figure:
    series = []
    for arm in (TORCH, EVENKEEL):
        bars = [to_none[arm.name][size] for size in sizes]
        series.append(
            Series(
                arm.label,
                arm.name,
                list(range(len(sizes))),
                [each.value for each in bars],
                [each.low for each in bars],
                [each.high for each in bars],
            )
        )
    described = "; ".join(
        f"{size}: torch.nn {to_none[TORCH.name][size].text(2)}, evenkeel {to_none[EVENKEEL.name][size].text(2)}"
        for size in sizes
    )
    return Figure(
        "Time of a training step, relative to no normalization",
        Axis("", categories=sizes),
        Axis("relative time"),
        series,
        f"Time of a training step over that of the same network without normalization: {described}.",
        kind="bars",
        reference=(1.0, "no normalization"),
    )


def _table(
    by_size: dict[str, list[Result]],
    to_none: dict[str, dict[str, Interval]],
    to_torch: dict[str, Interval],
) -> Table:
    return Table(
        "Milliseconds a training step, and ratios",
        [
            "network",
            *(arm.label for arm in ARMS),
            "torch.nn / none",
            "evenkeel / none",
            "evenkeel / torch.nn",
        ],
        [
            [
                size,
                *(_milliseconds(rows, arm).text(None) for arm in ARMS),
                to_none[TORCH.name][size].text(2),
                to_none[EVENKEEL.name][size].text(2),
                to_torch[size].text(2),
            ]
            for size, rows in by_size.items()
        ],
    )


EXPERIMENT = StepTime()
