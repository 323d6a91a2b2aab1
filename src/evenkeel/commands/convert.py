"""The command `evenkeel convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from evenkeel.commands import options
from evenkeel.commands.errors import aside, told_in_one_line


@told_in_one_line("convert")
def convert_command(
    model: options.Model,
    args: options.Args = None,
    weights: options.Weights = None,
    key: options.Key = None,
    prefix: options.Prefix = None,
    inputs: options.Input = None,
    example_file: options.Example = None,
    where: options.Where = None,
    fuse: Annotated[
        bool,
        typer.Option("--fuse/--no-fuse", help="Whether batch norms run with the addition and activation behind them."),
    ] = True,
    sync: Annotated[
        bool | None,
        typer.Option("--sync/--no-sync", help="Make them synchronized, or plain; else they stay as they are."),
    ] = None,
    out: options.Out = None,
    as_json: options.AsJson = False,
    report_file: options.ReportFile = None,
    force: options.Force = False,
) -> None:
    """Show what ek.convert does to a model: which batch norms it takes, what they run with, and why others don't.

    What a batch norm runs with is known once the model has run: --input or --example gives an example for that. The
    state_dict is the same after it; --out writes that, to be loaded before ek.convert or after.
    """
    from evenkeel.commands.examples import example_of
    from evenkeel.commands.inspection import run_twice
    from evenkeel.commands.model import load_model
    from evenkeel.commands.output import Output
    from evenkeel.surgery import convert

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
