"""The arms of a comparison: one normalization each, and nothing else that differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

Normalization = Callable[[int, int], nn.Module]
"""Builds the layer for inputs with `spatial` position axes (0, 1 or 2) and `channels` channels."""


@dataclass(frozen=True)
class Arm:
    """How one arm normalizes.

    Args:
        name: the key under which results are stored.
        label: what a reader sees.
        normalization: builds a layer; None for the arm without normalization.
        sequential: the container a user of this arm would write.
    """

    name: str
    label: str
    normalization: Normalization | None = None
    sequential: Callable[..., nn.Sequential] = nn.Sequential

    def block(self, spatial: int, channels: int, activation: nn.Module) -> nn.Sequential:
        """The normalization, where the arm has one, and the activation, in the arm's container."""
        if self.normalization is None:
            return self.sequential(activation)
        return self.sequential(self.normalization(spatial, channels), activation)


def _torch(spatial: int, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if spatial == 2 else nn.BatchNorm1d(channels)


def _evenkeel(spatial: int, channels: int) -> nn.Module:
    import evenkeel as ek

    layer: nn.Module = ek.BatchNorm2d(channels) if spatial == 2 else ek.BatchNorm1d(channels)
    return layer


def _evenkeel_sequential(*modules: nn.Module) -> nn.Sequential:
    import evenkeel as ek

    container: nn.Sequential = ek.Sequential(*modules)
    return container


NONE = Arm("none", "no normalization")
TORCH = Arm("torch", "torch.nn", _torch)
EVENKEEL = Arm("evenkeel", "evenkeel", _evenkeel, _evenkeel_sequential)

ARMS: dict[str, Arm] = {arm.name: arm for arm in (NONE, TORCH, EVENKEEL)}


def arm_named(name: str) -> Arm:
    """The arm of that name."""
    try:
        return ARMS[name]
    except KeyError:
        raise KeyError(f"no arm is named {name!r}; there are {', '.join(ARMS)}") from None
