"""Check and time keelnorm's GPU kernels: `python bench/gpu.py`, in under eight minutes.

Writes bench/results/gpu-<name of the GPU>.json, which `keelnorm bench page` and `make bench` draw. What the time did
not suffice for, and what a GPU or a package is missing for, is said. `--device cpu` with TRITON_INTERPRET=1 tries the
program itself on a machine without a GPU, on small tensors.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from time import monotonic

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402

import keelnorm as kn  # noqa: E402
from keelnorm.bench import gpu_check, gpu_network, gpu_run, gpu_sync  # noqa: E402
from keelnorm.bench.cases import LAYOUTS, VARIANTS, cases, shapes  # noqa: E402
from keelnorm.bench.machine import describe  # noqa: E402
from keelnorm.bench.results import NetworkRow, Report, Row, Settings  # noqa: E402
from keelnorm.bench.summary import means  # noqa: E402
from keelnorm.engine.atomic_write import write_text  # noqa: E402


def main() -> int:
    """Everything in the order in which it matters; 1 where a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="height and width of the network's images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=450.0, help="after so many nothing new is begun")
    parser.add_argument("--quick", action="store_true", help="four shapes of twelve")
    parser.add_argument("--network", default="ResNet-50", help="of benchmarks.networks.networks; none: leave it out")
    parser.add_argument("--autotune", action="store_true", help="time tile sizes first")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu with TRITON_INTERPRET=1 tries the program itself")
    if asked.device == "cpu":
        kn.kernels.use("triton")  # says what to set where that can't be
    if asked.autotune:
        kn.kernels.autotune()
    start = monotonic()
    until = start + asked.seconds

    def say(text: str) -> None:
        print(f"[{monotonic() - start:5.0f} s] {text}", flush=True)

    name = torch.cuda.get_device_name() if asked.device == "cuda" else "interpreter"
    say(f"{name}, torch {torch.__version__}, kernels {kn.kernels.active(asked.device)}")
    checked = gpu_check.check_all(asked.device, say, gpu_check.SHAPES[: 3 if asked.device == "cpu" else None])

    listed = shapes(
        asked.batch, quick=asked.quick or asked.device == "cpu", contains=("small",) if asked.device == "cpu" else ()
    )
    rows: list[Row] = []

    def measure(
        names: tuple[str, ...], layouts: tuple[str, ...], variants: tuple[str, ...], dtype: str, part: float = 1.0
    ) -> None:
        chosen = cases(listed, layouts, variants, dtypes=(dtype,))
        end = min(until, monotonic() + part * (until - monotonic()))
        rows.extend(gpu_run.run_cases(chosen, names, device=asked.device, rounds=asked.rounds, until=end, say=say))

    measure(gpu_run.PLAIN, LAYOUTS[::-1], VARIANTS, "bfloat16", 0.5)
    networks: list[NetworkRow] = []
    if asked.network != "none" and asked.device == "cuda" and monotonic() < until:
        networks = gpu_network.run_network(asked.network, asked.batch, asked.size, asked.device, asked.rounds)
        for row in networks:
            memory = "" if row.peak_bytes is None else f", {row.peak_bytes / 2**30:.2f} GiB at most"
            say(f"{row.network}, {row.arm}: {row.error or f'{row.step_ms:.1f} ms a step{memory}'}")
    measure(("keelnorm", *gpu_run.COMPILED, "copy"), ("channels_last",), ("bn_relu",), "bfloat16", 0.5)
    measure(gpu_run.PLAIN, LAYOUTS[::-1], VARIANTS, "float32", 0.8)
    measure(("keelnorm", "max-autotune"), ("channels_last",), ("bn_relu",), "bfloat16")
    rows += gpu_sync.run_sync(
        asked.device, asked.rounds, say, gpu_sync.DIMS if asked.device == "cuda" else (4, 8, 5, 5)
    )

    machine = describe()
    machine.gpu = name
    settings = Settings(
        asked.batch, list(LAYOUTS), list(VARIANTS), list(gpu_run.MODES), [each.name for each in listed],
        list(gpu_run.GPU_PEERS), asked.rounds, 0.0, quick=asked.quick, dtypes=["bfloat16", "float32"], pages=["device"],
    )  # fmt: skip
    for row in rows:
        row.pages = "device"
    report = Report(machine, settings, rows, networks=networks, seconds=monotonic() - start)
    report.means = means(rows, ("keelnorm",))
    for mean in report.means:
        others = ", ".join(f"{other} ×{1 / value:.2f}" for other, value in mean.ratios.items())
        rate = "" if mean.copy_fraction is None else f", {mean.copy_fraction:.0%} of the copy's rate"
        say(f"{mean.suite} {mean.layout} {mean.dtype} {mean.variant} {mean.mode}, {mean.shapes} shapes: {others}{rate}")
    out = asked.out or ROOT / "bench" / "results" / f"gpu-{'-'.join(name.split())}.json"
    write_text(out, report.to_json())
    say(f"wrote {os.path.relpath(out)}")
    return int(report.failed or bool(checked.wrong))


if __name__ == "__main__":
    raise SystemExit(main())
