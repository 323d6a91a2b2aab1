"""One arm of a network in a process of its own: reads modes from stdin, answers in JSON lines on stdout.

Each arm has a process because peak memory and the allocator's settings belong to a whole process; so the arms can take
turns step by step.
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
from benchmarks.networks.network_cases import batch_of, build
from keelnorm.measure.disturbance import peak_bytes


def serve(config: dict[str, Any]) -> None:
    """Run one step for each mode that is read, until stdin ends."""
    if config["threads"] is not None:
        torch.set_num_threads(config["threads"])
    if config["pages"] == "reused" and not (reuse := kn.reuse_memory()).active:
        raise RuntimeError(reuse.reason)
    net = build(config["network"], config["size"])
    images, labels = batch_of(config["network"], config["batch"], config["size"])
    if config["layers"] == "keelnorm":
        net, _ = kn.convert(net)
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
