"""The arms of a comparison: one normalization each, and nothing else that differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

Normalization = Callable[[int, int, int], nn.Module]
"""(position axes: 0, 1 or 2; channels of a replica; replicas) -> the layer for replicas * channels channels."""

GROUPS = 4
"""Groups of channels in group normalization; widths are multiples of it."""


@dataclass(frozen=True)
class Arm:
    """How one arm normalizes.

    Args:
        name: the key under which results are stored, and which fixes how the arm is drawn.
        label: what a reader sees.
        normalization: builds a layer; None for the arm without normalization.
    """

    name: str
    label: str
    normalization: Normalization | None = None

    def layer(self, spatial: int, channels: int, replicas: int = 1) -> nn.Module:
        """The normalization of `replicas` networks side by side, each with `channels` channels."""
        if self.normalization is None:
            return nn.Identity()
        return self.normalization(spatial, channels, replicas)


def _batch(spatial: int, channels: int, replicas: int) -> nn.Module:
    import keelnorm as kn

    layer: nn.Module = (kn.BatchNorm2d if spatial == 2 else kn.BatchNorm1d)(replicas * channels)
    return layer


def _torch(spatial: int, channels: int, replicas: int) -> nn.Module:
    return (nn.BatchNorm2d if spatial == 2 else nn.BatchNorm1d)(replicas * channels)


def _layer(spatial: int, channels: int, replicas: int) -> nn.Module:
    # One group a replica: its channels and positions together, which is layer normalization of each.
    return nn.GroupNorm(replicas, replicas * channels)


def _group(spatial: int, channels: int, replicas: int) -> nn.Module:
    return nn.GroupNorm(replicas * GROUPS, replicas * channels)


NONE = Arm("none", "no normalization")
BN = Arm("bn", "batch norm", _batch)
TORCH = Arm("torch", "torch.nn's batch norm", _torch)
LN = Arm("ln", "layer norm", _layer)
GN = Arm("gn", "group norm", _group)

ARMS: dict[str, Arm] = {arm.name: arm for arm in (NONE, BN, TORCH, LN, GN)}


def arm_named(name: str) -> Arm:
    """The arm of that name."""
    try:
        return ARMS[name]
    except KeyError:
        raise KeyError(f"no arm is named {name!r}; there are {', '.join(ARMS)}") from None
