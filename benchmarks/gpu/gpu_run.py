"""Batch normalization on a GPU against torch's: eager with and without cuDNN, torch.compile, ReLU alone, and a copy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from time import monotonic

import torch
from torch import Tensor

from benchmarks.gpu.gpu_timing import Loop, by_turns, copies_for
from keelnorm.bench import correctness
from keelnorm.bench.cases import Case, least_bytes
from keelnorm.bench.definition import Quantity
from keelnorm.bench.peers import PEERS, Built, Peer
from keelnorm.bench.problem import Problem, make_problem
from keelnorm.bench.results import Row, blank_row
from keelnorm.measure.timing import median_ratio, spread

PARTS = ("forward", "both")
MODES = ("forward", "backward", "both")


def _without_cudnn() -> AbstractContextManager[object]:
    return torch.backends.cudnn.flags(enabled=False)


def _tuned(problem: Problem) -> Built:
    """torch.compile with its search over kernels."""
    torch._dynamo.reset()
    eager = PEERS["eager"].build(problem)
    return Built(torch.compile(eager.call, dynamic=False, mode="max-autotune-no-cudagraphs"), eager.norm)


def _operators_compiled(problem: Problem) -> Built:
    """torch.compile of keelnorm's layer with its operators kept, as `kn.kernels.use("triton")` has it."""
    import keelnorm as kn

    torch._dynamo.reset()
    layer = PEERS["keelnorm"].build(problem)
    compiled = torch.compile(layer.call, dynamic=False)

    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        with kn.kernels.use("triton"):
            return compiled(x, residual)

    return Built(call, layer.norm)


@dataclass(frozen=True)
class GpuPeer:
    """A peer, and the context that its calls are built in."""

    peer: Peer
    context: Callable[[], AbstractContextManager[object]] = nullcontext


GPU_PEERS = {
    "keelnorm": GpuPeer(PEERS["keelnorm"]),
    "eager": GpuPeer(replace(PEERS["eager"], summary="torch.nn; cuDNN where torch chooses it")),
    "native": GpuPeer(replace(PEERS["eager"], name="native", summary="torch.nn without cuDNN"), _without_cudnn),
    "compile": GpuPeer(PEERS["compile"]),
    "max-autotune": GpuPeer(Peer("max-autotune", "torch.compile with its search over kernels", _tuned)),
    "operators": GpuPeer(Peer("operators", "torch.compile with keelnorm's operators kept", _operators_compiled)),
    "relu": GpuPeer(PEERS["relu"]),
    "copy": GpuPeer(PEERS["copy"]),
}
PLAIN = ("keelnorm", "eager", "native", "relu", "copy")
COMPILED = ("compile", "operators")


@dataclass
class Prepared:
    """A peer on several copies of a case's tensors."""

    peer: Peer
    loops: dict[str, Loop]
    error_eps: float | None = None


def run_case(case: Case, names: Sequence[str], *, device: str = "cuda", rounds: int = 7) -> list[Row]:
    """Check every peer on the case, and time those that are right: a row for each peer and mode.

    Args:
        case: Shape, layout, variant and dtype; the gradient has x's memory format.
        names: Keys of `GPU_PEERS`.
        device: "cuda", or "cpu" for a trial without a GPU.
        rounds: Rounds in which every peer takes its turn.
    """
    problem = make_problem(case, device)
    tensor_bytes = problem.x.numel() * problem.x.element_size()
    problems = [problem, *(_twin(problem) for _ in range(copies_for(tensor_bytes, device) - 1))]
    expected = correctness.expect(problem, "training")
    rows: list[Row] = []
    ready: dict[str, Prepared] = {}
    for name in names:
        try:
            ready[name] = _prepare(GPU_PEERS[name], problems, expected, device)
        except Exception as error:  # costs the numbers of this peer, not the run
            words = f"{type(error).__name__}: {error}"[:300]
            rows += [replace(blank_row(case, mode, name), error=words) for mode in MODES]
    times: dict[str, dict[str, list[float]]] = {name: {} for name in ready}
    for part in PARTS:
        loops = {name: each.loops[part] for name, each in ready.items() if part in each.loops}
        for name, found in by_turns(loops, rounds).items():
            times[name][part] = found
    for modes in times.values():
        if "both" in modes:
            modes["backward"] = [both - forward for both, forward in zip(modes["both"], modes["forward"], strict=True)]
    for name, modes in times.items():
        rows += [_timed(case, name, mode, tensor_bytes, ready[name], times) for mode in MODES if mode in modes]
    return rows


