"""The recipes of docs/architecture.md, followed: in a copy of the project, the files that a recipe names are edited, and no
others, and what was added works.

A recipe that names a file too few fails in the checks of what was added; one that names a file too many, because there is
no edit for it here. Edits stand in the order of the recipe's rows.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from source_tree import ROOT

PAGE = ROOT / "docs/architecture.md"
COPIED = ("pyproject.toml", "setup.py", "Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "src", "tests", "docs",
          "examples", "bench", "benchmarks")  # fmt: skip

Edit = Callable[[str], str]


def new(text: str) -> Edit:
    """A file that is not there yet."""

    def edit(before: str) -> str:
        assert not before, "the recipe calls this file new, and it is there"
        return text.lstrip("\n")

    return edit


def after(*pairs: tuple[str, str]) -> Edit:
    """Texts put right after others, each of which is there once."""

    def edit(text: str) -> str:
        for anchor, added in pairs:
            assert text.count(anchor) == 1, f"{anchor!r} is there {text.count(anchor)} times"
            text = text.replace(anchor, anchor + added)
        return text

    return edit


def changed(*pairs: tuple[str, str]) -> Edit:
    """Texts replaced wherever they are, which is somewhere."""

    def edit(text: str) -> str:
        for before, now in pairs:
            assert before in text, f"{before!r} is not there"
            text = text.replace(before, now)
        return text

    return edit


def files_of(recipe: str) -> list[tuple[str, bool]]:
    """The files that a recipe names, and whether each is new."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n### {recipe}\n")[2]
    table = re.match(r"(?:[^|#].*\n|\n)*((?:\|.*\n)+)", text)
    assert table, f"{PAGE.name} has no table for {recipe!r}"
    return [(path, bool(mark)) for path, mark in re.findall(r"^\| `(.+?)`( \(new\))? \|", table[1], re.MULTILINE)]


class Copy:
    """A copy of the project in which a recipe has been followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            elif source.exists():
                shutil.copy(source, path / name)

    def follow(self, recipe: str, name: str, *edits: Edit) -> None:
        """Edit the files of the recipe's rows, one edit a row."""
        files = files_of(recipe)
        assert len(files) == len(edits), f"the recipe names {[path for path, _ in files]}"
        for (path, is_new), edit in zip(files, edits, strict=True):
            file = self.path / path.replace("NAME", name)
            assert file.exists() != is_new, f"{path}: new is {is_new}"
            file.write_text(edit("" if is_new else file.read_text(encoding="utf-8")), encoding="utf-8")

    def run(self, *words: str, **environment: str) -> str:
        """Run Python on the copy, and give what it printed."""
        paths = os.pathsep.join([str(self.path / "src"), str(self.path)])
        done = subprocess.run(
            [sys.executable, *words], cwd=self.path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": paths, **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def test(self, *words: str, **environment: str) -> None:
        """Run tests of the copy; none at all is a failure."""
        self.run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *words, **environment)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


# ---- a variant

FLOOR = '''
"""Batch normalization whose variance has a lower bound."""

from __future__ import annotations

import torch
from torch import Tensor

from keelnorm.engine.activations import Activation
from keelnorm.moments import Moments
from keelnorm.nn._shared.variant import Variant, normalize


class FloorBatchNorm(Variant):
    """Batch normalization that never divides by less than the root of ``floor``.

    Example:
        >>> FloorBatchNorm(1, floor=1.0)(torch.tensor([[0.0], [8.0]])).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        floor: float = 0.01,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.floor = floor

    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        moments = Moments.from_tensor(x)
        var = moments.var_or_zero.clamp(min=self.floor)
        y = normalize(x, moments.mean, var, self.weight, self.bias, self.eps, residual, act)
        self.update_running(moments)
        return y
'''
FLOOR_CASES = '''
"""A lower bound of the variance."""

from __future__ import annotations

from torch import Tensor
from variants.cases_remedies import affine, by_running, moments
from variants.variant import Variant

from keelnorm.nn.floor import FloorBatchNorm


def floor(layer: FloorBatchNorm, x: Tensor) -> Tensor:
    if not layer.training and layer.running_mean is not None:
        return affine(layer, by_running(layer, x))
    mean, var = moments(x)
    return affine(layer, (x - mean) / (var.clamp(min=layer.floor) + layer.eps).sqrt())


VARIANTS = [Variant("FloorBatchNorm", FloorBatchNorm, floor)]
'''
FLOOR_IN_USE = """
import torch
from torch import nn
import keelnorm as kn

model = nn.Sequential(nn.Conv2d(3, 4, 1), kn.FloorBatchNorm(4), nn.ReLU())
x = torch.randn(8, 3, 5, 5)
model, report = kn.recalibrate(model, [x])
model.eval()
before = model(x)
folded, report = kn.fold(model, x)
assert report.summary["folded"] == 1, report
torch.testing.assert_close(folded(x), before)
"""


