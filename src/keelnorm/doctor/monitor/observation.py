"""What a monitor has seen in one training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keelnorm.doctor.finding import Finding
from keelnorm.doctor.layer_numbers import LayerNumbers


@dataclass(frozen=True)
class Observation:
    """The batch norms of a model in one training step.

    Args:
        step: The number of the step, from 1 on.
        layers: What was measured of each batch norm that ran, by path.
        began: Findings that have begun: those that were there in the observation before too, and not in the one before
            that.

    Example:
        >>> from keelnorm.doctor.layer_numbers import LayerNumbers
        >>> Observation(100, {"bn1": LayerNumbers(drift=0.25, noise=0.125)}).scalars()
        {'batch_norm/drift/bn1': 0.25, 'batch_norm/noise/bn1': 0.125, 'batch_norm/findings': 0}
    """

    step: int
    layers: Mapping[str, LayerNumbers]
    began: tuple[Finding, ...] = ()

    def scalars(self) -> dict[str, float]:
        """Every number by a name, as loggers take them: ``batch_norm/drift/layer1.0.bn1``."""
        found: dict[str, float] = {}
        for path, numbers in self.layers.items():
            found |= {f"batch_norm/{name}/{path or 'model'}": value for name, value in numbers.known().items()}
        return found | {"batch_norm/findings": len(self.began)}

    def to_dict(self) -> dict[str, Any]:
        """The observation as plain values, for JSON."""
        return {
            "step": self.step,
            "layers": {path: numbers.known() for path, numbers in self.layers.items()},
            "began": [finding.to_dict() for finding in self.began],
        }
