"""Does batch normalization reduce internal covariate shift? And is that why networks train faster?

Three measurements: how far the moments of what a hidden layer receives drift; how much a layer's gradient changes when
the layers ahead of it move; and whether the gain is lost when noise behind the batch norm puts the shift back.
"""

from __future__ import annotations

from collections.abc import Sequence

from evenkeel.lab.arms import BN, NONE
from evenkeel.lab.cell import Cell, Results
from evenkeel.lab.claim import Claim, Reading, Source
from evenkeel.lab.claims._shifts import (
    ARMS,
    NOISE_SCALE,
    NOISE_SHIFT,
    PREPARED,
    PROBED,
    RATE,
    RATES,
    TARGET,
    WIDTHS,
    drift,
    gradient_change,
    noisy_training,
)
from evenkeel.lab.figures import Axis, Figure, Series, Table
from evenkeel.lab.phrases import listed, steps
from evenkeel.lab.plan import Plan, seeds_text
from evenkeel.lab.reading import Runs, band
from evenkeel.lab.statistics import Speedup, difference, geometric_mean, mean, ratio, speedup
from evenkeel.lab.trials import where_text
from evenkeel.lab.tuning import tune
from evenkeel.lab.verdicts import Finding, speedup_finding

STYLES = {"none": "none", "bn": "bn", "noisy": "other-3"}


def _seeds(plan: Plan) -> range:
    return plan.seed_range(quick=3, full=8)


def _sets(plan: Plan) -> list[str]:
    return plan.sets("digits", "mnist")


def _drift_cells(plan: Plan, data: str) -> list[Cell]:
    steps_ = 90 if plan.quick else 300
    return [
        Cell(
            drift,
            {"data": data, "activation": "relu", "arm": arm.name, "seed": seed, "steps": steps_},
            cost=steps_ * 1e-3,
        )
        for seed in _seeds(plan)
        for arm in ARMS
    ]


def _gradient_cells(plan: Plan, data: str) -> list[Cell]:
    steps_ = 60 if plan.quick else 300
    return [
        Cell(
            gradient_change,
            {
                "data": data,
                "activation": activation,
                "centred": centred,
                "arm": arm.name,
                "seed": seed,
                "steps": steps_,
            },
            cost=steps_ * 1.2e-3,
        )
        for activation, centred in PREPARED.values()
        for seed in _seeds(plan)
        for arm in (NONE, BN)
    ]


def _noise_cells(plan: Plan, data: str) -> list[Cell]:
    steps_ = 250 if plan.quick else 700
    return [
        Cell(
            noisy_training,
            {"data": data, "arm": arm.name, "seed": seed, "steps": steps_, "rates": RATES},
            cost=steps_ * 2e-3,
        )
        for seed in _seeds(plan)
        for arm in ARMS
    ]


def cells(plan: Plan) -> Sequence[Cell]:
    return [
        cell
        for data in _sets(plan)
        for cell in (*_drift_cells(plan, data), *_gradient_cells(plan, data), *_noise_cells(plan, data))
    ]


