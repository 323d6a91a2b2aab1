"""The commands on models run on a module in the current directory."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from surgery.commands.invoke import trained
from torch import nn

import keelnorm as kn
from keelnorm.surgery import Report


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the module `nets` in it."""
    shutil.copy(Path(__file__).with_name("command_models.py"), tmp_path / "nets.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


@pytest.fixture
def model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.syspath_prepend(folder)
    return trained()


@pytest.fixture
def recalibrated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of a recalibrate that sets the means to 7."""
    calls: list[Any] = []

    def recalibrate(model: nn.Module, loader: Any, **options: Any) -> tuple[nn.Module, Report]:
        calls.append(([batch.clone() for batch in loader], options))
        model[1].running_mean.fill_(7.0)
        return model, Report("recalibrate", {"layers": 1}, [{"path": "1", "shift": float("nan")}])

    monkeypatch.setattr(kn.surgery, "recalibrate", recalibrate, raising=False)
    return calls
