"""A whole training step of a network on a GPU: eager, torch.compile, and with keelnorm's layers; time and memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import nn

import keelnorm as kn
from benchmarks.networks.networks import batch_of, build, roundings
from keelnorm.bench.results import NetworkRow
from keelnorm.measure.timing import ratio, spread, turns

ARMS = ("eager", "keelnorm", "compile", "keelnorm compiled")
WARM_UPS = 3


@dataclass
class Trainer:
    """A network and its optimizer: a step is forward, backward and update, under autocast to bfloat16."""

    network: Callable[..., torch.Tensor]
    optimizer: torch.optim.Optimizer
    images: torch.Tensor
    labels: torch.Tensor
    device: str

    def step(self) -> float:
        """The loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16):
            loss = nn.functional.cross_entropy(self.network(self.images), self.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return float(loss.detach())

    def timed(self) -> float:
        """Milliseconds of a step."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = perf_counter()
        self.step()  # reading the loss waits for the device
        return (perf_counter() - start) * 1e3


def trainer(arm: str, network: str, batch: int, size: int, device: str) -> Trainer:
    """One arm, from the same weights."""
    made = build(network, size).to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if arm.startswith("keelnorm"):
        made, _ = kn.convert(made)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.01, momentum=0.9)
    images, labels = batch_of(batch, size)
    run = torch.compile(made) if arm in ("compile", "keelnorm compiled") else made
    images = images.to(device=device, memory_format=torch.channels_last)
    return Trainer(run, optimizer, images, labels.to(device), device)


def run_network(
    network: str, batch: int, size: int, device: str, rounds: int, arms: Sequence[str] = ARMS
) -> list[NetworkRow]:
    """Every arm's steps by turns. The first losses of all arms must agree with what eager's may be."""
    rows = {arm: NetworkRow(network, arm, arm, "channels_last", "fresh", "training", batch, size) for arm in arms}
    ready: dict[str, Trainer] = {}
    right: list[float] = []
    losses: dict[str, list[float]] = {}
    for arm, row in rows.items():
        try:
            ready[arm] = trainer(arm, network, batch, size, device)
            losses[arm] = [ready[arm].step() for _ in range(WARM_UPS)]
            with _memory(row, device):
                ready[arm].step()
            if arm == "eager":
                right = first_losses(network, batch, size, device)
            if right:
                row.error = disagreement(losses[arm], right)
        except Exception as error:  # costs this arm's numbers, not the run
            row.error = f"{type(error).__name__}: {error}"[:300]
        if row.error is not None:
            ready.pop(arm, None)
    for order in turns(tuple(ready), rounds):
        for arm in order:
            rows[arm].samples_ms.append(round(ready[arm].timed(), 3))
    for arm in ready:
        row = rows[arm]
        row.step_ms, row.spread = statistics.median(row.samples_ms), spread(row.samples_ms)
        row.ratios = {other: ratio(row.samples_ms, rows[other].samples_ms) for other in ready if other != arm}
    return list(rows.values())


def first_losses(network: str, batch: int, size: int, device: str) -> list[float]:
    """Eager's first loss, for the images and for roundings of them to bfloat16."""
    made = trainer("eager", network, batch, size, device)
    found = []
    for images in roundings(made.images, torch.finfo(torch.bfloat16).eps / 2):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            found.append(float(nn.functional.cross_entropy(made.network(images), made.labels)))
    return found


def disagreement(losses: Sequence[float], right: Sequence[float]) -> str | None:
    """Why the first loss is none that eager's could be, or a later one is no number; None where all is well.

    Eager's first losses for roundings of the images say how well the network is conditioned: one may lie outside their
    range by its width, and by a rounding of the loss itself. Later losses drift apart by themselves.
    """
    low, high = min(right), max(right)
    room = high - low + torch.finfo(torch.bfloat16).eps * abs(right[0])
    if low - room <= losses[0] <= high + room and all(map(math.isfinite, losses)):
        return None
    here = ", ".join(f"{loss:.4f}" for loss in losses)
    return f"the first losses are {here}; eager's first is {low:.4f} to {high:.4f} for roundings of the images"


class _memory(nullcontext[None]):  # noqa: N801 - reads as a verb
    """Writes the most memory that was in use inside into the row, beyond what was there before."""

    def __init__(self, row: NetworkRow, device: str) -> None:
        super().__init__()
        self._row, self._on_gpu = row, device == "cuda"

    def __enter__(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
            self._row.baseline_bytes = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            assert self._row.baseline_bytes is not None
            self._row.peak_bytes = torch.cuda.max_memory_allocated() - self._row.baseline_bytes