def read(plan: Plan, results: Results) -> Reading:
    findings, figures, rows, words, learnt = [], [], [], [], []
    for data in _sets(plan):
        where = where_text(data)
        drifts = Runs(_drift_cells(plan, data), results)
        shift = {arm.name: [each["shift"][-1] for each in drifts.of(arm.name)] for arm in ARMS}
        held = ratio([max(v, 1e-6) for v in shift["none"]], [max(v, 1e-6) for v in shift["bn"]])
        restored = difference(shift["noisy"], shift["none"])
        findings += [
            Finding("(a) drift of a hidden layer's input, none over batch norm", f"{where}, ReLU", held, 1.0, unit="×"),
        ]
        gradients = Runs(_gradient_cells(plan, data), results, where=("activation", "centred"))
        cosines = {}
        for name, prepared in PREPARED.items():
            found = {
                arm.name: [mean(each["cosine"]).value for each in gradients.of(arm.name, *prepared)]
                for arm in (NONE, BN)
            }
            cosines[name] = found
            ends = [mean([each["accuracy"] for each in gradients.of(arm.name, *prepared)]).value for arm in (NONE, BN)]
            learnt.append(f"{where}, {name} {ends[0]:.0f} and {ends[1]:.0f} %")
            findings.append(
                Finding(
                    "(b) cosine of a layer's gradient before and after earlier layers move, batch norm − none",
                    f"{where}, {name}",
                    difference(found["bn"], found["none"]),
                    0.0,
                    unit="",
                    digits=3,
                )
            )
            figures.append(_cosine_figure(where, name, gradients))
        noise = Runs(_noise_cells(plan, data), results)
        by_arm = {arm.name: noise.of(arm.name) for arm in ARMS}
        tuned = {name: tune(histories, RATES, TARGET) for name, histories in by_arm.items()}
        horizon = float(by_arm["bn"][0]["steps"][-1])
        gains: dict[str, Speedup] = {
            name: speedup(tuned[name].steps, tuned["none"].steps, horizon) for name in ("bn", "noisy")
        }
        findings += [
            Finding(
                "(c) drift with noise behind batch norm − without batch norm",
                f"{where}, ReLU",
                restored,
                0.0,
                unit="deviations",
                digits=2,
                decisive=False,
            ),
            speedup_finding(
                "(c) steps to 90 %, none over batch norm", f"{where}, sigmoid", gains["bn"], decisive=False
            ),
            speedup_finding(
                "(c) steps to 90 %, none over batch norm with noise that restores the shift",
                f"{where}, sigmoid",
                gains["noisy"],
                decisive=False,
            ),
        ]
        turned = listed(
            [
                f"{mean(each['none']).value:.2f} → {mean(each['bn']).value:.2f} with {name}"
                for name, each in cosines.items()
            ]
        )
        words.append(
            f"a hidden layer's input drifts {mean(shift['none']).value:.2f} → {mean(shift['bn']).value:.3f} "
            f"deviations; the cosine of a layer's gradient "
            f"goes {turned}; with noise that puts the drift at "
            f"{mean(shift['noisy']).value:.2f}, batch norm still needs {steps(gains['noisy'])} than none "
            f"({steps(gains['bn'])} without the noise; {where})"
        )
        figures[:0] = [_drift_figure(where, drifts), _unit_figure(where, drifts)]
        for arm in ARMS:
            rows.append(
                [
                    where,
                    arm.label,
                    mean(shift[arm.name]).text(3),
                    *(mean(cosines[a][arm.name]).text(3) if arm.name in cosines[a] else "-" for a in PREPARED),
                    _steps_text(tuned[arm.name].steps),
                    mean([each["accuracy"] for each in drifts.of(arm.name)]).text(1),
                ]
            )
    return Reading(
        f"From no normalization to batch norm, {listed(words)}.",
        findings,
        figures,
        [
            Table(
                "Drift at the end (deviations), mean cosine of the gradient, steps to 90 % (sigmoid), and accuracy "
                "of the drifting network",
                ["where", "arm", "drift", *(f"cosine, {name}" for name in PREPARED), "steps to 90 %", "accuracy, %"],
                rows,
            )
        ],
        setup=[
            (
                "Network",
                f"fully connected, {' - '.join(map(str, WIDTHS))} hidden units, Xavier's initialization, centred "
                f"pixels",
            ),
            (
                "(a) Drift",
                "distance of a unit's mean at the last activation's input from its mean before training, over its "
                "deviation, averaged over "
                f"units; in training mode on the validation images; gradient descent at {RATE['relu']:g} in all arms",
            ),
            (
                "(b) Gradient",
                f"of hidden layer {PROBED + 1}'s weights on the same batch, before and after the step of the layer "
                f"ahead of it; the cosine's mean over "
                f"training; rate {RATE['relu']:g} with ReLU, {RATE['sigmoid']:g} with sigmoid, in both arms",
            ),
            (
                "(c) Noise",
                f"behind every batch norm in training: times 1 + {NOISE_SCALE:g}·N(0, 1), plus {NOISE_SHIFT:g}·N(0, "
                f"1), drawn for each channel and step; "
                "sigmoid, each arm at the rate with the fewest steps on validation data",
            ),
            ("Seeds", seeds_text(_seeds(plan))),
        ],
        notes=[
            "A layer that normalizes its own input is bound to hold that input's moments near (β, γ), so (a) is no "
            "surprise.",
            f"Accuracy at the end of the networks of (b), without and with batch norm: {'; '.join(learnt)}. A cosine "
            "in a network that does not learn says little.",
            "In (c) drift and steps come from different networks (ReLU and sigmoid), and the noise is the same in "
            "every layer: it shows that a gain is left under noise, not that the shift has no part in it.",
        ],
    )


