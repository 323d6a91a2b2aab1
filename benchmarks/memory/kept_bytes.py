"""The bytes that a model keeps between forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import keelnorm as kn
from benchmarks.architectures import Architecture
from benchmarks.memory.memory_results import CONVERTED, EAGER, SAVED, KeptBytes
from benchmarks.training_steps import gradient_step
from keelnorm.surgery.observation.nested_tensors import tensors_in

#: Steps of a converted model in which its layers learn what follows them.
LEARNING = 2


def count_bytes(one: Architecture, samples: int) -> KeptBytes:
    """Count what eager, converted and save_memory keep for the backward, in a step as a user runs it.

    `kn.kept_memory` says what autograd saves. The allocator's own account is stored beside it: it knows nothing of
    autograd and of recipes, and would show a tensor that something else holds.

    Args:
        one: The architecture.
        samples: Samples in the batch.
    """
    x = one.batch(samples)
    model = one.build().train()
    kept = {EAGER: saved_bytes(model, x)}
    alive = {EAGER: alive_bytes(model, x)}
    model = learned(model, x)
    kept |= {CONVERTED: saved_bytes(model, x), SAVED: saved_bytes(model, x, save_memory=True)}
    alive[CONVERTED] = alive_bytes(model, x)
    with kn.save_memory(model):
        alive[SAVED] = alive_bytes(model, x)
    return KeptBytes(samples, kept, alive)


def learned(model: nn.Module, x: Tensor) -> nn.Module:
    """Convert a model, and take steps in which its layers learn what follows them."""
    model, _ = kn.convert(model)
    step = gradient_step(model, x)
    for _ in range(LEARNING):
        step()
    return model


def saved_bytes(model: nn.Module, x: Tensor, *, save_memory: bool = False) -> int:
    """Bytes of the distinct storages that autograd saves, without parameters, buffers and input."""
    summary = kn.kept_memory(model, x).summary
    return int(1e6 * summary["with save_memory" if save_memory else "kept MB"] + 0.5)


def alive_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that torch's allocator handed out during a forward and that are still in use, without the outputs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        y: Any = model(x)
    outputs = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(y)}
    return int(sum(event.self_cpu_memory_usage for event in profile.events())) - sum(outputs.values())
