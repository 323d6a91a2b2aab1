"""Building without a compiler, with one that fails, and what the distributions hold."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from source_tree import CPU, Tree

pytestmark = pytest.mark.packaging

REASON = "keelnorm/engine/kernels/cpu/not_built.txt"
LIBRARY = "keelnorm/engine/kernels/cpu/libkeelnorm.so"

# Runs the installed package where the native kernels are missing: one warning for two calls, and the right result.
USE = """
import sys, warnings
import torch
import keelnorm as kn

assert kn.__file__.startswith(sys.argv[1]), kn.__file__
x = torch.randn(4, 3, 5, 5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layer = kn.BatchNorm2d(3)
    y = layer(x, activation="relu")
    layer(x)
[warning] = caught
assert warning.category is RuntimeWarning, warning
assert kn.kernels.active() == "reference"
torch.testing.assert_close(y, torch.nn.BatchNorm2d(3)(x).relu())
print(warning.message)
"""


def test_without_a_compiler_the_package_runs_on_reference_and_says_so_once(tree: Tree, tmp_path: Path) -> None:
    done = tree.build("build_wheel")
    assert done.returncode == 0, done.stderr
    wheel = tree.built()
    assert wheel.name.startswith("keelnorm-")
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert LIBRARY not in names
        assert archive.read(REASON).decode() == "there was no C++ compiler\n"

    target = tmp_path / "installed"
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run([sys.executable, "-m", *install], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = {name: value for name, value in os.environ.items() if name != "KEELNORM_KERNELS"}
    done = subprocess.run(
        [sys.executable, "-c", USE, str(target)],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "there was no C++ compiler" in done.stdout


def test_the_wheel_has_what_runs_and_no_more(tree: Tree) -> None:
    done = tree.build("build_wheel", KEELNORM_NATIVE="0")
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(tree.built()).namelist()
    sources = tree.path / "src"
    expected = {str(path.relative_to(sources)) for path in sources.rglob("*") if path.is_file()}
    expected = {name for name in expected if "/csrc/" not in name and ".egg-info/" not in name}
    assert {name for name in names if ".dist-info/" not in name} == expected | {REASON}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_distribution_can_be_built_from(tree: Tree) -> None:
    done = tree.build("build_sdist")
    assert done.returncode == 0, done.stderr
    with tarfile.open(tree.built()) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kernels = {str(path.relative_to(tree.path)) for path in (tree.path / CPU / "csrc").iterdir()}
    assert kernels
    assert names >= kernels | {"LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert not [name for name in names if name.endswith((".so", "not_built.txt", ".pyc"))]


def test_a_compiler_that_fails_leaves_its_reason(tree: Tree, install_program: Callable[[str, str], None]) -> None:
    install_program("c++", "echo 'kernels.cpp:1: error: out of order' >&2; exit 3")
    done = tree.build("build_wheel")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tree.built()) as archive:
        assert LIBRARY not in archive.namelist()
        [reason] = archive.read(REASON).decode().splitlines()
    assert reason.startswith("c++ ended with status 3 on kernels.cpp")
    assert reason.endswith("kernels.cpp:1: error: out of order")
    assert reason in done.stderr


def test_a_compiler_named_by_cxx_is_the_one_that_runs(tree: Tree, install_program: Callable[[str, str], None]) -> None:
    install_program("c++", "exit 3")
    install_program("mine", 'echo "error: mine ran with $1" >&2; exit 4')
    done = tree.build("build_wheel", CXX="mine -some-option")
    assert done.returncode == 0, done.stderr
    reason = zipfile.ZipFile(tree.built()).read(REASON).decode()
    assert reason.startswith("mine ended with status 4")
    assert reason.endswith("error: mine ran with -some-option\n")


@pytest.mark.parametrize(
    ("script", "reason"),
    [(None, "there was no C++ compiler"), ("exit 1", "c++ ended with status 1 on kernels.cpp")],
    ids=["no compiler", "one that fails"],
)
def test_kernels_that_are_required_and_missing_are_an_error(
    tree: Tree, install_program: Callable[[str, str], None], script: str | None, reason: str
) -> None:
    if script:
        install_program("c++", script)
    done = tree.build("build_wheel", KEELNORM_NATIVE="1")
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: KEELNORM_NATIVE=1 requires the native CPU kernels, but {reason}")
    assert not list(tree.out.iterdir())


def test_a_wish_that_means_nothing_is_an_error(tree: Tree) -> None:
    done = tree.build("build_wheel", KEELNORM_NATIVE="yes")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("KEELNORM_NATIVE is 'yes'; legal are")


@pytest.mark.parametrize("wish", ["", "1"], ids=["optional", "required"])
def test_an_older_library_does_not_outlive_a_failed_build(tree: Tree, wish: str) -> None:
    library = tree.path / CPU / "libkeelnorm.so"
    library.write_bytes(b"from an earlier build")
    done = tree.build("build_editable", KEELNORM_NATIVE=wish)
    assert not library.exists()
    assert (done.returncode == 0) == (wish == "")
    assert (tree.path / CPU / "not_built.txt").exists() == (wish == "")


def test_a_module_that_was_removed_is_not_installed_from_an_earlier_build(tree: Tree) -> None:
    assert tree.build("build_wheel").returncode == 0
    [old] = tree.path.glob("build/lib*/keelnorm")
    (old / "removed.py").touch()
    tree.built().unlink()
    assert tree.build("build_wheel").returncode == 0
    assert "keelnorm/removed.py" not in zipfile.ZipFile(tree.built()).namelist()
