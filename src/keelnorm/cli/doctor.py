"""The command `keelnorm doctor`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, get_args

import typer

from keelnorm.cli._shared import model_options
from keelnorm.cli._shared.common_options import AsJson, page_path, writable_path
from keelnorm.cli._shared.failures import CommandError, aside, need, told_in_one_line

#: The exit status where a finding is as severe as --fail-on says.
FOUND = 3
FailOn: TypeAlias = Literal["error", "warning", "info", "never"]
Names: TypeAlias = list[str] | None


@told_in_one_line()
def doctor_command(
    model: model_options.Model,
    args: model_options.Args = None,
    weights: model_options.Weights = None,
    key: model_options.Key = None,
    prefix: model_options.Prefix = None,
    inputs: model_options.Input = None,
    example_file: model_options.Example = None,
    data: Annotated[str | None, model_options.DATA] = None,
    batch_size: model_options.BatchSize = 64,
    max_batches: model_options.MaxBatches = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Look at a training step: torch.nn:CrossEntropyLoss, or package.module:loss(model, batch).",
        ),
    ] = None,
    where: model_options.Where = None,
    training: Annotated[
        bool | None, typer.Option("--train/--eval", help="Set this mode first; by default the model's own.")
    ] = None,
    select: Annotated[
        Names, typer.Option(metavar="RULE", help="Only these rules: KN101, momentum, or KN1 for all that begin so.")
    ] = None,
    ignore: Annotated[Names, typer.Option(metavar="RULE", help="Not these rules.")] = None,
    silence: Annotated[
        Names, typer.Option(metavar="RULE:PATTERN", help="Silence a rule for layers: 'KN101:layer1.*'.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Report only what is not in this file of --write-baseline.")
    ] = None,
    write_baseline: Annotated[
        Path | None,
        typer.Option("--write-baseline", metavar="FILE", callback=writable_path, help="Write the findings there."),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            callback=lambda path: None if path is None else page_path(path),
            help="Draw the findings, and drift, noise and gradients of each layer, on a page.",
        ),
    ] = None,
    sarif: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=writable_path, help="Write the findings as SARIF 2.1.0.")
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Apply the safe remedies; --out writes the repaired state_dict.")
    ] = False,
    fail_on: Annotated[
        str,
        typer.Option(
            "--fail-on", metavar="SEVERITY", help=f"Exit with {FOUND} from here on: error, warning, info; or never."
        ),
    ] = "error",
    out: model_options.Out = None,
    as_json: AsJson = False,
    report_file: model_options.ReportFile = None,
    force: model_options.Force = False,
) -> None:
    """Say what is wrong with a model's batch norms: which layer, why, how sure, and the code that repairs it.

    --input or --example show what stands beside each layer. --data does so too, and is what running statistics and
    batches are judged by; --fix needs it to compute running statistics again.
    """
    import json

    from keelnorm.cli._shared.example_inputs import batches_of, example_of, loss_of
    from keelnorm.cli._shared.model_source import load_model, source_of
    from keelnorm.cli._shared.output import Output
    from keelnorm.doctor import diagnose
    from keelnorm.engine.atomic_write import write_text

    if fail_on not in get_args(FailOn):
        raise CommandError(f"--fail-on must be one of {', '.join(get_args(FailOn))}; got {fail_on!r}")
    if fix is not (out is not None):
        raise CommandError("--fix and --out FILE go together: one repairs the model, the other says where it is kept")
    if page is not None:
        need("bench", "jinja2", "plotly")
    output = Output(as_json, report_file, out, force)
    with aside():
        network, notes = load_model(model, args, weights, key, prefix)
        if training is not None:
            network.train(training)
        diagnosis = diagnose(
            network,
            None if data is None else batches_of(network, data, batch_size),
            example=example_of(network, inputs, example_file),
            loss=None if loss is None else loss_of(loss),
            select=select or None,
            ignore=ignore or None,
            where=where or None,
            silence=silence or None,
            baseline=baseline,
            fix=fix,
            max_batches=max_batches,
        )
        notes += output.save_state(network)
    if write_baseline is not None:
        diagnosis.write_baseline(write_baseline)
        notes.append(f"The findings were written to {write_baseline}.")
    if page is not None:
        diagnosis.write_page(page)
        notes.append(f"The page was written to {page}.")
    if sarif is not None:
        write_text(sarif, json.dumps(diagnosis.to_sarif(source_of(model)), allow_nan=False) + "\n")
        notes.append(f"The findings were written to {sarif}.")
    output.tell(replace(diagnosis, notes=[*notes, *diagnosis.notes]))
    if fail_on != "never" and diagnosis.at_least(fail_on):  # type: ignore[arg-type]
        raise typer.Exit(FOUND)
