"""What is added has a place on the pages: every layer in the table of variants, every command on some page."""

from __future__ import annotations

import re

import pytest
from pages import PAGES, ROOT
from torch.nn.modules.batchnorm import _BatchNorm

import keelnorm as kn

LAYERS = [
    name for name in kn.nn.__all__ if isinstance(kind := getattr(kn.nn, name), type) and issubclass(kind, _BatchNorm)
]
#: Described with the recurrent layers that use it.
ELSEWHERE = {"StepwiseBatchNorm"}


@pytest.mark.parametrize("name", sorted({*LAYERS} - ELSEWHERE))
def test_every_layer_is_in_the_table_of_variants(name: str) -> None:
    patterns = re.findall(r"`kn\.(\w+\*?)`", (ROOT / "docs/variants.md").read_text(encoding="utf-8"))
    assert any(re.fullmatch(pattern.replace("*", r"\w*"), name) for pattern in patterns), (
        f"docs/variants.md lacks {name}"
    )


def test_every_command_is_on_a_page() -> None:
    cli = pytest.importorskip("keelnorm.cli", reason="the command line needs typer")
    names = {info.name for info in (*cli.app.registered_commands, *cli.app.registered_groups)}
    others = [page for page in PAGES if page.name != "architecture.md"]  # which names files, not what commands do
    text = "\n".join(page.read_text(encoding="utf-8") for page in others)
    assert len(names) > 5
    assert not [name for name in names if not re.search(rf"keelnorm {name}\b", text)]
