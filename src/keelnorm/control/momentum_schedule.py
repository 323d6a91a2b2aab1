"""Schedules of the running statistics' momentum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch

from keelnorm.control.layer_selection import Where, select_some
from keelnorm.engine.error_messages import describe, is_count

__all__ = ["MomentumSchedule", "Schedule", "cosine", "cumulative_then_exponential", "linear", "step_decay"]

#: Maps the number of steps so far (0, 1, …) to the momentum until the next step.
Schedule = Callable[[int], float]


class MomentumSchedule:
    """Set the momentum of a model's batch norms by a schedule, step by step.

    ``schedule(0)`` holds from the start, ``schedule(k)`` after the k-th :meth:`step`. The training loop decides whether
    a step is a batch or an epoch.

    Args:
        model: Its present batch norms are meant, torch.nn's (``BatchNormBase``, so SyncBatchNorm too) and keelnorm's.
        schedule: A function from the number of steps to the momentum, between 0 and 1, in PyTorch's sense
            (``running = (1 − momentum)·running + momentum·batch``).
        where: A pattern for the layers' paths, a module's path, or several; or a function ``where(path, layer)`` that
            selects layers. None for all.

    State:
        :meth:`state_dict` holds the number of steps, not the schedule, as in ``torch.optim.lr_scheduler.LambdaLR``. A
        model's state_dict does not hold the momentum, so load both.

    Raises:
        TypeError: ``model`` is not a module, ``schedule`` not a function, or ``where`` none of these.
        ValueError: The model has no batch norm, ``where`` selects none, or the schedule returns no momentum. No layer
            is then changed.
        RuntimeError: A step after :meth:`close`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> with MomentumSchedule(model, linear(0.5, 0.25, steps=2)) as schedule:
        ...     print([(model[1].momentum, schedule.step())[0] for _ in range(4)])
        [0.5, 0.375, 0.25, 0.25]
        >>> model[1].momentum
        0.1
    """

    def __init__(
        self,
        model: torch.nn.Module,
        schedule: Schedule,
        *,
        where: Where = None,
    ) -> None:
        layers = select_some("MomentumSchedule", model, where)
        if not callable(schedule):
            raise TypeError(
                "MomentumSchedule: schedule must be a function from the number of steps to the momentum, such as "
                f"momentum_schedule.linear(0.5, 0.1, steps=9); got {describe(schedule)}"
            )
        self._schedule = schedule
        self._layers = [(layer, layer.momentum) for layer in layers.values()]
        self._closed = False
        self._set(0)

    @property
    def steps(self) -> int:
        """The number of steps made so far."""
        return self._steps

    @property
    def momentum(self) -> float:
        """The present momentum."""
        return self._momentum

    def step(self) -> None:
        """Set the next momentum."""
        self._set(self._steps + 1)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, for :meth:`load_state_dict`."""
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from another schedule's state, and set its momentum."""
        steps = state_dict.get("steps") if isinstance(state_dict, dict) else None
        if not is_count(steps, 0):
            raise ValueError(
                f"MomentumSchedule: the state has a number of steps, as state_dict() gives; got {describe(state_dict)}"
            )
        self._set(cast(int, steps))

    def close(self) -> None:
        """Give every layer its original momentum back. A second call does nothing."""
        if not self._closed:
            for layer, momentum in self._layers:
                layer.momentum = momentum
        self._closed = True

    def __enter__(self) -> MomentumSchedule:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _set(self, steps: int) -> None:
        if self._closed:
            raise RuntimeError("MomentumSchedule: closed, so the layers have their own momentum again; make another")
        momentum = self._schedule(steps)
        if not isinstance(momentum, (int, float)) or not 0 <= momentum <= 1:
            raise ValueError(
                f"MomentumSchedule: the schedule must give a momentum between 0 and 1; at step {steps} it gives "
                f"{describe(momentum)}"
            )
        for layer, _ in self._layers:
            layer.momentum = momentum
        self._steps, self._momentum = steps, momentum


def cumulative_then_exponential(momentum: float = 0.1) -> Schedule:
    """1/n for the n-th batch until that is below ``momentum``, then ``momentum``; for one step per batch.

    The running statistics are first the exact average over all batches, without the initial zeros and ones, and then
    an exponential average over about the last 1/momentum batches.

    Example:
        >>> [round(cumulative_then_exponential(0.3)(step), 3) for step in range(5)]
        [1.0, 0.5, 0.333, 0.3, 0.3]
    """
    _check("cumulative_then_exponential", momentum=momentum)
    return lambda step: max(1 / (step + 1), momentum)


def step_decay(initial: float = 0.5, factor: float = 0.5, *, every: int, least: float = 0.01) -> Schedule:
    """``initial · factor^⌊step / every⌋``, but at least ``least``; for one step per epoch or batch.

    Example:
        >>> [step_decay(every=2)(step) for step in range(5)]
        [0.5, 0.5, 0.25, 0.25, 0.125]

    Source:
        The training code of PointNet and PointNet++ (Qi, Yi, Su, Guibas, 2017, arXiv:1706.02413) decays the momentum
        this way, from 0.5 by factors of 0.5 down to 0.01.
    """
    _check("step_decay", initial=initial, factor=factor, least=least)
    _check_steps("step_decay", every=every)
    return lambda step: float(max(initial * factor ** (step // every), least))


def linear(initial: float, final: float, *, steps: int) -> Schedule:
    """From ``initial`` to ``final`` on a straight line, and ``final`` after ``steps`` steps.

    Example:
        >>> [linear(0.5, 0.1, steps=4)(step) for step in (0, 1, 4, 9)]
        [0.5, 0.4, 0.1, 0.1]
    """
    _check("linear", initial=initial, final=final)
    _check_steps("linear", steps=steps)
    return lambda step: final + (initial - final) * max(1 - step / steps, 0.0)


def cosine(initial: float, final: float, *, steps: int) -> Schedule:
    """From ``initial`` to ``final`` along half a cosine, and ``final`` after ``steps`` steps.

    Example:
        >>> [round(cosine(0.5, 0.1, steps=4)(step), 3) for step in (0, 1, 2, 4, 9)]
        [0.5, 0.441, 0.3, 0.1, 0.1]
    """
    _check("cosine", initial=initial, final=final)
    _check_steps("cosine", steps=steps)
    return lambda step: final + (initial - final) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def _check(what: str, **momenta: float) -> None:
    for name, value in momenta.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{what}: {name} must be between 0 and 1; got {describe(value)}")


def _check_steps(what: str, **counts: int) -> None:
    for name, value in counts.items():
        if not is_count(value):
            raise ValueError(f"{what}: {name} must be a positive number of steps; got {describe(value)}")
