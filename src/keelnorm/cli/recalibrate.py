"""The command `keelnorm recalibrate`."""

from __future__ import annotations

from typing import Annotated

import typer

from keelnorm.cli._shared import model_options
from keelnorm.cli._shared.common_options import AsJson
from keelnorm.cli._shared.failures import aside, told_in_one_line


@told_in_one_line()
def recalibrate_command(
    model: model_options.Model,
    data: Annotated[str, model_options.DATA],
    args: model_options.Args = None,
    weights: model_options.Weights = None,
    key: model_options.Key = None,
    prefix: model_options.Prefix = None,
    where: model_options.Where = None,
    batch_size: model_options.BatchSize = 64,
    sequential: Annotated[
        bool,
        typer.Option("--sequential", help="Recalibrate one layer after the other, in order."),
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0.0, help="Stop when the statistics are this accurate; by default use all data."),
    ] = None,
    max_batches: model_options.MaxBatches = None,
    out: model_options.Out = None,
    as_json: AsJson = False,
    report_file: model_options.ReportFile = None,
    force: model_options.Force = False,
) -> None:
    """Compute a model's running statistics again from data, and show how far off they were."""
    from keelnorm import surgery
    from keelnorm.cli._shared.example_inputs import batches_of
    from keelnorm.cli._shared.model_source import load_model
    from keelnorm.cli._shared.output import Output

    output = Output(as_json, report_file, out, force)
    with aside():
        network, notes = load_model(model, args, weights, key, prefix)
        network, report = surgery.recalibrate(
            network,
            batches_of(network, data, batch_size),
            where=where or None,
            sequential=sequential,
            tolerance=tolerance,
            max_batches=max_batches,
        )
        report.notes[:0] = notes
        output.save(network, report)
    output.tell(report)
