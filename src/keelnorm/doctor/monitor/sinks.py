"""Where a monitor writes: a function, a CSV file, TensorBoard, Weights & Biases, MLflow, a logger of Lightning."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias

from keelnorm.doctor.layer_numbers import NUMBERS
from keelnorm.doctor.monitor.observation import Observation
from keelnorm.engine.atomic_write import obstacle
from keelnorm.engine.error_messages import RefusedTypeError, RefusedValueError, describe

#: Takes an observation.
Sink: TypeAlias = Callable[[Observation], object]

_LEGAL = (
    "a function of an observation; a path that ends in .csv; a SummaryWriter of TensorBoard; a run of wandb; the "
    "module mlflow, or a logger of Lightning; or a list of these"
)


def sinks_of(to: Any) -> list[Sink]:
    """The sinks that an argument ``to=`` names.

    Raises:
        TypeError: It is none of these.
        ValueError: A path does not end in .csv, or can't be written.
    """
    if to is None:
        return []
    if isinstance(to, list | tuple):
        return [_sink_of(one) for one in to]
    return [_sink_of(to)]


def _sink_of(to: Any) -> Sink:
    if isinstance(to, str | PathLike):
        return _csv(Path(fspath(to)))
    if hasattr(to, "add_scalar"):
        return lambda seen: [to.add_scalar(name, value, seen.step) for name, value in seen.scalars().items()]
    if hasattr(to, "log_metrics"):
        return lambda seen: to.log_metrics(seen.scalars(), step=seen.step)
    if hasattr(to, "log") and hasattr(to, "define_metric"):
        return _wandb(to)
    if callable(to):
        return to  # type: ignore[no-any-return]
    raise RefusedTypeError(f"Monitor: to must be {_LEGAL}; got {describe(to)}")


def _wandb(run: Any) -> Sink:
    """Numbers with a step of their own: a run's own steps only go forward, and are the user's."""
    run.define_metric("batch_norm/step")
    run.define_metric("batch_norm/*", step_metric="batch_norm/step")
    return lambda seen: run.log({**seen.scalars(), "batch_norm/step": seen.step})


def _csv(path: Path) -> Sink:
    if path.suffix.lower() != ".csv":
        raise RefusedValueError(f"Monitor: a file must end in .csv; got {fspath(path)!r}")
    if why_not := obstacle(path):
        raise RefusedValueError(f"Monitor: {why_not}")
    columns = ("step", "layer", *NUMBERS)
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), None)
        if header != list(columns):
            raise RefusedValueError(
                f"Monitor: {fspath(path)!r} is there and no record of a monitor, which would be continued; name another"
            )

    def rows(seen: Observation) -> Iterable[list[Any]]:
        for layer, numbers in seen.layers.items():
            known = numbers.known()
            yield [seen.step, layer, *(known.get(name, "") for name in NUMBERS)]

    def write(seen: Observation) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(columns)
            writer.writerows(rows(seen))

    return write
