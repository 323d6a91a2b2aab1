"""The peers that are measured: each is a name, a sentence and a function that builds its call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from keelnorm.bench.cases import Case
from keelnorm.bench.problem import EPS, MOMENTUM, Problem

Call = Callable[[Tensor, Tensor | None], Tensor]


class CannotError(Exception):
    """A peer does not do a case; unlike a wrong result this is not a failure."""


class Given(NamedTuple):
    """The tensors of a call and its backward."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor


@dataclass
class Built:
    """A peer ready to run: `call(x, residual) -> y`, and the module whose state it uses.

    `given` replaces the problem's tensors for a peer that needs them in another form.
    """

    call: Call
    norm: nn.Module | None = None
    given: Given | None = None


@dataclass(frozen=True)
class Peer:
    """One implementation that is compared.

    The results of a peer with `is_batch_norm` are checked. The others show a limit: `limit_of` names the variant that
    moves the same bytes.
    """

    name: str
    summary: str
    build: Callable[[Problem], Built]
    is_batch_norm: bool = True
    has_backward: bool = True
    limit_of: str | None = None


def _channels(problem: Problem) -> int:
    return problem.case.shape.dims[1]


def _torch_norm(problem: Problem) -> nn.Module:
    kind = nn.BatchNorm2d if len(problem.case.shape.dims) == 4 else nn.BatchNorm1d
    return kind(_channels(problem), eps=EPS, momentum=MOMENTUM)


def _compose(case: Case, norm: nn.Module) -> Call:
    """A batch norm and what follows it, as a ResNet writes it."""
    relu = nn.ReLU(inplace=True)

    def bn(x: Tensor, _: Tensor | None) -> Tensor:
        return norm(x)  # type: ignore[no-any-return]

    def bn_relu(x: Tensor, _: Tensor | None) -> Tensor:
        return relu(norm(x))  # type: ignore[no-any-return]

    def bn_add_relu(x: Tensor, residual: Tensor | None) -> Tensor:
        out = norm(x)
        out += residual
        return relu(out)  # type: ignore[no-any-return]

    return {"bn": bn, "bn_relu": bn_relu, "bn_add_relu": bn_add_relu}[case.variant]


def _eager(problem: Problem) -> Built:
    norm = _torch_norm(problem)
    return Built(_compose(problem.case, norm), norm)


def _compiled(problem: Problem) -> Built:
    # Every case is a program of its own: without a reset, torch falls back to eager at its recompilation limit.
    torch.compiler.reset()
    norm = _torch_norm(problem)
    return Built(torch.compile(_compose(problem.case, norm), dynamic=False), norm)


def _keelnorm(problem: Problem) -> Built:
    import keelnorm as kn

    kind = kn.BatchNorm2d if len(problem.case.shape.dims) == 4 else kn.BatchNorm1d
    norm = kind(_channels(problem), eps=EPS, momentum=MOMENTUM)
    activation = problem.case.activation

    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        return norm(x, residual, activation=activation)  # type: ignore[no-any-return]

    return Built(call, norm)


def _onednn(problem: Problem) -> Built:
    case = problem.case
    if len(case.shape.dims) != 4:
        raise CannotError("oneDNN's batch norm in torch takes two-dimensional planes only")
    if case.layout != "contiguous" or case.gradient != "matching" or case.dtype != "float32":
        raise CannotError("torch's oneDNN tensors have a layout of their own and are measured in float32 only")
    if not torch.backends.mkldnn.is_available():
        raise CannotError("this build of torch has no oneDNN")
    norm = _torch_norm(problem)
    x, residual, dy = problem.x.detach(), problem.residual, problem.dy
    given = Given(
        x.to_mkldnn().requires_grad_(),
        None if residual is None else residual.detach().to_mkldnn().requires_grad_(),
        dy.to_mkldnn(),
    )
    compose = _compose(case, norm)
    return Built(compose, norm, given)


def _relu(_: Problem) -> Built:
    return Built(lambda x, _: torch.relu(x))


def _copy(problem: Problem) -> Built:
    target = torch.empty_like(problem.x, requires_grad=False)
    return Built(lambda x, _: target.copy_(x.detach()))


def _clone(_: Problem) -> Built:
    return Built(lambda x, _: x.detach().clone())


_ALL = (
    Peer("keelnorm", "keelnorm's layer, one call", _keelnorm),
    Peer("eager", "torch.nn, one module after the other, ReLU in place", _eager),
    Peer("compile", "torch.compile of the eager modules", _compiled),
    Peer("onednn", "torch.nn on oneDNN's tensors, converted beforehand", _onednn),
    Peer("relu", "ReLU alone", _relu, is_batch_norm=False, limit_of="bn_relu"),
    Peer(
        "copy",
        "a copy into an existing tensor",
        _copy,
        is_batch_norm=False,
        has_backward=False,
        limit_of="bn_relu",
    ),
    Peer(
        "clone",
        "a copy into a new tensor",
        _clone,
        is_batch_norm=False,
        has_backward=False,
        limit_of="bn_relu",
    ),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}
DEFAULT_PEERS = ("keelnorm", "eager", "onednn", "relu", "copy", "clone")
