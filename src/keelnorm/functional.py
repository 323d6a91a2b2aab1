"""Batch normalization and moments as functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from keelnorm.engine import dispatch
from keelnorm.engine.activations import ActivationLike, resolve
from keelnorm.engine.arguments import Options, Padding, State, check_arguments, check_inplace
from keelnorm.engine.inplace import batch_norm_
from keelnorm.engine.kernels import reference, registry
from keelnorm.engine.masking import common_mask, length_mask, take_mask, weighted, without_variance
from keelnorm.engine.torch_internals import is_transformed
from keelnorm.moments import Moments, Weighting, check_values, check_weighting

__all__ = ["batch_norm", "length_mask", "moments"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    residual: Tensor | None = None,
    inplace: bool = False,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    weighting: Weighting = "frequency",
    padding: Padding = "zero",
) -> Tensor:
    """Compute ``activation(bn(x) + residual)`` in one fused operation.

    Per channel, over the M = N·S values of the batch or with the running statistics:

        y = act((x − mean) / √(var + eps) · weight + bias + residual)

    with the biased variance. In training, ``running = (1 − momentum)·running + momentum·batch``, for which the variance
    is the unbiased one.

    Args:
        input: x, values of shape (N, C, *S), floating-point.
        running_mean: Shape (C,), or None. Updated in place if ``training``, and needed otherwise.
        running_var: As ``running_mean``; both or neither.
        weight: γ, shape (C,); None for ones.
        bias: β, shape (C,); None for zeros.
        training: Normalize with the batch's moments, else with the running statistics.
        momentum: Weight of the batch in the update, in PyTorch's sense.
        eps: Added to the variance.
        activation: None; ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"elu"``, ``"silu"``, ``"gelu"``, ``"gelu_tanh"``,
            ``"hardswish"``, ``"hardsigmoid"``, ``"sigmoid"``, ``"tanh"``, ``"mish"`` or ``"softplus"``; or the module
            of torch.nn for one of them, whose parameters are used (but not its ``inplace``).
        residual: Added before the activation; of x's shape.
        inplace: Write y into x's memory and save only y for the backward, which recomputes x from it. For an activation
            of None, leaky_relu (slope > 0) or elu (alpha > 0), without a residual. Under torch.compile, torch.func and
            forward-mode differentiation, and for tensor subclasses, it has no effect: the result is the same, and x
            stays.
        mask: True for values that count: boolean, shape (N,) or (N, *S), the same for all channels; see
            :func:`length_mask` for sequences. Moments and gradients are those of the values that count; the others may
            be anything, NaN included, and have the gradient 0. A batch in which no value counts changes nothing.
        sample_weight: Weights of the values, floating-point, not negative, shape (N,) or (N, *S): the mean is
            Σw·x/Σw, the variance Σw·(x − mean)²/Σw. A value of weight 0 is normalized, but does not count.
        weighting: Meaning of the weights, which decides the unbiased variance: ``"frequency"``, how often a value
            occurs: Σw·(x − mean)²/(Σw − 1), and Σw must be above 1; or ``"importance"``, how much it matters relative
            to the others: Σw·(x − mean)²/(Σw − Σw²/Σw).
        padding: The output where the mask is False: ``"zero"``, or ``"keep"`` for the value of x, with its gradient.

    Shape:
        (N, C, *S) -> (N, C, *S)

    Differs:
        From ``torch.nn.functional.batch_norm`` by the keyword arguments, and by accuracy when the mean is much larger
        than the standard deviation.

    Numerics:
        Sums are taken in float32 or wider around a value near the mean and added up in float64. Native kernels give
        bitwise equal results for any number of threads. An activation is computed in the dtype of the sums.

    Cost:
        float32, float64, bfloat16 and float16 on the CPU run on native kernels, which read x once from memory per
        direction if a block of channels fits the cache. Saved for the backward: x, and with both a residual and an
        activation y (relu) or the residual (others); in place only y. The normalized values are not saved. An x that is
        neither contiguous nor channels-last is copied once.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A wrong shape, device or value; one value per channel in training; no statistics in inference. The
            running statistics are then as before.
        RuntimeError: ``inplace`` for a leaf that requires a gradient, or for a view; a second derivative through
            ``inplace``; and, from torch, a backward after y was modified.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> batch_norm(x, None, None, training=True, activation="relu").flatten()
        tensor([0.0000, 1.0000])

    Source:
        Ioffe, Szegedy (2015), "Batch Normalization", arXiv:1502.03167, algorithms 1 and 2.
    """
    refuse_jit("kn.functional.batch_norm")
    if has_torch_function((input, running_mean, running_var, weight, bias, residual)):
        return handle_torch_function(
            batch_norm,
            (input, running_mean, running_var, weight, bias, residual),
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            residual=residual,
            inplace=inplace,
            mask=mask,
            sample_weight=sample_weight,
            weighting=weighting,
            padding=padding,
        )
    state = State(
        training=training, update=training, momentum=momentum, eps=eps, running_mean=running_mean,
        running_var=running_var,
    )  # fmt: skip
    options = Options(activation, inplace, mask, sample_weight, weighting, padding)
    return layer_batch_norm(input, residual, weight, bias, state, options)


def moments(
    x: Tensor,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    weighting: Weighting = "frequency",
) -> Moments:
    """Compute count, mean and sum of squared deviations per channel, as a mergeable :class:`~keelnorm.Moments`.

    The arguments and the result are those of :meth:`keelnorm.Moments.from_tensor`; native kernels run if no gradient is
    asked for.

    Example:
        >>> moments(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).mean.tolist()
        [2.0, 5.0]
    """
    check_values(x)
    if sample_weight is not None or weighting != "frequency":
        return Moments.from_tensor(x, mask, sample_weight, weighting)
    common = None if mask is None else common_mask(mask, x)
    if (
        type(x) is not Tensor
        or is_transformed()
        or (x.requires_grad and torch.is_grad_enabled())
        or x.numel() == 0
        or (fast := registry.operators(x)) is None
        or (mask is not None and (common is None or (common.is_cpu and not common.any())))
    ):
        return reference.stats(x, mask)
    mean, var = fast.stats(x, common)
    if common is None:
        count = torch.full((), x.numel() // x.shape[1], dtype=mean.dtype, device=x.device)
    else:
        count = common.sum().to(mean.dtype).repeat(x.shape[1])
    return Moments(count, mean, var * count)


def layer_batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    state: State,
    options: Options,
    ranks: tuple[int, ...] | None = None,
    too_few: str = "error",
) -> Tensor:
    """Run a call of :func:`batch_norm` or of a layer; see :class:`keelnorm.BatchNorm`."""
    what = state.what
    refuse_jit(what)
    if has_torch_function((x, residual)):
        return handle_torch_function(
            layer_batch_norm, (x, residual), x, residual, weight, bias, state, options, ranks, too_few
        )
    mask, sample_weight, weighting = options.mask, options.sample_weight, options.weighting
    act = resolve(what, options.activation)
    try:
        plain = _plainly_legal(x, residual, weight, bias, state, ranks)
    except (AttributeError, TypeError, RuntimeError):
        plain = False  # an argument of a wrong type; check_arguments says which
    if not plain:
        check_arguments(what, x, residual, weight, bias, state, ranks, too_few)
        if state.training and x.numel() == x.shape[1] > 0:
            state = without_variance(state, too_few)
    try:
        if mask is not None or sample_weight is not None or weighting != "frequency" or options.padding != "zero":
            check_weighting(what, weighting)
            if options.inplace:
                raise ValueError(
                    f"{what}: inplace=True goes without mask, sample_weight, weighting and padding; leave them out"
                )
            state = take_mask(state, options, x, too_few)
            if sample_weight is not None:
                if plain:  # no native operator is on this way, which would check the rest
                    check_arguments(what, x, residual, weight, bias, state, ranks, too_few)
                with dispatch.unchanged(state):
                    return weighted(x, residual, weight, bias, state, act, options, too_few)
        elif options.inplace:
            check_inplace(what, x, residual, act)
            return batch_norm_(x, weight, bias, state, act)
        return dispatch.batch_norm(x, residual, weight, bias, state, act)
    except RuntimeError:
        if plain:  # torch's message about a kind of tensor that it can't take does not help
            check_arguments(what, x, residual, weight, bias, state, ranks, too_few)
        raise


def check_layer_call(
    x: Any, weight: Tensor | None, bias: Tensor | None, state: State, ranks: tuple[int, ...] | None
) -> bool:
    """Whether a call is legal; if not, :func:`layer_batch_norm` raises the error."""
    if _plainly_legal(x, None, weight, bias, state, ranks):
        return True
    try:
        check_arguments(state.what, x, None, weight, bias, state, ranks)
    except (TypeError, ValueError):
        return False
    return True


def _plainly_legal(x: Any, residual: Any, weight: Any, bias: Any, state: State, ranks: tuple[int, ...] | None) -> bool:
    """A quick check of the common case; the native operators check the rest before they write anything."""
    running_mean, running_var, momentum = state.running_mean, state.running_var, state.momentum
    batches, training = state.num_batches_tracked, state.training
    return (
        type(x) is Tensor
        and x.dtype in registry.DTYPES
        and x.is_cpu
        and registry.native_enabled
        and ranks is not None
        and x.dim() in ranks
        and state.eps > 0
        and (momentum is None or momentum - momentum == 0)  # finite
        and not (training and x.numel() == x.shape[1])
        and (residual is None or (type(residual) is Tensor and residual.is_cpu))
        and (weight is None or weight.is_cpu)
        and (bias is None or bias.is_cpu)
        and (running_mean is None or (running_mean.is_cpu and not running_mean.requires_grad))
        and (running_var is None or (running_var.is_cpu and not running_var.requires_grad))
        and (batches.is_cpu if batches is not None else momentum is not None)
        and not torch.compiler.is_compiling()
    )


#: What to use instead of torch.jit.
INSTEAD_OF_JIT = (
    "Use torch.export or torch.compile, or kn.to_torch(model) first, which puts torch.nn.BatchNorm* in the place of "
    "every layer that computes the same"
)


def refuse_jit(what: str) -> None:
    """Raise under torch.jit.trace, which would record the fused operators without their backward."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(
            f"{what} does not run under torch.jit.trace, which would record the fused operators without their "
            f"backward. {INSTEAD_OF_JIT}"
        )
