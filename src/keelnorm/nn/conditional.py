"""Conditional batch normalization: γ and β of each sample depend on its class or an embedding."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from keelnorm.engine import dispatch
from keelnorm.engine.activations import NONE, Activation, ActivationLike
from keelnorm.engine.arguments import Options, Padding, check_arguments, check_channels
from keelnorm.engine.error_messages import describe, is_count
from keelnorm.engine.layout import check_kind
from keelnorm.engine.recomputed_steps import elementwise
from keelnorm.engine.torch_internals import BatchNormBase, is_transformed
from keelnorm.moments import Weighting, compute_dtype
from keelnorm.nn._shared.normalize import normalize_by_batch
from keelnorm.nn._shared.take_over import adopt, expand_rows, options_of
from keelnorm.nn._shared.variant import Variant


class _ZeroLinear(torch.nn.Linear):
    """A linear map that is initialized to zero."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)


class ConditionalBatchNorm(Variant):
    """Batch normalization with γ and β of each sample's class, or from an embedding of the sample.

    The moments are the whole batch's, as in plain batch normalization. For sample n with the condition e_n:

        y_n = act((x_n − mean) / √(var + eps) · γ(e_n) + β(e_n) + residual_n)

    - ``num_classes=K``: a table, γ(k) = weight[k] and β(k) = bias[k]. Weights (N, K) instead of labels mix rows.
    - ``embedding_dim=E``: γ(e) = weight + Δγ(e), β(e) = bias + Δβ(e), with (Δγ, Δβ) = modulation(e): a linear map,
      initially zero, so the layer starts as plain batch normalization; or a module of your own.

    Called as ``layer(x, residual=None, *, condition, activation=None, mask=None)``.

    Args:
        num_features: Number of channels C.
        num_classes: Number of classes K. Either this or ``embedding_dim``.
        embedding_dim: Length E of an embedding.
        eps, momentum, track_running_stats, device, dtype: As for ``torch.nn.BatchNorm2d``.
        affine: With an embedding: whether Δγ and Δβ are added to a weight and a bias, or to 1 and 0. With classes:
            whether there are tables; without them labels are checked and have no effect.
        modulation: Replaces the linear map: a module from (N, E) to (N, 2C), Δγ first. It is not initialized.

    Shape:
        x: (N, C, *S) -> (N, C, *S). condition: int64 (N,) or floating (N, K) with classes; floating (N, E) else.

    State:
        As ``torch.nn.BatchNorm2d``. With classes ``weight`` and ``bias`` have the shape (K, C), and a plain checkpoint
        gives its γ and β to every class. With an embedding there is also ``modulation.*``.

    Differs:
        Without a condition the call is an error. ``mask`` is as for :class:`~keelnorm.nn._shared.variant.Variant`.

    Numerics:
        Half-precision x is normalized and scaled in float32 and rounded once. Labels are checked on the CPU only; on a
        GPU a label out of range is an error of the indexing.

    Cost:
        The fused kernel without γ and β, one more pass over x for the running statistics, and one pass for γ and β.

    Raises:
        TypeError, ValueError: Not exactly one of ``num_classes`` and ``embedding_dim`` is given; the condition is
            missing or does not fit; or as :class:`~keelnorm.BatchNorm`. The running statistics are then as before.

    Example:
        >>> layer = ConditionalBatchNorm(16, num_classes=10)
        >>> x, labels = torch.randn(4, 16, 8, 8), torch.tensor([3, 1, 4, 1])
        >>> layer(x, condition=labels, activation="relu").shape
        torch.Size([4, 16, 8, 8])

    Source:
        Dumoulin, Shlens, Kudlur (2017), "A Learned Representation For Artistic Style", arXiv:1610.07629, section 2.2
        (a row of γ and β per style, and mixtures of rows); de Vries, Strub, Mary, Larochelle, Pietquin, Courville
        (2017), "Modulating early visual processing by language", arXiv:1707.00683, section 3 (Δγ and Δβ).
    """

    takes_mask = True
    own_evaluation: str | None = "with the γ and β of each sample's condition"

    modulation: torch.nn.Module
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter

    def __init__(
        self,
        num_features: int,
        num_classes: int | None = None,
        embedding_dim: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        modulation: torch.nn.Module | None = None,
    ) -> None:
        what = type(self).__name__
        given = [size for size in (num_classes, embedding_dim) if size is not None]
        if len(given) != 1 or not is_count(given[0]):
            raise ValueError(
                f"{what}: give either num_classes or embedding_dim, as a positive integer; got "
                f"num_classes={num_classes!r}, embedding_dim={embedding_dim!r}"
            )
        if modulation is not None and embedding_dim is None:
            raise ValueError(f"{what}: a modulation maps embeddings, so it needs embedding_dim; got num_classes")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        if embedding_dim is not None:
            linear = _ZeroLinear(embedding_dim, 2 * num_features, device=device, dtype=dtype)
            self.modulation = linear if modulation is None else modulation
        elif affine:
            assert num_classes is not None
            self.weight = torch.nn.Parameter(self.weight.detach().repeat(num_classes, 1))
            self.bias = torch.nn.Parameter(self.bias.detach().repeat(num_classes, 1))

    @classmethod
    def from_batch_norm(
        cls,
        bn: BatchNormBase,
        num_classes: int | None = None,
        embedding_dim: int | None = None,
        *,
        modulation: torch.nn.Module | None = None,
    ) -> ConditionalBatchNorm:
        """Make a conditional layer from ``bn``, whose γ and β every class gets, or Δγ and Δβ are added to.

        Raises:
            TypeError: ``bn`` is not ``torch.nn``'s or keelnorm's drop-in layer, or has hooks.

        Example:
            >>> bn = torch.nn.BatchNorm2d(16)
            >>> ConditionalBatchNorm.from_batch_norm(bn, num_classes=10).weight.shape
            torch.Size([10, 16])
        """
        options = options_of(f"{cls.__name__}.from_batch_norm", bn)
        layer = cls(num_classes=num_classes, embedding_dim=embedding_dim, modulation=modulation, **options)
        adopt(layer, bn)
        return layer

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        condition: Tensor | None = None,
        activation: ActivationLike = None,
        inplace: bool = False,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        weighting: Weighting = "frequency",
        padding: Padding = "zero",
    ) -> Tensor:
        """Compute ``activation(bn(x)·γ(condition) + β(condition) + residual)``.

        ``condition`` is a class per sample, int64 (N,), or weights of the classes (N, K); or an embedding (N, E). The
        other arguments are as for every variant.
        """
        options = Options(activation, inplace, mask, sample_weight, weighting, padding)
        return self._call(input, residual, options, condition=condition)

    def check(self, x: Any, residual: Any, condition: Any = None) -> None:
        """Raise unless the layer can normalize x; :meth:`compute` checks the condition."""
        what = type(self).__name__
        # Tables have another shape, which is checked below.
        weight, bias = (self.weight, self.bias) if self.num_classes is None else (None, None)
        check_arguments(what, x, residual, weight, bias, self._checked(), self._ranks)
        check_channels(what, x, self.num_features)
        table = (self.num_classes, self.num_features)
        for name, value in self.named_parameters(recurse=False) if self.num_classes is not None else ():
            if value.shape != table:
                raise ValueError(f"{what}: {name} must have a row for each class, {table}; got {describe(value)}")

    def compute(
        self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None, condition: Tensor | None = None
    ) -> Tensor:
        """Normalize with the batch's or the running statistics, then apply each sample's γ and β."""
        dtype = compute_dtype(x)
        gain, shift = self._affine(x, condition)
        wide, moments = x.to(dtype), None
        if self.uses_batch():
            y, moments = normalize_by_batch(wide, None, None, None, self.eps, NONE, mask, self.counts())
        else:
            y = dispatch.batch_norm(wide, None, None, None, self._state(), NONE)
        if gain is not None or residual is not None or act.code or x.dtype != dtype:
            y = elementwise(partial(_modulated, dtype=x.dtype, act=act), residual, y, gain, shift)
        if moments is not None:
            self.update_running(moments)
        return y

    def _affine(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute γ and β of each sample, (N, C); None without tables."""
        mixed = self._check_condition(x, condition)
        assert condition is not None
        if self.num_classes is None:
            # The embedding may have another precision than the map's parameters.
            of = next(self.modulation.parameters(), condition)
            changes = self.modulation(condition.to(of.dtype))
            expected = (x.shape[0], 2 * self.num_features)
            if not isinstance(changes, Tensor) or changes.shape != expected:
                raise ValueError(
                    f"{type(self).__name__}: the modulation must map the embedding to shape {expected}, Δγ and "
                    f"then Δβ; got {describe(changes)}"
                )
            gain, shift = changes.to(torch.promote_types(changes.dtype, compute_dtype(x))).chunk(2, 1)
            return gain + (1 if self.weight is None else self.weight), shift if self.bias is None else shift + self.bias
        if self.weight is None:
            return None, None
        if mixed:
            weights = condition.to(self.weight.dtype)
            return weights @ self.weight, None if self.bias is None else weights @ self.bias
        embedding = torch.nn.functional.embedding
        return embedding(condition, self.weight), None if self.bias is None else embedding(condition, self.bias)

    def _check_condition(self, x: Tensor, condition: Any) -> bool:
        """Whether the condition is floating-point; raise if it is not legal."""
        what, N = type(self).__name__, x.shape[0]
        if self.num_classes is None:
            legal = f"an embedding: floating-point, of shape ({N}, {self.embedding_dim})"
        else:
            legal = f"class labels: int64, of shape ({N},), or their weights: floating, of ({N}, {self.num_classes})"
        if not isinstance(condition, Tensor):
            came = "none came" if condition is None else f"got {describe(condition)}"
            raise TypeError(f"{what}: each sample needs its condition, {legal}; {came}. Call layer(x, condition=...)")
        check_kind(what, "the condition", condition)
        if condition.is_floating_point():
            fits = condition.shape == (N, self.num_classes or self.embedding_dim)
        else:
            fits = self.num_classes is not None and condition.dtype == torch.int64 and condition.shape == (N,)
        if not fits or condition.device != x.device:
            raise ValueError(f"{what}: the condition must be {legal}, on {x.device}; got {describe(condition)}")
        if condition.is_floating_point():
            return True
        # On a GPU reading values would wait for the device; the compiler would break the graph.
        if condition.is_cpu and N > 0 and not torch.compiler.is_compiling() and not is_transformed():
            low, high = (int(value) for value in condition.aminmax())
            top = (self.num_classes or 0) - 1
            if low < 0 or high > top:
                raise ValueError(f"{what}: class labels must be from 0 to {top}; got labels from {low} to {high}")
        return False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        expand_rows(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The options, for the layer's repr."""
        kind = "num_classes" if self.num_classes is not None else "embedding_dim"
        return (
            f"{self.num_features}, {kind}={getattr(self, kind)}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}"
        )


def _modulated(
    residual: Tensor | None, y: Tensor, gain: Tensor | None, shift: Tensor | None, dtype: torch.dtype, act: Activation
) -> Tensor:
    """Return ``act(y·gain + shift + residual)`` in x's dtype, or one that the residual's promotes it to."""
    if gain is not None:
        spread = (*y.shape[:2], *[1] * (y.dim() - 2))
        gain = gain.to(y.dtype).view(spread)
        y = y * gain if shift is None else torch.addcmul(shift.to(y.dtype).view(spread), y, gain)
    if residual is not None:
        y = y + residual
    return act.forward(y).to(dtype if residual is None else torch.promote_types(dtype, residual.dtype))
