"""What a model returns, as it is and with other statistics: how much differs, and how many predictions are right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keelnorm.surgery.observation.nested_tensors import main_output

#: Values of a sample that are kept, evenly chosen; a map of pixels has more.
_MOST = 4096


@dataclass(frozen=True)
class Compared:
    """The outputs of the model as it is, compared with those under other statistics of its batch norms.

    Args:
        difference: The root mean square of the difference, as a share of the outputs' standard deviation.
        changed: The share of samples whose largest output is another one; None unless outputs are (N, classes).
        right: The share of right predictions of the model as it is; None without labels.
        right_then: That under the other statistics.
        lost: How many predictions are right under the other statistics alone.
        won: How many are right as it is alone.
    """

    difference: float
    changed: float | None = None
    right: float | None = None
    right_then: float | None = None
    lost: int = 0
    won: int = 0


class OutputRecord:
    """The outputs of one run over the batches."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []
        self._classes: list[Tensor] = []

    def add(self, output: Any) -> None:
        """Keep the output for one batch."""
        y = main_output(output)
        if y is None:
            return
        y = y.detach()
        if y.ndim == 2 and y.shape[1] > 1:
            self._classes.append(y.argmax(1).cpu())
        flat = y.reshape(len(y), -1)
        step = -(-flat.shape[1] // _MOST)
        self._outputs.append(flat[:, ::step].float().cpu())

    def compared(self, other: OutputRecord, labels: list[Tensor | None]) -> Compared | None:
        """This run beside another over the same batches; None where the outputs can't be compared."""
        pairs = list(zip(self._outputs, other._outputs, strict=False))
        if not pairs or len(self._outputs) != len(other._outputs) or any(a.shape != b.shape for a, b in pairs):
            return None
        mine, theirs = (torch.cat([pair[k].flatten() for pair in pairs]).double() for k in (0, 1))
        spread = float(theirs.std(correction=0))
        if not (bool(mine.isfinite().all()) and bool(theirs.isfinite().all()) and spread > 0):
            return None
        difference = float((mine - theirs).square().mean().sqrt()) / spread
        if len(self._classes) != len(pairs):
            return Compared(difference)
        here, there = torch.cat(self._classes), torch.cat(other._classes)
        changed = float((here != there).double().mean())
        if any(label is None for label in labels) or not labels:
            return Compared(difference, changed)
        wanted = torch.cat([label for label in labels if label is not None])
        if len(wanted) != len(here):
            return Compared(difference, changed)
        right, right_then = here == wanted, there == wanted
        return Compared(
            difference, changed, float(right.double().mean()), float(right_then.double().mean()),
            int((right_then & ~right).sum()), int((right & ~right_then).sum()),
        )  # fmt: skip


def labels_of(batch: Any, samples: int | None) -> Tensor | None:
    """The class of each sample, where a batch has them: integers (N,), second in it or named ``label(s)``."""
    if isinstance(batch, Mapping):
        given = batch.get("labels", batch.get("label"))
    else:
        given = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    if not isinstance(given, Tensor) or given.ndim != 1 or given.is_floating_point() or len(given) != samples:
        return None
    return given.detach().cpu().long()
