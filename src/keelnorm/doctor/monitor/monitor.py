"""``kn.Monitor``: follows the batch norms of a model while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from keelnorm.control.layer_selection import Where
from keelnorm.doctor.diagnose import check_model, run_rules
from keelnorm.doctor.evidence.passing_hook import PassingHook
from keelnorm.doctor.finding import Finding, Severity
from keelnorm.doctor.known_rules import all_rules, chosen
from keelnorm.doctor.layer_numbers import numbers_of
from keelnorm.doctor.monitor.observation import Observation
from keelnorm.doctor.monitor.observed_step import ObservedStep
from keelnorm.doctor.monitor.sinks import sinks_of
from keelnorm.doctor.report_text import groups
from keelnorm.doctor.rule import Rule
from keelnorm.doctor.silencing import Silence, read_silence
from keelnorm.engine.error_messages import RefusedRuntimeError, RefusedTypeError, RefusedValueError, describe, is_count
from keelnorm.surgery.target_layers import batch_norms_in

if TYPE_CHECKING:
    from torch.optim import Optimizer

WHAT = "Monitor"
#: A monitor keeps at most so many observations; then every second one goes. Files and loggers get all.
KEPT = 1000
#: Observed steps that wait for their backward, as where several forwards have one.
_WAITING = 8
#: What a finding has to be at least, to be told.
_TOLD: Severity = "warning"


class MonitorWarning(UserWarning):
    """A rule of the doctor has begun to find something while a model trains."""


class Monitor:
    """Follow the batch norms of a model while it trains: drift, noise, gradients and weights, and what rules find.

    In one of ``every`` training steps, hooks look at what goes into each batch norm and at the gradient there; in the
    others nothing runs but a counter. A step is a forward of the model in training mode with gradients, with the
    backward behind it; or what runs between :meth:`begin_step` and :meth:`end_step`. It is written when the next one
    begins, or when the monitor stops: a GPU is asked for values in the steps that are written only.

    A rule that finds something in two written steps in a row says so once, as a :class:`MonitorWarning`; if it stops
    and begins again, it says so again.

    Args:
        model: The model. It trains as it would without: results, running statistics and random generators are equal.
        every: How many training steps there are for each that is written.
        to: Where observations go: ``to(observation)``; a path that ends in .csv; a SummaryWriter of TensorBoard; a run
            of wandb; the module ``mlflow`` or a logger of Lightning; or a list of these.
        optimizer: The optimizer, for rules about its options.
        select: Only these rules, as in ``kn.diagnose``.
        ignore: Not these rules.
        where: A pattern for the layers' paths, a module's path, or several; None for all.
        silence: Rules that are silent for some layers, as in ``kn.diagnose``.

    Raises:
        TypeError: ``model`` is no module, or an argument is of another type.
        ValueError: The model has no batch norm, or an argument is not legal.

    Cost:
        A written step reads the input of each batch norm once more, and copies a mean and a variance for each sample
        and channel to the CPU. Nothing is kept of the activations.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> with Monitor(model, every=2) as monitor:
        ...     for _ in range(4):
        ...         model(torch.randn(16, 3, 8, 8)).sum().backward()
        >>> [seen.step for seen in monitor.observations], sorted(monitor.observations[0].layers)
        ([2, 4], ['1'])
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        to: Any = None,
        optimizer: Optimizer | None = None,
        select: str | Iterable[str] | None = None,
        ignore: str | Iterable[str] | None = None,
        where: Where = None,
        silence: Silence = None,
    ) -> None:
        check_model(WHAT, model, batch_norms_in(WHAT, model, where))
        if not is_count(every):
            raise RefusedValueError(f"{WHAT}: every must be a positive number of steps; got {describe(every)}")
        if optimizer is not None and not isinstance(getattr(optimizer, "param_groups", None), list):
            raise RefusedTypeError(f"{WHAT}: optimizer must be a torch.optim.Optimizer; got {describe(optimizer)}")
        registry = all_rules()
        asked = chosen(WHAT, select, ignore, registry)
        self._rules = {rule.id: rule for rule in asked if rule.in_training}
        if not self._rules:
            names = ", ".join(f"{rule.id} {rule.name}" for rule in asked)
            raise RefusedValueError(f"{WHAT}: {names}: none is asked while a model trains; kn.diagnose asks all rules")
        self._silences = read_silence(WHAT, silence, registry.rules)
        self._sinks = sinks_of(to)
        self._model, self._where, self._optimizer = model, where, optimizer
        self._every = every
        self._hooks: list[Any] = []
        self._pending: list[ObservedStep] = []
        self._began_at = 0
        self._written, self._stride = 0, 1
        self._seen_before: frozenset[tuple[str, tuple[str, ...]]] = frozenset()
        self._told: frozenset[tuple[str, tuple[str, ...]]] = frozenset()
        #: The number of training steps so far.
        self.steps: int = 0
        #: What was seen, oldest first: at most 1,000, evenly spread.
        self.observations: list[Observation] = []
        #: What rules have found, with the step at which each began.
        self.findings: list[tuple[int, Finding]] = []

    @property
    def rules(self) -> dict[str, Rule]:
        """The rules that are asked, by identifier."""
        return dict(self._rules)

    def start(self) -> Monitor:
        """Begin to follow the model.

        Raises:
            RuntimeError: It is followed already.
        """
        if self._hooks:
            raise RefusedRuntimeError(f"{WHAT}: it has been started; stop() ends it")
        before = self._model.register_forward_pre_hook(PassingHook(self._begin), with_kwargs=True)
        after = self._model.register_forward_hook(PassingHook(self._end), always_call=True)
        self._hooks = [before, after]
        self._began_at = self.steps
        return self

    def stop(self) -> None:
        """Write the observed steps that are left, and leave the model; without effect where it was not started."""
        self._leave(tell=True)

    def _leave(self, *, tell: bool) -> None:
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook.remove()
        self._write(everything=True)
        if tell and hooks and self.steps == self._began_at:
            warnings.warn(
                f"{WHAT}: no training step was seen. One is a call of the model itself in training mode, with "
                "gradients: where torch.compile calls it, follow the compiled module; where a loop calls parts of it, "
                "use begin_step() and end_step()",
                MonitorWarning,
                stacklevel=2,
            )

    def begin_step(self) -> None:
        """Say that a training step begins, in a loop that does not call the model itself, but parts of it.

        :meth:`start` is for all others; after it, this raises.

        Raises:
            RuntimeError: The monitor was started.
        """
        if self._hooks:
            raise RefusedRuntimeError(f"{WHAT}: it was started, and counts steps by itself; stop() ends that")
        self._write(everything=True)
        self._count()

    def end_step(self) -> None:
        """Say that the step is over, with its backward: an observed one is written."""
        self._write(everything=True)

    def __enter__(self) -> Monitor:
        return self if self._hooks else self.start()

    def __exit__(self, *raised: object) -> None:
        self._leave(tell=raised[0] is None)

    def write_page(self, path: str | PathLike[str]) -> None:
        """Write a page of HTML that loads nothing: each number by layer and step, and what rules have found, and when.

        Raises:
            ImportError: plotly or jinja2 is missing.
            ValueError: Nothing has been observed.
        """
        from keelnorm.doctor.pages.findings_part import write_document
        from keelnorm.doctor.pages.record_page import record_document

        write_document(f"{WHAT}.write_page", lambda: record_document(self), Path(path))

    def _begin(self, model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        self._write()
        if self._hooks:  # nobody has stopped it meanwhile
            self._count(args, keywords)

    def _count(self, args: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None) -> None:
        self.steps += 1
        if self.steps % self._every == 0:
            with self._reading(self.steps):
                # Looked for again: a layer may have been replaced.
                layers = batch_norms_in(WHAT, self._model, self._where)
                step = ObservedStep(self._model, layers, self.steps)
                self._pending.append(step)
                step.begin(args, keywords)

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """A block whose errors are told, and do not end the training."""
        try:
            yield
        except MonitorWarning:  # where warnings are errors
            raise
        except Exception as error:
            warnings.warn(
                f"{WHAT}: step {step} could not be read: {type(error).__name__}: {error}", MonitorWarning, stacklevel=2
            )

    def _end(self, model: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        if self._pending:
            self._pending[-1].end_forward()

    def _write(self, *, everything: bool = False) -> None:
        """Write the observed steps whose backward has been there: several forwards may have one backward."""
        if self._pending:
            self._pending[-1].end_forward()
        while self._pending and (everything or self._pending[0].is_over or len(self._pending) > _WAITING):
            step = self._pending.pop(0)
            step.end()
            with self._reading(step.step):
                self._write_one(step)

    def _write_one(self, step: ObservedStep) -> None:
        evidence, weights = step.evidence(self._optimizer)
        assert evidence.data is not None
        layers = {
            layer.path: numbers_of(evidence, layer, weights.get(layer.path))
            for layer in evidence.layers
            if layer.path in evidence.data.true
        }
        found, _ = run_rules(list(self._rules.values()), evidence)
        seen = Observation(step.step, layers, self._begun(found))
        self._keep(seen)
        self.findings += [(step.step, finding) for finding in seen.began]
        self._deliver(seen)
        for finding in groups(seen.began):
            self._warn(step.step, finding)

    def _keep(self, seen: Observation) -> None:
        """Keep an observation; beyond the limit every second one goes, and of new ones as many are kept."""
        if self._written % self._stride == 0:
            self.observations.append(seen)
            if len(self.observations) > KEPT:
                del self.observations[1::2]
                self._stride *= 2
        self._written += 1

    def _deliver(self, seen: Observation) -> None:
        """Give an observation to every sink. One that raises is left out from then on: training goes on."""
        for sink in list(self._sinks):
            try:
                sink(seen)
            except Exception as error:  # a user's function, or another package
                self._sinks.remove(sink)
                warnings.warn(
                    f"{WHAT}: a place to write to raised {type(error).__name__}: {error}. It gets nothing from step "
                    f"{seen.step} on",
                    MonitorWarning,
                    stacklevel=2,
                )

    def _begun(self, found: list[Finding]) -> tuple[Finding, ...]:
        """Those findings that were there before too, and have not been told."""
        there = [
            one for one in found if one.is_at_least(_TOLD) and not any(entry.covers(one) for entry in self._silences)
        ]
        now = frozenset(one.identity for one in there)
        lasting = now & self._seen_before
        began = tuple(one for one in there if one.identity in lasting - self._told)
        self._told = (self._told & now) | lasting
        self._seen_before = now
        return began

    def _warn(self, step: int, findings: list[Finding]) -> None:
        first = findings[0]
        layers = {path for one in findings for path in one.layers}
        more = f" The same in {len(layers) - len(first.layers)} more." if len(layers) > len(first.layers) else ""
        rule = self._rules[first.rule]
        warnings.warn(
            "\n".join([f"step {step}: {rule.id} {rule.name}: {first.message}{more} Remedy:", *first.remedy]),
            MonitorWarning,
            stacklevel=2,
        )
