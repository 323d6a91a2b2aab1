"""One arm of a network in a process of its own: takes commands on stdin, answers on stdout, JSON lines.

A process for each arm makes its peak memory its own, and lets arms with different settings of the
allocator, which belong to a whole process, take turns step by step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import nn

import keelnorm as kn
from benchmarks.networks.fusing import use_keelnorm
from benchmarks.networks.networks import batch_of, build
from keelnorm.measure.disturbance import peak_bytes


def serve(config: dict[str, Any]) -> None:
    """Answer commands, the name of a mode each, until stdin ends."""
    if config["threads"] is not None:
        torch.set_num_threads(config["threads"])
    if config["pages"] == "reused" and not (reuse := kn.reuse_memory()).active:
        raise RuntimeError(reuse.reason)
    net = build(config["network"], config["size"])
    images, labels = batch_of(config["batch"], config["size"])
    if config["layers"] == "keelnorm":
        use_keelnorm(net)
    if config["layout"] == "channels_last":
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    steps = {"training": training_step(net, images, labels), "inference": inference_step(net, images)}
    _say({"baseline_bytes": peak_bytes()})
    for line in sys.stdin:
        start = perf_counter()
        steps[line.strip()]()
        _say({"seconds": perf_counter() - start, "peak_bytes": peak_bytes()})


def training_step(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """Forward, loss, backward and a step of SGD with momentum."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        net.train()
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()

    return step


def inference_step(net: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """Forward without gradients, with the running statistics."""

    def step() -> None:
        net.eval()
        with torch.no_grad():
            net(images)

    return step


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
