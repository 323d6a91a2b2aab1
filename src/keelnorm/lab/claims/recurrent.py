"""Does batch normalization help recurrent networks?

An LSTM against the batch-normalized LSTM of Cooijmans et al. on three kinds of sequences: rows of an image, characters
of text, and the pixels of an image one by one, where some steps hardly vary and batch normalization fails.
"""

from __future__ import annotations

from collections.abc import Sequence

from keelnorm.lab.claims._sequences import ARMS, BATCH, EPS, TASKS, WINDOW, trained
from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan, kind_of, seeds_text
from keelnorm.lab.reading.figures import Axis, Figure, Table
from keelnorm.lab.reading.results_by_arm import Runs, band
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.lab.reading.wording import listed
from keelnorm.measure.statistics import difference, mean

LONG_STEPS = 500
"""Training steps for images that are larger than digits, pixel by pixel."""


def cells(plan: Plan) -> Sequence[Cell]:
    return [cell for task, data in _conditions(plan) for cell in _cells(plan, task, data)]


def _conditions(plan: Plan) -> list[tuple[str, str]]:
    found = []
    for task in TASKS:
        if task == "text":
            sets = ["text"]
        elif task == "margin":
            sets = ["digits"]  # larger images have one of their own
        else:
            sets = plan.sets("digits", *(["mnist"] if task == "rows" or not plan.quick else []))
        found += [(task, data) for data in sets]
    return found


def _arms(plan: Plan, task: str, data: str) -> tuple[str, ...]:
    """The remedies are tried where the failure is, and where there is time for them."""
    plain = plan.quick or (task, data) == ("pixels", "digits")
    return TASKS[task].arms[:2] if plain else TASKS[task].arms


def _cells(plan: Plan, task: str, data: str) -> Sequence[Cell]:
    what = TASKS[task]
    form = 0 if plan.quick else 1
    long = kind_of(data) == "mnist" and task == "pixels"
    steps = LONG_STEPS if long else what.steps[form]
    step = {"lstm": 3e-3, "bn": 3.5e-2, "eps": 3e-2, "noise": 3e-2, "input": 1.3e-2}
    of_task = {"rows": 0.15, "text": 0.5, "pixels": 1.5 if long else 1.0, "margin": 1.5}
    return [
        Cell(
            trained,
            {"task": task, "data": data, "arm": arm, "seed": seed, "rate": rate, "steps": steps},
            cost=step[arm] * of_task[task] * steps,
        )
        for seed in plan.seed_range(quick=what.seeds[0], full=what.seeds[1])
        for arm in _arms(plan, task, data)
        for rate in what.rates[form]
    ]


def _repaired(test: dict[str, list[float]]) -> str:
    """What the remedies reach, where they were tried."""
    if "noise" not in test:
        return ""
    return f", {mean(test['noise']).value:.1f} % with initial noise, {mean(test['eps']).value:.1f} % with ε = {EPS:g}"


