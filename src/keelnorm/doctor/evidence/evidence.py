"""All that rules look at, collected once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from keelnorm.doctor.evidence.batches import Batches
from keelnorm.doctor.evidence.data import Data, collect_data
from keelnorm.doctor.evidence.layers import LayerFacts, facts_of
from keelnorm.doctor.evidence.neighbors import from_run, from_sequence
from keelnorm.doctor.evidence.training_step import Loss, TrainingStep, take_step
from keelnorm.doctor.evidence.untouched import untouched
from keelnorm.doctor.rule import Need, Rule
from keelnorm.engine.error_messages import RefusedTypeError, RefusedValueError
from keelnorm.engine.torch_internals import DropoutBase, compiled_original
from keelnorm.surgery.observation.call_record import Trace
from keelnorm.surgery.observation.nested_tensors import call_of
from keelnorm.surgery.observation.observe import observe
from keelnorm.surgery.snapshot import in_evaluation
from keelnorm.surgery.statistics.model_inputs import passes_over

if TYPE_CHECKING:
    from torch.optim import Optimizer

#: What is missing where a rule can't judge, and what to pass.
_MISSING: dict[Need, str] = {
    "optimizer": "needs optimizer=",
    "neighbors": "needs batches= or example=, which show what stands beside a layer",
    "batch": "needs batches=",
    "data": "needs batches=",
    "step": "needs batches= and loss=",
}


@dataclass(frozen=True)
class Evidence:
    """What rules look at.

    Args:
        model: The model, as it was given.
        layers: Facts about its batch norms, in the order in which they run, where that is known.
        optimizer: The optimizer.
        batches: The batches.
        data: What the batches show, where a rule needs it.
        step: What a training step shows, where a rule needs it.
        ranks: The number of processes of torch.distributed.
        failure: What the model raised when it was run to see what stands beside the layers.
    """

    model: nn.Module
    layers: tuple[LayerFacts, ...]
    optimizer: Optimizer | None = None
    batches: Batches | None = None
    data: Data | None = None
    step: TrainingStep | None = None
    ranks: int = 1
    failure: RuntimeError | None = None
    _by_path: dict[str, LayerFacts] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._by_path.update({layer.path: layer for layer in self.layers})

    def __getitem__(self, path: str) -> LayerFacts:
        return self._by_path[path]

    @property
    def core(self) -> nn.Module:
        """The model without wrappers such as DistributedDataParallel: its mode is the mode that was asked for."""
        return unwrapped(self.model)

    def raised_in(self, module: nn.Module) -> bool:
        """Whether the model raised while this module ran."""
        trace = None if self.failure is None or self.failure.__cause__ is None else self.failure.__cause__.__traceback__
        while trace is not None:
            if trace.tb_frame.f_locals.get("self") is module:
                return True
            trace = trace.tb_next
        return False

    def lacks(self, rule: Rule) -> str | None:
        """Why a rule can't judge; None if it can."""
        there = {
            "optimizer": self.optimizer is not None,
            "neighbors": not self.layers or any(layer.beside is not None for layer in self.layers),
            "batch": self.batches is not None,
            "data": self.data is not None,
            "step": self.step is not None,
        }
        missing = next((need for need in rule.needs if not there[need]), None)
        if missing in ("data", "step") and self.failure is not None:
            return "the model raised"
        if missing == "step" and not _trains(self.model):
            return "needs a parameter that requires a gradient"
        return None if missing is None else _MISSING[missing]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, an averaged model, and torch.compile's module."""
    while True:
        original = compiled_original(model)
        if original is not None:
            model = original
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel | AveragedModel):
            model = model.module
        else:
            return model


