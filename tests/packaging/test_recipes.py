"""The recipes of docs/architecture.md, followed: only the files that a recipe names are edited, and it works.

A recipe that names a file too few fails in the tests of what was added. One that names a file too many fails because it
has no edit here. Edits stand in the order of the recipe's rows.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from recipes import PAGE, Copy, after, both, changed, example, files_of, new
from source_tree import ROOT

#: A command of the copy ends well, and prints what is wanted.
COMMAND = """
from typer.testing import CliRunner

from keelnorm.cli import app


def test_it_works():
    done = CliRunner().invoke(app, {0!r}.split())
    assert done.exit_code == 0, done.output
    assert {1!r} in done.output
"""


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


@pytest.mark.slow
def test_a_variant(copy: Copy) -> None:
    listed = after(('    "DomainBatchNorm",\n', '    "FloorBatchNorm",\n'))
    copy.follow(
        "A variant",
        "floor",
        new("cases_floor.py"),
        new("floor.py"),
        both(listed, after(("import DomainBatchNorm\n", "from keelnorm.nn.floor import FloorBatchNorm\n"))),
        both(listed, after(("    DomainBatchNorm,\n", "    FloorBatchNorm,\n"))),
        after(("    kn.L1BatchNorm: ({}, {}),\n", "    kn.FloorBatchNorm: ({}, {}),\n")),
        after(("|---|---|---|\n", "| a channel is constant | `kn.FloorBatchNorm` | |\n")),
        after(("γ and β from a class or an embedding |\n", "| `floor.py` | a lower bound of the variance |\n")),
    )
    copy.test(
        example("floor_in_use.py"),
        *(f"tests/variants/test_contract_{part}.py" for part in ("coverage", "values", "state")),
        "tests/nn/test_drop_in.py",
        "tests/nn/test_options.py",
        "tests/packaging/test_public_names.py",
        "tests/docs/test_architecture.py",
        "tests/docs/test_pages_name_everything.py",
        select="Floor or every_layer_is_there or every_variant or public_names or listed_folder",
    )


@pytest.mark.slow
def test_an_activation(copy: Copy) -> None:
    row = (
        '    Definition(\n        "softsign", "v/(1 + |v|)", nn.Softsign,\n'
        "        value=lambda v, a, b: F.softsign(v),\n"
        "        gradient=lambda g, v, a, b: g / (1 + v.abs()).square(),\n    ),\n"
    )
    in_triton = after(
        (
            "        y = tl.where(v * a > b, v, softplus(v * a) / a)\n",
            '    elif ACT == "softsign":\n        y = v / (1.0 + tl.abs(v))\n',
        ),
        (
            "        r = tl.where(v * a > b, g, g * sigmoid(v * a))\n",
            '    elif ACT == "softsign":\n        r = 1.0 + tl.abs(v)\n        r = g / (r * r)\n',
        ),
    )
    copy.follow(
        "An activation",
        "softsign",
        after(
            ('"mish", "softplus",', ' "softsign",'),
            ('        parameters={"beta": 1.0, "threshold": 20.0},\n    ),\n', row),
        ),
        changed(("X(softplus, Softplus, false)", "X(softplus, Softplus, false) X(softsign, Softsign, false)")),
        changed(("typedef Vec (*Activation", example("softsign_struct.h") + "typedef Vec (*Activation")),
        in_triton,
        changed(('``"mish"`` or ``"softplus"``', '``"mish"``, ``"softplus"`` or ``"softsign"``')),
        after(
            ("v * a > b ? v : log1p_exp(v * a) / a;\n", "case Activation::softsign: return v / (1 + std::fabs(v));\n"),
            (
                "v * a > b ? 1 : logistic(v * a);\n",
                "case Activation::softsign: return 1 / ((1 + std::fabs(v)) * (1 + std::fabs(v)));\n",
            ),
        ),
        after(
            ('    "softplus": F.softplus,\n', '    "softsign": F.softsign,\n'),
            ("    nn.Softplus(2.5, 3.0),\n", "    nn.Softsign(),\n"),
        ),
        after(("log(1 + exp(beta·v))/beta |\n", '| `"softsign"` | `Softsign()` | v/(1 + \\|v\\|) |\n')),
    )
    copy.test(
        example("softsign_in_use.py"),
        "tests/packaging/test_public_names.py",
        "tests/triton/test_triton_layers.py",
        "tests/kernels/test_activation_table.py",
        select="public_names or (activations and softsign) or activation_table",
        TRITON_INTERPRET="1",
    )
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    source, program = copy.path / "vectors.cpp", copy.path / "vectors"
    source.write_text(example("softsign_vectors.cpp"), encoding="utf-8")
    folders = [f"-I{copy.path / name}" for name in ("src/keelnorm/engine/kernels/cpu/csrc", "tests/native")]
    unit = ["-DKEELNORM_ISA=baseline", "-DKEELNORM_DTYPE=f32", "-O1", "-std=c++17"]
    subprocess.run([compiler, *unit, *folders, str(source), "-o", str(program)], check=True)
    assert subprocess.run([str(program)], capture_output=True, text=True).stdout == "softsign\n"


@pytest.mark.slow
def test_a_claim(copy: Copy) -> None:
    pytest.importorskip("plotly", reason="the laboratory's page needs plotly")
    copy.follow("A claim", "zero_mean", new("zero_mean.py"))
    copy.test(
        COMMAND.format("lab run zero_mean --quick --seeds 2 --jobs 1 --json --out claim.html", '"holds"'),
        "tests/lab/test_lab_claims.py",
        select="zero_mean or numbers_follow or quick_is_less",
    )


@pytest.mark.slow
def test_a_command(copy: Copy) -> None:
    pytest.importorskip("typer", reason="the command line needs typer")
    copy.follow(
        "A command",
        "layers",
        new("layers.py"),
        after(
            ("import lab_app\n", "    from keelnorm.cli.layers import layers_command\n"),
            ('app.command("info")(info_command)\n', 'app.command("layers")(layers_command)\n'),
        ),
        after(("# Models on the command line\n", "\n```console\n$ keelnorm layers\n```\n")),
        after(("| `info.py` | `keelnorm info` |\n", "| `layers.py` | `keelnorm layers` |\n")),
    )
    copy.test(
        COMMAND.format("layers", "GhostBatchNorm"),
        "tests/docs/test_commands.py",
        "tests/docs/test_architecture.py",
        "tests/docs/test_pages_name_everything.py",
        select="command_line or listed_folder or every_command",
    )


@pytest.mark.slow
def test_an_architecture_of_the_zoo(copy: Copy) -> None:
    pytest.importorskip("pytorchcv", reason="the architecture is pytorchcv's")
    copy.follow(
        "An architecture of the zoo",
        "ResNet-10",
        after(("_FROM_PYTORCHCV = {\n", '    "ResNet-10": "resnet10",\n')),
        both(changed(("== 1651", "== 1660")), after(("FUSIBLE = {\n", '    "ResNet-10": 9,\n'))),
    )
    copy.test("", "tests/surgery/test_models.py", select="ResNet-10 or there_are_enough")


def test_every_recipe_names_files_that_are_there() -> None:
    recipes = re.findall(
        r"^### (.+)$", PAGE.read_text(encoding="utf-8").partition("## Adding something")[2], re.MULTILINE
    )
    assert len(recipes) == 8
    for recipe in recipes:
        files = files_of(recipe)
        assert files
        assert not [path for path, is_new in files if is_new == (ROOT / path).exists()], recipe
