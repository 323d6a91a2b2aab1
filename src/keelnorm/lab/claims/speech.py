"""Does batch normalization help with speech? And with a speaker that training has not heard?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import keelnorm as kn
from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import ByForm, Plan, Seeds, kind_of
from keelnorm.lab.core.seeds import generator, seed_from
from keelnorm.lab.data import Split, speakers_of, spoken
from keelnorm.lab.reading.series import bars
from keelnorm.lab.reading.verdicts import Finding, difference_findings
from keelnorm.lab.reading.wording import listed, signed
from keelnorm.lab.training.train import batches
from keelnorm.measure.page_parts import Axis, Figure, Table
from keelnorm.measure.statistics import difference, mean

ARMS = {
    "none": ("no normalization", "none"),
    "bn": ("batch norm", "bn"),
    "adapted": ("batch norm, adapted to the speaker", "adapted"),
}
CHANNELS = 32
BATCH = 32
RATE = 0.003
RANDOM = -1
"""The split that is not by speaker."""
SEEDS = Seeds(quick=3, full=6)
SPEAKER_SEEDS = ByForm(quick=1, full=3)
"""Seeds for each speaker that is held out, who is the unit."""


def network(bands: int, classes: int, *, normalized: bool) -> nn.Sequential:
    """A convolutional network over time, as a user would write it: (n, bands, frames) -> (n, classes)."""
    modules: list[nn.Module] = []
    into = bands
    for layer in range(3):
        modules.append(nn.Conv1d(into, CHANNELS, 3, stride=1 + layer % 2, padding=1, bias=not normalized))
        modules += [kn.BatchNorm1d(CHANNELS)] if normalized else []
        modules.append(nn.ReLU())
        into = CHANNELS
    return kn.Sequential(*modules, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(CHANNELS, classes))


def split_of(data: str, held_out: int, seed: int) -> Split:
    """The recordings, divided at random or by speaker, scaled by the training part."""
    found = spoken(data)
    split = found.at_random(seed) if held_out == RANDOM else found.held_out(held_out, seed)
    center, width = split.train_x.mean(), split.train_x.std()
    return split.with_inputs(lambda x: (x - center) / width)


def train_and_test(*, data: str, held_out: int, seed: int, steps: int) -> Result:
    """Train with and without batch norm, and test on what was held out; with batch norm also after adapting to it.

    Returns:
        The test accuracy of each arm in percent, and whose it is; nothing is chosen on the held-out part.
    """
    split = split_of(data, held_out, seed)
    found: dict[str, float] = {}
    for name in ("none", "bn"):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed_from(draw="initialization", data=data, held_out=held_out, seed=seed))
            model = network(split.train_x.shape[1], split.classes, normalized=name == "bn")
        optimizer = torch.optim.Adam(model.parameters(), RATE)
        order = generator(draw="order", data=data, held_out=held_out, seed=seed)
        for chosen in batches(len(split.train_y), BATCH, steps, order):
            optimizer.zero_grad()
            F.cross_entropy(model(split.train_x[chosen]), split.train_y[chosen]).backward()
            optimizer.step()
        model.eval()
        found[name] = accuracy(model, split.test_x, split.test_y)
        if name == "bn":
            adapted = copy.deepcopy(model)
            kn.adapt(adapted, [split.test_x], progress=False)
            found["adapted"] = accuracy(adapted, split.test_x, split.test_y)
    return {**found, "name": "a random part" if held_out == RANDOM else spoken(data).names[held_out]}


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent."""
    hits: float = (model(x).argmax(1) == y).float().mean().item()
    return round(100 * hits, 4)


def _sets(plan: Plan) -> list[str]:
    """Real recordings where the reader has some, and the stand-in for whoever has none."""
    return plan.data_sets("digits", "speech")


def _cell(plan: Plan, data: str, held_out: int, seed: int) -> Cell:
    steps = (120 if plan.quick else 500) if kind_of(data) == "digits" else (150 if plan.quick else 600)
    return Cell(train_and_test, {"data": data, "held_out": held_out, "seed": seed, "steps": steps}, cost=steps * 8e-3)


def _random_cells(plan: Plan, data: str) -> list[Cell]:
    return [_cell(plan, data, RANDOM, seed) for seed in SEEDS.of(plan)]


def _speaker_cells(plan: Plan, data: str) -> list[Cell]:
    return [
        _cell(plan, data, speaker, seed)
        for seed in range(SPEAKER_SEEDS.of(plan))
        for speaker in range(speakers_of(data))
    ]


def read(plan: Plan, results: Results) -> Reading:
    """What batch norm gains on a random split and on a held-out speaker, and what adapting to the speaker gains."""
    found = [Accuracies.of(plan, data, results) for data in _sets(plan)]
    words = listed([each.words() for each in found])
    parts = [(where, by_arm) for each in found for where, by_arm in each.parts().items()]
    stand_in = all(kind_of(data) == "digits" for data in _sets(plan))
    return Reading(
        f"In accuracy, {words}." + (" No recordings were given: the stand-in is made of images." if stand_in else ""),
        [finding for each in found for finding in each.findings()],
        [
            Figure(
                "Test accuracy by split",
                Axis("split", categories=[where for where, _ in parts]),
                Axis("test accuracy, %", limits=(0.0, 100.0)),
                [
                    bars(label, style, [mean(by_arm[arm]) for _, by_arm in parts])
                    for arm, (label, style) in ARMS.items()
                ],
                f"Test accuracy by split: {words}.",
                kind="bars",
            )
        ],
        [
            Table(
                "Test accuracy in percent", ["where", "arm", "accuracy"], [row for each in found for row in each.rows()]
            )
        ],
        setup=_setup(plan),
        notes=["A held-out speaker's recordings are all adapted to at once: they hold every word about as often."],
    )


