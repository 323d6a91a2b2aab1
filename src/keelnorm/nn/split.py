"""Split (auxiliary) batch normalization: each part of a batch has its own statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from keelnorm.engine import dispatch
from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import check_arguments
from keelnorm.engine.error_messages import check_module, describe, is_count
from keelnorm.engine.recomputed_steps import joined
from keelnorm.functional import moments
from keelnorm.nn._shared.scoped_choice import Choices
from keelnorm.nn._shared.take_over import adopt, options_of
from keelnorm.nn._shared.variant import Variant


class AuxiliaryBatchNorm(Variant):
    """Batch normalization of one part of the batch; :class:`SplitBatchNorm` holds and calls it.

    Example:
        >>> SplitBatchNorm(8).aux_bn[0].running_mean.shape
        torch.Size([8])
    """

    own_data: str | None = "of its part of the batch"

    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        """Normalize with this layer's weight and bias."""
        return self.run(x, residual, self.weight, self.bias, act)

    def run(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        act: Activation,
        update: bool = True,
    ) -> Tensor:
        """Compute ``act(bn(x) + residual)`` with this layer's statistics, and update them if it is training."""
        y = dispatch.batch_norm(x, residual, weight, bias, self._state(), act)
        if update and self.counts() and self.uses_batch():
            self.update_running(moments(x.detach()))
        return y