def _steps_text(needed: Sequence[float | None]) -> str:
    known = [max(value, 1.0) for value in needed if value is not None]
    return f"{geometric_mean(known).text(0)} ({len(known)} of {len(needed)})" if known else "-"


def _drift_figure(where: str, runs: Runs) -> Figure:
    series = [
        band(arm.label, STYLES[arm.name], runs.of(arm.name)[0]["steps"], [each["shift"] for each in runs.of(arm.name)])
        for arm in ARMS
    ]
    ends = listed([f"{each.label} {each.y[-1]:.2f}" for each in series if each.y[-1] is not None])
    return Figure(
        f"Drift of a hidden layer's input: {where}, ReLU",
        Axis("steps"),
        Axis("drift since the start, deviations"),
        series,
        f"Distance of the units' means from their start, in deviations, over training. At the end: {ends}.",
    )


def _unit_figure(where: str, runs: Runs) -> Figure:
    series = []
    for arm in (NONE, BN):
        first = runs.of(arm.name)[0]
        low, middle, high = zip(*first["percentiles"], strict=True)
        series.append(Series(arm.label, STYLES[arm.name], first["steps"], list(middle), list(low), list(high)))
    travels = listed(
        [f"{each.label} from {each.y[0]:.2f} to {each.y[-1]:.2f}" for each in series if each.y[0] is not None]
    )
    return Figure(
        f"One unit's input, 15th, 50th and 85th percentile: {where}, ReLU",
        Axis("steps"),
        Axis("input of the activation"),
        series,
        "Percentiles of what one unit of the last hidden layer receives over training, first seed; the band lies "
        "between the 15th and the 85th, and is "
        f"no interval. The median goes, for {travels}.",
    )


def _cosine_figure(where: str, name: str, runs: Runs) -> Figure:
    series = []
    for arm in (NONE, BN):
        found = runs.of(arm.name, *PREPARED[name])
        series.append(band(arm.label, STYLES[arm.name], found[0]["steps"], [each["cosine"] for each in found]))
    said = listed(
        [
            f"{each.label} {each.y[0]:.2f} at the start and {each.y[-1]:.2f} at the end"
            for each in series
            if each.y[0] is not None
        ]
    )
    return Figure(
        f"Gradient before and after earlier layers move: {where}, {name}",
        Axis("steps"),
        Axis("cosine", limits=(-0.2, 1.0)),
        series,
        f"Cosine of a layer's gradient before and after the layer ahead of it makes its step, over training: {said}.",
    )


CLAIM = Claim(
    number=3,
    title="Internal covariate shift",
    statement="Batch normalization reduces internal covariate shift, and that is why networks train faster.",
    question="Does a layer's input hold still with batch norm, and is that what helps?",
    literature="Ioffe and Szegedy name the drift of a layer's inputs internal covariate shift, and its reduction as "
    "the reason for what batch norm gains. "
    "Santurkar et al. define it by the change of a layer's gradient when earlier layers move, find no reduction by "
    "batch norm, and show that a network whose "
    "shift is put back by noise trains as fast.",
    sources=[
        Source("Ioffe, Szegedy 2015, sections 1 and 4.1, figure 1", "https://arxiv.org/abs/1502.03167"),
        Source("Santurkar, Tsipras, Ilyas, Mądry 2018, sections 2.1 and 2.2", "https://arxiv.org/abs/1805.11604"),
    ],
    criterion="Holds if with batch norm (a) the moments of a hidden layer's input drift less and (b) a layer's "
    "gradient changes less when the layer ahead of it moves, "
    "in every set-up; depends if some of these hold. Whether the gain needs it is shown beside (c): batch norm with "
    "noise that restores the "
    "shift, against none.",
    data=("digits", "mnist"),
    cells=cells,
    read=read,
)
