"""Callbacks for Lightning: ``from keelnorm.trainers.lightning import MonitorBatchNorms``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from keelnorm.doctor.monitor.monitor import Monitor
from keelnorm.engine.optional_imports import missing_modules


def _package() -> str:
    """Lightning's package under the name by which it was imported: there are two, whose classes differ."""
    names = ("lightning.pytorch", "pytorch_lightning")
    there = [name for name in names if name in sys.modules]
    there += [name for name in names if not missing_modules(name.partition(".")[0])]
    if not there:
        raise ImportError("keelnorm.trainers.lightning needs Lightning: pip install lightning")
    return there[0]


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = import_module(_package()).Callback


class MonitorBatchNorms(Callback):
    """Follow the batch norms of a LightningModule while it is fitted, by :class:`keelnorm.Monitor`.

    Args:
        every: How many training batches there are for each that is written.
        to: Where observations go, as in ``kn.Monitor``; by default the trainer's loggers.
        options: The other options of ``kn.Monitor``: ``select``, ``ignore``, ``where``, ``silence``.

    Raises:
        ValueError: When the fit begins: the module has no batch norm, or an option is not legal.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> monitoring = MonitorBatchNorms(every=50, to="batch_norms.csv")
        >>> trainer = Trainer(callbacks=[monitoring], logger=False, enable_checkpointing=False)
        >>> monitoring.monitor is None  # until the fit begins; then its observations are there, also after it
        True
    """

    def __init__(self, every: int = 100, *, to: Any = None, **options: Any) -> None:
        super().__init__()
        self._every, self._places, self._options = every, to, options
        #: The monitor of the last fit; None before the first.
        self.monitor: Monitor | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to follow."""
        loggers = [logger for logger in trainer.loggers if hasattr(logger, "log_metrics")]
        to = loggers if self._places is None else self._places
        optimizer = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        self.monitor = Monitor(pl_module, self._every, to=to, optimizer=optimizer, **self._options)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        if self.monitor is not None:
            self.monitor.begin_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is over, and is written."""
        if self.monitor is not None:
            self.monitor.end_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left, and take the hooks away: a batch that the module skips has no end."""
        if self.monitor is not None:
            self.monitor.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks away, whatever has ended the fit."""
        if self.monitor is not None:
            self.monitor.stop()
