"""A small residual network, of keelnorm's layers or of torch's, and what one step of it gives."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import keelnorm as kn

SHAPE = (4, 3, 6, 5)


class Block(nn.Module):
    """conv, batch norm and ReLU as a Sequential; then conv and batch norm with a residual and a ReLU."""

    def __init__(self, ours: bool = True, momentum: float | None = 0.1) -> None:
        super().__init__()
        norm, sequential = (kn.BatchNorm2d, kn.Sequential) if ours else (nn.BatchNorm2d, nn.Sequential)
        self.stem = sequential(nn.Conv2d(3, 4, 3, padding=1), norm(4, momentum=momentum), nn.ReLU())
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = norm(4, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if isinstance(self.norm, kn.BatchNorm2d):
            return self.norm(self.conv(h), h, activation="relu")
        return torch.relu(self.norm(self.conv(h)) + h)


def twins(ours: bool = True, **keywords: float | None) -> tuple[Block, Block]:
    """Two blocks with the same state: the first of keelnorm's layers, the second of those that are asked for."""
    block = Block(**keywords)
    with torch.no_grad():
        for name, value in block.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif not name.endswith("num_batches_tracked"):
                value.normal_()
    other = Block(ours=ours, **keywords)
    other.load_state_dict(copy.deepcopy(block.state_dict()))
    return block, other


def formula(layer: nn.Module, x: Tensor) -> Tensor:
    """Batch norm written out, for derivatives of any order.

    torch's own are wrong in training from the third on, and where a forward-mode derivative is differentiated again.
    """

    def spread(values: Tensor) -> Tensor:
        return values.view(-1, *([1] * (x.dim() - 2)))

    dims = [0, *range(2, x.dim())]
    if layer.training or layer.running_mean is None:
        mean = x.mean(dims, keepdim=True)
        var = (x - mean).square().mean(dims, keepdim=True)
    else:
        mean, var = spread(layer.running_mean), spread(layer.running_var)
    return (x - mean) / (var + layer.eps).sqrt() * spread(layer.weight) + spread(layer.bias)


def step(model: nn.Module, x: Tensor, of: nn.Module | None = None) -> dict[str, Tensor]:
    """A forward and a backward: output, gradients of the input and of the parameters, and the buffers after it.

    Args:
        of: Whose parameters and buffers to look at, where ``model`` is a wrapper.
    """
    module = of or model
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    found |= {f"grad {name}": p.grad for name, p in module.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], units: float = 0) -> None:
    """Fail unless all agree: to the bit, or within ``units`` roundings of each tensor's largest value."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        other = expected[name]
        assert (value.shape, value.dtype) == (other.shape, other.dtype), name
        if units == 0 or not value.is_floating_point():
            assert torch.equal(value, other), name
            continue
        error = (value.double() - other.double()).abs().max().item()
        bound = units * torch.finfo(value.dtype).eps * max(other.double().abs().max().item(), 1.0)
        assert error <= bound, f"{name}: off by {error:.3g}, allowed {bound:.3g}"
