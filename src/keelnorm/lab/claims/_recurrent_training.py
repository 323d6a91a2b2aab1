"""Sequences, recurrent networks that read them, and their training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keelnorm.lab.core.cell import Result
from keelnorm.lab.core.seeds import generator, seed_from
from keelnorm.lab.data import characters, images
from keelnorm.lab.data.text import ASCII
from keelnorm.lab.training.train import batch_moments
from keelnorm.nn.recurrent.recurrent_layers import BatchNormLSTM

BATCH = 64
EPS = 0.1
NOISE = 0.1
WINDOW = 30
"""Characters in a window of text."""
LOOKS = 5
MOST_SIDE = 10
"""Larger images are averaged to this side before they are read pixel by pixel."""

ARMS: dict[str, tuple[str, str, Callable[..., nn.Module]]] = {
    "lstm": ("LSTM", "none", nn.LSTM),
    "bn": ("batch-normalized LSTM", "bn", BatchNormLSTM),
    "eps": (f"batch-normalized LSTM, ε = {EPS:g}", "other-1", partial(BatchNormLSTM, eps=EPS)),
    "noise": (
        f"batch-normalized LSTM, initial noise {NOISE:g}",
        "other-3",
        partial(BatchNormLSTM, initial_noise=NOISE),
    ),
    "input": ("batch norm on the input term only", "other-2", partial(BatchNormLSTM, normalize="input")),
}


@dataclass(frozen=True)
class Task:
    """One kind of sequences: its name, its arms, hidden units; steps, rates and seeds in quick and in full form."""

    words: str
    arms: tuple[str, ...]
    hidden: int
    steps: tuple[int, int]
    rates: tuple[tuple[float, ...], tuple[float, ...]]
    seeds: tuple[int, int]


REMEDIES = ("lstm", "bn", "eps", "noise", "input")
TASKS = {
    "rows": Task("rows of an image", ("lstm", "bn"), 32, (60, 150), ((0.01,), (0.01, 0.03)), (4, 8)),
    "text": Task("characters of text", ("lstm", "bn"), 64, (40, 200), ((0.01,), (0.01, 0.03)), (3, 4)),
    "pixels": Task("pixel by pixel", REMEDIES, 32, (40, 300), ((0.01,), (0.01,)), (3, 4)),
    "margin": Task("pixel by pixel with a margin", REMEDIES, 32, (40, 300), ((0.01,), (0.01,)), (3, 4)),
}


class Reader(nn.Module):
    """A recurrent layer and a linear map of its outputs."""

    def __init__(self, arm: str, features: int, hidden: int, classes: int, length: int) -> None:
        super().__init__()
        options = {} if arm == "lstm" else {"max_length": length}
        self.recurrent = ARMS[arm][2](features, hidden, batch_first=True, **options)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.recurrent(x)[0])
        return y


@dataclass(frozen=True)
class Sequences:
    """What a task reads: a batch for each step, and parts to validate and test on, each as (x, labels)."""

    draw: Callable[[int], tuple[Tensor, Tensor]]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    last_step_only: bool

    def loss(self, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The mean cross-entropy, in nats."""
        logits = network(x)
        return F.cross_entropy(logits[:, -1] if self.last_step_only else logits.flatten(0, 1), y.flatten())

    @torch.no_grad()
    def score(self, network: nn.Module, part: tuple[Tensor, Tensor]) -> float:
        """Accuracy in percent, or bits a character."""
        x, y = part
        if not self.last_step_only:
            return self.loss(network, x, y).item() / math.log(2)
        hits: float = (network(x)[:, -1].argmax(1) == y).float().mean().item()
        return 100 * hits


def sequences(task: str, data: str, seed: int) -> Sequences:
    """The sequences of a task, drawn by the seed."""
    if task == "text":
        train, *held_out = characters()

        def windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
            taken = text[starts[:, None] + torch.arange(WINDOW + 1)].long()
            return F.one_hot(taken[:, :-1], ASCII).float(), taken[:, 1:]

        def draw(step: int) -> tuple[Tensor, Tensor]:
            random = generator(draw="windows", seed=seed, step=step)
            return windows(train, torch.randint(len(train) - WINDOW, (BATCH,), generator=random))

        spread = [torch.linspace(0, len(part) - WINDOW - 1, 300).long() for part in held_out]
        return Sequences(draw, windows(held_out[0], spread[0]), windows(held_out[1], spread[1]), last_step_only=False)
    split = images(data, seed)

    def read(x: Tensor) -> Tensor:
        if task == "pixels" and x.shape[-1] > MOST_SIDE:
            x = F.adaptive_avg_pool2d(x, MOST_SIDE)  # 100 pixels of MNIST's 784
        if task == "margin":
            x = F.pad(x, (1, 1, 1, 1))  # a background that never varies is 0 after centering
        rows = x.mean(dim=1)
        return rows if task == "rows" else rows.flatten(1).unsqueeze(2)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        random = generator(draw="images", data=data, seed=seed, step=step)
        chosen = torch.randint(len(split.train_x), (BATCH,), generator=random)
        return read(split.train_x[chosen]), split.train_y[chosen]

    few = 300
    return Sequences(
        batch,
        (read(split.validation_x[:few]), split.validation_y[:few]),
        (read(split.test_x[:few]), split.test_y[:few]),
        last_step_only=True,
    )


def train_reader(*, task: str, data: str, arm: str, seed: int, rate: float, steps: int) -> Result:
    """Train one network with Adam at a rate that falls to zero, and look at it along the way.

    A training that meets a gradient that is not finite ends there: clipping turns it into weights that are no numbers.

    Returns:
        steps, validation, test, and test with the test batch's own moments; the largest norm of the gradient before
        clipping (`gradient`) and the step at which it was no longer finite (`broken`, 0 where it always was).
    """
    what = sequences(task, data, seed)
    x, y = what.test
    classes = ASCII if task == "text" else int(max(y.max(), what.validation[1].max())) + 1
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed_from(draw="initialization", task=task, data=data, seed=seed))
        network = Reader(arm, x.shape[2], TASKS[task].hidden, classes, x.shape[1])
        return _fit(network, what, rate, steps)


def _fit(network: nn.Module, what: Sequences, rate: float, steps: int) -> Result:
    optimizer = torch.optim.Adam(network.parameters(), rate)
    seen: dict[str, list[float]] = {"steps": [], "validation": [], "test": [], "test_batch": []}
    largest, broken = 0.0, 0
    for step in range(1, steps + 1):
        if not broken:
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - (step - 1) / steps)
            optimizer.zero_grad()
            what.loss(network.train(), *what.draw(step)).backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0).item()
            if math.isfinite(norm):
                largest = max(largest, norm)
                optimizer.step()
            else:
                broken = step
        if step % max(1, steps // LOOKS) == 0:
            network.eval()
            seen["steps"].append(step)
            seen["validation"].append(round(what.score(network, what.validation), 4))
            seen["test"].append(round(what.score(network, what.test), 4))
            with batch_moments(network):
                seen["test_batch"].append(round(what.score(network, what.test), 4))
    return {**seen, "gradient": float(f"{largest:.4g}"), "broken": broken}
