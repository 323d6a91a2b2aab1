"""Time inference with folded batch norms, by keelnorm and by others: `python -m benchmarks.folding`."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import keelnorm as kn
from benchmarks.architectures import ARCHITECTURES, require_packages
from keelnorm.bench.result_table import new_table, table_console
from keelnorm.measure import timing

ORIGINAL, FOLDED = "torch.nn, eager", "kn.fold"
Model = Callable[[Tensor], Tensor]


def main(
    network: Annotated[str, typer.Option(help="One of the architectures of `python -m benchmarks.zoo`.")] = "ResNet-50",
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of every arm that are timed.")] = 9,
    compiled: Annotated[bool, typer.Option("--compiled/--eager", help="Time torch.compile with freezing too.")] = True,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Inputs and weights channels-last.")] = False,
) -> None:
    """Time inference of a network whose batch norms are folded by kn.fold, by torch's fusion, by torch.compile.

    Outputs are first compared with the original's. An arm that differs gets no time, and the exit status is 1.
    """
    if network not in ARCHITECTURES:
        raise typer.BadParameter(f"known are {', '.join(ARCHITECTURES)}", param_hint="--network")
    require_packages([network])
    one = ARCHITECTURES[network]
    x = one.batch(batch)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        arms = _arms(one.build().eval(), x, compiled=compiled, channels_last=channels_last)
        expected = arms[ORIGINAL](x)
        wrong = [name for name, call in arms.items() if not torch.allclose(call(x), expected, rtol=1e-3, atol=1e-3)]
        samplers = {
            name: partial(timing.seconds_per_call, partial(call, x)) for name, call in arms.items() if name not in wrong
        }
        taken = timing.by_turns(samplers, rounds, discarded=2)
    layout = "channels-last" if channels_last else "contiguous"
    title = f"{network}, inference, batch {batch}, float32, {layout}"
    table = new_table(title, ("arm",), ("ms", "times faster than eager", "than folded by keelnorm"))
    for name, seconds in taken.items():
        ratios = [
            "" if other in wrong else f"{timing.median_ratio(taken[other], seconds):.2f}"
            for other in (ORIGINAL, FOLDED)
        ]
        table.add_row(name, f"{statistics.median(seconds) * 1000:.1f}", *ratios)
    console = table_console(120)
    console.print(table)
    for name in wrong:
        console.print(f"{name} is not right", style="red", markup=False)
    if wrong:
        raise typer.Exit(1)


def _arms(model: nn.Module, x: Tensor, *, compiled: bool, channels_last: bool) -> dict[str, Model]:
    """What computes the model's output, by name."""
    from torch.fx.experimental.optimization import fuse

    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    arms: dict[str, Model] = {
        ORIGINAL: model,
        "kn.convert": kn.convert(copy.deepcopy(model))[0],
        FOLDED: kn.fold(model, x[:1], verify=False)[0],
        "torch.nn.utils.fusion": fuse(copy.deepcopy(model)),
    }
    if compiled:
        import torch._inductor.config as inductor

        with inductor.patch(freezing=True):
            frozen, folded = (torch.compile(copy.deepcopy(arms[name])) for name in (ORIGINAL, FOLDED))
            for call in (frozen, folded):
                call(x)
        arms |= {"torch.compile with freezing": frozen, "kn.fold, torch.compile with freezing": folded}
    return arms


if __name__ == "__main__":
    typer.run(main)
