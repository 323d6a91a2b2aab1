"""Does batch normalization help recurrent networks?

An LSTM against the batch-normalized LSTM of Cooijmans et al. on three kinds of sequences: rows of an image, characters
of text, and the pixels of an image one by one, where some steps hardly vary and batch normalization fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keelnorm.lab.claims._recurrent_training import ARMS, BATCH, EPS, TASKS, WINDOW, train_reader
from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, EarlierCriterion, Reading, Source
from keelnorm.lab.core.plan import Plan, Seeds, kind_of, seeds_text
from keelnorm.lab.reading.best_rates import best_rate
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.series import band
from keelnorm.lab.reading.verdicts import Finding, difference_finding, difference_findings
from keelnorm.lab.reading.wording import listed
from keelnorm.measure.page_parts import Axis, Figure, Table
from keelnorm.measure.statistics import mean

LONG_STEPS = 500
"""Training steps for images that are larger than digits, pixel by pixel."""
Condition = tuple[str, str]
"""A task and a data set."""


def _conditions(plan: Plan) -> list[Condition]:
    found = []
    for task in TASKS:
        if task == "text":
            sets = ["text"]
        elif task == "margin":
            sets = ["digits"]  # larger images have one of their own
        else:
            sets = plan.data_sets("digits", *(["mnist"] if task == "rows" or not plan.quick else []))
        found += [(task, data) for data in sets]
    return found


def _arms(plan: Plan, condition: Condition) -> tuple[str, ...]:
    """The remedies are tried where the failure is, and where there is time for them."""
    arms = TASKS[condition[0]].arms
    return arms[:2] if plan.quick or condition == ("pixels", "digits") else arms


def _form(plan: Plan) -> int:
    """The place of the plan's form in what a task has for both."""
    return 0 if plan.quick else 1


def _cells(plan: Plan, condition: Condition) -> Sequence[Cell]:
    task, data = condition
    what = TASKS[task]
    long = kind_of(data) == "mnist" and task == "pixels"
    steps = LONG_STEPS if long else what.steps[_form(plan)]
    step = {"lstm": 3e-3, "bn": 3.5e-2, "eps": 3e-2, "noise": 3e-2, "input": 1.3e-2}
    of_task = {"rows": 0.15, "text": 0.5, "pixels": 1.5 if long else 1.0, "margin": 1.5}
    return [
        Cell(
            train_reader,
            {"task": task, "data": data, "arm": arm, "seed": seed, "rate": rate, "steps": steps},
            cost=step[arm] * of_task[task] * steps,
        )
        for seed in Seeds(*what.seeds).of(plan)
        for arm in _arms(plan, condition)
        for rate in what.rates[_form(plan)]
    ]


@dataclass(frozen=True)
class Compared:
    """The arms under one condition, each at its best rate.

    Args:
        task: what is read.
        where: the condition in words.
        rates: the best rate of each arm.
        runs: the results at it, by seed.
    """

    task: str
    where: str
    rates: dict[str, float]
    runs: dict[str, list[Result]]

    @classmethod
    def of(cls, plan: Plan, results: Results, condition: Condition) -> Compared:
        """From the results of all rates."""
        task, data = condition
        runs = Runs(_cells(plan, condition), results, arms=("arm", "rate"))
        rates, at_best = {}, {}
        for arm in _arms(plan, condition):
            tried = {rate: runs.of((arm, rate)) for rate in TASKS[task].rates[_form(plan)]}
            rates[arm] = best_rate(tried, lambda run: run["validation"][-1], lower_is_better=task == "text")
            at_best[arm] = tried[rates[arm]]
        words = TASKS[task].words
        return cls(task, words if task == "text" else f"{words}, {kind_of(data)}", rates, at_best)

    @property
    def in_bits(self) -> bool:
        """Whether a score is in bits a character, where less is better, and not an accuracy."""
        return self.task == "text"

    def at_end(self, arm: str, curve: str = "test") -> list[float]:
        """The last value of a curve, by seed."""
        return [run[curve][-1] for run in self.runs[arm]]

    def findings(self) -> list[Finding]:
        """What batch norm gains, and what the remedies repair."""
        lstm, bn = self.at_end("lstm"), self.at_end("bn")
        if self.in_bits:
            quantity = "bits a character, LSTM − batch-normalized LSTM"
            return [difference_finding(quantity, self.where, lstm, bn, unit="bits", digits=3)]
        found = [difference_finding("test accuracy, batch-normalized LSTM − LSTM", self.where, bn, lstm)]
        if self.task == "rows":
            return found
        test = {arm: self.at_end(arm) for arm in self.runs} | {"batch": self.at_end("bn", "test_batch")}
        pairs = {}
        for arm in [arm for arm in self.runs if arm not in ("lstm", "bn")]:
            pairs[f"the remedy: test accuracy, {ARMS[arm][0]} − batch-normalized LSTM"] = arm, "bn"
            pairs[f"what is left: test accuracy, {ARMS[arm][0]} − LSTM"] = arm, "lstm"
        pairs["batch-normalized LSTM, with the test batch's own moments − with running statistics"] = "batch", "bn"
        return found + difference_findings(self.where, test, pairs, decisive=False)

    def words(self) -> str:
        """From which score to which; and what the remedies reach, where they were tried."""
        digits, unit = (2, "bits") if self.in_bits else (1, "%")
        score = {arm: mean(self.at_end(arm)).value for arm in self.runs}
        said = f"{score['lstm']:.{digits}f} → {score['bn']:.{digits}f} {unit} ({self.where})"
        if "noise" in score:
            said += f", {score['noise']:.1f} % with initial noise, {score['eps']:.1f} % with ε = {EPS:g}"
        return said

    def figure(self) -> Figure:
        """Test scores over training."""
        series = []
        for arm, runs in self.runs.items():
            label, style, _ = ARMS[arm]
            steps, own = runs[0]["steps"], [run["test_batch"] for run in runs]
            series.append(band(f"{label}, rate {self.rates[arm]:g}", style, steps, [run["test"] for run in runs]))
            if arm == "bn":
                series.append(band(f"{label}, batch's moments", style, steps, own, faint=True))
        return Figure(
            f"Test over training: {self.where}",
            Axis("steps"),
            Axis("bits a character" if self.in_bits else "test accuracy, %"),
            series,
            f"{'Bits a character' if self.in_bits else 'Accuracy'} on test data over training steps, {self.where}: "
            f"{self.words()}.",
        )

    def row(self, arm: str) -> list[str]:
        """A row of the table."""
        digits = 3 if self.in_bits else 1
        runs = self.runs[arm]
        return [
            self.where,
            ARMS[arm][0],
            f"{self.rates[arm]:g}",
            mean(self.at_end(arm)).text(digits),
            mean(self.at_end(arm, "test_batch")).text(digits),
            f"{max(run['gradient'] for run in runs):.2g}",
            f"{sum(run['broken'] > 0 for run in runs)} of {len(runs)}",
        ]


