"""The results of the memory benchmark as a document that `keelnorm.measure.page` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.memory.memory_results import CONVERTED, EAGER, SAVED, MemoryReport
from benchmarks.memory.memory_table import (
    architecture_table,
    checkpoint_table,
    count_note,
    failures,
    largest_table,
    peak_table,
    target_table,
)
from benchmarks.memory.memory_targets import MEAN_STEP, mean_bytes, mean_step, targets
from benchmarks.memory.training_peak import ARMS
from keelnorm.measure.machine import facts_of
from keelnorm.measure.page_parts import Axis, Figure, Section, Series, Table

COMMAND = "python -m benchmarks.memory"
Bars = Mapping[str, Mapping[str, float]]
"""By series and category."""


def memory_document(report: MemoryReport) -> dict[str, Any]:
    """The document of a report.

    Raises:
        ValueError: There is nothing to show.
    """
    if not report.rows:
        raise ValueError("the result has no networks to draw")
    asked = ", ".join(f"{key} {value}" for key, value in asdict(report.settings).items() if value is not None)
    sections = [_bytes(report), _steps(report), _peaks(report), _largest(report), _checkpoints(report)]
    met = [one.is_met for one in targets(report)]
    return {
        "title": "keelnorm: memory in training",
        "environment": facts_of(report.machine) | {"settings": asked},
        "seconds": round(report.seconds),
        "failures": failures(report),
        "summary": [asdict(target_table(report))],
        "notes": [
            f"{met.count(True)} of {len(met)} targets are met, {met.count(None)} were not measured. "
            "A mean is not shown when one of its networks has no number.",
            "Correct first: outputs, gradients and buffers of three training steps have to be equal bit for bit "
            "with and without save_memory; a network with a difference gets no number.",
        ],
        "sections": [asdict(section) for section in sections if section is not None],
        "command": f"{COMMAND} --from RESULT.json --html PAGE.html",
    }


def _bytes(report: MemoryReport) -> Section | None:
    rows = [(row.name, row.bytes_kept) for row in report.rows if row.bytes_kept]
    if not rows:
        return None
    mean = mean_bytes(report)
    return _section(
        "bytes",
        "What is kept for the backward?",
        f"save_memory keeps {mean:.2f} of what eager keeps, in the geometric mean over {len(rows)} networks."
        if mean
        else f"{len(rows)} networks were counted.",
        _bars(
            "Bytes kept between forward and backward",
            "bytes / eager's",
            f"Bars of {CONVERTED} and of {SAVED} for each architecture, relative to eager; less is better.",
            {arm: {name: kept.ratio(arm) for name, kept in rows} for arm in (SAVED, CONVERTED)},
            reference=(1.0, EAGER),
        ),
        architecture_table(report),
        [
            (
                "bytes",
                "distinct storages that autograd saves, without parameters, buffers and input; batch "
                f"{report.settings.samples}",
            ),
            ("a second count", count_note(report)),
        ],
    )


def _steps(report: MemoryReport) -> Section | None:
    bars = {pages: {row.name: ratio for row in report.rows if (ratio := row.step_ratio(pages))} for pages in MEAN_STEP}
    if not any(bars.values()):
        return None
    means = {pages: mean_step(report, pages) for pages in bars}
    said = [f"×{mean:.2f} with {pages} pages" for pages, mean in means.items() if mean]
    return _section(
        "steps",
        "What does it cost?",
        f"A training step takes {' and '.join(said)}, in the geometric mean." if said else "Some networks were timed.",
        _bars(
            "Time of a step with save_memory over that without",
            "time / time of the converted model",
            "Bars for each architecture, with reused and with fresh pages; 1 means equal.",
            bars,
            reference=(1.0, "as fast"),
        ),
        None,
        [
            ("step", "forward, loss and backward of one converted model, with and without save_memory by turns"),
            ("time", "the median over rounds of the ratio within a round; fresh pages before reused ones"),
        ],
    )


def _peaks(report: MemoryReport) -> Section | None:
    rows = [(row.name, row.peak) for row in report.rows if row.peak]
    if not rows:
        return None
    least = min(peak.ratio(SAVED) for _, peak in rows)
    return _section(
        "peaks",
        "How much memory does training take?",
        f"With save_memory a process takes down to {least:.2f} of eager's peak.",
        _bars(
            f"Peak resident memory of {len(rows[0][1].above[EAGER])} training steps",
            "MB above what there was before",
            "Bars of the three arms for each network; less is better.",
            {arm: {name: max(peak.above[arm]) / 1e6 for name, peak in rows} for arm in reversed(ARMS)},
        ),
        peak_table(report),
        [
            (
                "peak",
                f"of a process for each arm, batch {report.settings.peak_samples}, SGD with momentum, from the first "
                "step on, in which converted layers learn what follows them",
            )
        ],
    )


def _largest(report: MemoryReport) -> Section | None:
    rows = [(row.name, row.largest) for row in report.rows if row.largest]
    if not rows:
        return None
    most = max(found.ratio for _, found in rows)
    return _section(
        "largest",
        "How large may a batch be?",
        f"With save_memory up to {most:.2f} times as many images train within the same memory.",
        _bars(
            f"Largest batch within {report.settings.limit_bytes / 2**30:g} GiB",
            "images",
            "Bars of eager and of save_memory for each network; more is better.",
            {arm: {name: float(found.batch[arm]) for name, found in rows} for arm in (SAVED, EAGER)},
        ),
        largest_table(report),
        [("run", "a process for each batch, ended when its peak exceeds the limit; the next larger batch was tried")],
    )


def _checkpoints(report: MemoryReport) -> Section | None:
    rows = [(row.name, row.checkpoint) for row in report.rows if row.checkpoint]
    if not rows:
        return None
    bars = {
        pages: {name: step.ratio for name, found in rows for step in found.steps if step.pages == pages}
        for pages in MEAN_STEP
    }
    faster = sum(ratio < 1 for each in bars.values() for ratio in each.values())
    return _section(
        "checkpointing",
        "Is it faster than checkpointing?",
        f"save_memory is faster in {faster} of {sum(map(len, bars.values()))} comparisons with checkpointing.",
        _bars(
            "Time of a step with save_memory over that with checkpointing",
            "time / time with checkpointing",
            "Bars for each network, with reused and with fresh pages; below 1, save_memory is faster.",
            bars,
            reference=(1.0, "as fast"),
        ),
        checkpoint_table(report),
        [
            (
                "checkpointing",
                "of the first blocks of the eager model, as many as it takes to keep no more than save_memory and 5 %",
            )
        ],
    )


def _section(
    name: str, question: str, answer: str, figure: Figure, table: Table | None, setup: Sequence[tuple[str, str]]
) -> Section:
    return Section(
        name=name,
        title=name.capitalize(),
        question=question,
        answer=answer,
        command=COMMAND,
        figures=[figure],
        tables=[] if table is None else [table],
        setup=setup,
        open=True,
    )


#: How each series is drawn.
_STYLES = {
    EAGER: "torch", CONVERTED: "other-1", SAVED: "keelnorm",
    "reused": "keelnorm", "fresh": "other-1",
}  # fmt: skip


def _bars(title: str, unit: str, description: str, bars: Bars, *, reference: tuple[float, str] | None = None) -> Figure:
    names = list(dict.fromkeys(name for values in bars.values() for name in values))
    return Figure(
        title=title,
        x=Axis("", categories=names),
        y=Axis(unit),
        series=[
            Series(label, _STYLES[label], [names.index(name) for name in values], list(values.values()))
            for label, values in bars.items()
            if values
        ],
        description=description,
        kind="bars",
        reference=reference,
    )
