"""The command `keelnorm inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from keelnorm.cli._shared import model_options
from keelnorm.cli._shared.common_options import AsJson
from keelnorm.cli._shared.failures import aside, told_in_one_line


@told_in_one_line()
def inspect_command(
    model: model_options.Model,
    args: model_options.Args = None,
    weights: model_options.Weights = None,
    key: model_options.Key = None,
    prefix: model_options.Prefix = None,
    inputs: model_options.Input = None,
    example_file: model_options.Example = None,
    where: model_options.Where = None,
    evaluation: Annotated[
        bool, typer.Option("--eval/--train", help="The mode in which the model is run on --input or --example.")
    ] = True,
    memory: Annotated[
        bool, typer.Option("--memory", help="List instead what each module keeps for the backward, in MB.")
    ] = False,
    limit: Annotated[
        float | None,
        typer.Option("--limit", metavar="GIB", min=0.001, help="With --memory: the largest batch for so much memory."),
    ] = None,
    as_json: AsJson = False,
    report_file: model_options.ReportFile = None,
    force: model_options.Force = False,
) -> None:
    """List a model's batch norms: their kind, running statistics and γ, and neighbors.

    With --input or --example also what comes before and after each, and which can be fused or folded. With --memory
    what each module keeps between forward and backward: as it is, converted, and with kn.save_memory.
    """
    from keelnorm.cli._shared.example_inputs import example_of
    from keelnorm.cli._shared.inspection import inspect_memory, inspect_model, without_constants
    from keelnorm.cli._shared.model_source import load_model
    from keelnorm.cli._shared.output import Output

    output = Output(as_json, report_file, None, force)
    with aside():
        network, notes = load_model(model, args, weights, key, prefix)
        example = example_of(network, inputs, example_file)
        if memory:
            report = inspect_memory(network, example, limit=None if limit is None else limit * 2**30)
        else:
            report = inspect_model(network, example, where=where or None, evaluation=evaluation)
        report.notes[:0] = notes
    output.tell(report, report if memory else without_constants(report))
