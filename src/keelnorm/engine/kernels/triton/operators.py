"""The operators of keelnorm/engine/ops.py on Triton kernels, with the schemas' signatures.

Nothing here waits for the GPU: what follows from values is decided in kernels. What the kernels do not take (float64,
no values, other layouts) is refused as the native operators do, before anything is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from keelnorm.engine.kernels.triton import launches
from keelnorm.engine.kernels.triton.device import alike, check_counts, check_vectors, unsupported, view_of
from keelnorm.engine.kernels.triton.launches import Act, Given, Running
from keelnorm.engine.kernels.triton.tiling import View

calls = 0


def stats(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean and biased variance of each channel, (2, C), of the values that the mask (N, *S) lets count."""
    view = view_of(x)
    _count_call()
    return launches.moments(x, mask, view, eps=1.0)[0][:2]  # no one asks for 1/√(var + eps)


def measure_(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None, training: bool,
    update: bool, momentum: float | None, eps: float, counts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(mean, var, rstd), (3, C), of what normalizes x; updates the running statistics as `forward_`."""
    view = view_of(x)
    check_vectors(x, running_mean=running_mean, running_var=running_var)
    check_counts(x, counts)
    running = Running(running_mean, running_var, batches, counts, update and training, momentum)
    _count_call()
    return launches.measure(x, None, None, None, running, training, eps, view)[0]


def apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    activation: int, a: float, b: float,
) -> Tensor:  # fmt: skip
    """act(bn(x) + residual) with the given mean and 1/√(var + eps)."""
    view = view_of(x)
    check_vectors(x, mean=mean, rstd=rstd, weight=weight, bias=bias)
    residual = None if residual is None else alike("residual", residual, x)
    _count_call()
    coefficients = launches.coefficients(x, mean, rstd, weight, bias)
    y = torch.empty_like(x, dtype=_result_dtype(x, residual))
    launches.apply(x, residual, None, False, y, coefficients, view, Act(activation, a, b))
    return y


def finish(
    x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: int,
    a: float, b: float,
) -> Tensor:  # fmt: skip
    """As `apply`, from what `measure_` has found."""
    return apply(x, saved[0], saved[2], weight, bias, residual, activation, a, b)


def grad_stats(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None,
    residual: Tensor | None, activation: int, a: float, b: float,
) -> Tensor:  # fmt: skip
    """Σg and Σg·x̂, (2, C)."""
    view, given = _given(dy, x, y, residual)
    check_vectors(x, mean=mean, rstd=rstd, weight=weight, bias=bias)
    _count_call()
    coefficients = launches.coefficients(x, mean, rstd, weight, bias)
    return launches.sums(x, given, None, mean, rstd, weight, coefficients, view, Act(activation, a, b))


def grad_input(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None,
    residual: Tensor | None, grad_means: Tensor | None, activation: int, a: float, b: float,
) -> Tensor:  # fmt: skip
    """dx, from the means (2, C) of g and g·x̂; None: fixed statistics."""
    view, given = _given(dy, x, y, residual)
    check_vectors(x, mean=mean, rstd=rstd, weight=weight, bias=bias)
    _count_call()
    coefficients = launches.coefficients(x, mean, rstd, weight, bias)
    slopes = None if grad_means is None else launches.slopes(x, grad_means, mean, rstd, weight, coefficients)
    dx = torch.empty_like(x)
    launches.write_gradients(x, given, None, False, dx, None, coefficients, slopes, view, Act(activation, a, b))
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
    """As `forward`, and updates the running statistics where ``update`` says so."""
    view = view_of(x)
    check_vectors(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    check_counts(x, counts)
    residual = None if residual is None else alike("residual", residual, x)
    running = Running(running_mean, running_var, batches, counts, update and training, momentum)
    _count_call()
    y = torch.empty_like(x, dtype=_result_dtype(x, residual))
    act = Act(activation, a, b)
    return y, launches.forward(x, residual, mask, keep, y, weight, bias, running, training, eps, view, act)


def inplace_(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    batches: Tensor | None, training: bool, update: bool, momentum: float | None, eps: float, activation: int,
    a: float, b: float, counts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `forward_`; x becomes y."""
    view = view_of(x)
    check_vectors(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    check_counts(x, counts)
    running = Running(running_mean, running_var, batches, counts, update and training, momentum)
    _count_call()
    act = Act(activation, a, b)
    return launches.forward(x, None, None, False, x, weight, bias, running, training, eps, view, act)


def invert(
    y: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, activation: int, a: float, b: float
) -> Tensor:
    """x from y, in y's layout: none, leaky_relu, elu."""
    view = view_of(y, "y")
    check_vectors(y, weight=weight, bias=bias)
    if activation not in (0, 3, 4):
        raise unsupported("activation")
    _count_call()
    x = torch.empty_like(y)
    launches.invert(y, x, saved, weight, bias, view, Act(activation, a, b))
    return x


def backward(
    dy: Tensor, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None,
    residual: Tensor | None, training: bool, activation: int, a: float, b: float, need_input: bool,
    need_residual: bool, need_weight: bool, need_bias: bool, mask: Tensor | None = None, keep: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dresidual, dweight, dbias, as far as they are needed."""
    view, given = _given(dy, x, y, residual)
    check_vectors(x, weight=weight, bias=bias)
    _count_call()
    dx = torch.empty_like(x) if need_input else None
    dresidual = torch.empty_like(x, dtype=dy.dtype) if need_residual else None
    dweight, dbias = launches.backward(
        x, given, mask, keep, dx, dresidual, saved, weight, bias, training, need_weight or need_bias, view,
        Act(activation, a, b),
    )  # fmt: skip
    return dx, dresidual, dweight if need_weight else None, dbias if need_bias else None


def backward_(
    dy: Tensor, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, activation: int,
    a: float, b: float, need_weight: bool, need_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As `backward` without a residual; x becomes dx."""
    view, given = _given(dy, x, None, None)
    check_vectors(x, weight=weight, bias=bias)
    _count_call()
    dweight, dbias = launches.backward(
        x, given, None, False, x, None, saved, weight, bias, training, need_weight or need_bias, view,
        Act(activation, a, b),
    )  # fmt: skip
    return dweight if need_weight else None, dbias if need_bias else None


def _given(dy: Tensor, x: Tensor, y: Tensor | None, residual: Tensor | None) -> tuple[View, Given]:
    """What a backward reads, all laid out as x is."""
    view = view_of(x)
    return view, Given(
        alike("dy", dy, x),
        None if y is None else alike("y", y, x),
        None if residual is None else alike("residual", residual, x),
    )


def _result_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _count_call() -> None:
    global calls
    calls += 1
