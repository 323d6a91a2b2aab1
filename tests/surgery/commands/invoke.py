"""Run the commands on models, like a user, and look at what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typer.testing import CliRunner, Result

from keelnorm.cli import app

runner = CliRunner()


def run(*words: str) -> Result:
    """Run a command that succeeds."""
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    return result


def refused(*words: str) -> str:
    """The one line that a failing command prints on stderr, with nothing on stdout."""
    result = runner.invoke(app, words)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line != "a module that prints"]
    assert len(lines) == 1, result.stderr
    return lines[0]


def report_of(*words: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(run(*words, "--json").stdout)  # which is there alone
    return report


def trained(classes: int = 4) -> nn.Module:
    """The module's network, with random weights and statistics."""
    from nets import small  # type: ignore[import-not-found]

    model: nn.Module = small(classes)
    torch.manual_seed(5)
    with torch.no_grad():
        for value in (*model.parameters(), *(one for one in model.buffers() if one.is_floating_point())):
            value.uniform_(0.2, 1.0)
    return model


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Bad:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path("ran").touch, ()
