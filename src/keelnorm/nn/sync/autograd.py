"""The autograd function of synchronized batch normalization, made of the four operators of every back end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from keelnorm.engine import dispatch, ops, saved_outputs
from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import Kept, Needs, State
from keelnorm.engine.collectives import add_up
from keelnorm.engine.fast_operators import run_fast
from keelnorm.engine.kernels import reference
from keelnorm.engine.preflight import Step, agree
from keelnorm.engine.torch_internals import is_transformed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Call(NamedTuple):
    """What the backward needs besides tensors."""

    act: Activation
    group: ProcessGroup
    what: str
    residual_dtype: torch.dtype | None
    step: Step | None


class Synchronized(torch.autograd.Function):
    """Compute ``act(bn(x) + residual)``, where the moments depend on the x of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        saved: Tensor,
        count: Tensor,
        call: Call,
    ) -> Tensor:
        """Normalize x with the pooled moments ``saved``."""
        mean, _, rstd = saved
        given, act = (x, mean, rstd, weight, bias, residual), call.act
        fast: Tensor | None = run_fast("apply", x, *given, act.code, act.a, act.b)
        y = reference.apply(*given, act) if fast is None else fast
        if saved_outputs.calls:  # it is computed again from what the ranks have found, without asking them
            state = State(training=True, update=False, momentum=None, eps=0.0, what=call.what)
            dispatch.note_output(y, x, residual, weight, bias, saved, state, act, fast is None)
        ctx.save_for_backward(x, weight, saved, count, *ops.gate_needs(call.act.code, residual, bias, y))
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients, with sums over all ranks."""
        x, weight, saved, count, bias, y, residual = ctx.saved_tensors
        need, call = Needs(*ctx.needs_input_grad[:4]), ctx.call
        if torch.is_grad_enabled() or is_transformed():
            refuse_second_derivative(call.what)
        kept = Kept(x=x, saved=saved, weight=weight, bias=bias, y=y, residual=residual, training=True, act=call.act)
        found = synchronized_backward(dy, kept, count, call, need)
        return *found, None, None, None


def refuse_second_derivative(what: str) -> NoReturn:
    """Raise because ranks synchronize in the first derivative only."""
    raise RuntimeError(
        f"{what}: there is no second derivative through synchronized ranks (create_graph=True asks for one); "
        "use kn.BatchNorm, or a process group of one rank"
    )


def synchronized_backward(dy: Tensor, kept: Kept, count: Tensor, call: Call, need: Needs) -> tuple[Tensor | None, ...]:
    """Compute dx, dresidual, dweight and dbias, each only if ``need`` says so.

    Args:
        count: Values per channel of all ranks.
    """
    x, act, group, what, step = kept.x, call.act, call.group, call.what, call.step
    mean, _, rstd = kept.saved
    given = (dy, x, mean, rstd, kept.weight, kept.bias, kept.y, kept.residual)
    dx = dresidual = dweight = dbias = None
    if need.x or need.weight or need.bias:
        dbias, dweight = sums = _run("grad_stats", x, *given, act=act)
    if need.x:
        if step is not None:
            agree(step._replace(direction="backward"), group, what)
        here = step or Step(f"a {what}", "backward", x.shape[1], str(x.dtype).removeprefix("torch."), "training", True)
        total = add_up(torch.stack(tuple(sums)), group, what, lambda: here._replace(direction="backward"))
        dx = _run("grad_input", x, *given, total / count.clamp(min=1), act=act)
    if need.residual:
        dresidual = dy
        if act.code != 0:
            only_residual = Needs(x=False, residual=True, weight=False, bias=False)
            dresidual = dispatch.backward(dy, kept._replace(training=False), only_residual)[1]
        dresidual = dresidual.to(call.residual_dtype)
    return dx, dresidual, dweight if need.weight else None, dbias if need.bias else None


def _run(stem: str, x: Tensor, *given: Tensor | None, act: Activation) -> Any:
    """Run one of the four operators: a fast one if it accepts x, else the reference."""
    found = run_fast(stem, x, *given, act.code, act.a, act.b)
    return getattr(reference, stem)(*given, act) if found is None else found
