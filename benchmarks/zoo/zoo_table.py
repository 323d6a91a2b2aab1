"""The results of published architectures, as a table in a terminal and as the page docs/models.md."""

from __future__ import annotations

from statistics import geometric_mean

from rich.console import Console

from benchmarks.zoo.zoo_check import MOST_ERROR
from benchmarks.zoo.zoo_run import ZooReport, ZooRow
from keelnorm.bench.result_table import new_table, number, table_console

_COLUMNS = (
    "architecture", "batch norms", "fused / fusible", "folded / foldable", "error, converted", "error, folded",
    "inference, converted", "inference, folded", "training, converted",
)  # fmt: skip

_HEAD = """\
# Published architectures

What [convert](convert.md) and [fold](fold.md) do to published architectures with random weights.
`make models` measures the table and writes this page.

- **fused / fusible**: calls of batch norms that ran as one kernel with an addition or an activation, counted in one
  call of the converted model after it has learned what follows each layer ([how](how_fusing_works.md)); and how many
  could be fused, counted in a run of the original by separate code (`benchmarks/zoo/fusible_patterns.py`).
- **folded / foldable**: batch norms that were folded; and how many alone read the result of a convolution or linear
  layer, counted in the same way. More are folded where they follow a pooling or precede a layer.
- **error**: the largest difference of outputs, every gradient and running statistics, in training and in evaluation, in
  float64, relative to each tensor's largest value (for gradients below a thousandth of the model's largest, to that).
  Where it is above 10⁻¹⁰, the number in brackets is the change of the original's own results when its input changes by
  rounding errors.
- **inference, training**: times faster than the original (`torch.nn`, eager) at batch {samples}, float32, contiguous:
  medians of {rounds} interleaved rounds on {cpu}, {threads} threads, torch {torch}.
  Ratios on your machine will differ. The same model built twice differs in speed by up to 5 %, depending on where its
  weights are in memory: a difference that small in one row means nothing, only the mean over all rows does.
"""


def print_zoo(report: ZooReport, console: Console | None = None) -> None:
    """Print a line for each architecture, and what is wrong last."""
    console = console or table_console(160)
    table = new_table("Published architectures, converted and folded", _COLUMNS[:1], _COLUMNS[1:])
    for row in report.rows:
        table.add_row(*_cells(row))
    console.print(table)
    for row in report.rows:
        if not row.is_right:
            console.print(f"{row.name}: {row.error or 'is not right'}", style="red", markup=False)
    console.print(_shares(report), markup=False)


def page(report: ZooReport) -> str:
    """Write the page docs/models.md."""
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


def _cells(row: ZooRow) -> list[str]:
    found = row.check
    if found is None:
        return [row.name, *[""] * 8]
    error = f"{found.converted_error:.0e}"
    if found.converted_error > MOST_ERROR:
        error += f" ({found.rounding:.0e})"
    return [
        row.name,
        str(found.batch_norms),
        f"{found.fused} / {found.fusible}",
        f"{found.folded} / {found.foldable}",
        error,
        f"{found.folded_error:.0e}",
        *map(number, (row.converted_inference, row.folded_inference, row.training)),
    ]


def _shares(report: ZooReport) -> str:
    found = [row.check for row in report.rows if row.check is not None]
    fused, fusible = sum(one.fused for one in found), sum(one.fusible for one in found)
    foldable = sum(one.foldable for one in found)
    folded = sum(min(one.folded, one.foldable) for one in found)
    right = sum(row.is_right for row in report.rows)
    text = (
        f"{right} of {len(report.rows)} architectures are right. Of {fusible} fusible calls {fused} are fused "
        f"({100 * fused / max(1, fusible):.1f} %), of {foldable} foldable batch norms {folded} are folded "
        f"({100 * folded / max(1, foldable):.1f} %)."
    )
    means = [
        f"{geometric_mean(values):.2f}"
        for field in ("converted_inference", "folded_inference", "training")
        if (values := [getattr(row, field) for row in report.rows if getattr(row, field) is not None])
    ]
    if len(means) == 3:
        text += (
            f" Geometric means: inference {means[0]} times faster converted and {means[1]} folded, a training "
            f"step {means[2]} converted."
        )
    return text


def _reasons(report: ZooReport) -> list[str]:
    """Why batch norms that could be fused or folded were not."""
    lines = [
        f"- {row.name}: {'; '.join(found.left) or 'no reason is known'}"
        for row in report.rows
        if (found := row.check) and (found.fused < found.fusible or found.folded < found.foldable)
    ]
    return ["What is missing, and why:", "", *lines] if lines else []
