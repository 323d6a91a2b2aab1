"""The results of the memory benchmark as the page docs/memory_figures.md."""

from __future__ import annotations

from textwrap import fill

from benchmarks.memory.memory_results import MemoryReport
from benchmarks.memory.memory_table import (
    architecture_table,
    checkpoint_table,
    count_note,
    failures,
    largest_table,
    peak_table,
)
from keelnorm.measure.page_parts import Table

_HEAD = """\
# Memory, measured

What [`kn.save_memory`](memory.md#outputs-that-are-not-kept) saves on published architectures with random weights, and
what it costs. `make memory` measures all of it and writes this page.

Correct first: outputs, gradients and buffers of three training steps have to equal those of the same converted model
without `save_memory`, bit for bit. Otherwise the network gets no number.

Measured on {cpu}, threads: {threads}, torch {torch}, float32, contiguous. Ratios on your machine will differ, those of
times above all. A ~ marks times that other programs disturbed.
"""

_ALL = """\
- **kept**: what autograd keeps between forward and backward at batch {samples}, in distinct storages without
  parameters, buffers and input, as [`kn.kept_memory`](memory.md#outputs-that-are-not-kept) counts it: megabytes of
  eager, then the ratio to eager. Layers are converted by `kn.convert` and have learned what follows them; small results
  do not wait.
- **step**: the time of forward, loss and backward with `save_memory` over that of the same converted model without,
  with fresh and with [reused](memory.md#reusing-pages) pages: medians of interleaved rounds, at a batch at which a step
  takes about a third of a second. A single row is uncertain by some percent; the mean says more.
"""

_PEAK = """\
Peak resident memory of three training steps with SGD and momentum at batch {samples}, above what the process had before
the first step: the largest of the three. The first step is the one in which a converted model's layers
learn what follows them.
"""

_LARGEST = """\
The largest batch at which a process trains with a peak of at most {limit:g} GiB resident memory, interpreter and torch
included. It was found by runs, and the next larger batch was tried and went beyond.
"""

_CHECKPOINT = """\
Against `torch.utils.checkpoint` on the eager model. Its first blocks are checkpointed, as many as it takes to keep at
most 5 % more than `save_memory`. Times are those of a step with `save_memory` over one with checkpointing.
"""


def page(report: MemoryReport) -> str:
    """Write the page docs/memory_figures.md."""
    machine, settings = report.machine, report.settings
    parts = [_HEAD.format(cpu=machine.cpu, threads=machine.threads, torch=machine.torch)]
    for title, text, table in (
        ("All architectures", _ALL.format(samples=settings.samples), architecture_table(report)),
        ("Peak memory", _PEAK.format(samples=settings.peak_samples), peak_table(report)),
        ("Largest batch", _LARGEST.format(limit=settings.limit_bytes / 2**30), largest_table(report)),
        ("Checkpointing", _CHECKPOINT, checkpoint_table(report)),
    ):
        if table.rows:
            parts += [f"## {title}\n", text, _markdown(table)]
    if note := count_note(report):
        parts.insert(4, fill(note, 120) + "\n")
    if missed := failures(report):
        parts.append("Not measured:\n\n" + "\n".join(f"- {line}" for line in missed) + "\n")
    return "\n".join(parts)


def _markdown(table: Table) -> str:
    head, *lines = [f"| {' | '.join(row)} |" for row in (table.columns, *table.rows)]
    return "\n".join([head, "|---" * len(table.columns) + "|", *lines]) + "\n"
