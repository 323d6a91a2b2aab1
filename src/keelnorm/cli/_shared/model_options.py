"""Arguments and options that the commands on models share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

Model: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="package.module:callable that returns the model; the current directory is looked in too."
    ),
]
Args: TypeAlias = Annotated[
    str | None, typer.Option("--args", metavar="JSON", help="""Its keywords, such as '{"num_classes": 10}'.""")
]
Weights: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Load this state_dict: .safetensors, or a file of torch.save with tensors alone.",
    ),
]
Key: TypeAlias = Annotated[
    str | None,
    typer.Option("--key", metavar="KEY", help="What the state_dict is called in that file, such as ema or ema.module."),
]
Prefix: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--prefix", metavar="PREFIX", help="Take the keys that begin with this, without it, such as 'student.'."
    ),
]
Input: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE[:DTYPE]",
        help="Run the model on random numbers of this shape, such as 1,3,224,224 or 1,128:int64; again for each "
        "argument.",
    ),
]
Example: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--example",
        metavar="FILE",
        help="Run the model on what is in this file: .safetensors, its keywords by name, or .npy, its only argument.",
    ),
]
#: Of ``--data``, which some commands need and others take.
DATA = typer.Option(
    "--data",
    metavar="DATA",
    help="Batches: a .safetensors, .npy or .npz file with one array, the inputs (N, ...); or package.module:callable "
    "that returns an iterable of batches.",
)
BatchSize: TypeAlias = Annotated[int, typer.Option(min=1, help="Batch size for inputs from a file.")]
MaxBatches: TypeAlias = Annotated[int | None, typer.Option(min=1, help="Use at most this many batches.")]
Where: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="PATTERN",
        help="Only batch norms whose path matches, such as 'layer1.*'; may be given again.",
    ),
]
Out: TypeAlias = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write the state_dict to this .safetensors file.")
]
ReportFile: TypeAlias = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write the report as JSON to this file too.")
]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
