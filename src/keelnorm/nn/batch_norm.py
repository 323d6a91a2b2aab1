"""The layers: torch.nn's batch normalization, with an activation and a residual as arguments of the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from keelnorm.engine.activations import NONE, ActivationLike, resolve
from keelnorm.engine.arguments import Options, Padding, State
from keelnorm.engine.error_messages import locate
from keelnorm.engine.fusion.call import begin, passes_by
from keelnorm.engine.fusion.scope import is_inside
from keelnorm.engine.masking import TooFew
from keelnorm.engine.node_calls import run_node
from keelnorm.engine.normalization_steps import Normalization, is_plain
from keelnorm.functional import check_layer_call, layer_batch_norm
from keelnorm.moments import Weighting
from keelnorm.nn._shared.layer_base import Layer
from keelnorm.nn._shared.too_few_option import HasTooFew

passes_by(__file__)


def fx_node(layer: torch.nn.Module, x: Any, residual: Any, options: Options, **more: Any) -> Any:
    """The node of a layer's call in the graph that torch.fx traces; None if there is none, or it traces this layer.

    The graph keeps the layer itself, with its buffers and mode, as for torch.nn's layers. The node has only the
    arguments that were given, so torch.nn's layer in its place takes a plain call too. An activation module, which
    can't be an argument in a graph, becomes a node of its own.
    """
    from torch.fx import Proxy  # imported late: few programs trace

    proxy = next((value for value in (x, residual) if isinstance(value, Proxy)), None)
    tracer: Any = None if proxy is None else proxy.tracer
    if tracer is None or tracer.root is layer:
        return None
    default, asked = Options._field_defaults, {**options._asdict(), **more}
    activation = asked.pop("activation")
    act, keywords = NONE, {name: value for name, value in asked.items() if value is not default.get(name)}
    if isinstance(activation, str):
        keywords = {"activation": activation, **keywords}
    elif activation is not None:
        act = resolve(type(layer).__name__, activation)
        keywords.pop("inplace", None)
    given = (x,) if residual is None else (x, residual)
    return act.forward(tracer.create_proxy("call_module", tracer.path_of_module(layer), given, keywords))


class FusedBatchNorm(HasTooFew, Layer):
    """What all drop-in layers share: the forward. State, constructor and state_dict are ``torch.nn``'s."""

    defers_in_training = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        too_few: TooFew = "error",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.set_too_few(too_few)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        activation: ActivationLike = None,
        inplace: bool = False,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        weighting: Weighting = "frequency",
        padding: Padding = "zero",
    ) -> Tensor:
        """Compute ``activation(bn(x) + residual)`` as one fused operation.

        Args:
            input: x, shape (N, C, *S).
            residual: Added before the activation; of x's shape.
            activation: None, a name or a module, as :func:`keelnorm.functional.batch_norm` lists them.
            inplace: Write the result into x's memory, and recompute x in the backward; for None, leaky_relu and elu.
            mask: True for values that count; shape (N,) or (N, *S).
            sample_weight: Weights of the values, shape (N,) or (N, *S).
            weighting: Meaning of the weights: "frequency" (how often a value occurs) or "importance" (how much it
                matters).
            padding: The output where the mask is False: "zero", or "keep" for the value of x.
        """
        ordinary = (
            mask is None and sample_weight is None and not inplace and weighting == "frequency" and padding == "zero"
            and not torch.compiler.is_compiling()
        )  # fmt: skip
        if ordinary and residual is None and activation is None and is_inside():
            deferred = begin(self, input, FusedBatchNorm.forward)
            if deferred is not None:
                return deferred
        weight, bias, state = self._unpacked()
        if ordinary:
            y = run_node(input, residual, weight, bias, state, activation, self._ranks)
            if y is not NotImplemented:
                return y  # type: ignore[no-any-return]
        options = Options(activation, inplace, mask, sample_weight, weighting, padding)
        if has_torch_function((input, residual)):
            node = fx_node(self, input, residual, options)
            if node is not None:
                return node  # type: ignore[no-any-return]
        try:
            return layer_batch_norm(input, residual, weight, bias, state, options, self._ranks, self.too_few)
        except (TypeError, ValueError, RuntimeError) as error:
            if not torch.compiler.is_compiling():
                locate(error, self)
            raise

    def _unpacked(self) -> tuple[Tensor | None, Tensor | None, State]:
        """Weight, bias, and the state for this call."""
        # Attribute access does the same look-ups several times slower. What is not in these dictionaries (a
        # parametrized weight, or a replica's) is found by attribute access.
        parameters, buffers = self._parameters, self._buffers
        try:
            weight, bias, running_mean = parameters["weight"], parameters["bias"], buffers["running_mean"]
            running_var, batches = buffers["running_var"], buffers["num_batches_tracked"]
        except KeyError:
            weight, bias, batches = self.weight, self.bias, self.num_batches_tracked
            running_mean, running_var = self.running_mean, self.running_var
        training = self.training
        update = training and self.track_running_stats
        state = State(
            training=training or running_mean is None, update=update, momentum=self.momentum, eps=self.eps,
            running_mean=running_mean, running_var=running_var, num_batches_tracked=batches,
            what=type(self).__name__, updates=self._updates or self.count_skipped(),
        )  # fmt: skip
        if update and self._control is not None:
            state = self._control.applied(state)
        return weight, bias, state

    def normalization(self, x: Tensor) -> Normalization | None:
        """The steps of normalizing x, for a result that waits for the operation that follows.

        None if only :meth:`forward` can run: the call is not legal, or the parameters are not plain tensors.
        """
        weight, bias, state = self._unpacked()
        if x.is_inference() or not is_plain(weight) or not is_plain(bias):
            return None
        return Normalization(state, weight, bias) if check_layer_call(x, weight, bias, state, self._ranks) else None