def _twin(problem: Problem) -> Problem:
    """The same values in other memory."""
    residual = problem.residual
    return replace(
        problem,
        x=problem.x.detach().clone().requires_grad_(),
        residual=None if residual is None else residual.detach().clone().requires_grad_(),
        dy=problem.dy.clone(),
    )


def _prepare(what: GpuPeer, problems: Sequence[Problem], expected: dict[str, Quantity], device: str) -> Prepared:
    peer = what.peer
    with what.context():
        built = peer.build(problems[0])
        if built.norm is not None:
            built.norm.to(device)
        error = correctness.check(problems[0], built, "training", expected) if peer.is_batch_norm else None
        _, inputs = correctness.gradient_inputs(problems[0], built)
        vectors = [each for each in inputs if each is not problems[0].x and each is not problems[0].residual]

        def forward(number: int) -> None:
            built.call(problems[number].x, problems[number].residual)

        def both(number: int) -> None:
            given = problems[number]
            y = built.call(given.x, given.residual)
            wanted = [given.x, *vectors] if given.residual is None else [given.x, *vectors, given.residual]
            if not peer.is_batch_norm:
                wanted = [given.x]
            torch.autograd.grad(y, wanted, given.dy)

        loops = {"forward": Loop(forward, len(problems), device)}
        if peer.has_backward:
            loops["both"] = Loop(both, len(problems), device)
    return Prepared(peer, loops, error)


def _timed(
    case: Case, name: str, mode: str, tensor_bytes: int, own: Prepared, times: dict[str, dict[str, list[float]]]
) -> Row:
    row = blank_row(case, mode, name)
    found = times[name][mode]
    row.samples_us = [round(each, 3) for each in found]
    row.median_us, row.spread, row.error_eps = statistics.median(found), spread(found), own.error_eps
    itemsize = getattr(torch, case.dtype).itemsize
    elements = tensor_bytes // itemsize
    row.tensor_bytes = tensor_bytes
    row.least_bytes = least_bytes(elements, itemsize, own.peer.limit_of or case.variant, mode)
    row.gbps = row.least_bytes / row.median_us / 1e3
    for other, theirs in times.items():
        if other != name and mode in theirs:
            row.ratios[other] = median_ratio(found, theirs[mode])
    copied = times.get("copy", {}).get("forward")
    if copied is not None:
        row.copied_bytes = round(2 * tensor_bytes * statistics.median(found) / statistics.median(copied))
        row.copy_fraction = row.least_bytes / row.copied_bytes
    return row


def run_cases(
    cases: Iterable[Case], names: Sequence[str], *, device: str, rounds: int, until: float, say: Callable[[str], None]
) -> list[Row]:
    """Run all cases until the time is up, and say how many were left out."""
    rows: list[Row] = []
    left_out = 0
    for case in cases:
        if monotonic() > until:
            left_out += 1
            continue
        found = run_case(case, names, device=device, rounds=rounds)
        rows += found
        say(line(case, found))
    if left_out:
        say(f"not measured because the time was up: {left_out} cases with {', '.join(names)}")
    return rows


def line(case: Case, rows: Sequence[Row]) -> str:
    """Summarize a case in a line: keelnorm's time, its part of the copy's rate, and the times of others over it."""
    own = next((row for row in rows if row.peer == "keelnorm" and row.mode == "both"), None)
    wrong = [f"{row.peer}: {row.error}" for row in rows if row.error and row.mode == "both"]
    if own is None or own.median_us is None:
        return f"{case.name}: {'; '.join(wrong) or 'no number'}"
    others = ", ".join(f"{name} ×{1 / value:.2f}" for name, value in own.ratios.items())
    rate = "" if own.copy_fraction is None else f", {own.copy_fraction:.0%} of the copy's rate"
    return f"{case.name}: {own.median_us:.0f} µs{rate}; {others}{''.join(f'; {each}' for each in wrong)}"
