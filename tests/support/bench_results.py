"""Settings of small benchmark runs, results without a run, and the commands called as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.testing import CliRunner, Result

from keelnorm.bench.cases import LAYOUTS, MODES, VARIANTS
from keelnorm.bench.results import NetworkRow, Report, Row, Settings
from keelnorm.bench.summary import means, totals
from keelnorm.measure.machine import describe


def settings_of(peers: list[str], **given: Any) -> Settings:
    """Settings of a run on one small shape."""
    defaults = {
        "batch": 2,
        "layouts": list(LAYOUTS),
        "variants": list(VARIANTS),
        "modes": list(MODES),
        "shapes": ["8x16x4x4"],
        "peers": peers,
        "rounds": 2,
        "min_time_ms": 0.0,
    }
    return Settings(**(defaults | given))


def invoke(command: Callable[..., None], *words: str) -> Result:
    """Run a command's function with words as on the command line."""
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, words)


def kernel_rows(pages: str = "fresh", factor: float = 1.0) -> list[Row]:
    """Two shapes in both layouts: keelnorm wins one of them, and loses the other."""
    rows = []
    for shape, ratio in (("2x64x7x7", 0.5 * factor), ("2x128x7x7", 1.25 * factor)):
        for layout in ("contiguous", "channels_last"):
            for peer, against, time in (("keelnorm", "eager", 100 * ratio), ("eager", "keelnorm", 100.0)):
                value = ratio if peer == "keelnorm" else 1 / ratio
                rows.append(
                    Row(
                        *("resnet50", shape, layout, "bn_relu", "both", peer),
                        pages=pages,
                        median_us=time,
                        spread=0.1,
                        gbps=5.0,
                        least_bytes=1000,
                        copied_bytes=2000,
                        copy_fraction=0.5,
                        ratios={against: value},
                    )
                )
    return rows


def network_rows(pages: str = "fresh") -> list[NetworkRow]:
    """One network, both kinds of layers."""
    rows = []
    for layers, time in (("eager", 20.0), ("keelnorm", 10.0)):
        other = "keelnorm" if layers == "eager" else "eager"
        rows.append(
            NetworkRow(
                *("ResNet-50", f"{layers} contiguous {pages}", layers, "contiguous", pages, "training", 2, 32),
                step_ms=time,
                spread=0.0,
                peak_bytes=2 << 20,
                baseline_bytes=1 << 20,
                ratios={f"{other} contiguous {pages}": 0.5 if layers == "keelnorm" else 2.0},
                samples_ms=[time],
            )
        )
    return rows


def report_of(rows: list[Row], networks: list[NetworkRow] | None = None) -> Report:
    """A report of this machine."""
    layouts = ["contiguous", "channels_last"]
    peers = ["keelnorm", "eager"]
    settings = Settings(2, layouts, ["bn_relu"], ["both"], [], peers, 3, 2.0, pages=["fresh", "reused"])
    return Report(
        describe(), settings, rows, means(rows, peers), totals(rows, peers), networks=networks or [], seconds=1.5
    )