def read(plan: Plan, results: Results) -> Reading:
    """From an LSTM to a batch-normalized one, by task."""
    compared = [Compared.of(plan, results, condition) for condition in _conditions(plan)]
    table = Table(
        "At the end of training, in percent or bits a character: with running statistics, and with the test "
        "batch's own; the largest norm of a gradient, and how many runs ended at one that was not finite",
        ["where", "arm", "rate", "running", "the batch's own", "largest gradient", "not finite"],
        [each.row(arm) for each in compared for arm in each.runs],
    )
    too_short = "Pixel by pixel the quick form is too short for either network to learn; the full one tells."
    return Reading(
        f"From an LSTM to a batch-normalized one: {listed([each.words() for each in compared])}.",
        [finding for each in compared for finding in each.findings()],
        [each.figure() for each in compared],
        [table],
        setup=_setup(plan),
        notes=[
            *([too_short] if plan.quick else []),
            "Border pixels are the same in almost every image. At such a step the states of a batch are all alike, and "
            "the gradient is multiplied by γ/√ε, at first 32: over a border of some dozen steps it outgrows the "
            "numbers, and where it does not, clipping leaves its rounding errors to be followed. Noise in the initial "
            "state makes the states differ; a large ε bounds the factor (ε = 0.1: 0.3). The running statistics of such "
            "a step are far from those of the next batch too, which the column with the batch's own moments shows. On "
            "8 × 8 digits only few pixels never vary, and the failure is small or absent.",
        ],
    )


def _setup(plan: Plan) -> dict[str, str]:
    form = _form(plan)
    steps = ", ".join(f"{task.steps[form]} steps for {task.words}" for task in TASKS.values())
    rates = "; ".join(f"{', '.join(f'{r:g}' for r in task.rates[form])} for {task.words}" for task in TASKS.values())
    return {
        "Networks": "one recurrent layer (64 units for text, 32 for images) and a linear layer; kn.BatchNormLSTM "
        "normalizes the input term, the recurrent term and the cell with moments of their own for each step",
        "Rows": "an image row by row, classified at the end",
        "Text": f"the source code of Python's standard library, the next character in windows of {WINDOW}; files are "
        "held out",
        "Pixels": "an image pixel by pixel, 64 steps (larger images are averaged to 10 × 10: 100); with a "
        "margin of one pixel around, as larger images have: 100 steps",
        "Training": f"Adam, rate falling to zero, clipped gradients, batches of {BATCH}; {steps} ({LONG_STEPS} for "
        "larger images)",
        "Learning rate": f"of {rates}; where there are several, the one with the best validation score for each arm",
        "Seeds": seeds_text(Seeds(quick=3, full=5).of(plan)),
    }


CLAIM: Claim = Claim(
    number=14,
    title="Recurrent networks",
    statement="Batch normalization helps recurrent networks.",
    question="Does a batch-normalized LSTM learn better than an LSTM?",
    literature="Laurent et al. found no gain from normalizing the recurrent term, Cooijmans et al. a clear one with "
    "moments of each step's own and a small initial γ, on text and on MNIST pixel by pixel, to whose inputs they add "
    "noise because the first pixels do not vary. Layer norm has largely replaced it there.",
    sources=[
        Source("Cooijmans, Ballas, Laurent, Gülçehre, Courville 2017", "https://arxiv.org/abs/1603.09025"),
        Source("Laurent, Pereyra, Brakel, Zhang, Bengio 2015", "https://arxiv.org/abs/1510.01378"),
        Source("Ba, Kiros, Hinton 2016: layer normalization", "https://arxiv.org/abs/1607.06450"),
    ],
    criterion="Holds if, on rows, text and pixels with and without a margin, the batch-normalized LSTM is better than "
    "the LSTM (each interval above 0); depends if on some. What a larger ε, noise in the initial state and normalizing "
    "the input term alone repair is shown beside.",
    earlier=(
        EarlierCriterion(
            "2026-11-27",
            "Holds if, on rows, text and pixels, the batch-normalized LSTM is better than the LSTM (each interval "
            "above 0); depends if on some. What a larger ε and normalizing the input term alone repair is shown "
            "beside.",
            "The failure that the literature reports was not there on plain digits; pixels with a margin, where "
            "sequences begin alike, were added, and initial noise as a remedy.",
        ),
    ),
    data=("digits", "text", "mnist"),
    cells=lambda plan: [cell for condition in _conditions(plan) for cell in _cells(plan, condition)],
    read=read,
)
