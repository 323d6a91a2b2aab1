"""The command `keelnorm fold`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from keelnorm.cli._shared import model_options
from keelnorm.cli._shared.common_options import AsJson
from keelnorm.cli._shared.failures import CommandError, aside, need, told_in_one_line


@told_in_one_line()
def fold_command(
    model: model_options.Model,
    args: model_options.Args = None,
    weights: model_options.Weights = None,
    key: model_options.Key = None,
    prefix: model_options.Prefix = None,
    inputs: model_options.Input = None,
    example_file: model_options.Example = None,
    where: model_options.Where = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0.0, help="Leave out a layer whose output would change by more, relatively."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Write the folded model: its state_dict as .safetensors, or all of it as .onnx, which is then checked "
            "in onnxruntime.",
        ),
    ] = None,
    as_json: AsJson = False,
    report_file: model_options.ReportFile = None,
    force: model_options.Force = False,
) -> None:
    """Fold a model's batch norms into neighboring layers, for inference, and check each.

    The model is put in evaluation mode and run on the example of --input or --example.
    """
    from keelnorm.cli._shared.example_inputs import example_of
    from keelnorm.cli._shared.model_source import load_model
    from keelnorm.cli._shared.output import Output
    from keelnorm.engine.atomic_write import replacing
    from keelnorm.surgery import export_onnx, fold

    output = Output(as_json, report_file, out, force, (".safetensors", ".onnx"))
    to_onnx = out is not None and out.suffix == ".onnx"
    if to_onnx:
        need("export", "onnx", "onnxscript", "onnxruntime")
    if not inputs and example_file is None:
        raise CommandError("fold runs the model on an example: give --input 1,3,224,224 or --example FILE")
    with aside():
        network, notes = load_model(model, args, weights, key, prefix)
        example = example_of(network, inputs, example_file)
        network, report = fold(network.eval(), example, inplace=True, tolerance=tolerance, where=where or None)
        report.notes[:0] = notes
        if out is not None and to_onnx:
            with replacing(out) as temporary:
                written = export_onnx(network, example, temporary, tolerance=1e-3)
            report = replace(report, summary={**report.summary, "in onnxruntime": written.summary["difference"]})
            report.notes.append(f"The folded model was written to {out}.")
        else:
            output.save(network, report)
    output.tell(report)
