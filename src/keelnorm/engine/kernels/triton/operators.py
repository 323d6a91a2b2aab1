"""The operators of keelnorm/engine/ops.py on Triton kernels, with the schemas' signatures.

Nothing here waits for the GPU: decisions that depend on values are made in kernels. Tensors that the kernels do not
take (float64, empty ones, other layouts) are refused as by the native operators, before anything is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from keelnorm.engine.activations import TABLE
from keelnorm.engine.kernels.triton import launches
from keelnorm.engine.kernels.triton.device import check_counts, check_vectors, laid_out_as, unsupported, view_of
from keelnorm.engine.kernels.triton.launches import Act, Call, GradientInputs, Running

calls = 0


def stats(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean and biased variance of each channel, (2, C), of the values that the mask (N, *S) lets count."""
    call = Call(x, view_of(x), mask=mask)
    _count_call()
    return launches.moments(call, eps=1.0)[0][:2]  # 1/√(var + eps) is not used


def measure_(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None, training: bool,
    update: bool, momentum: float | None, eps: float, counts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(mean, var, rstd), (3, C), that normalize x; updates the running statistics as `forward_`."""
    call = Call(x, view_of(x))
    running = _running(x, running_mean, running_var, batches, counts, update and training, momentum)
    _count_call()
    return launches.measure(call, running, training, eps)[0]


def apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    activation: int, a: float, b: float,
) -> Tensor:  # fmt: skip
    """act(bn(x) + residual) with the given mean and 1/√(var + eps)."""
    call = _call(x, weight, bias, activation, a, b)
    check_vectors(x, mean=mean, rstd=rstd)
    residual = None if residual is None else laid_out_as(x, "residual", residual)
    _count_call()
    y = _empty_result(x, residual)
    launches.apply(call, residual, y, launches.coefficients(call, mean, rstd))
    return y


def finish(
    x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: int,
    a: float, b: float,
) -> Tensor:  # fmt: skip
    """As `apply`, from the result of `measure_`."""
    return apply(x, saved[0], saved[2], weight, bias, residual, activation, a, b)


def grad_stats(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None,
    residual: Tensor | None, activation: int, a: float, b: float,
) -> Tensor:  # fmt: skip
    """Σg and Σg·x̂, (2, C)."""
    call, inputs = _call(x, weight, bias, activation, a, b), _inputs(dy, x, y, residual)
    check_vectors(x, mean=mean, rstd=rstd)
    _count_call()
    return launches.sums(call, inputs, mean, rstd, launches.coefficients(call, mean, rstd))


def grad_input(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None,
    residual: Tensor | None, grad_means: Tensor | None, activation: int, a: float, b: float,
) -> Tensor:  # fmt: skip
    """dx, from the means (2, C) of g and g·x̂; None: fixed statistics."""
    call, inputs = _call(x, weight, bias, activation, a, b), _inputs(dy, x, y, residual)
    check_vectors(x, mean=mean, rstd=rstd)
    _count_call()
    coefficients = launches.coefficients(call, mean, rstd)
    slopes = None if grad_means is None else launches.slopes(call, grad_means, mean, rstd, coefficients)
    dx = torch.empty_like(x)
    launches.write_gradients(call, inputs, dx, None, coefficients, slopes)
    return dx


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, eps: float, activation: int, a: float, b: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and (mean, var, rstd) as one (3, C) tensor; nothing is updated."""
    return forward_(
        x, residual, weight, bias, running_mean, running_var, None, training, False, 0.0, eps, activation, a, b
    )


def forward_(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, batches: Tensor | None, training: bool, update: bool, momentum: float | None,
    eps: float, activation: int, a: float, b: float, counts: Tensor | None = None, mask: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `forward`, and updates the running statistics with ``update``."""
    call = _call(x, weight, bias, activation, a, b, mask, keep)
    running = _running(x, running_mean, running_var, batches, counts, update and training, momentum)
    residual = None if residual is None else laid_out_as(x, "residual", residual)
    _count_call()
    y = _empty_result(x, residual)
    return y, launches.forward(call, residual, y, running, training, eps)


def inplace_(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    batches: Tensor | None, training: bool, update: bool, momentum: float | None, eps: float, activation: int,
    a: float, b: float, counts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `forward_`; x becomes y."""
    call = _call(x, weight, bias, activation, a, b)
    running = _running(x, running_mean, running_var, batches, counts, update and training, momentum)
    _count_call()
    return launches.forward(call, None, x, running, training, eps)


def invert(
    y: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, activation: int, a: float, b: float
) -> Tensor:
    """Rebuild x from y, in y's layout, for an activation that has an inverse."""
    call = _call(y, weight, bias, activation, a, b, name="y")
    if TABLE[activation].inverse is None:
        raise unsupported("activation")
    _count_call()
    x = torch.empty_like(y)
    launches.invert(call, x, saved)
    return x


def backward(
    dy: Tensor, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None,
    residual: Tensor | None, training: bool, activation: int, a: float, b: float, need_input: bool,
    need_residual: bool, need_weight: bool, need_bias: bool, mask: Tensor | None = None, keep: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dresidual, dweight, dbias; None for those that are not needed."""
    call, inputs = _call(x, weight, bias, activation, a, b, mask, keep), _inputs(dy, x, y, residual)
    _count_call()
    dx = torch.empty_like(x) if need_input else None
    dresidual = torch.empty_like(x, dtype=dy.dtype) if need_residual else None
    need_vectors = need_weight or need_bias
    dweight, dbias = launches.backward(call, inputs, dx, dresidual, saved, training, need_vectors)
    return dx, dresidual, dweight if need_weight else None, dbias if need_bias else None


def backward_(
    dy: Tensor, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, activation: int,
    a: float, b: float, need_weight: bool, need_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As `backward` without a residual; x becomes dx."""
    call, inputs = _call(x, weight, bias, activation, a, b), _inputs(dy, x, None, None)
    _count_call()
    dweight, dbias = launches.backward(call, inputs, x, None, saved, training, need_weight or need_bias)
    return dweight if need_weight else None, dbias if need_bias else None


def _call(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, activation: int, a: float, b: float,
    mask: Tensor | None = None, keep: bool = False, name: str = "x",
) -> Call:  # fmt: skip
    """Check the arguments that most operators share."""
    view = view_of(x, name)
    check_vectors(x, weight=weight, bias=bias)
    if not 0 <= activation < len(TABLE):
        raise unsupported("activation")
    act = Act(TABLE[activation].name, a, b)
    return Call(x=x, view=view, act=act, weight=weight, bias=bias, mask=mask, keep=keep)


def _running(
    x: Tensor, mean: Tensor | None, var: Tensor | None, batches: Tensor | None, counts: Tensor | None, update: bool,
    momentum: float | None,
) -> Running:  # fmt: skip
    """Check the running statistics."""
    check_vectors(x, running_mean=mean, running_var=var)
    check_counts(x, counts)
    return Running(mean=mean, var=var, batches=batches, counts=counts, update=update, momentum=momentum)


def _inputs(dy: Tensor, x: Tensor, y: Tensor | None, residual: Tensor | None) -> GradientInputs:
    """The tensors that a backward reads, laid out as x is."""
    return GradientInputs(
        laid_out_as(x, "dy", dy),
        None if y is None else laid_out_as(x, "y", y),
        None if residual is None else laid_out_as(x, "residual", residual),
    )


def _empty_result(x: Tensor, residual: Tensor | None) -> Tensor:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return torch.empty_like(x, dtype=dtype)


def _count_call() -> None:
    global calls
    calls += 1
