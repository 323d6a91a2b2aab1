"""Train a network for some steps and report the peaks of the process, which has to be one of its own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

import keelnorm as kn
from benchmarks.memory.memory_results import CONVERTED, EAGER, SAVED
from benchmarks.networks.arm_worker import training_step
from benchmarks.networks.network_cases import batch_of, build
from keelnorm.bench.peers import CannotError
from keelnorm.measure.disturbance import peak_bytes, reset_peak

ARMS = (EAGER, CONVERTED, SAVED)


@dataclass
class TrainingRun:
    """What a run of some steps found.

    Args:
        before: Bytes that were resident before the first step: interpreter, torch, model and images.
        peaks: The most that was resident in each step, or up to its end where a peak can't be reset.
        digest: Of the model's parameters and buffers after the last step.
    """

    before: int
    peaks: list[int]
    digest: str


def train(network: str, arm: str, batch: int, size: int, steps: int) -> TrainingRun:
    """Train from the beginning: a converted model's layers learn in the first step what follows them.

    Args:
        network: One of `network_cases.NETWORKS`.
        arm: One of `ARMS`.
        batch: Images.
        size: Their height and width.
        steps: Steps of SGD with momentum.

    Raises:
        CannotError: The system does not tell a process's peak.
    """
    net = build(network, size)
    images, labels = batch_of(network, batch, size)
    if arm != EAGER:
        net, _ = kn.convert(net)
    if arm == SAVED:
        kn.save_memory(net)
    step = training_step(net, images, labels)
    reset_peak()
    before, peaks = _peak(), []
    for _ in range(steps):
        reset_peak()
        step()
        peaks.append(_peak())
    return TrainingRun(before, peaks, digest_of(net))


def digest_of(model: nn.Module) -> str:
    """A digest of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _peak() -> int:
    found = peak_bytes()
    if found is None:
        raise CannotError("the system does not tell the peak memory of a process")
    return found
