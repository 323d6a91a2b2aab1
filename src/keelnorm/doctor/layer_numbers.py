"""The numbers of a layer that pages draw and a monitor follows."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.rules._drift import REFERENCE, batch_noise, changed_by


@dataclass(frozen=True)
class LayerNumbers:
    """What was measured of one batch norm; None for what is not known.

    Args:
        drift: How far the running statistics change the normalized values from those with the data's moments: the
            root of the mean square over values and channels. What chance explains is subtracted.
        noise: The same for the statistics of one batch, as large as those that were given.
        limit: The same for the statistics of 16 samples, which cost nearly nothing.
        effective: How many independent values a batch has, in the median over channels: positions are correlated.
        gradient: The norm of the loss's gradient at the layer.
        weights: The norm of the weights in front.
        gamma: The root of the mean square of γ.
    """

    drift: float | None = None
    noise: float | None = None
    limit: float | None = None
    effective: float | None = None
    gradient: float | None = None
    weights: float | None = None
    gamma: float | None = None

    def known(self) -> dict[str, float]:
        """The numbers that are known and finite, by name."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


#: The names of the numbers.
NUMBERS = tuple(one.name for one in fields(LayerNumbers))


def numbers_of(evidence: Evidence, layer: LayerFacts, weights: float | None = None) -> LayerNumbers:
    """The numbers of a layer."""
    true = None if evidence.data is None else evidence.data.moments(layer.path)
    step = evidence.step
    gradient = None if step is None else step.gradients.get(layer.path)
    gamma = None if layer.weight is None else float(layer.weight.square().mean().sqrt())
    if true is None or true.samples < 2:
        return LayerNumbers(gradient=gradient, weights=weights, gamma=gamma)
    one_batch = max(true.sizes)  # what the layer sees: a head may get several rows of each sample
    mean, var = layer.running_mean, layer.running_var
    drift = None
    if mean is not None and var is not None and mean.shape == true.mean.shape and layer.own_scale is None:
        change = changed_by(true, mean, var, layer.eps).mean() - batch_noise(true, true.samples, layer.eps).mean()
        drift = math.sqrt(max(float(change), 0.0)) if change.isfinite() else None
    return LayerNumbers(
        drift=drift,
        noise=math.sqrt(float(batch_noise(true, one_batch, layer.eps).mean())),
        limit=math.sqrt(float(batch_noise(true, REFERENCE, layer.eps).mean())),
        effective=float(true.effective(one_batch).median()),
        gradient=gradient,
        weights=weights,
        gamma=gamma,
    )
