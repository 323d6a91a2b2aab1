"""Scenarios of synchronized layers that agree."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from problems import FOUR, TWO, C, Case
from rank_models import Network, network_batch, said
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import keelnorm as kn
import keelnorm.distributed
import keelnorm.engine.preflight
from keelnorm.nn.sync.sync_batch_norm import SyncBatchNorm


def step(layer: nn.Module, batch: dict[str, Any], activation: str | None = None) -> dict[str, Any]:
    """One forward and backward of a layer on a rank's share."""
    x = batch["x"].clone().requires_grad_()
    residual = None if batch["residual"] is None else batch["residual"].clone().requires_grad_()
    y = layer(x, residual, activation=activation, mask=batch["mask"])
    y.backward(batch["dy"])
    found = {"y": y.detach(), "dx": x.grad, "dresidual": None if residual is None else residual.grad}
    return found | {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}


def layer_of(case: Case, batch: dict[str, Any], **options: Any) -> SyncBatchNorm:
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    layer = SyncBatchNorm(C, momentum=case.momentum, affine=case.affine, dtype=wide, **options)
    if case.affine:
        layer.load_state_dict(layer.state_dict() | {key: batch[key] for key in ("weight", "bias")})
    return layer


def run_cases(cases: tuple[Case, ...]) -> dict[str, dict[str, Any]]:
    found = {}
    for case in cases:
        batch = case.part(dist.get_rank())
        layer = layer_of(case, batch)
        before = kn.kernels.calls()
        with kn.kernels.use(case.kernels):
            found[case.name] = step(layer, batch, case.activation) | dict(layer.named_buffers())
        after = kn.kernels.calls()
        found[case.name]["ran"] = {name for name in after if after[name] > before.get(name, 0)}
        found[case.name]["kept"] = case.size == () or not case.channels_last or channels_last(found[case.name]["y"])
    return found


def channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def two() -> Any:
    return run_cases(TWO)


def four() -> Any:
    return run_cases(FOUR)