def read(plan: Plan, results: Results) -> Reading:
    findings, figures, rows, words, notes = [], [], [], [], []
    form = 0 if plan.quick else 1
    for task, data in _conditions(plan):
        what = TASKS[task]
        runs = Runs(_cells(plan, task, data), results, arms=("arm", "rate"))
        where = what.words if task == "text" else f"{what.words}, {kind_of(data)}"
        lower = task == "text"
        best: dict[str, tuple[float, list[Result]]] = {}
        for arm in _arms(plan, task, data):
            tried = {rate: runs.of((arm, rate)) for rate in what.rates[form]}
            validation = {rate: mean([h["validation"][-1] for h in each]).value for rate, each in tried.items()}
            rate = (min if lower else max)(validation, key=lambda each, found=validation: found[each])  # type: ignore[misc]
            best[arm] = rate, tried[rate]
        test = {arm: [history["test"][-1] for history in histories] for arm, (_, histories) in best.items()}
        # What is better is positive, for bits too.
        gain = difference(test["lstm"], test["bn"]) if lower else difference(test["bn"], test["lstm"])
        digits = 3 if lower else 1
        quantity = (
            "bits a character, LSTM − batch-normalized LSTM" if lower else "test accuracy, batch-normalized LSTM − LSTM"
        )
        findings.append(Finding(quantity, where, gain, 0.0, unit=what.unit, digits=digits))
        if task in ("pixels", "margin"):
            for arm in _arms(plan, task, data)[2:]:
                repaired = difference(test[arm], test["bn"])
                findings.append(
                    Finding(
                        f"the remedy: test accuracy, {ARMS[arm][0]} − batch-normalized LSTM",
                        where,
                        repaired,
                        0.0,
                        decisive=False,
                    )
                )
                findings.append(
                    Finding(
                        f"what is left: test accuracy, {ARMS[arm][0]} − LSTM",
                        where,
                        difference(test[arm], test["lstm"]),
                        0.0,
                        decisive=False,
                    )
                )
            own = [history["test_batch"][-1] for history in best["bn"][1]]
            findings.append(
                Finding(
                    "batch-normalized LSTM, with the test batch's own moments − with running ones",
                    where,
                    difference(own, test["bn"]),
                    0.0,
                    decisive=False,
                )
            )
        words.append(
            f"{mean(test['lstm']).value:.{2 if lower else 1}f} → {mean(test['bn']).value:.{2 if lower else 1}f} "
            f"{'bits' if lower else '%'} ({where})" + _repaired(test)
        )
        series = []
        for arm, (rate, histories) in best.items():
            label, style, _ = ARMS[arm]
            series.append(band(f"{label}, rate {rate:g}", style, histories[0]["steps"], [h["test"] for h in histories]))
            if arm == "bn":
                series.append(
                    band(
                        f"{label}, batch's moments",
                        style,
                        histories[0]["steps"],
                        [h["test_batch"] for h in histories],
                        faint=True,
                    )
                )
            rows.append(
                [
                    where,
                    label,
                    f"{rate:g}",
                    mean(test[arm]).text(digits),
                    mean([h["test_batch"][-1] for h in histories]).text(digits),
                    f"{max(h['gradient'] for h in histories):.2g}",
                    f"{sum(h['broken'] > 0 for h in histories)} of {len(histories)}",
                ]
            )
            rates = what.rates[form]
            if len(rates) > 2 and rate in (rates[0], rates[-1]):
                notes.append(f"{where}: the best rate of {label}, {rate:g}, lies at the edge of the grid.")
        figures.append(
            Figure(
                f"Test over training: {where}",
                Axis("steps"),
                Axis("bits a character" if lower else "test accuracy, %"),
                series,
                f"{'Bits a character' if lower else 'Accuracy'} on test data over training steps, {where}: "
                f"{words[-1]}.",
            )
        )
    return Reading(
        f"From an LSTM to a batch-normalized one: {listed(words)}.",
        findings,
        figures,
        [
            Table(
                "At the end of training, in percent or bits a character: with running statistics, and with the test "
                "batch's own; the largest norm of a gradient, and how many runs ended at one that was not finite",
                ["where", "arm", "rate", "running", "the batch's own", "largest gradient", "not finite"],
                rows,
            )
        ],
        setup=[
            (
                "Networks",
                "one recurrent layer (64 units for text, 32 for images) and a linear layer; kn.BatchNormLSTM "
                "normalizes the input term, the "
                "recurrent term and the cell with moments of their own for each step",
            ),
            ("Rows", "an image row by row, classified at the end"),
            (
                "Text",
                f"the source code of Python's standard library, the next character in windows of {WINDOW}; files are "
                f"held out",
            ),
            (
                "Pixels",
                "an image pixel by pixel, 64 steps (larger images are averaged to 10 × 10: 100); with a "
                "margin of one pixel around, as larger images have: 100 steps",
            ),
            (
                "Training",
                f"Adam, rate falling to zero, clipped gradients, batches of {BATCH}; "
                + ", ".join(f"{TASKS[task].steps[form]} steps for {TASKS[task].words}" for task in TASKS)
                + f" ({LONG_STEPS} for larger images)",
            ),
            (
                "Learning rate",
                "of "
                + "; ".join(f"{', '.join(f'{r:g}' for r in TASKS[t].rates[form])} for {TASKS[t].words}" for t in TASKS)
                + "; where there are several, the one with the best validation score for each arm",
            ),
            ("Seeds", seeds_text(plan.seed_range(quick=3, full=5))),
        ],
        notes=[
            *notes,
            *(
                ["Pixel by pixel the quick form is too short for either network to learn; the full one tells."]
                if plan.quick
                else []
            ),
            "Border pixels are the same in almost every image. At such a step the states of a batch are all alike, and "
            "the gradient is multiplied by γ/√ε, at first 32: over a border of some dozen steps it outgrows the "
            "numbers, and where it does not, clipping leaves its rounding errors to be followed. Noise in the initial "
            "state makes the states differ; a large ε bounds the factor (ε = 0.1: 0.3). The running statistics of such "
            "a step are far from those of the next batch too, which the column with the batch's own moments shows. On "
            "8 × 8 digits only few pixels never vary, and the failure is small or absent.",
        ],
    )


CLAIM = Claim(
    number=14,
    title="Recurrent networks",
    statement="Batch normalization helps recurrent networks.",
    question="Does a batch-normalized LSTM learn better than an LSTM?",
    literature="Laurent et al. found no gain from normalizing the recurrent term, Cooijmans et al. a clear one with "
    "moments of each step's own and a "
    "small initial γ, on text and on MNIST pixel by pixel, to whose inputs they add noise because the first pixels "
    "do not vary. Layer norm has "
    "largely replaced it there.",
    sources=[
        Source("Cooijmans, Ballas, Laurent, Gülçehre, Courville 2017", "https://arxiv.org/abs/1603.09025"),
        Source("Laurent, Pereyra, Brakel, Zhang, Bengio 2015", "https://arxiv.org/abs/1510.01378"),
        Source("Ba, Kiros, Hinton 2016: layer normalization", "https://arxiv.org/abs/1607.06450"),
    ],
    criterion="Holds if, on rows, text and pixels with and without a margin, the batch-normalized LSTM is better than "
    "the LSTM (each interval above 0); depends if on some. What a larger ε, noise in the initial state and normalizing "
    "the input term alone repair is shown beside.",
    data=("digits", "text", "mnist"),
    cells=cells,
    read=read,
)