class BatchNorm(FusedBatchNorm):
    """Batch normalization over inputs of any rank from two on, channels at dimension 1.

    Per channel, over the M = N·S values of the batch in training, with the running statistics in evaluation:

        y = act((x − mean) / √(var + eps) · weight + bias + residual)

    The batch's biased variance normalizes; its unbiased variance updates ``running_var``. Called as ``layer(input,
    residual=None, *, activation=None, inplace=False, mask=None, sample_weight=None, weighting="frequency",
    padding="zero")``, see :func:`keelnorm.functional.batch_norm`. The activation is an argument of the call and never
    part of the module, so a tool that treats the layer as an ordinary batch norm is right.

    Args:
        num_features: Number of channels C.
        eps: Added to the variance. Default 1e-5.
        momentum: Weight of the batch in the running statistics; None averages over all batches. Default 0.1.
        affine: Whether there are a learnable weight and bias. Default True.
        track_running_stats: Whether there are running statistics; without them the batch normalizes in evaluation too.
        device, dtype: Of the parameters and buffers.
        bias: Whether affine includes a bias. Default True.
        too_few: What happens in training with one value per channel, which has no variance: ``"error"``, ``"running"``
            (the running statistics normalize it), or ``"skip"`` (the output is the bias). The running statistics stay.

    Shape:
        (N, C, *S) -> (N, C, *S)

    State:
        ``running_mean``, ``running_var`` and ``num_batches_tracked``, updated in training once per batch: the second
        forward of activation checkpointing does not count, an empty batch changes nothing. If a stored value would not
        be finite, the channel keeps its running statistics, and ``skipped_updates`` (C,) counts that; with
        ``momentum=None`` such a batch has no weight in the average. The counter is neither a buffer nor in the
        state_dict, which is that of ``torch.nn.BatchNorm2d``, both ways.

    Differs:
        From ``torch.nn.BatchNorm*`` only by the arguments of the call, ``too_few``, ``skipped_updates``, speed, and
        accuracy when the mean is much larger than the standard deviation. It is an instance of
        ``BatchNormBase``.

    Numerics, Cost:
        As :func:`keelnorm.functional.batch_norm`.

    Raises:
        TypeError, ValueError: The input can't be normalized; the running statistics are then as before.
        RuntimeError: The layer is used under ``torch.jit``.

    Example:
        >>> layer = BatchNorm(3)
        >>> y = layer(torch.randn(8, 3, 5, 5), activation="relu")
        >>> y.shape, bool((y >= 0).all())
        (torch.Size([8, 3, 5, 5]), True)

    Source:
        Ioffe, Szegedy (2015), "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        Shift", arXiv:1502.03167, algorithms 1 and 2.
    """


class BatchNorm1d(FusedBatchNorm, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` with fused activation and residual: inputs (N, C) or (N, C, L). See :class:`BatchNorm`.

    Example:
        >>> BatchNorm1d(16)(torch.randn(4, 16), activation="relu").shape
        torch.Size([4, 16])
    """

    _ranks = (2, 3)


class BatchNorm2d(FusedBatchNorm, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` with fused activation and residual: inputs (N, C, H, W). See :class:`BatchNorm`.

    Example:
        >>> x = torch.randn(4, 16, 8, 8)
        >>> BatchNorm2d(16)(x, residual=x, activation="relu").shape
        torch.Size([4, 16, 8, 8])
    """

    _ranks = (4,)


class BatchNorm3d(FusedBatchNorm, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` with fused activation and residual: inputs (N, C, D, H, W). See :class:`BatchNorm`.

    Example:
        >>> BatchNorm3d(2)(torch.randn(4, 2, 3, 3, 3)).shape
        torch.Size([4, 2, 3, 3, 3])
    """

    _ranks = (5,)
