"""Importing the package brings in the layers and nothing else."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import keelnorm

HEAVY = (
    "triton",
    "torch._dynamo",
    "torch._inductor",
    "torch._export",
    "torch.ao",
    "torch.export",
    "torch.fx.experimental",
    "torch.onnx",
    "torch.utils.benchmark",
    "torch.utils.tensorboard",
    "typer",
    "rich",
    "plotly",
    "jinja2",
    "sklearn",
    "scipy",
    "joblib",
)
OUTER = tuple(f"keelnorm.{name}" for name in ("cli", "commands", "info", "lab", "report", "bench", "surgery", "doctor"))
ON_GPUS = "keelnorm.engine.kernels.triton."
"""Rules and launches for GPUs, which are loaded with the first tensor there."""


def test_version_is_that_of_the_distribution() -> None:
    assert importlib.metadata.version("keelnorm") == keelnorm.__version__


def test_import_is_light() -> None:
    code = "import sys, torch; before = set(sys.modules); import keelnorm; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    brought = done.stdout.split()
    assert "keelnorm.nn.batch_norm" in brought
    unwanted = [name for name in brought if f"{name}.".startswith(tuple(f"{heavy}." for heavy in HEAVY + OUTER))]
    unwanted += [name for name in brought if name.startswith(ON_GPUS)]
    assert not unwanted
    # Whatever else comes along belongs to torch or to Python: the package has no other cost than its own modules.
    others = {name.partition(".")[0] for name in brought} - sys.stdlib_module_names
    assert others <= {"keelnorm", "torch"}
