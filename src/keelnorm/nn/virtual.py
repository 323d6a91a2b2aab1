"""Virtual batch normalization: each sample is normalized with a fixed reference batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import State, check_arguments, check_numbers
from keelnorm.engine.error_messages import check_module
from keelnorm.moments import Moments
from keelnorm.nn._shared.normalize import normalize
from keelnorm.nn._shared.variant import Variant


class VirtualBatchNorm(Variant):
    """Normalization of each sample with the pooled moments of a reference batch and the sample itself.

    For a reference batch of R samples, and one sample x_n, per channel over all positions:

        mean_n, var_n = moments of the R + 1 samples {reference batch, x_n}
        y_n = act((x_n − mean_n) / √(var_n + eps) · weight + bias + residual_n)

    A sample's output then depends on no other sample of its batch, in training and in evaluation; normalization does
    not correlate a generator's samples. The reference batch is chosen once. Its moments at a layer change with the
    weights in front of it: run the reference batch through the model before each step, within
    :func:`collect_reference`, and once before evaluation.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: As for ``torch.nn.BatchNorm2d``.

    Shape:
        (N, C, *S) -> (N, C, *S). One sample with one value per channel is legal.

    State:
        The reference's moments, not in the state_dict: collect them again after loading. The state_dict is that of
        ``torch.nn.BatchNorm2d``: each reference pass in training updates the running statistics. This layer does not
        use them; ``torch.nn.BatchNorm2d`` with this state_dict does in evaluation.

    Differs:
        From the paper's code: moments are merged exactly, weighted by their numbers of values, instead of
        (R·E_ref[x²] + E_n[x²])/(R + 1) − mean². Both are equal if a sample has as many positions as one of the
        reference.

    Numerics:
        Moments in float64, merged by Chan's formula.

    Cost:
        One pass over x for the samples' moments, in evaluation too, and one forward of the reference batch a step.

    Raises:
        TypeError, ValueError: The input can't be normalized.
        RuntimeError: There is no reference; or the layer runs under ``torch.jit``.

    Example:
        >>> norm = VirtualBatchNorm(3)
        >>> norm.set_reference(torch.randn(64, 3, 8, 8))
        >>> x = torch.randn(5, 3, 8, 8)
        >>> torch.allclose(norm(x)[:1], norm(x[:1]), atol=1e-6)
        True

    Source:
        Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen (2016), "Improved Techniques for Training GANs",
        arXiv:1606.03498, section 3.4.
    """

    takes_mask = True
    own_data: str | None = "of the reference batch"
    own_evaluation: str | None = "by the moments of the reference batch and of each sample"
    _reference: Moments | None = None
    #: Whether the present reference pass runs without gradients; None outside of a pass.
    _collecting: bool | None = None

    def set_reference(self, x: Tensor, mask: Tensor | None = None, *, detach: bool = True) -> None:
        """Set the reference batch's moments from its input to this layer.

        Args:
            x: The input, shape (R, C, *S).
            mask: Which values count, as in :meth:`keelnorm.Moments.from_tensor`.
            detach: Keep the moments as constants. False lets gradients flow into x, as in the paper's code.

        Raises:
            TypeError, ValueError: ``x`` is not an input for this layer; the reference is then as before.
        """
        what = f"{type(self).__name__}.set_reference"
        check_arguments(what, x, None, self.weight, self.bias, self._state()._replace(training=True), self._ranks)
        self._reference = Moments.from_tensor(x.detach() if detach else x, mask)

    def check(self, x: Any, residual: Any) -> None:
        """Raise unless the layer can normalize x and update its running statistics."""
        super().check(x, residual)
        check_numbers(type(self).__name__, self.eps, self.momentum, True, self.training and self.track_running_stats)

    def uses_batch(self) -> bool:
        """Whether the input's own moments take part: always."""
        return True

    def unready(self) -> str | None:
        """What the layer lacks for evaluation: a reference."""
        return None if self._reference is not None else "has no reference batch: see kn.collect_reference"

    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        """Normalize each sample with the reference; or collect the reference."""
        if self._collecting is not None:
            if self._reference is not None:
                raise RuntimeError(
                    f"{type(self).__name__} ran twice within collect_reference: run the reference batch once, as a "
                    "whole; a layer that a model calls at two places needs a layer for each"
                )
            moments = Moments.from_tensor(x.detach() if self._collecting else x, mask)
            self._reference = moments
            self.update_running(Moments(moments.count, moments.mean.detach(), moments.m2.detach()))
            mean, var = moments.mean, moments.m2 / moments.count.clamp(min=1)
        else:
            mean, var = self._moments_of_samples(x, mask)
        return normalize(x, mean, var, self.weight, self.bias, self.eps, residual, act)

    def _moments_of_samples(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and variance for each sample and channel, (N, C, 1, …): its own values' and the reference's."""
        if self._reference is None:
            raise RuntimeError(
                f"{type(self).__name__} has no reference batch, which the state_dict does not carry: run it within "
                "kn.collect_reference(model), or give this layer's input for it to layer.set_reference(x)"
            )
        N, C = x.shape[:2]
        # A sample's channels count as channels of their own.
        own = Moments.from_tensor(
            x.reshape(1, N * C, *x.shape[2:]),
            None if mask is None else mask.expand_as(x).reshape(1, N * C, *x.shape[2:]),
        )
        reference = self._reference
        count, mean, m2 = (part.to(x.device) for part in (reference.count, reference.mean, reference.m2))
        merged = Moments(count.expand(C).repeat(N), mean.repeat(N), m2.repeat(N)).merge(own)
        shape = (N, C, *[1] * (x.dim() - 2))
        return merged.mean.view(shape), (merged.m2 / merged.count.clamp(min=1)).view(shape)

    def _state(self) -> State:
        # One value is legal: its variance is the reference's.
        training = self._collecting is not None or self.running_mean is None
        return super()._state()._replace(training=training)

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles: the reference without its graph, and no reference pass."""
        state: dict[str, Any] = super().__getstate__()
        state.pop("_collecting", None)
        if (reference := self._reference) is not None:
            state["_reference"] = Moments(*(part.detach() for part in (reference.count, reference.mean, reference.m2)))
        return state


@contextmanager
def collect_reference(model: torch.nn.Module, *, detach: bool = True) -> Iterator[None]:
    """Take the forward inside the block as that of the reference batch, for each :class:`VirtualBatchNorm` of a model.

    Each layer normalizes its input with the input's own moments, and keeps them as its reference. Run the whole
    reference batch once, in one forward, before each training step, since the moments change with the weights.

    Args:
        model: Any module with :class:`VirtualBatchNorm` layers.
        detach: Run the pass without gradients, and keep the moments as constants. False keeps the pass's graph, so the
            loss has gradients through the reference's moments too, as in the paper's code. There is then one backward
            for each pass, and no activation checkpointing.

    Raises:
        ValueError: The model has no :class:`VirtualBatchNorm`.
        RuntimeError: A layer ran twice, or a block is open already. After any exception, all references are as before.

    Cost:
        One forward of the reference batch.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), VirtualBatchNorm(3))
        >>> with collect_reference(net):
        ...     _ = net(torch.randn(64, 4))
        >>> net(torch.randn(1, 4)).shape
        torch.Size([1, 3])
    """
    check_module("collect_reference", model)
    layers = [module for module in model.modules() if isinstance(module, VirtualBatchNorm)]
    if not layers:
        raise ValueError(f"collect_reference: there is no VirtualBatchNorm in {type(model).__name__}")
    if any(layer._collecting is not None for layer in layers):
        raise RuntimeError("collect_reference: a reference pass of this model is going on already")
    before = [layer._reference for layer in layers]
    try:
        for layer in layers:
            layer._reference = None
            layer._collecting = detach
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
            yield
    except BaseException:
        for layer, reference in zip(layers, before, strict=True):
            layer._reference = reference
        raise
    finally:
        for layer in layers:
            layer._collecting = None