def number_of_ranks() -> int:
    """The number of processes of torch.distributed; 1 where it is not initialized."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    *,
    optimizer: Optimizer | None = None,
    batches: Batches | None = None,
    example: Any = None,
    ranks: int | None = None,
    loss: Loss | None = None,
    data: bool = True,
    progress: bool | None = False,
) -> Evidence:
    """Collect the evidence, inside of a block of ``untouched``.

    Args:
        model: The model.
        layers: Its batch norms by path.
        optimizer: The optimizer.
        batches: Batches; the first shows what stands beside the layers if there is no example.
        example: What the model is called with, as in ``kn.fold``.
        ranks: The number of processes; None asks torch.distributed.
        loss: Gives the loss of a training step, for rules that need one.
        data: Whether to run the model over the batches, for rules that need what they show.
        progress: Whether to show a progress bar then; None shows it in a terminal if rich is installed.
    """
    failure = None
    paths = {module: path for path, module in model.named_modules()}
    beside = from_sequence(unwrapped(model), layers.values(), paths)
    if example is not None or batches is not None:
        try:
            with _only_dropouts_training(model):
                trace = _run(model, batches, example)
                beside = from_run(trace, layers.values(), paths)
        except ModelFailedError as error:
            failure = error
    facts = facts_of(layers, beside)
    shown = step = None
    if batches is not None and failure is None:
        try:
            shown = _data(model, facts, batches, progress) if data else None
            step = _step(model, facts, batches, loss, optimizer) if loss is not None and _trains(model) else None
        except ModelFailedError as error:
            failure = error
    ranks = number_of_ranks() if ranks is None else ranks
    return Evidence(model, facts, optimizer, batches, shown, step, ranks, failure)


def _trains(model: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())


def _step(
    model: nn.Module, layers: tuple[LayerFacts, ...], batches: Batches, loss: Loss, optimizer: Optimizer | None
) -> TrainingStep:
    with untouched(model):  # rules look at the model after
        try:
            return take_step(model, unwrapped(model), layers, batches, loss, optimizer)
        except (RefusedTypeError, RefusedValueError):
            raise
        except Exception as error:
            raise _failed("the training step", error) from error


def _data(model: nn.Module, layers: tuple[LayerFacts, ...], batches: Batches, progress: bool | None) -> Data:
    # A custom forward is called with the model that the user has, wrapped or not.
    called = unwrapped(model) if batches.forward is None else model

    def run(batch: Any) -> Any:
        try:
            return batches.run(called, batch)
        except Exception as error:
            raise _failed("a batch", error) from error

    with (
        untouched(model),  # the last run has other statistics, and rules look at the model after
        passes_over(batches.all, batches.most, progress, "diagnose", 2) as start,
    ):
        return collect_data(model, layers, batches, run, start)


class ModelFailedError(RuntimeError):
    """The model raised when it was run."""


@contextmanager
def _only_dropouts_training(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation, but with dropouts at work: one that is off leaves no trace in the data flow."""
    with in_evaluation(model):
        for module in model.modules():
            if isinstance(module, DropoutBase):
                module.training = True
        yield


def _run(model: nn.Module, batches: Batches | None, example: Any) -> Trace:
    core = unwrapped(model)
    if example is not None:
        args, kwargs = call_of("diagnose", example)
        return _observed(core, "the example", lambda: core(*args, **kwargs), (args, kwargs))
    assert batches is not None
    few = batches.few()
    if few is not None:
        try:
            return observe(core, (few,), run=lambda: batches.run(core, few))
        except Exception:
            pass  # the model may want as many samples as it was given
    # A custom forward is called with the model that the user has, wrapped or not.
    called = core if batches.forward is None else model
    return _observed(core, "the first batch", lambda: batches.run(called, batches.first), batches.first)


def _observed(core: nn.Module, what: str, run: Any, given: Any) -> Trace:
    try:
        return observe(core, (given,), run=run)
    except Exception as error:
        raise _failed(what, error) from error


def _failed(what: str, error: Exception) -> ModelFailedError:
    said = " ".join(str(error).split())
    return ModelFailedError(
        f"diagnose: the model raised on {what}: {type(error).__name__}: {said}. A batch is a tensor, a tuple or "
        "list that begins with the model's argument, or a mapping of its keywords; pass "
        "forward=lambda model, batch: model(...) for others. Tensors must have the model's dtype"
    )


def check_not_lazy(what: str, model: nn.Module) -> None:
    """Raise if parameters have no shape yet: running the model would give them one.

    Raises:
        ValueError: They have not.
    """
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(value):
            raise RefusedValueError(f"{what}: {name!r} has no shape yet; run the lazy model once first")