class SplitBatchNorm(AuxiliaryBatchNorm):
    """Batch normalization of a batch in equal parts, each with its own statistics, weight and bias.

    In training each of ``num_splits`` consecutive parts of the batch is normalized by itself: the first by this layer,
    part k by ``aux_bn[k − 1]``. In evaluation this layer normalizes everything, so the auxiliary layers need not be
    deployed. AdvProp trains this way on clean and adversarial images, whose moments differ.

    ``with layer.use_split(k)`` sends the whole batch to part k, in training and in evaluation; :func:`use_split` does
    so for all layers of a model.

    Args:
        num_features: Number of channels C.
        num_splits: Number of parts, at least 2.
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics; None averages over all batches.
        affine: Whether there are a learnable weight and bias.
        track_running_stats: Whether there are running statistics.
        device, dtype: Of the parameters and buffers.
        share_affine: Whether all parts use this layer's weight and bias; else each has its own. Default False.

    Shape:
        (N, C, *S) -> (N, C, *S), N divisible by num_splits

    State:
        The keys of ``torch.nn.BatchNorm2d``, which are those of this layer, and the same under ``aux_bn.0``,
        ``aux_bn.1``, ... (timm's names). Each layer's running statistics are updated by its own part of the batch.

    Differs:
        From timm's ``SplitBatchNorm2d``: any rank, ``use_split``, a shared weight and bias, and an error if
        ``num_splits`` does not divide N. A layer reads the choice of ``use_split`` when it runs; activation
        checkpointing runs it again in the backward, which then belongs inside the ``with`` too.

    Numerics:
        As :func:`keelnorm.functional.batch_norm`, per part.

    Cost:
        As batch normalization, one more pass over x for the running statistics, and one copy of y and of dx to
        concatenate the parts. Nothing more in evaluation.

    Raises:
        ValueError: ``num_splits`` does not divide N, or a part has one value per channel; the running statistics are
            then as before.

    Example:
        >>> layer = SplitBatchNorm(3, num_splits=2)
        >>> clean, adversarial = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8) + 1
        >>> y = layer(torch.cat([clean, adversarial]))
        >>> bool((layer.aux_bn[0].running_mean > layer.running_mean).all())
        True

    Source:
        Xie, Tan, Gong, Wang, Yuille, Le (2020), "Adversarial Examples Improve Image Recognition", arXiv:1911.09665,
        section 4.2.
    """

    own_evaluation: str | None = "with the part that use_split() chooses"
    num_splits: int
    share_affine: bool
    aux_bn: torch.nn.ModuleList

    def __init__(
        self,
        num_features: int,
        num_splits: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        share_affine: bool = False,
    ) -> None:
        if not is_count(num_splits, 2):
            raise ValueError(f"SplitBatchNorm: num_splits must be an integer of at least 2; got {describe(num_splits)}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.num_splits, self.share_affine = num_splits, share_affine
        own = affine and not share_affine
        self.aux_bn = torch.nn.ModuleList(
            AuxiliaryBatchNorm(num_features, eps, momentum, own, track_running_stats, device, dtype)
            for _ in range(num_splits - 1)
        )
        self._choices: Choices[int] = Choices()

    @classmethod
    def from_batch_norm(cls, bn: Any, num_splits: int = 2, *, share_affine: bool = False) -> SplitBatchNorm:
        """Make a split layer that takes a batch norm's place.

        It takes over the parameters and buffers of ``bn``; the auxiliary layers get copies.

        Raises:
            TypeError: ``bn`` is not ``torch.nn``'s or keelnorm's drop-in layer, or has hooks.

        Example:
            >>> SplitBatchNorm.from_batch_norm(torch.nn.BatchNorm2d(8), 3).num_splits
            3
        """
        options = options_of(f"{cls.__name__}.from_batch_norm", bn)
        layer = cls(num_splits=num_splits, share_affine=share_affine, **options)
        adopt(layer, bn)
        for part in layer._parts():
            with torch.no_grad():
                for name, value in (*bn.named_parameters(recurse=False), *bn.named_buffers(recurse=False)):
                    if getattr(part, name, None) is not None:
                        new = value if part is layer else value.detach().clone()
                        if isinstance(value, torch.nn.Parameter) and part is not layer:
                            new = torch.nn.Parameter(new, value.requires_grad)
                        setattr(part, name, new)
            if bn.bias is None:
                part.register_parameter("bias", None)
        return layer.train(bn.training)

    @contextmanager
    def use_split(self, index: int) -> Iterator[SplitBatchNorm]:
        """Let part ``index`` normalize the whole batch inside the block: 0 is this layer, k is ``aux_bn[k − 1]``.

        Blocks may be nested and end in any order; a copy made inside has no choice.

        Raises:
            ValueError: There is no such part.

        Example:
            >>> layer = SplitBatchNorm(3)
            >>> with layer.use_split(1):
            ...     y = layer(torch.randn(5, 3))
            >>> layer.num_batches_tracked.item(), layer.aux_bn[0].num_batches_tracked.item()
            (0, 1)
        """
        if not isinstance(index, int) or not 0 <= index < self.num_splits:
            raise ValueError(
                f"SplitBatchNorm: the parts are 0 (the layer itself) to {self.num_splits - 1}; got {describe(index)}"
            )
        with self._choices.choosing(index):
            yield self

    def check(self, x: Any, residual: Any) -> None:
        """Raise unless all parts can normalize x."""
        super().check(x, residual)
        for part in self.aux_bn:
            part.check(x, residual)  # type: ignore[operator]

    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        """Normalize each part by itself, or all by the chosen part."""
        parts = self._parts()
        index = self._choices.latest()
        if index is not None or not self.training:
            return self._run(parts[index or 0], x, residual, act)
        if x.shape[0] % self.num_splits:
            raise ValueError(
                f"SplitBatchNorm: the batch must divide into {self.num_splits} equal parts; got {describe(x)}. Send it "
                "to one part by `with layer.use_split(k)`, or drop a short last batch (drop_last=True)"
            )
        xs = x.chunk(self.num_splits)
        check_arguments("SplitBatchNorm, one part of the batch", xs[0], None, None, None, self._state())
        residuals = [None] * len(xs) if residual is None else residual.chunk(self.num_splits)
        return joined(
            lambda *ys: torch.cat(ys), [self._run(*each, act) for each in zip(parts, xs, residuals, strict=True)]
        )

    def normalize_running(self, x: Tensor, residual: Tensor | None, act: Activation) -> Tensor:
        """Normalize with the running statistics of this layer, or of the chosen part."""
        return self._run(self._parts()[self._choices.latest() or 0], x, residual, act)

    def _parts(self) -> list[AuxiliaryBatchNorm]:
        return [self, *self.aux_bn]

    def _run(self, part: AuxiliaryBatchNorm, x: Tensor, residual: Tensor | None, act: Activation) -> Tensor:
        affine = self if self.share_affine else part
        return part.run(x, residual, affine.weight, affine.bias, act, self.counts())

    def extra_repr(self) -> str:
        """The options, for the layer's repr."""
        return f"{super().extra_repr()}, num_splits={self.num_splits}, share_affine={self.share_affine}"


@contextmanager
def use_split(model: torch.nn.Module, index: int) -> Iterator[torch.nn.Module]:
    """Let part ``index`` of each :class:`SplitBatchNorm` of a model normalize the whole batch inside the block.

    Args:
        model: Any module that contains split layers.
        index: 0 for the main layers, k for the k-th auxiliary ones.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: The model has no split layer, or one of them has no such part; nothing is changed then.

    Example:
        >>> net = torch.nn.Sequential(SplitBatchNorm(3), SplitBatchNorm(3))
        >>> with use_split(net, 1):
        ...     y = net(torch.randn(5, 3))
        >>> net[1].aux_bn[0].num_batches_tracked.item()
        1
    """
    check_module("use_split", model)
    layers = [module for module in model.modules() if isinstance(module, SplitBatchNorm)]
    if not layers:
        raise ValueError(f"use_split: there is no SplitBatchNorm in {type(model).__name__}")
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.use_split(index))
        yield model
