"""Callbacks for the Trainer of transformers: ``from keelnorm.trainers.transformers import MonitorBatchNorms``."""

from __future__ import annotations

from typing import Any

from keelnorm.doctor.monitor.monitor import Monitor
from keelnorm.engine.optional_imports import missing_modules

if missing_modules("transformers"):
    raise ImportError("keelnorm.trainers.transformers needs transformers: pip install transformers")

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments


class MonitorBatchNorms(TrainerCallback):
    """Follow the batch norms of a model while a Trainer trains it, by :class:`keelnorm.Monitor`.

    Args:
        every: How many forwards there are for each that is written; with gradient accumulation, each batch is one.
        to: Where observations go, as in ``kn.Monitor``.
        options: The other options of ``kn.Monitor``: ``optimizer``, ``select``, ``ignore``, ``where``, ``silence``.

    Raises:
        ValueError: When the training begins: the model has no batch norm, or an option is not legal.

    Example:
        >>> monitoring = MonitorBatchNorms(every=50, to="batch_norms.csv")  # Trainer(..., callbacks=[monitoring])
        >>> monitoring.monitor is None  # until the training begins
        True
    """

    def __init__(self, every: int = 100, *, to: Any = None, **options: Any) -> None:
        self._every, self._places, self._options = every, to, options
        #: The monitor of the last training; None before the first.
        self.monitor: Monitor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to follow the model."""
        if self.monitor is not None:
            self.monitor.stop()
        options = {"optimizer": kwargs.get("optimizer"), **self._options}
        if not hasattr(options["optimizer"], "param_groups"):
            options["optimizer"] = None
        self.monitor = Monitor(kwargs["model"], self._every, to=self._places, **options).start()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the last observed step, and leave the model."""
        if self.monitor is not None:
            self.monitor.stop()
