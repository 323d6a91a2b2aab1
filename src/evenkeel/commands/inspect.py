"""The command `evenkeel inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from evenkeel.commands import options
from evenkeel.commands.errors import aside, told_in_one_line


@told_in_one_line("inspect")
def inspect_command(
    model: options.Model,
    args: options.Args = None,
    weights: options.Weights = None,
    key: options.Key = None,
    prefix: options.Prefix = None,
    inputs: options.Input = None,
    example_file: options.Example = None,
    where: options.Where = None,
    evaluation: Annotated[
        bool, typer.Option("--eval/--train", help="The mode in which the model is run on --input or --example.")
    ] = True,
    as_json: options.AsJson = False,
    report_file: options.ReportFile = None,
    force: options.Force = False,
) -> None:
    """List a model's batch norms: what they are, their running moments and γ, and what stands beside them.

    With --input or --example it says too what comes before and after each, and which of them can be folded.
    """
    from evenkeel.commands.examples import example_of
    from evenkeel.commands.inspection import inspect_model, without_constants
    from evenkeel.commands.model import load_model
    from evenkeel.commands.output import Output

    output = Output(as_json, report_file, None, force)
    with aside():
        network, notes = load_model(model, args, weights, key, prefix)
        example = example_of(network, inputs, example_file)
        report = inspect_model(network, example, where=where or None, evaluation=evaluation)
        report.notes[:0] = notes
    output.tell(report, without_constants(report))
