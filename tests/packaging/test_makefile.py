"""What the Makefile sets up, and when it does it again; with a Python that only writes down what it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from source_tree import CPU, ROOT

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(shutil.which("make") is None, reason="needs make"),
]

PYTHON = """#!/bin/sh
echo "$* DATA=$KEELNORM_DATA_DIR" >> "$ASKED"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *--editable*) rm -f {cpu}/libkeelnorm.so {cpu}/not_built.txt && touch {cpu}/$LEAVES && test "$LEAVES" != nothing ;;
esac
"""

VENV, INSTALL, BUILD, TEST = "venv", "install", "build", "test"


class Project:
    """A project of the files that the Makefile looks at, with a fake Python."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked = path / "asked"
        for name in ("Makefile", "setup.py", "pyproject.toml", "requirements/dev.txt"):
            (path / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, path / name)
        (path / CPU / "csrc").mkdir(parents=True)
        for name in ("kernels.cpp", "loops.h"):
            (path / CPU / "csrc" / name).touch()
        self.python = path / "python"
        self.python.write_text(PYTHON.format(cpu=CPU), encoding="utf-8")
        self.python.chmod(0o755)

    def run(self, *words: str, left: str = "libkeelnorm.so", status: int = 0, **environment: str) -> str:
        """Run make, and return what it said."""
        self.asked.unlink(missing_ok=True)
        done = subprocess.run(
            ["make", f"PYTHON={self.python}", *words],
            cwd=self.path,
            env={"PATH": os.environ["PATH"], "ASKED": str(self.asked), "LEAVES": left, **environment},
            capture_output=True,
            text=True,
        )
        assert (done.returncode != 0) == (status != 0), done.stdout + done.stderr
        return done.stdout + done.stderr

    def steps(self) -> list[str]:
        """Which steps the last run took."""
        names = {"-m venv": VENV, "install --quiet --requirement": INSTALL, "--editable": BUILD, "-m pytest": TEST}
        lines = self.asked.read_text(encoding="utf-8").splitlines() if self.asked.exists() else []
        return [name for line in lines for words, name in names.items() if words in line]

    def touch(self, name: str | Path) -> None:
        later = time.time() + 1
        os.utime(self.path / name, (later, later))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    path = tmp_path / "project"
    path.mkdir()
    return Project(path)


def test_the_first_run_sets_up_and_the_second_starts_at_once(project: Project) -> None:
    said = project.run("test")
    assert project.steps() == [VENV, INSTALL, BUILD, TEST]
    assert "creating .venv" in said
    assert "building" in said
    assert project.run("test") == ""
    assert project.steps() == [TEST]


@pytest.mark.parametrize(
    "source",
    [CPU / "csrc" / "kernels.cpp", CPU / "csrc" / "loops.h", Path("setup.py"), Path("pyproject.toml")],
    ids=str,
)
def test_a_changed_source_is_built_again(project: Project, source: Path) -> None:
    project.run("test")
    project.touch(source)
    project.run("test")
    assert project.steps() == [BUILD, TEST]


def test_changed_pins_and_another_torch_are_installed(project: Project) -> None:
    project.run("test")
    project.touch("requirements/dev.txt")
    project.run("test")
    assert project.steps() == [INSTALL, BUILD, TEST]
    project.run("test", "TORCH=torch==2.12.1")
    assert project.steps() == [INSTALL, BUILD, TEST]
    assert "-r requirements/dev.txt torch==2.12.1" in project.asked.read_text().replace("--requirement", "-r")


def test_a_library_that_is_gone_is_built_again(project: Project) -> None:
    project.run("test")
    (project.path / CPU / "libkeelnorm.so").unlink()
    project.run("test")
    assert project.steps() == [BUILD, TEST]


def test_a_machine_without_a_compiler_goes_on_and_says_so(project: Project) -> None:
    assert "left out" in project.run("test", left="not_built.txt")
    assert project.steps() == [VENV, INSTALL, BUILD, TEST]
    project.run("test", left="not_built.txt")
    assert project.steps() == [TEST]
    project.run("test", left="not_built.txt", KEELNORM_NATIVE="1")
    assert project.steps() == [BUILD, TEST], "required kernels are tried again"
    project.run("test", CXX="another-compiler")
    assert project.steps() == [BUILD, TEST], "another compiler is tried"


def test_a_failed_step_ends_the_run_and_is_repeated(project: Project) -> None:
    project.run("test", left="nothing", status=2)
    assert project.steps() == [VENV, INSTALL, BUILD]
    project.run("test")
    assert project.steps() == [BUILD, TEST]


def test_data_beside_the_project_are_named_to_the_tests(project: Project) -> None:
    data = project.path.parent / "shared" / "data"
    project.run("test")
    assert project.asked.read_text().splitlines()[-1].endswith(" DATA=")
    data.mkdir(parents=True)
    project.run("test")
    assert project.asked.read_text().splitlines()[-1].endswith(f" DATA={data}")
    project.run("test", KEELNORM_DATA_DIR="/elsewhere")
    assert project.asked.read_text().splitlines()[-1].endswith(" DATA=/elsewhere")


def test_help_is_the_default_and_names_every_target(project: Project) -> None:
    said = project.run()
    assert not project.asked.exists()
    checked = ("check", "coverage", "native", "sanitize", "arm")
    for target in ("demo", "lab", "claims", "test", "bench", "models", "memory", "format", "clean", *checked):
        assert f"make {target} " in said
