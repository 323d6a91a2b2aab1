"""What is missing is said with what installs it, however the package came here."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from keelnorm.engine import optional_imports
from keelnorm.engine.optional_imports import lacking, required_by

METADATA = """Metadata-Version: 2.4
Name: keelnorm
Version: 9
Requires-Dist: torch>=2.10
Requires-Dist: surely-not-there>=0.12; extra == "cli"
Requires-Dist: numpy>=1; extra == "cli"
Requires-Dist: keelnorm[cli]; extra == "lab"
Requires-Dist: not-there-too<3,>=2; extra == "lab"
Requires-Dist: keelnorm[cli,lab]; extra == "all"
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution of the package's name, found before the real one."""
    folder = tmp_path / "keelnorm-9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_what_an_extra_brings() -> None:
    assert required_by("cli") == ["surely-not-there>=0.12", "numpy>=1"]
    assert required_by("lab") == required_by("all") == [*required_by("cli"), "not-there-too<3,>=2"]
    assert required_by("gone") == []


@pytest.mark.usefixtures("installed")
def test_what_is_missing_is_named_with_its_versions_and_what_is_there_is_not() -> None:
    assert lacking("cli", "numpy", "torch") is None
    words = lacking("lab", "numpy", "surely_not_there")
    assert words is not None
    assert words.startswith("surely_not_there: ")
    assert shlex.split(words)[-3:] == ["install", "surely-not-there>=0.12", "not-there-too<3,>=2"]


def test_of_a_package_that_is_on_the_path_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional_imports, "_DISTRIBUTION", "surely-not-there")
    monkeypatch.setattr(optional_imports, "find_spec", lambda name: None if name in ("sklearn", "rich") else object())
    words = lacking("lab", "sklearn", "rich", "numpy")
    assert words is not None
    assert words.startswith("sklearn, rich: ")
    assert shlex.split(words)[-3:] == ["install", "scikit-learn", "rich"]


def test_what_installs_is_that_of_this_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    beside = str(Path(sys.executable).parent / "pip")
    for found, pip, answer in (
        (beside, True, "pip install"),
        (str(tmp_path / "pip"), True, f"{sys.executable} -m pip install"),
        (None, True, f"{sys.executable} -m pip install"),
        (None, False, f"uv pip install --python {sys.executable}"),
    ):
        monkeypatch.setattr(optional_imports.shutil, "which", lambda name, found=found: found)
        monkeypatch.setattr(optional_imports, "find_spec", lambda name: None)
        monkeypatch.setattr(optional_imports, "_is_installed", lambda name, pip=pip: name == "pip" and pip)
        words = lacking("gone", "rich")
        assert words == f"rich: {answer} rich"


@pytest.mark.parametrize("extra", ["cli", "lab", "dask", "bench", "export", "all"])
def test_no_extra_leads_to_the_index_for_the_package_itself(extra: str) -> None:
    """Its name there is another project's."""
    assert required_by(extra)
    assert not [one for one in required_by(extra) if one.startswith("keelnorm")]
