"""Batch normalization with separate statistics for each time step of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keelnorm.engine import dispatch
from keelnorm.engine.activations import NONE, Activation, ActivationLike
from keelnorm.engine.arguments import Options, Padding, State, check_arguments, check_counter, check_numbers
from keelnorm.engine.error_messages import describe, is_count
from keelnorm.engine.layout import check_kind
from keelnorm.moments import Moments, Weighting, wide_dtype
from keelnorm.nn._shared.variant import Variant


class StepwiseBatchNorm(Variant):
    """Batch normalization with separate statistics for each time step, and one γ and β for all steps.

    At step t, per channel, over the N samples of the batch in training, with the step's running statistics in
    evaluation:

        y = act((x − mean_t) / √(var_t + eps) · weight + bias + residual)

    with the biased variance. In evaluation, steps from ``max_length`` on, and steps that no training batch has reached,
    use the statistics of the last step that has some. In training every step normalizes with its own batch; steps from
    ``max_length`` on update no running statistics.

    Args:
        num_features: Number of channels C.
        max_length: Number T of steps with separate running statistics. Default 100.
        eps: Added to the variance. Default 1e-5.
        momentum: Weight of the batch in the running statistics; None averages over all batches of a step. Default 0.1.
        gamma: Initial value of γ. Default 0.1: with 1, activations saturate and gradients vanish over time.
        bias: Whether there is a learnable β. Default True.
        device, dtype: Of the parameters and buffers.

    Shape:
        (N, C) -> (N, C); ``layer(x, residual=None, *, step, activation=None)``

    State:
        ``weight`` (C,), ``bias`` (C,) if there is one, ``running_mean`` and ``running_var`` (T, C) and
        ``num_batches_tracked`` (T,), in the state_dict. A forward in training updates the row of its step.

    Differs:
        From ``torch.nn.BatchNorm1d`` by the argument ``step``, the shapes of the buffers, and the initial γ.

    Numerics:
        As :func:`keelnorm.functional.batch_norm`. A single sample has no variance. At the first step it is an error; at
        later steps the running statistics of the step normalize it (mean 0 and variance 1 before any update), and stay
        as they are.

    Cost:
        One batch normalization per step; 2·T·C values in the buffers.

    Raises:
        TypeError, ValueError: The input or the step is not legal, or one sample in training at step 0.
        RuntimeError: The layer runs under ``torch.jit``.

    Example:
        >>> layer = StepwiseBatchNorm(3, max_length=5)
        >>> y = layer(torch.randn(8, 3), step=4)
        >>> layer.num_batches_tracked.tolist()
        [0, 0, 0, 0, 1]

    Source:
        Cooijmans, Ballas, Laurent, Gülçehre, Courville (2016), "Recurrent Batch Normalization", arXiv:1603.09025,
        sections 3 and 4.
    """

    _ranks = (2,)
    own_data: str | None = "of each time step"
    own_evaluation: str | None = "with the statistics of the time step"

    max_length: int
    gamma: float
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        max_length: int = 100,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        gamma: float = 0.1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not is_count(max_length):
            raise ValueError(
                f"StepwiseBatchNorm: max_length is the number of steps with separate running statistics, an "
                f"integer from 1 on; got {describe(max_length)}"
            )
        self.max_length, self.gamma, self._biased = max_length, gamma, bias
        super().__init__(num_features, eps, momentum, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.running_mean = self.running_mean.repeat(max_length, 1)
        self.running_var = self.running_var.repeat(max_length, 1)
        self.num_batches_tracked = self.num_batches_tracked.repeat(max_length)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set γ to ``gamma`` and β to 0, and reset the running statistics."""
        self.reset_running_stats()
        torch.nn.init.constant_(self.weight, float(self.gamma))
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        step: int,
        activation: ActivationLike = None,
        inplace: bool = False,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        weighting: Weighting = "frequency",
        padding: Padding = "zero",
    ) -> Tensor:
        """Compute ``activation(bn(x) + residual)`` at one time step.

        ``step`` is the number of the time step, from 0 on. ``residual`` and ``activation`` are as for every variant;
        the other arguments are refused.
        """
        return self._call(
            input, residual, Options(activation, inplace, mask, sample_weight, weighting, padding), step=step
        )

    def check(self, x: Any, residual: Any, step: Any = 0) -> None:
        """Raise unless the layer can normalize x at this step."""
        what = type(self).__name__
        check_step(what, step)
        self._check_tensors()
        mean = None if self.running_mean is None else self.running_mean[0]
        var = None if self.running_var is None else self.running_var[0]
        # A single sample may use the running statistics; check_legal knows at which steps.
        training = self.uses_batch()
        state = self._state()._replace(running_mean=mean, running_var=var, training=training, update=training)
        check_arguments(what, x, residual, self.weight, self.bias, state, self._ranks, "others")
        self.check_legal([x.shape[0]], step)

    def compute(
        self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None, step: int = 0
    ) -> Tensor:
        """Normalize x at one step, and update the step's running statistics."""
        run = Run(self)
        y = run(x, step, self.bias, residual, act)
        run.finish()
        return y

    def check_legal(self, batch_sizes: Sequence[int], first: int = 0) -> None:
        """Raise unless a run of steps can be normalized, before anything is written.

        Args:
            batch_sizes: Samples at the steps ``first``, ``first + 1`` and so on, never increasing.
            first: The first step.
        """
        self._check_tensors()
        batch = self.uses_batch()
        check_numbers(type(self).__name__, self.eps, self.momentum, batch, self.training and self.track_running_stats)
        if not (batch and batch_sizes):
            return
        if (first == 0 and batch_sizes[0] == 1) or (self.running_mean is None and batch_sizes[-1] == 1):
            raise ValueError(
                f"{type(self).__name__}: one sequence has no variance over the batch, so the batch can't normalize its "
                f"steps; got a batch of {batch_sizes[0]} at step {first}. Use a larger batch (drop_last=True drops a "
                "short last one), or evaluate with model.eval()"
            )

    def _check_tensors(self) -> None:
        """Raise unless parameters and buffers have the types and shapes that the constructor gives them."""
        what, rows = type(self).__name__, (self.max_length, self.num_features)
        kept = {"running_mean": self.running_mean, "running_var": self.running_var}
        if len({value is None for value in (*kept.values(), self.num_batches_tracked)}) > 1:
            raise ValueError(f"{what}: running_mean, running_var and num_batches_tracked come together")
        shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {name: (value, rows) for name, value in kept.items()}
        shapes |= {"weight": (self.weight, rows[1:]), "bias": (self.bias, rows[1:])}
        for name, (value, shape) in shapes.items():
            if value is None:
                continue
            if not value.is_floating_point() or value.is_nested or value.shape != shape:
                raise ValueError(f"{what}: {name} must be floating-point, of shape {shape}; got {describe(value)}")
            check_kind(what, name, value)
        if self.num_batches_tracked is not None:
            check_counter(what, self.num_batches_tracked, self.num_batches_tracked.device)
            if self.num_batches_tracked.shape != rows[:1]:
                raise ValueError(
                    f"{what}: num_batches_tracked must have shape {rows[:1]}; got {describe(self.num_batches_tracked)}"
                )

    def population(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (T, C) for evaluation; later steps have those of the last step that a batch has reached."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        reached = (self.num_batches_tracked > 0).sum()
        # If no step is reached, the statistics may have been set by hand: each step keeps its own.
        last = torch.where(reached > 0, reached, self.max_length) - 1
        index = torch.arange(self.max_length, device=last.device).minimum(last)
        return self.running_mean.index_select(0, index), self.running_var.index_select(0, index)

    def extra_repr(self) -> str:
        """The options, for the layer's repr."""
        return (
            f"{self.num_features}, max_length={self.max_length}, eps={self.eps}, momentum={self.momentum}, "
            f"gamma={self.gamma}, bias={self._biased}"
        )


class Run:
    """One run of a :class:`StepwiseBatchNorm` over a sequence; :meth:`finish` updates the running statistics.

    Calls have to be legal, see :meth:`StepwiseBatchNorm.check_legal`.
    """

    def __init__(self, layer: StepwiseBatchNorm) -> None:
        self.layer = layer
        self._batch = layer.uses_batch()
        self._population: Sequence[tuple[Tensor, Tensor]] = ()
        if not self._batch:
            mean, var = layer.population()
            self._population = list(zip(mean.unbind(), var.unbind(), strict=True))
        self._taken: list[tuple[int, int, Tensor, Tensor]] = []

    def __call__(
        self, x: Tensor, step: int, bias: Tensor | None, residual: Tensor | None = None, act: Activation = NONE
    ) -> Tensor:
        """Normalize x at one step."""
        layer = self.layer
        row = min(step, layer.max_length - 1)
        batch = self._batch and x.shape[0] != 1
        if batch:
            # With momentum 1 the running statistics of this call become the batch's moments. If these are not finite,
            # they may stay as they are: the variance -1 tells that.
            wide = wide_dtype(x.device)
            mean = torch.zeros(layer.num_features, dtype=wide, device=x.device)
            var = torch.full_like(mean, -1)
            if step < layer.max_length:
                self._taken.append((step, x.shape[0], mean, var))
        elif self._batch:
            assert layer.running_mean is not None and layer.running_var is not None
            mean, var = layer.running_mean[row], layer.running_var[row]
        else:
            mean, var = self._population[row]
        state = State(
            training=batch, update=batch, momentum=1.0, eps=layer.eps, running_mean=mean, running_var=var,
            what=type(layer).__name__,
        )  # fmt: skip
        return dispatch.batch_norm(x, residual, layer.weight, bias, state, act)

    def finish(self) -> None:
        """Update the running statistics with the moments of all steps."""
        layer = self.layer
        if not (layer.counts() and self._taken):
            return
        steps, sizes, means, variances = zip(*self._taken, strict=True)
        mean, var = torch.stack(means), torch.stack(variances)
        shape = (layer.max_length, layer.num_features)
        rows = torch.tensor(steps, device=mean.device)
        number = torch.tensor(sizes, dtype=mean.dtype, device=mean.device).unsqueeze(1)
        count = mean.new_zeros(layer.max_length, 1).index_copy(0, rows, number)
        mean = mean.new_zeros(shape).index_copy(0, rows, mean.where(var >= 0, torch.nan))
        m2 = mean.new_zeros(shape).index_copy(0, rows, var * (number - 1))
        layer.update_running(Moments(count, mean, m2))


def check_step(what: str, step: object) -> None:
    """Raise unless ``step`` is the number of a time step."""
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"{what}: step is the number of the time step, an integer from 0 on; got {describe(step)}")
