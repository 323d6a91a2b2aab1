"""Time and memory of a whole training step on a GPU: eager, torch.compile, and converted by kn.convert."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import nn

import keelnorm as kn
from benchmarks.networks.network_cases import batch_of, build, roundings
from keelnorm.bench.results import NetworkRow
from keelnorm.measure.timing import by_turns, median_ratio, spread

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
        loss.backward()
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
    images, labels = batch_of(network, batch, size)
    run = torch.compile(made) if arm in ("compile", "keelnorm compiled") else made
    images = images.to(device=device, memory_format=torch.channels_last)
    return Trainer(run, optimizer, images, labels.to(device), device)


def run_network(
    network: str, batch: int, size: int, device: str, rounds: int, arms: Sequence[str] = ARMS
) -> list[NetworkRow]:
    """Time the steps of every arm by turns, if its first losses agree with eager's."""
    setting = "channels_last", "fresh"
    rows = {arm: NetworkRow(network, " ".join((arm, *setting)), arm, *setting, "training", batch, size) for arm in arms}
    ready: dict[str, Trainer] = {}
    right: list[float] = []
    losses: dict[str, list[float]] = {}
    for arm, row in rows.items():
        try:
            ready[arm] = trainer(arm, network, batch, size, device)
            losses[arm] = [ready[arm].step() for _ in range(WARM_UPS)]
            with _record_memory(row, device):
                ready[arm].step()
            if arm == "eager":
                right = first_losses(network, batch, size, device)
            if right:
                row.error = disagreement(losses[arm], right)
        except Exception as error:  # costs this arm's numbers, not the run
            row.error = f"{type(error).__name__}: {error}"[:300]
        if row.error is not None:
            ready.pop(arm, None)
    taken = by_turns({arm: each.timed for arm, each in ready.items()}, rounds)
    for arm, samples in taken.items():
        row = rows[arm]
        row.samples_ms = [round(sample, 3) for sample in samples]
        row.step_ms, row.spread = statistics.median(row.samples_ms), spread(row.samples_ms)
        row.ratios = {rows[other].arm: median_ratio(samples, taken[other]) for other in taken if other != arm}
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
    """Say why the first loss cannot be eager's, or a later one is not finite; None if neither is so.

    Eager's first losses for roundings of the images show how well the network is conditioned: the loss may lie outside
    their range by its width plus a rounding of the loss itself. Later losses drift apart in any case.
    """
    low, high = min(right), max(right)
    room = high - low + torch.finfo(torch.bfloat16).eps * abs(right[0])
    if low - room <= losses[0] <= high + room and all(map(math.isfinite, losses)):
        return None
    here = ", ".join(f"{loss:.4f}" for loss in losses)
    return f"the first losses are {here}; eager's first is {low:.4f} to {high:.4f} for roundings of the images"


@contextmanager
def _record_memory(row: NetworkRow, device: str) -> Iterator[None]:
    """Write the peak memory inside, beyond what was in use before, into the row."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    row.baseline_bytes = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield
    row.peak_bytes = torch.cuda.max_memory_allocated() - row.baseline_bytes
