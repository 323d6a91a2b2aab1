"""What the ranks do; each scenario runs on every rank of its own processes, and returns what tests look at."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from problems import FOUR, TWO, C, Case
from saving import saving
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import keelnorm as kn
import keelnorm.distributed
import keelnorm.engine.preflight
from keelnorm.distributed import preflight, sync_statistics
from keelnorm.nn.sync.sync_batch_norm import SyncBatchNorm


class Scenario(NamedTuple):
    run: Callable[[], Any]
    ranks: int
    timeout: float = 30.0


def said(action: Callable[[], Any]) -> tuple[str, str]:
    """The type and the words of the error that an action raises; empty where it raises none."""
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


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


class Network(nn.Module):
    """Calls its synchronized layer in the order and mode that the test asks for."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(4, C, dtype=dtype)
        self.bn = SyncBatchNorm(C, dtype=dtype)
        self.bn2 = SyncBatchNorm(C, dtype=dtype)
        self.head = nn.Linear(C, 2, dtype=dtype)

    def forward(self, x: Tensor, swapped: bool = False) -> Tensor:
        first, second = (self.bn2, self.bn) if swapped else (self.bn, self.bn2)
        return self.head(second(torch.tanh(first(self.inner(x), activation="relu"))))


def network_batch() -> Tensor:
    return torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


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


