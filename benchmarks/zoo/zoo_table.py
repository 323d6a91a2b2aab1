"""What was found of published architectures, as a table in a terminal and as a page."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from benchmarks.zoo.zoo_run import ModelReport, ModelRow

_COLUMNS = (
    "architecture", "batch norms", "fused / fusible", "folded / foldable", "error, converted", "error, folded",
    "inference, converted", "inference, folded", "training, converted",
)  # fmt: skip

_HEAD = """\
# Published architectures

What [convert](convert.md) and [fold](fold.md) make of architectures as people publish them, with random weights.
The table is made by `make models`, which writes this page.

- **fused / fusible**: calls of batch norms that ran as one kernel with an addition or an activation, counted in one
  call of the converted model after it has learned what follows each layer ([how](how_fusing_works.md)); and how many
  could, counted in a run of the original by other code (`benchmarks.zoo.fusible_patterns`).
- **folded / foldable**: batch norms folded; and how many lie behind a convolution or linear layer that nobody else
  reads, seen in the same way. More are folded where they lie behind a pooling or in front of a layer.
- **error**: the largest difference of outputs, every gradient and running statistics, in training and in evaluation, in
  float64, relative to each tensor's largest value (of gradients below a thousandth of the model's largest, to that).
  Beside what is above 10⁻¹⁰ stands how far the original's own results move when its input changes by roundings.
- **inference, training**: times faster than the original (`torch.nn`, eager) at batch {samples}, float32, contiguous:
  medians of {rounds} interleaved rounds on {cpu}, {threads} threads, torch {torch}.
  Ratios on your machine will differ. The same model, built twice, is up to 5 % faster or slower, by where its weights
  come to lie in memory: so little says nothing about a single row, only about the mean of all.
"""


def print_models(report: ModelReport, console: Console | None = None) -> None:
    """One line for each; what is wrong last."""
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=160)
    table = Table(title="Published architectures, converted and folded", title_style="bold")
    for index, name in enumerate(_COLUMNS):
        table.add_column(name, justify="right" if index else "left")
    for row in report.rows:
        table.add_row(*_cells(row))
    console.print(table)
    for row in report.rows:
        if not row.is_right:
            console.print(f"{row.name}: {row.error or 'is not right'}", style="red", markup=False)
    console.print(_shares(report), markup=False)


def page(report: ModelReport) -> str:
    """The page docs/models.md."""
    machine = report.machine
    lines = [
        _HEAD.format(
            samples=report.samples, rounds=report.rounds, cpu=machine.cpu, threads=machine.threads, torch=machine.torch
        ),
        f"| {' | '.join((_COLUMNS[0], 'from', *_COLUMNS[1:]))} |",
        "|---" * (len(_COLUMNS) + 1) + "|",
    ]
    for row in report.rows:
        name, *rest = _cells(row)
        lines.append(f"| {name} | {row.package} | " + " | ".join(rest) + " |")
    lines += ["", _shares(report), "", *_reasons(report)]
    return "\n".join(lines).rstrip() + "\n"


def _cells(row: ModelRow) -> list[str]:
    counts = row.counts
    if not counts:
        return [row.name, *[""] * 8]
    error = f"{counts['converted_error']:.0e}"
    if counts["converted_error"] > 1e-10:
        error += f" ({counts['rounding']:.0e})"
    return [
        row.name,
        str(counts["batch_norms"]),
        f"{counts['fused']} / {counts['fusible']}",
        f"{counts['folded']} / {counts['foldable']}",
        error,
        f"{counts['folded_error']:.0e}",
        *("" if value is None else f"{value:.2f}"
          for value in (row.converted_inference, row.folded_inference, row.training)),
    ]  # fmt: skip


def _shares(report: ModelReport) -> str:
    found = [row.counts for row in report.rows if row.counts]
    fused, fusible = (sum(counts[name] for counts in found) for name in ("fused", "fusible"))
    foldable = sum(counts["foldable"] for counts in found)
    folded = sum(min(counts["folded"], counts["foldable"]) for counts in found)
    right = sum(row.is_right for row in report.rows)
    text = (
        f"{right} of {len(report.rows)} architectures are right. Of {fusible} fusible calls {fused} are fused "
        f"({100 * fused / max(1, fusible):.1f} %), of {foldable} foldable batch norms {folded} are folded "
        f"({100 * folded / max(1, foldable):.1f} %)."
    )
    timed = [row for row in report.rows if row.training]
    if timed:
        means = [
            math.exp(sum(math.log(value or 1) for value in values) / len(timed))
            for values in zip(
                *((row.converted_inference, row.folded_inference, row.training) for row in timed), strict=True
            )
        ]
        text += (
            f" Geometric means: inference {means[0]:.2f} times faster converted and {means[1]:.2f} folded, a training "
            f"step {means[2]:.2f} converted."
        )
    return text


def _reasons(report: ModelReport) -> list[str]:
    """Why something that could be fused is not."""
    lines = []
    for row in report.rows:
        counts = row.counts
        if counts and (counts["fused"] < counts["fusible"] or counts["folded"] < counts["foldable"]):
            lines += [f"- {row.name}: {'; '.join(counts['left']) or 'no reason is known'}"]
    return ["What is missing, and why:", "", *lines] if lines else []