def test_a_variant(copy: Copy) -> None:
    listed = after(('    "DomainBatchNorm",\n', '    "FloorBatchNorm",\n'))
    copy.follow(
        "A variant",
        "floor",
        new(FLOOR_CASES),
        new(FLOOR),
        lambda text: listed(after(
            ("import DomainBatchNorm\n", "from keelnorm.nn.floor import FloorBatchNorm\n"),
        )(text)),
        lambda text: listed(after(("    DomainBatchNorm,\n", "    FloorBatchNorm,\n"))(text)),
        after(("    kn.L1BatchNorm: ({}, {}),\n", "    kn.FloorBatchNorm: ({}, {}),\n")),
        after(("|---|---|---|\n", "| a channel is constant | `kn.FloorBatchNorm` | [small batches](small_batches.md) |\n")),
        after(("γ and β from a class or an embedding |\n", "| `floor.py` | a lower bound of the variance |\n")),
    )  # fmt: skip
    copy.run("-c", FLOOR_IN_USE)
    copy.test(
        "tests/variants/test_contract_values.py", "tests/variants/test_contract_state.py", "tests/nn/test_drop_in.py",
        "tests/nn/test_options.py", "tests/packaging/test_public_names.py", "tests/docs/test_architecture.py",
        "-k", "Floor or every_layer_is_there or public_names or listed_folder",
    )  # fmt: skip


# ---- an activation

SOFTSIGN_IN_USE = """
import torch
import torch.nn.functional as F
from torch import nn
import keelnorm as kn
from keelnorm.engine.fusion import pending
from keelnorm.engine.fusion.call import all_sizes_wait

x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
ours, theirs = kn.BatchNorm2d(3, dtype=torch.float64), nn.BatchNorm2d(3, dtype=torch.float64)
for activation in ("softsign", nn.Softsign()):
    torch.testing.assert_close(ours(x, activation=activation), F.softsign(theirs(x)))
torch.autograd.gradcheck(lambda x: ours(x, activation="softsign"), (x,))
torch.autograd.gradgradcheck(lambda x: ours(x, activation="softsign"), (x,))
model, report = kn.convert(nn.Sequential(nn.BatchNorm2d(3), nn.Softsign()).double())
before = pending.completed
with all_sizes_wait():
    model(x), model(x)
assert pending.completed == before + 1
"""
#: Every activation's vector function against its formula, compiled for one instruction set and dtype.
VECTORS = r"""
#include <cstdio>

#include "activations.h"
#include "functions.h"

int main() {
  int wrong = 0;
  for (int64_t code = 0; code < keelnorm::kActivations; ++code)
    for (double v = -8; v < 8; v += 0.37) {
      const native::Function formula{static_cast<keelnorm::Activation>(code), 0.5, 3};
      const Parameters p{0.5, 3};
      const double value = kFunctions[code].value(splat(static_cast<Value>(v)), p)[0];
      const double slope = kFunctions[code].derivative(splat(static_cast<Value>(v)), p)[0];
      if (std::fabs(value - formula.value(v)) + std::fabs(slope - formula.slope(v)) < 1e-5) continue;
      std::printf("%s at %g: %g and %g\n", native::name_of(formula.which), v, value, slope);
      wrong = 1;
    }
  std::printf("%s\n", native::name_of(static_cast<keelnorm::Activation>(keelnorm::kActivations - 1)));
  return wrong;
}
"""


