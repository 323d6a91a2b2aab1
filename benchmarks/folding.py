"""The command `keelnorm bench folding`: inference with batch norms folded, by keelnorm and by others."""

import copy
import statistics
from time import perf_counter
from typing import Annotated, Any

import typer

from keelnorm.engine.optional_imports import lacking

ORIGINAL = "torch.nn, eager"


def folding_command(
    network: Annotated[str, typer.Option(help="An architecture of `keelnorm bench models`.")] = "ResNet-50",
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of every arm that are timed.")] = 9,
    compiled: Annotated[bool, typer.Option("--compiled/--eager", help="Time torch.compile with freezing too.")] = True,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Inputs and weights channels-last.")] = False,
) -> None:
    """Time inference of a network whose batch norms are folded: by kn.fold, by torch's fusion, by torch.compile.

    Outputs are compared with the original's first; one that differs gets no time, and the exit status is 1.
    """
    if words := lacking("bench", "pytorchcv"):
        typer.echo(f"the networks need {words}", err=True)
        raise typer.Exit(1)
    import torch
    from rich.console import Console
    from rich.table import Table

    from benchmarks.architectures import ARCHITECTURES
    from keelnorm.measure import timing

    if network not in ARCHITECTURES:
        raise typer.BadParameter(f"known are {', '.join(ARCHITECTURES)}", param_hint="--network")
    one = ARCHITECTURES[network]
    x = one.batch(batch)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    console = Console()
    with torch.no_grad():
        arms = _arms(one.build().eval(), x, compiled, channels_last)
        expected = arms[ORIGINAL](x)
        wrong = [name for name, call in arms.items() if not torch.allclose(call(x), expected, rtol=1e-3, atol=1e-3)]
        calls = {name: call for name, call in arms.items() if name not in wrong}
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for index, order in enumerate(timing.turns(tuple(calls), rounds + 2)):
            for name in order:
                start = perf_counter()
                calls[name](x)
                if index >= 2:
                    taken[name].append(perf_counter() - start)
    layout = "channels-last" if channels_last else "contiguous"
    table = Table(title=f"{network}, inference, batch {batch}, float32, {layout}", title_style="bold")
    for heading in ("arm", "ms", "times faster than eager", "than folded by keelnorm"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for name, seconds in taken.items():
        ratios = [1 / timing.ratio(seconds, taken[other]) for other in (ORIGINAL, "kn.fold")]
        table.add_row(name, f"{statistics.median(seconds) * 1000:.1f}", *(f"{value:.2f}" for value in ratios))
    console.print(table)
    for name in wrong:
        console.print(f"{name} is not right", style="red", markup=False)
    if wrong:
        raise typer.Exit(1)


def _arms(model: Any, x: Any, compiled: bool, channels_last: bool) -> dict[str, Any]:
    """What computes the model's output, by name."""
    import torch
    from torch.fx.experimental.optimization import fuse

    import keelnorm as kn

    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    arms = {
        ORIGINAL: model,
        "kn.convert": kn.convert(copy.deepcopy(model))[0],
        "kn.fold": kn.fold(model, x[:1], verify=False)[0],
        "torch.nn.utils.fusion": fuse(copy.deepcopy(model)),
    }
    if compiled:
        import torch._inductor.config as inductor

        with inductor.patch(freezing=True):
            frozen, folded = (torch.compile(copy.deepcopy(arms[name])) for name in (ORIGINAL, "kn.fold"))
            for call in (frozen, folded):
                call(x)
        arms |= {"torch.compile with freezing": frozen, "kn.fold, torch.compile with freezing": folded}
    return arms
