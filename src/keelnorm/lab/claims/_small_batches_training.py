"""The remedies for small batches, and their training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.lab.core.cell import Result
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.data import images
from keelnorm.lab.training.arms import BN, GN, NONE, Arm
from keelnorm.lab.training.stacks import StackedMLP
from keelnorm.lab.training.train import train

WIDTHS = (64, 64)
ACCUMULATED = 8
"""Micro-batches, or processes, whose moments are pooled in the synchronized arm."""
WINDOW = 8
GHOST = 16


def _layer(make: Callable[[int], nn.Module]) -> Callable[[int, int, int], nn.Module]:
    return lambda spatial, channels, replicas: make(replicas * channels)


def _renorm(channels: int) -> nn.Module:
    # The paper's ramps last 40,000 batches; these trainings are shorter than its first phase.
    return kn.BatchRenorm(
        channels, r_max=kn.LinearRamp(1.0, 3.0, 50, 250), d_max=kn.LinearRamp(0.0, 5.0, 50, 250), momentum=0.02
    )


ARMS: dict[str, Arm] = {
    "none": NONE,
    "bn": BN,
    "ghost": Arm("ghost", "ghost batch norm", _layer(partial(kn.GhostBatchNorm, ghost_size=GHOST))),
    "renorm": Arm("renorm", "batch renormalization", _layer(_renorm)),
    "cross": Arm(
        "cross",
        "cross-iteration",
        _layer(partial(kn.CrossIterationBatchNorm, window=WINDOW, burn_in=50, momentum=0.02)),
    ),
    "moving": Arm(
        "moving", "moving average", _layer(partial(kn.MovingAverageBatchNorm, window=WINDOW, burn_in=50, momentum=0.02))
    ),
    "sync": Arm("sync", f"synchronized over {ACCUMULATED}", BN.normalization),
    "gn": GN,
}


class RemedyStack(StackedMLP):
    """A stack whose layers get what some remedies need beside x."""

    def linear(self, layer: int, x: Tensor) -> Tensor:
        """(R, n, in) -> (R, n, out); for the moving average with weights as of `kn.center_weights`."""
        if self.arm.name != "moving" or layer == len(self.blocks):
            return super().linear(layer, x)
        weight = self.weights[layer] - self.weights[layer].mean(dim=1, keepdim=True)
        return torch.bmm(x, weight.view(self.replicas, -1, x.shape[2]).transpose(1, 2))

    def hidden(self, layer: int, z: Tensor) -> Tensor:
        """Normalization and ReLU; cross-iteration is told the weight that made z."""
        if self.arm.name != "cross":
            return super().hidden(layer, z)
        block = self.blocks[layer]
        assert isinstance(block, nn.Sequential)
        y: Tensor = block[0](z, producer_weight=self.weights[layer], activation="relu")
        return y


def train_remedy(*, data: str, arm: str, batch: int, seed: int, rates: tuple[float, ...], steps: int) -> Result:
    """Train one arm at one batch size and every learning rate; the synchronized arm in fewer, larger steps.

    What synchronization over k processes of b samples computes is one batch of k·b: that is what runs here.
    """
    split = images(data, seed)
    draw = generator(draw="initialization", data=data, seed=seed)
    stack = RemedyStack(
        split.train_x[0].numel(),
        WIDTHS,
        split.classes,
        ARMS[arm],
        draw,
        torch.ones(len(rates)),
        initialization="xavier",
    )
    if arm == "sync":
        batch, steps = batch * ACCUMULATED, max(1, steps // ACCUMULATED)
    order = generator(draw="order", data=data, seed=seed)
    return dict(vars(train(stack, split, torch.tensor(rates), batch=batch, evaluate_at=(steps,), generator=order)))
