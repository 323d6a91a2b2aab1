"""Check and time keelnorm's GPU kernels in under eight minutes: `python -m benchmarks.gpu`.

Writes benchmarks/results/gpu-<name of the GPU>.json, which `keelnorm bench page` and `make bench` draw. Says what was
not measured because the time was up, or because a GPU or a package is missing. `--device cpu` with TRITON_INTERPRET=1
tries the program on a machine without a GPU, on small tensors.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import torch

import keelnorm as kn
from benchmarks.architectures import ARCHITECTURES
from benchmarks.gpu import gpu_check, gpu_network, gpu_run, gpu_sync
from keelnorm.bench.cases import LAYOUTS, VARIANTS, Shape, cases, shapes
from keelnorm.bench.results import NetworkRow, Report, Row, Settings
from keelnorm.bench.summary import means
from keelnorm.engine.atomic_write import write_text
from keelnorm.measure.machine import describe

RESULTS = Path(__file__).resolve().parents[1] / "results"
SMALL_SYNC_DIMS = (4, 8, 5, 5)


@dataclass
class Session:
    """One run of the program: what it measures on, how long, and the rows so far."""

    device: str
    rounds: int
    shapes: list[Shape]
    until: float
    say: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)

    def measure(
        self, names: tuple[str, ...], layouts: tuple[str, ...], variants: tuple[str, ...], dtype: str, part: float = 1.0
    ) -> None:
        """Measure peers on cases, in at most this part of the time that is left."""
        chosen = cases(self.shapes, layouts, variants, dtypes=(dtype,))
        end = min(self.until, monotonic() + part * (self.until - monotonic()))
        self.rows += gpu_run.run_cases(chosen, names, device=self.device, rounds=self.rounds, until=end, say=self.say)


def main() -> int:
    """Run everything, the most important first; 1 if a result was wrong."""
    asked = _arguments()
    on_gpu = asked.device == "cuda"
    if not on_gpu:
        kn.kernels.use("triton")  # raises, with what to set, where that is impossible
    if asked.autotune:
        kn.kernels.autotune()
    start = monotonic()

    def say(text: str) -> None:
        print(f"[{monotonic() - start:5.0f} s] {text}", flush=True)

    name = torch.cuda.get_device_name() if on_gpu else "interpreter"
    say(f"{name}, torch {torch.__version__}, kernels {kn.kernels.active(asked.device)}")
    checked = gpu_check.check_all(asked.device, say, gpu_check.SHAPES if on_gpu else gpu_check.SHAPES[:3])

    listed = shapes(asked.batch, quick=asked.quick or not on_gpu, contains=() if on_gpu else ("small",))
    session = Session(asked.device, asked.rounds, listed, start + asked.seconds, say)
    session.measure(gpu_run.PLAIN, LAYOUTS[::-1], VARIANTS, "bfloat16", 0.5)
    networks: list[NetworkRow] = []
    if asked.network != "none" and on_gpu and monotonic() < session.until:
        networks = _run_network(asked.network, asked.batch, asked.size, asked.rounds, say)
    session.measure(("keelnorm", *gpu_run.COMPILED, "copy"), ("channels_last",), ("bn_relu",), "bfloat16", 0.5)
    session.measure(gpu_run.PLAIN, LAYOUTS[::-1], VARIANTS, "float32", 0.8)
    session.measure(("keelnorm", "max-autotune"), ("channels_last",), ("bn_relu",), "bfloat16")
    session.rows += gpu_sync.run_sync(asked.device, asked.rounds, say, gpu_sync.DIMS if on_gpu else SMALL_SYNC_DIMS)

    settings = Settings(
        asked.batch, list(LAYOUTS), list(VARIANTS), list(gpu_run.MODES), [each.name for each in listed],
        list(gpu_run.GPU_PEERS), asked.rounds, 0.0, quick=asked.quick, dtypes=["bfloat16", "float32"], pages=["device"],
    )  # fmt: skip
    report = _report(settings, session.rows, networks, name, monotonic() - start)
    _say_means(report, say)
    out = asked.out or RESULTS / f"gpu-{'-'.join(name.split())}.json"
    write_text(out, report.to_json())
    say(f"wrote {os.path.relpath(out)}")
    return int(report.failed or bool(checked.wrong))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="height and width of the network's images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=450.0, help="after so many no new case begins")
    parser.add_argument("--quick", action="store_true", help="four shapes of twelve")
    parser.add_argument("--network", default="ResNet-50", choices=("none", *ARCHITECTURES), metavar="NAME",
                        help="whose steps are timed; none: no network")  # fmt: skip
    parser.add_argument("--autotune", action="store_true", help="time tile sizes first")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu with TRITON_INTERPRET=1 tries the program itself")
    return asked


def _run_network(name: str, batch: int, size: int, rounds: int, say: Callable[[str], None]) -> list[NetworkRow]:
    rows = gpu_network.run_network(name, batch, size, "cuda", rounds)
    for row in rows:
        memory = "" if row.peak_bytes is None else f", {row.peak_bytes / 2**30:.2f} GiB at most"
        say(f"{row.network}, {row.layers}: {row.error or f'{row.step_ms:.1f} ms a step{memory}'}")
    return rows


def _report(settings: Settings, rows: list[Row], networks: list[NetworkRow], gpu: str, seconds: float) -> Report:
    machine = describe(with_revision=True)
    machine.gpu = gpu
    for row in rows:
        row.pages = "device"
    return Report(machine, settings, rows, means=means(rows, ("keelnorm",)), networks=networks, seconds=seconds)


def _say_means(report: Report, say: Callable[[str], None]) -> None:
    for mean in report.means:
        others = ", ".join(f"{other} ×{1 / value:.2f}" for other, value in mean.ratios.items())
        rate = "" if mean.copy_fraction is None else f", {mean.copy_fraction:.0%} of the copy's rate"
        say(f"{mean.suite} {mean.layout} {mean.dtype} {mean.variant} {mean.mode}, {mean.shapes} shapes: {others}{rate}")


if __name__ == "__main__":
    raise SystemExit(main())