def flights() -> Any:
    """With preflight: rank 1 of three goes another way."""
    rank = dist.get_rank()
    odd = rank == 1
    preflight(True)
    x = torch.randn(4, 4, dtype=torch.float64)
    found: dict[str, Any] = {}

    model = Network()
    found["agreed"] = said(lambda: model(x).sum().backward())
    found["order"] = said(lambda: Network()(x, swapped=odd))
    model = Network()
    model.bn2.train(not odd)
    found["mode"] = said(lambda: model(x))
    found["dtype"] = said(lambda: Network(torch.float32 if odd else torch.float64)(x.float() if odd else x))
    found["channels"] = said(lambda: SyncBatchNorm(3 if odd else 4)(torch.randn(5, 3 if odd else 4)))
    found["input"] = said(lambda: SyncBatchNorm(4)(torch.randn(5, 3 if odd else 4)))
    found["gradient"] = said(lambda: SyncBatchNorm(4)(torch.randn(5, 4, requires_grad=odd)))

    # The forwards agree, then one rank goes back through another branch first.
    bn, bn2 = Network().bn, SyncBatchNorm(3, dtype=torch.float64)
    a = torch.randn(4, C, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    outputs = [bn(a).sum(), bn2(b).sum()]
    found["backward"] = said(outputs[1 if odd else 0].backward)

    with torch.no_grad():  # one rank's evaluation is its own affair
        found["evaluation"] = said(lambda: Network().eval()(x)) if rank == 0 else ("", "")
    found["still working"] = said(lambda: Network()(x).sum().backward())
    preflight(False)
    found["off"] = said(lambda: SyncBatchNorm(4)(torch.randn(5, 4, dtype=torch.float32 if odd else torch.float64)))
    return found


def unlike() -> Any:
    """Without preflight: rank 1 of three has more channels, or fewer."""
    rank = dist.get_rank()
    odd = rank == 1
    preflight(False)
    found: dict[str, Any] = {}
    for name, channels in (("more", 4 + odd), ("fewer", 4 - odd), ("many", 4 + 4000 * odd)):
        layer, x = SyncBatchNorm(channels), torch.randn(5, channels, requires_grad=True)
        found[name] = said(partial(layer, x))
        found[f"{name}, unchanged"] = int(layer.num_batches_tracked), float(layer.running_mean.abs().max())
        found[f"{name}, activated"] = said(partial(nn.Sequential(layer), x.detach()))
        found[f"{name}, moments"] = said(kn.functional.moments(x.detach()).all_reduce)
        model = kn.BatchNorm1d(channels)
        found[f"{name}, recalibrated"] = said(partial(kn.recalibrate, model, [x.detach()]))
    bn, bn2 = SyncBatchNorm(4), SyncBatchNorm(3)
    outputs = [bn(torch.randn(5, 4, requires_grad=True)).sum(), bn2(torch.randn(5, 3, requires_grad=True)).sum()]
    found["backward"] = said(outputs[odd].backward)
    alike = SyncBatchNorm(4)
    found["still working"] = said(lambda: alike(torch.randn(5, 4, requires_grad=True)).sum().backward())
    return found


def dying() -> Any:
    """Rank 1 dies between its forward and its backward."""
    layer = SyncBatchNorm(3)
    y = layer(torch.randn(4, 3, requires_grad=True))
    if dist.get_rank() == 1:
        os._exit(1)
    start = time.monotonic()
    return said(y.sum().backward), said(lambda: nn.Sequential(layer)(torch.randn(4, 3))), time.monotonic() - start


def silent() -> Any:
    """Rank 1 lives, but does not come."""
    layer = nn.Sequential(SyncBatchNorm(3))
    if dist.get_rank() == 1:
        time.sleep(3)
        return None
    start = time.monotonic()
    return said(lambda: layer(torch.randn(4, 3))), time.monotonic() - start


def pooling() -> Any:
    """Ordinary batch norms of three ranks; see test_pooling."""
    rank = dist.get_rank()
    model = pooled_model(rank)
    found: dict[str, Any] = {}
    default = copy.deepcopy(model)
    sync_statistics(default)
    found["default"] = default.state_dict()
    repeated = copy.deepcopy(default)
    sync_statistics(repeated)
    found["repeated"] = repeated.state_dict()
    given = copy.deepcopy(model)
    sync_statistics(given, count=(0.1, 0.5, 0.0)[rank])
    found["given"] = given.state_dict()
    pair = dist.new_group([0, 1])
    inside = copy.deepcopy(model)
    found["pair"] = said(lambda: sync_statistics(inside, pair)), inside.state_dict()
    poisoned = copy.deepcopy(model)
    if rank == 1:
        poisoned.bn.running_var[0] = torch.nan
    sync_statistics(poisoned)
    found["poisoned"] = poisoned.state_dict()
    fresh = nn.BatchNorm1d(2)
    sync_statistics(fresh)
    found["untrained"] = fresh.state_dict()
    before = copy.deepcopy(model.state_dict())
    other = copy.deepcopy(model)
    if rank == 2:
        other.more = nn.BatchNorm1d(2)
    found["other model"] = said(lambda: sync_statistics(other))
    found["other channels"] = said(lambda: sync_statistics(nn.BatchNorm1d(2 + (rank == 1))))
    found["other counts"] = said(lambda: sync_statistics(model, count=1.0 if rank == 2 else None))
    found["illegal count"] = said(lambda: sync_statistics(model, count=-1.0 if rank == 2 else 1.0))
    found["unchanged"] = all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    found["no layers"] = said(lambda: sync_statistics(nn.Linear(2, 2)))
    sync_statistics(nn.BatchNorm1d(2, track_running_stats=False))
    return found


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.deep = nn.Sequential(kn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(2, track_running_stats=False))


def pooled_model(rank: int) -> Pooled:
    """Rank r's model after r + 1 batches, one of its layers after 2 only on rank 1."""
    torch.manual_seed(rank)
    model = Pooled()
    for _ in range(rank + 1):
        model.bn(torch.randn(6, 3, 2, 2) * (1 + rank) + 5 * rank)
    for _ in range(2 if rank == 1 else 0):
        model.deep[0](torch.randn(6, 4) - 2)
    return model


def moments() -> Any:
    rank = dist.get_rank()
    data = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 1e6
    data += torch.arange(20).view(-1, 1, 1) // 7
    own = data[:7] if rank == 0 else data[7:] if rank == 1 else data[:0]
    total = kn.Moments.from_tensor(own).all_reduce()
    per_channel = kn.Moments.from_tensor(
        own, torch.ones(len(own), dtype=torch.bool) if rank == 1 else None
    ).all_reduce()
    alone = kn.Moments.empty(3) if rank else kn.Moments.from_tensor(data)
    alone = alone.all_reduce()
    nothing = kn.Moments.empty(2).all_reduce()
    half = kn.BatchNorm1d(2).half()
    half.running_mean.copy_(torch.tensor([400.0, 1.0]) * (rank - 1))
    half.num_batches_tracked.fill_(1)
    kn.sync_statistics(half)
    weights = None if rank == 1 else torch.arange(1.0, len(own) + 1) / 100  # some ranks have weights, others none
    weighted = kn.Moments.from_tensor(own, sample_weight=weights, weighting="importance").all_reduce()
    differentiable = kn.Moments.from_tensor(own.clone().requires_grad_())
    return {
        "total": total,
        "per channel": per_channel,
        "alone": alone,
        "nothing": nothing,
        "weighted": weighted,
        "half": half.state_dict(),
        "gradient": said(differentiable.all_reduce),
    }


def environment() -> Any:
    """Whether preflight is on, by what the environment says when keelnorm is imported."""
    found = {}
    for value in (None, "0", "1"):
        os.environ.pop("KEELNORM_SYNC_DEBUG", None)
        if value is not None:
            os.environ["KEELNORM_SYNC_DEBUG"] = value
        importlib.reload(keelnorm.engine.preflight)
        found[value] = keelnorm.distributed.preflight_is_on()
    return found


SCENARIOS = {
    "two": Scenario(two, 2),
    "four": Scenario(four, 4),
    "subgroups": Scenario(subgroups, 4),
    "parallel": Scenario(parallel, 2),
    "many": Scenario(many, 2),
    "compiled": Scenario(compiled, 2),
    "flights": Scenario(flights, 3),
    "unlike": Scenario(unlike, 3),
    "dying": Scenario(dying, 2, timeout=5.0),
    "silent": Scenario(silent, 2, timeout=1.0),
    "pooling": Scenario(pooling, 3),
    "moments": Scenario(moments, 3),
    "environment": Scenario(environment, 2),
    "saving": Scenario(saving, 2),
}
