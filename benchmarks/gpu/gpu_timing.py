"""Timing on a GPU: CUDA graphs of calls on rotating tensors, replayed by turns. On a CPU, for trial, by the clock."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

from keelnorm.measure import timing

Step = Callable[[int], None]
"""A call on the set of tensors of this number."""
WARM_UPS = 3
MOST_COPIES = 8


def copies_for(tensor_bytes: int, device: str) -> int:
    """How many sets of tensors are rotated, so that none is still in the cache when its turn comes again."""
    if device == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MOST_COPIES, -(-3 * cache // max(tensor_bytes, 1))))


class Loop:
    """A step on every set of tensors in turn: one CUDA graph if it can be captured, else calls.

    Args:
        step: What is timed.
        copies: Sets of tensors.
        device: "cuda" or "cpu".
    """

    def __init__(self, step: Step, copies: int, device: str) -> None:
        self._step, self._copies, self._device = step, copies, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self.why_no_graph: str | None = None
        for _ in range(WARM_UPS):
            self._calls()
        if device == "cpu":
            return
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._calls()
            self._graph = graph
        except RuntimeError as error:
            self.why_no_graph = str(error).partition("\n")[0]
            torch.cuda.synchronize()
        self.run()

    def _calls(self) -> None:
        for number in range(self._copies):
            self._step(number)

    def run(self) -> float:
        """Microseconds of one step."""
        if self._device == "cpu":
            start = perf_counter()
            self._calls()
            return (perf_counter() - start) * 1e6 / self._copies
        start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start_event.record()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._calls()
        end_event.record()
        end_event.synchronize()
        return float(start_event.elapsed_time(end_event)) * 1e3 / self._copies


def by_turns(loops: dict[str, Loop], rounds: int) -> dict[str, list[float]]:
    """Microseconds of every loop in every round, in which each takes its turn."""
    return timing.by_turns({name: loop.run for name, loop in loops.items()}, rounds)
