"""``kn.save_memory`` on two ranks: the same bits as without, under wrappers that free and gather parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import keelnorm as kn
from keelnorm.engine.fusion.call import all_sizes_wait

C, SIZE = 4, 5


class Block(nn.Module):
    """A residual block; ``given`` says what the calls of its layers are given."""

    def __init__(self, layer: Callable[[], nn.Module], given: dict[str, Any]) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 3, padding=1)
        self.bn1, self.bn2, self.given = layer(), layer(), given

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x), activation="silu", **self.given)
        z: Tensor = self.bn2(self.conv2(y), x, activation="relu", **self.given)
        return z


def network(synchronized: bool) -> nn.Sequential:
    """Plain, masked, weighted and ghost blocks; or synchronized ones, of which one is converted."""
    torch.manual_seed(0)
    mask = torch.rand(6, SIZE, SIZE, generator=torch.Generator().manual_seed(dist.get_rank())) > 0.3
    if not synchronized:
        return nn.Sequential(
            nn.Conv2d(3, C, 1),
            Block(lambda: kn.BatchNorm2d(C), {}),
            Block(lambda: kn.BatchNorm2d(C), {"mask": mask}),
            Block(lambda: kn.BatchNorm2d(C), {"sample_weight": mask.float() + 1}),
            Block(lambda: kn.GhostBatchNorm(C, 2), {}),
            nn.Conv2d(C, 2, 1),
        )
    return nn.Sequential(
        nn.Conv2d(3, C, 1),
        Block(lambda: kn.SyncBatchNorm(C), {}),
        Block(lambda: kn.SyncBatchNorm(C), {"mask": mask}),
        kn.convert(nn.Sequential(nn.Conv2d(C, C, 1), kn.SyncBatchNorm(C), nn.ReLU(), nn.Conv2d(C, 2, 1)))[0],
    )


def sharded(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WRAPPERS: dict[str, tuple[Callable[[nn.Sequential], nn.Module], bool]] = {
    "alone": (lambda model: model, False),
    "synchronized": (lambda model: model, True),
    "DDP": (DistributedDataParallel, False),
    "DDP, synchronized": (DistributedDataParallel, True),
    "FSDP2": (sharded, False),
    "FSDP2, synchronized": (sharded, True),
}


@contextmanager
def counted(calls: list[str]) -> Iterator[None]:
    """Note the collectives of the synchronized layers."""
    before = dist.all_reduce, dist.all_gather

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            calls.append(name)
            return function(*args, **keywords)

        return call

    dist.all_reduce, dist.all_gather = (noting(f.__name__, f) for f in before)
    try:
        yield
    finally:
        dist.all_reduce, dist.all_gather = before


def steps(name: str, saves: bool) -> dict[str, Any]:
    """Three steps of SGD: outputs, gradients, parameters and buffers, and the collectives of the backwards."""
    wrap, synchronized = WRAPPERS[name]
    model = wrap(network(synchronized))
    if saves:
        kn.save_memory(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(3, 6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3 + dist.get_rank()))
    tensors: list[Tensor] = []
    collectives: list[str] = []
    for each in x:
        optimizer.zero_grad()
        leaf = each.clone().requires_grad_()
        before = kn.kernels.calls()
        y = model(leaf)
        with counted(collectives):
            y.square().sum().backward()
        tensors += [y.detach(), leaf.grad, *(p.grad for p in model.parameters())]
        optimizer.step()
        ran = sum(kn.kernels.calls().values()) - sum(before.values())
    tensors += [*model.parameters(), *model.buffers()]
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
    return {"tensors": [t.detach().clone() for t in whole], "collectives": collectives, "kernels": ran}


def saving() -> Any:
    # of torch's sharding, about its own functions
    warnings.filterwarnings("default", module="torch.distributed")
    with all_sizes_wait():
        return {name: [steps(name, saves) for saves in (False, True)] for name in WRAPPERS}