def test_an_activation(copy: Copy) -> None:
    copy.follow(
        "An activation",
        "softsign",
        after(
            ('"mish", "softplus",', ' "softsign",'),
            ("lambda g, v, a, b: torch.where(v * a > b, g, g * torch.sigmoid(v * a)),\n    ),\n",
             "    _Formula(lambda v, a, b: F.softsign(v), lambda g, v, a, b: g / (1 + v.abs()).square()),\n"),
            ('Activation("softplus", 13, 1.0, 20.0),\n', '    "softsign": Activation("softsign", 14),\n'),
            ('("softplus", ("beta", "threshold")),\n', '    nn.Softsign: ("softsign", ()),\n'),
        ),
        lambda text: changed(("kActivations = 14", "kActivations = 15"))(
            after(("softplus = 13,  // a: beta, b: threshold\n", "  softsign = 14,\n"))(text)
        ),
        lambda text: changed(("typedef Vec (*ActivationFunction)", """\
struct Softsign {
  static Vec value(Vec u, Parameters) { return u / ((Value)1 + absolute(u)); }
  static Vec derivative(Vec u, Parameters) {
    const Vec r = (Value)1 / ((Value)1 + absolute(u));
    return r * r;
  }
};

typedef Vec (*ActivationFunction)"""))(after(("both<Softplus>(),", " both<Softsign>(),"))(text)),
        changed(
            ("    else:\n        y =", "    elif ACT == 14:\n        y = v / (1.0 + tl.abs(v))\n    else:\n        y ="),
            ("    else:\n        r =", "    elif ACT == 14:\n        r = 1.0 + tl.abs(v)\n        r = g / (r * r)\n"
             "    else:\n        r ="),
        ),
        after(('"silu", "hardswish", "hardsigmoid", "mish"', ', "softsign"')),
        changed(('``"mish"`` or ``"softplus"``', '``"mish"``, ``"softplus"`` or ``"softsign"``')),
        after(
            ("return v * a > b ? v : log1p_exp(v * a) / a;\n",
             "      case Activation::softsign:\n        return v / (1 + std::fabs(v));\n"),
            ("v * a > b ? 1 : logistic(v * a);\n",
             "      case Activation::softsign:\n        return 1 / ((1 + std::fabs(v)) * (1 + std::fabs(v)));\n"),
            ('"softplus"', ', "softsign"'),
        ),
        after(("| `\"softplus\"` | `Softplus(beta, threshold)` |\n", "| `\"softsign\"` | `Softsign()` | | | |\n")),
    )  # fmt: skip
    copy.run("-c", SOFTSIGN_IN_USE)
    copy.test("tests/packaging/test_public_names.py")
    copy.test("tests/triton/test_triton_layers.py", "-k", "activations and softsign", TRITON_INTERPRET="1")
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = copy.path / "vectors"
    program.with_suffix(".cpp").write_text(VECTORS, encoding="utf-8")
    folders = [f"-I{copy.path / name}" for name in ("src/keelnorm/engine/kernels/cpu/csrc", "tests/native")]
    unit = ["-DKEELNORM_ISA=baseline", "-DKEELNORM_DTYPE=f32", "-O1", "-std=c++17"]
    subprocess.run([compiler, *unit, *folders, str(program.with_suffix(".cpp")), "-o", str(program)], check=True)
    assert subprocess.run([str(program)], capture_output=True, text=True).stdout == "softsign\n"


# ---- a claim

