"""Converted models whose layers have learned what follows them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.engine.fusion.expectations import ATTRIBUTE
from keelnorm.surgery import Report


def convert_and_learn(model: nn.Module, x: Tensor) -> tuple[nn.Module, Report]:
    """Convert a model, and let its layers learn what follows them, so that the next call runs fused.

    Only what the layers learn changes: a copy of the model makes the calls.
    """
    converted, report = kn.convert(model)
    pupil = copy.deepcopy(converted)
    with torch.no_grad():
        for training in (True, False):
            pupil.train(training)(x)
    for layer, taught in zip(converted.modules(), pupil.modules(), strict=True):
        if ATTRIBUTE in vars(taught):
            vars(layer)[ATTRIBUTE] = vars(taught)[ATTRIBUTE]
    return converted, report
