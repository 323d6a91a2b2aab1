"""Networks, and comparisons of a step with and without ``kn.save_memory``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import keelnorm as kn
from keelnorm.engine import output_recipes, saved_outputs


class Block(nn.Module):
    """A residual block: its output is kept by its own ReLU, by the next convolution, and by the next addition."""

    def __init__(self, activation: str = "relu", channels: int = 4) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = kn.BatchNorm2d(channels), kn.BatchNorm2d(channels)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv1(x), activation=self.activation)
        return self.bn2(self.conv2(y), x, activation=self.activation)


def network(activation: str = "relu", blocks: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), *(Block(activation) for _ in range(blocks)), nn.AdaptiveAvgPool2d(2))


def unfused(blocks: int = 3) -> nn.Module:
    """The same as code writes it, converted."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2 * blocks))
            self.bns = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2 * blocks))
            self.first = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for i in range(0, len(self.convs), 2):
                y = F.silu(self.bns[i](self.convs[i](x)))
                x = torch.relu(self.bns[i + 1](self.convs[i + 1](y)) + x)
            return F.avg_pool2d(x, 2)

    torch.manual_seed(0)
    model, _ = kn.convert(Written())
    for _ in range(3):  # layers learn what follows them
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    return model


def outcome(model: nn.Module, x: torch.Tensor, **keywords: Any) -> list[torch.Tensor]:
    """The output, all gradients, and all buffers after one step."""
    x = x.clone().requires_grad_(x.is_floating_point())
    model.zero_grad(set_to_none=True)
    y = model(x, **keywords)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *grads, *(b.clone() for b in model.buffers())]


def assert_same_bits(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def assert_saving_changes_nothing(model: nn.Module, x: torch.Tensor, longest: int = 4) -> None:
    other = copy.deepcopy(model)
    expected = [outcome(model, x) for _ in range(2)]
    with kn.save_memory(other, longest=longest):
        for each in expected:
            assert_same_bits(outcome(other, x), each)
    assert_same_bits(outcome(other, x), outcome(model, x))


def kept(model: nn.Module, x: torch.Tensor, longest: int) -> int:
    """Bytes of distinct storages that one forward keeps, without parameters; 0 for ``longest`` keeps every output."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), x)}
    alive: list[output_recipes.Packed] = []
    with saved_outputs.recorded(model, longest, lambda _, packed: alive.append(packed)):
        model(x)
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage() for packed in alive for t in output_recipes.held_by(packed)
    }
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)


class Parts(nn.Module):
    """A convolution, a batch norm, and a reader of its output, with code between them."""

    def __init__(self, code: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 4, 1), kn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.code = code

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.code(self, x)