ZERO_MEAN = '''
"""Does batch normalization give outputs of mean zero?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import keelnorm as kn
from keelnorm.lab.core.cell import Cell, Result, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.reading.figures import Axis, Figure, Series, Table
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.measure.statistics import mean


def output_mean(*, seed: int, size: int) -> Result:
    """The largest mean of a channel."""
    x = 3 + torch.randn(size, 4, generator=generator(draw="values", seed=seed))
    return {"mean": float(kn.BatchNorm1d(4)(x).mean(0).abs().max().detach())}


def cells(plan: Plan) -> Sequence[Cell]:
    size = 16 if plan.quick else 1024
    seeds = plan.seed_range(quick=3, full=20)
    return [Cell(output_mean, {"seed": seed, "size": size}, cost=0.001 * size) for seed in seeds]


def read(plan: Plan, results: Results) -> Reading:
    values = [result["mean"] for _, result in results.of(cells(plan))]
    found = mean(values)
    return Reading(
        f"The largest mean is {found.value:.1e}.",
        [Finding("largest mean of a channel", "normal values", found, 1e-5, larger=False, unit="", digits=8)],
        [Figure("Means", Axis("seed"), Axis("mean"), [Series("batch norm", "bn", list(range(len(values))), values)], "Means.")],
        [Table("Means", ["seed", "mean"], [[str(seed), f"{value:.1e}"] for seed, value in enumerate(values)])],
        setup=[("Values", "normal, of mean 3")],
    )


CLAIM = Claim(
    number=24,
    title="Zero mean",
    statement="The outputs of batch normalization have mean zero.",
    question="Is the mean of the outputs zero?",
    literature="It is by definition.",
    sources=[Source("Ioffe, Szegedy 2015", "https://arxiv.org/abs/1502.03167")],
    criterion="Holds if the mean is below a hundred thousandth.",
    data=("none",),
    cells=cells,
    read=read,
)
'''


def test_a_claim(copy: Copy) -> None:
    pytest.importorskip("plotly", reason="the laboratory's page needs plotly")
    copy.follow("A claim", "zero_mean", new(ZERO_MEAN), changed(("range(1, 24)", "range(1, 25)")))
    copy.test("tests/lab/test_lab_claims.py", "-k", "zero_mean or there_are_all or quick_is_less")
    command = "lab run zero_mean --quick --seeds 2 --jobs 1 --json --out claim.html"
    assert '"holds"' in copy.run("-m", "keelnorm", *command.split())


# ---- a command

LAYERS_COMMAND = '''
"""`keelnorm layers`: the names of all layers."""

from __future__ import annotations

import typer


def layers_command() -> None:
    """List the layers."""
    import keelnorm.nn

    typer.echo("\\n".join(keelnorm.nn.__all__))
'''


def test_a_command(copy: Copy) -> None:
    pytest.importorskip("typer", reason="the command line needs typer")
    copy.follow(
        "A command",
        "layers",
        new(LAYERS_COMMAND),
        after(
            ("import lab_app\n", "    from keelnorm.cli.layers import layers_command\n"),
            ('app.command("info")(info_command)\n', 'app.command("layers")(layers_command)\n'),
        ),
        after(("# Models on the command line\n", "\n```console\n$ keelnorm layers\n```\n")),
        after(("| `info.py` | `keelnorm info` |\n", "| `layers.py` | `keelnorm layers` |\n")),
    )
    assert "GhostBatchNorm" in copy.run("-m", "keelnorm", "layers").splitlines()
    copy.test("tests/docs/test_commands.py", "tests/docs/test_architecture.py", "-k", "command_line or listed_folder")


# ---- an architecture of the zoo


def test_an_architecture_of_the_zoo(copy: Copy) -> None:
    pytest.importorskip("pytorchcv", reason="the architecture is pytorchcv's")
    copy.follow(
        "An architecture of the zoo",
        "ResNet-10",
        after(("_FROM_PYTORCHCV = {\n", '    "ResNet-10": "resnet10",\n')),
        lambda text: changed(("== 1651", "== 1660"))(after(("FUSIBLE = {\n", '    "ResNet-10": 9,\n'))(text)),
    )
    copy.test("tests/surgery/test_models.py", "-k", "ResNet-10 or there_are_enough")


def test_every_recipe_names_files_that_are_there() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## Adding something")[2]
    recipes = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert len(recipes) == 7
    for recipe in recipes:
        files = files_of(recipe)
        assert files
        assert not [path for path, is_new in files if is_new == (ROOT / path).exists()], recipe