def subgroups() -> Any:
    """Ranks 0, 2 and 1, 3 normalize together."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    own, other = groups[rank % 2], groups[1 - rank % 2]
    case = Case(f"subgroup {rank % 2}", (5, 11))
    batch = case.part(rank // 2)
    layer = layer_of(case, batch, process_group=own)
    found = step(copy.deepcopy(layer), batch)
    converted = SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), own)
    return {
        "step": found,
        "stranger": said(lambda: layer_of(case, batch, process_group=other)(batch["x"])),
        "groups": copy.deepcopy(layer).process_group is own and converted[0].process_group is own,
    }


def parallel() -> Any:
    """DistributedDataParallel, with two forwards before one backward, and buffers broadcast at each."""
    model = DistributedDataParallel(Network())
    own = slice(0, 5) if dist.get_rank() == 0 else slice(5, 16)
    first, second = network_batch()[:, own]
    # Gradients are averaged over ranks; these losses add up to the whole batch's.
    loss = 2 * (model(first).square().sum() + model(second).sin().sum())
    loss.backward()
    return {name: p.grad for name, p in model.module.named_parameters()} | dict(model.module.named_buffers())


def many() -> Any:
    """Odds and ends on two ranks."""
    rank = dist.get_rank()
    case = Case("odds and ends", (5, 11))
    batch = case.part(rank)
    x = batch["x"]
    found: dict[str, Any] = {}

    layer = layer_of(case, batch)
    again = layer_of(case, batch)
    leaf = x.clone().requires_grad_()
    y = checkpoint(layer, leaf, use_reentrant=False)
    y.backward(batch["dy"])
    found["checkpoint"] = {"dx": leaf.grad, "plain": step(again, batch)["dx"]}
    found["checkpoint"] |= {
        "batches": layer.num_batches_tracked,
        "same": torch.equal(layer.running_var, again.running_var),
    }

    frozen = layer_of(case, batch).eval()
    plain = kn.BatchNorm(C, dtype=torch.float64).eval()
    plain.load_state_dict(frozen.state_dict())
    # Only one rank evaluates: nothing is exchanged.
    found["evaluation"] = torch.equal(frozen(x), plain(x)) if rank == 0 else True

    leaf = x.clone().requires_grad_()
    y = layer_of(case, batch)(leaf)
    found["second derivative"] = said(lambda: torch.autograd.grad(y.square().sum(), leaf, create_graph=True))
    found["transform"] = said(lambda: torch.func.grad(lambda x: layer_of(case, batch)(x).sum())(x))
    found["one value"] = said(lambda: SyncBatchNorm(2)(torch.ones(1 - rank, 2)))
    one = SyncBatchNorm(2)
    found["one value each"] = one(torch.tensor([[1.0, 2.0]]) * (1 + 2 * rank)).detach(), one.running_var
    single = SyncBatchNorm(2)
    said(lambda: single(torch.ones(1 - rank, 2)))
    found["nothing changed"] = int(single.num_batches_tracked), single.running_mean
    for policy in ("running", "skip"):
        found[f"too few, {policy}"] = one_value(policy, rank)
    masked = SyncBatchNorm(2)
    y = masked(torch.randn(3, 2), mask=torch.zeros(3, dtype=torch.bool))
    found["all masked"] = y.detach(), int(masked.num_batches_tracked), masked.running_mean
    empty = SyncBatchNorm(2)
    found["all empty"] = empty(torch.ones(0, 2)).shape, int(empty.num_batches_tracked), empty.running_var
    poisoned = SyncBatchNorm(2)
    poisoned(torch.tensor([[1.0, 2.0], [3.0, torch.inf if rank else 4.0]]))
    found["poisoned"] = poisoned.running_mean
    untracked = SyncBatchNorm(C, track_running_stats=False, dtype=torch.float64)
    found["untracked"] = step(untracked, case.part(rank) | {"weight": None})["y"]

    # Without a gradient for x there is no collective in the backward: rank 1 leaves it out.
    layer = layer_of(case, batch)
    y = layer(x)
    if rank == 0:
        y.backward(batch["dy"])
    found["dweight alone"] = layer.weight.grad

    with torch.no_grad():
        found["without autograd"] = layer_of(case, batch)(x)
    found["state"] = list(pickle.loads(pickle.dumps(SyncBatchNorm(2))).state_dict())
    return found


def one_value(too_few: str, rank: int) -> dict[str, Tensor]:
    """A step in which rank 0 has one value per channel, and rank 1 none."""
    layer = SyncBatchNorm(2, too_few=too_few, dtype=torch.float64)
    with torch.no_grad():
        for value, fill in zip(
            (layer.weight, layer.bias, layer.running_mean, layer.running_var), (3, 5, 1, 4), strict=True
        ):
            value.fill_(fill)
    leaf = torch.full((1 - rank, 2), 7.0, dtype=torch.float64, requires_grad=True)
    y = layer(leaf)
    y.sum().backward()
    return {"y": y.detach(), "dx": leaf.grad, "moments": torch.stack([layer.running_mean, layer.running_var])}


def compiled() -> Any:
    """torch.compile breaks the graph, and says why."""
    case = Case("compiled", (5, 11))
    batch = case.part(dist.get_rank())
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    layer = layer_of(case, batch)

    def network(x: Tensor, residual: Any = None, **keywords: Any) -> Tensor:
        return layer(x * 1.0, residual, **keywords) * 1.0

    # torch's own, where a graph that was broken goes on with a tensor that isn't a leaf
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    torch._dynamo.reset()
    whole = step_of(torch.compile(network, backend=backend), layer, batch)
    refused = said(lambda: torch.compile(network, backend="eager", fullgraph=True)(batch["x"]))
    return {"step": whole, "graphs": len(graphs), "refused": refused, "batches": layer.num_batches_tracked}


def step_of(function: Callable[..., Tensor], layer: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    x = batch["x"].clone().requires_grad_()
    y = function(x)
    y.backward(batch["dy"])
    return {"y": y.detach(), "dx": x.grad} | {f"d{name}": p.grad for name, p in layer.named_parameters()}
