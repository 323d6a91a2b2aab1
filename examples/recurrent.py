"""Does batch normalization help an LSTM? On characters of real text, and on handwritten digits row by row.

Both arms have the same initial weights, batches and number of steps; each has the learning rate, out of a few, that was
best on a validation part with a seed of its own. What is printed is measured on a test part: the mean over seeds and of
the differences, seed by seed, each with its 95 % interval. Nothing is downloaded: the text is the source code of
Python's standard library, the digits are scikit-learn's.

    python examples/recurrent.py            a few minutes on one core
    python examples/recurrent.py --quick    less than 20 seconds; too short to say anything about training
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keelnorm.lab import data
from keelnorm.lab.core.seeds import generator, seed_from
from keelnorm.measure.statistics import difference, mean
from keelnorm.nn.recurrent.recurrent_layers import BatchNormLSTM

ARMS: dict[str, Callable[..., nn.Module]] = {
    "LSTM": nn.LSTM,
    "BatchNormLSTM": BatchNormLSTM,
    "input": partial(BatchNormLSTM, normalize="input"),
}
ASCII = 128


@dataclass(frozen=True)
class Size:
    """How long a run is. Rates are the learning rates to choose from; with one there is nothing to choose."""

    steps: int
    hidden: int
    rates: tuple[float, ...]
    length: int = 50  # characters in a window
    batch: int = 32


FULL = {"text": Size(400, 100, (0.01, 0.03, 0.1)), "rows": Size(400, 64, (0.01, 0.03, 0.1), batch=64)}
QUICK = {"text": Size(40, 32, (0.01,), length=25), "rows": Size(40, 32, (0.01,), batch=64)}


class Network(nn.Module):
    """An LSTM of one layer, and a linear map of its outputs."""

    def __init__(self, arm: str, features: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.lstm = ARMS[arm](features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Text:
    """The next character in the source code of Python's standard library; every tenth file for validation and test."""

    title, unit, better = "text, next character", "bits per character", "lower"
    features = classes = ASCII

    def __init__(self, seed: int, size: Size) -> None:
        self.seed, self.size = seed, size
        self.train, *self.held_out = data.characters()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        draw = generator(draw="windows", seed=self.seed, step=step)
        starts = torch.randint(len(self.train) - self.size.length, (self.size.batch,), generator=draw)
        return self.windows(self.train, starts)

    def windows(self, characters: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        taken = characters[starts[:, None] + torch.arange(self.size.length + 1)].long()
        return F.one_hot(taken[:, :-1], ASCII).float(), taken[:, 1:]

    def loss(self, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network(x).flatten(0, 1), y.flatten())

    def score(self, network: nn.Module, part: int) -> float:
        """Bits per character over windows that are spread evenly over a held-out part."""
        characters = self.held_out[part]
        starts = torch.linspace(0, len(characters) - self.size.length - 1, 400).long()
        return self.loss(network, *self.windows(characters, starts)).item() / math.log(2)


class Rows:
    """scikit-learn's digits, read row by row: eight steps of eight pixels."""

    title, unit, better = "digits, row by row", "% right", "higher"
    features, classes = 8, 10

    def __init__(self, seed: int, size: Size) -> None:
        split = data.digits(seed)
        self.seed, self.size = seed, size
        self.train = split.train_x.squeeze(1), split.train_y
        self.held_out = (split.validation_x.squeeze(1), split.validation_y), (split.test_x.squeeze(1), split.test_y)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = self.train
        chosen = torch.randint(len(x), (self.size.batch,), generator=generator(draw="rows", seed=self.seed, step=step))
        return x[chosen], y[chosen]

    def loss(self, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network(x)[:, -1], y)

    def score(self, network: nn.Module, part: int) -> float:
        x, y = self.held_out[part]
        return 100 * (network(x)[:, -1].argmax(1) == y).float().mean().item()


TASKS: dict[str, type[Text] | type[Rows]] = {"text": Text, "rows": Rows}
VALIDATION, TEST = 0, 1


def run(task: Text | Rows, arm: str, rate: float, part: int) -> float:
    """Train one network, and its score on a held-out part."""
    torch.manual_seed(seed_from(draw="weights", seed=task.seed))
    network = Network(arm, task.features, task.classes, task.size.hidden)
    optimizer = torch.optim.Adam(network.parameters(), rate)
    for step in range(task.size.steps):
        for group in optimizer.param_groups:  # falls to zero, so that the end is not a matter of luck
            group["lr"] = rate * (1 - step / task.size.steps)
        optimizer.zero_grad()
        task.loss(network, *task.batch(step)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    network.eval()
    with torch.no_grad():
        return task.score(network, part)


def compare(name: str, size: Size, seeds: int, arm: str) -> None:
    """Print what the plain LSTM and ``arm`` reach, and the difference."""
    make = TASKS[name]
    best = min if make.better == "lower" else max
    scores: dict[str, list[float]] = {}
    print(f"{make.title}: {make.unit} on the test part, {make.better} is better; seeds: {seeds}")
    for each in ("LSTM", arm):
        rate = size.rates[0]
        if len(size.rates) > 1:
            tuning = make(-1, size)  # a seed that is not among those that count
            rate = best(size.rates, key=lambda rate, each=each: run(tuning, each, rate, VALIDATION))
        scores[each] = []
        for seed in range(seeds):
            scores[each].append(run(make(seed, size), each, rate, TEST))
            print(f"{name}: {each}: seed {seed}: {scores[each][-1]:.3f}", file=sys.stderr, flush=True)
        print(f"  {each:<14}{mean(scores[each]).text(3):<26}learning rate {rate:g}")
    gap = difference(scores[arm], scores["LSTM"])
    said = "one seed says nothing" if seeds == 1 else "resolved" if gap.excludes(0) else "not resolved"
    print(f"  {'difference':<14}{gap.text(3):<26}{said}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (5)")
    parser.add_argument("--quick", action="store_true", help="small networks, few steps, no choice of learning rates")
    parser.add_argument("--only", choices=TASKS, help="one of the two tasks")
    parser.add_argument("--steps", type=int, help="training steps, in place of the size's own")
    parser.add_argument("--normalize", choices=["recurrent", "input"], default="recurrent")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (1)")
    given = parser.parse_args(arguments)
    if given.seeds < 1:
        parser.error("--seeds must be 1 or more")
    torch.set_num_threads(given.threads)
    for name, size in (QUICK if given.quick else FULL).items():
        if given.only in (None, name):
            size = replace(size, steps=given.steps or size.steps)
            compare(name, size, given.seeds, "BatchNormLSTM" if given.normalize == "recurrent" else "input")


if __name__ == "__main__":
    main()
