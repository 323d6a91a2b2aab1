"""The command `keelnorm convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from keelnorm.cli._shared import model_options
from keelnorm.cli._shared.common_options import AsJson
from keelnorm.cli._shared.failures import aside, told_in_one_line


@told_in_one_line()
def convert_command(
    model: model_options.Model,
    args: model_options.Args = None,
    weights: model_options.Weights = None,
    key: model_options.Key = None,
    prefix: model_options.Prefix = None,
    inputs: model_options.Input = None,
    example_file: model_options.Example = None,
    where: model_options.Where = None,
    fuse: Annotated[
        bool,
        typer.Option("--fuse/--no-fuse", help="Run batch norms fused with the addition and activation after them."),
    ] = True,
    sync: Annotated[
        bool | None,
        typer.Option("--sync/--no-sync", help="Make them synchronized, or not; by default they stay as they are."),
    ] = None,
    out: model_options.Out = None,
    as_json: AsJson = False,
    report_file: model_options.ReportFile = None,
    force: model_options.Force = False,
) -> None:
    """Show what kn.convert does to a model: what it converts, what runs fused, and why others do not.

    What a batch norm runs with is known once the model has run: give --input or --example.
    The state_dict does not change; --out writes it, to be loaded before or after kn.convert.
    """
    from keelnorm.cli._shared.example_inputs import example_of
    from keelnorm.cli._shared.inspection import run_twice
    from keelnorm.cli._shared.model_source import load_model
    from keelnorm.cli._shared.output import Output
    from keelnorm.surgery import convert

    output = Output(as_json, report_file, out, force)
    with aside():
        network, notes = load_model(model, args, weights, key, prefix)
        example = example_of(network, inputs, example_file)
        network, report = convert(network, fuse=fuse, sync=sync, where=where or None)
        if example is not None:
            notes += run_twice(network, example)
        elif fuse:
            notes.append("What batch norms run with is known once the model has run: give --input or --example.")
        report.notes[:0] = notes
        output.save(network, report)
    output.tell(report)