@dataclass(frozen=True)
class Accuracies:
    """Test accuracies on one data set by arm: on random splits by seed, and by the speaker held out.

    Args:
        what: the data in words.
        group: what is held out.
        speakers: their names.
        mixed: on random splits.
        held_out: on each speaker, the mean over seeds.
    """

    what: str
    group: str
    speakers: Sequence[str]
    mixed: dict[str, list[float]]
    held_out: dict[str, list[float]]

    @classmethod
    def of(cls, plan: Plan, data: str, results: Results) -> Accuracies:
        """From the results.

        Raises:
            ValueError: when no random split has one, or fewer than two speakers.
        """
        speech = kind_of(data) == "speech"
        what = "spoken words" if speech else "the stand-in"
        random = [result for _, result in results.of(_random_cells(plan, data))]
        by_speaker: dict[str, list[Result]] = {}
        for _, result in results.of(_speaker_cells(plan, data)):
            by_speaker.setdefault(result["name"], []).append(result)
        if not random or len(by_speaker) < 2:
            raise ValueError(f"too few runs on {what} have a result")
        return cls(
            what,
            "a speaker" if speech else "a group of strokes",
            list(by_speaker),
            {arm: [each[arm] for each in random] for arm in ARMS},
            {arm: [sum(each[arm] for each in found) / len(found) for found in by_speaker.values()] for arm in ARMS},
        )

    def parts(self) -> dict[str, dict[str, list[float]]]:
        """The accuracies of each kind of split, by its name."""
        return {
            f"{self.what}, random split": self.mixed,
            f"{self.what}, {self.group} held out": self.held_out,
        }

    def findings(self) -> list[Finding]:
        """What batch norm gains on either split, and adapting on the one by speaker."""
        gain = {"test accuracy, batch norm − none": ("bn", "none")}
        asides = {
            "the remedy: test accuracy, adapted − batch norm": ("adapted", "bn"),
            "the remedy against none: test accuracy, adapted − none": ("adapted", "none"),
        }
        (random, mixed), (speaker, held_out) = self.parts().items()
        return [
            *difference_findings(random, mixed, gain),
            *difference_findings(speaker, held_out, gain),
            *difference_findings(speaker, held_out, asides, decisive=False),
        ]

    def words(self) -> str:
        """The accuracies on a held-out speaker."""
        none, bn, adapted = (mean(self.held_out[arm]).value for arm in ARMS)
        remedy = difference(self.held_out["adapted"], self.held_out["bn"])
        return (
            f"with {self.group} held out, {none:.1f} % without, {bn:.1f} % with batch norm and {adapted:.1f} % with "
            f"moments adapted to it ({signed(remedy, 1)}; {self.what})"
        )

    def rows(self) -> list[list[str]]:
        """The mean of each split and arm, then each speaker's."""
        return [
            *(
                [where, label, mean(by_arm[arm]).text(1)]
                for where, by_arm in self.parts().items()
                for arm, (label, _) in ARMS.items()
            ),
            *(
                [
                    f"{self.what}, held out: {name}",
                    "none / batch norm / adapted",
                    " / ".join(f"{self.held_out[arm][place]:.1f}" for arm in ARMS),
                ]
                for place, name in enumerate(self.speakers)
            ),
        ]


def _setup(plan: Plan) -> dict[str, str]:
    return {
        "Recordings": "WAV files of words by several speakers, as 24 log-mel bands and 64 frames (with --data-dir)",
        "Stand-in": "scikit-learn's digits, read as eight frames of eight bands; the groups held out are sixths of the "
        "images by the thickness of their strokes",
        "Network": f"three convolutions over time of {CHANNELS} channels with ReLU, mean over time, one linear layer",
        "Training": f"Adam at {RATE:g}, batches of {BATCH}; the same in all arms, nothing chosen on the part held out",
        "Adapted": "kn.adapt with the recordings of the part held out, without their words",
        "Unit": f"of a held-out interval: the speaker or group, each over {SPEAKER_SEEDS.of(plan)} seed(s); of a "
        f"random split: {len(SEEDS.of(plan))} seeds",
    }


CLAIM: Claim = Claim(
    number=17,
    title="Speech",
    statement="Batch normalization helps with speech.",
    question="Does batch norm gain accuracy on spoken words, and on a speaker not heard in training?",
    literature="Batch norm is common in convolutional acoustic models (Deep Speech 2 reports gains, in its recurrent "
    "layers from normalizing the input term). A new speaker shifts the features' moments; adapting only these to the "
    "speaker, without labels, is a cheap adaptation (as Li et al. 2017 do for images).",
    sources=[
        Source("Amodei et al. 2015: Deep Speech 2, section 3.2", "https://arxiv.org/abs/1512.02595"),
        Source("Li, Wang, Shi, Liu, Hou 2017: AdaBN", "https://arxiv.org/abs/1603.04779"),
        Source("Jackson et al.: Free Spoken Digit Dataset", "https://github.com/Jakobovski/free-spoken-digit-dataset"),
    ],
    criterion="Holds if the test accuracy is higher with batch norm than without, both on a random split and with a "
    "speaker held out; depends if in one of these. What adapting the moments to the speaker gains is shown beside.",
    data=("digits (a stand-in)", "speech"),
    cells=lambda plan: [
        cell for data in _sets(plan) for cell in (*_random_cells(plan, data), *_speaker_cells(plan, data))
    ],
    read=read,
)
