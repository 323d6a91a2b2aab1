"""Layers that learn their number of channels from the first input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keelnorm.engine.error_messages import describe
from keelnorm.engine.masking import TooFew
from keelnorm.engine.torch_internals import BatchNormBase, LazyNormBase
from keelnorm.nn._shared.layer_base import Layer
from keelnorm.nn.batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, FusedBatchNorm


class _LazyFused(FusedBatchNorm):
    """What the lazy layers share: the forward is that of the drop-in layers, and the first input is checked."""

    num_features: int

    def __init__(
        self,
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
        newer = {} if bias else {"bias": False}
        # Skips Layer's constructor, which needs the number of channels.
        super(Layer, self).__init__(eps, momentum, affine, track_running_stats, device, dtype, **newer)  # type: ignore[arg-type]
        self.set_too_few(too_few)
        self.count_skipped()

    def initialize_parameters(self, input: Any, *args: Any, **kwargs: Any) -> None:
        """Create parameters and buffers for x's channels, unless the first call, with these arguments, raises."""
        what, x = type(self).__name__, input
        legal = "two or more" if self._ranks is None else " or ".join(map(str, self._ranks))
        asked = f"{what}: the first x gives the number of channels, so it must be a floating-point tensor"
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{asked}; got {describe(x)}")
        if x.dim() < 2 or (self._ranks is not None and x.dim() not in self._ranks):
            raise ValueError(f"{asked} of {legal} dimensions, channels second; got {describe(x)}")
        if type(x) is Tensor and self.has_uninitialized_params():  # type: ignore[operator]
            self._try(x, *args, **kwargs)
        super().initialize_parameters(x)  # type: ignore[misc]
        # torch.nn leaves 0 if a state_dict gave the sizes, or if nothing has a size.
        known = [value for value in (self.weight, self.running_mean) if value is not None]
        self.num_features = known[0].shape[0] if known else x.shape[1]
        self.count_skipped()

    def _try(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Try the call with an ordinary layer: if it raises, this one stays lazy."""
        like = next((value for value in (self.weight, self.running_mean) if value is not None), x)
        become: type[FusedBatchNorm] = self.cls_to_become  # type: ignore[assignment]
        layer = become(
            x.shape[1], self.eps, self.momentum, self.affine, self.track_running_stats, like.device, like.dtype,
            too_few=self.too_few,
        )  # fmt: skip
        with torch.no_grad():
            layer.train(self.training).forward(x.clone(), *args, **kwargs)


class LazyBatchNorm(_LazyFused, LazyNormBase, BatchNormBase):
    """:class:`keelnorm.BatchNorm` that takes ``num_features`` from its first input, of any rank from two on.

    Until then parameters and running statistics are uninitialized, as in ``torch.nn``'s lazy modules. The first forward
    turns the layer into an ordinary one, of the class ``cls_to_become``.

    Args:
        eps, momentum, affine, track_running_stats, device, dtype, bias: As :class:`keelnorm.BatchNorm`.

    Shape:
        (N, C, *S) -> (N, C, *S)

    State:
        As ``torch.nn``'s lazy modules: the state_dict has the uninitialized tensors. A lazy layer loads the state_dict
        of an initialized layer, shapes included; that of a lazy layer changes nothing in it.

    Differs:
        From ``torch.nn.LazyBatchNorm*`` by the arguments of the call (``residual``, ``activation``, ``inplace``, from
        the first call on), and by one more forward that checks the first call before anything is created.

    Raises:
        TypeError, ValueError: The first input has no channels; or as :class:`keelnorm.BatchNorm`. The layer is then
            still lazy.

    Example:
        >>> layer = LazyBatchNorm()
        >>> layer(torch.randn(8, 3, 5), activation="relu").shape, layer
        (torch.Size([8, 3, 5]), BatchNorm(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True))
    """

    cls_to_become: type = BatchNorm


class LazyBatchNorm1d(_LazyFused, torch.nn.LazyBatchNorm1d):
    """:class:`keelnorm.BatchNorm1d` that takes ``num_features`` from its first input. See :class:`LazyBatchNorm`.

    Example:
        >>> LazyBatchNorm1d()(torch.randn(4, 16)).shape
        torch.Size([4, 16])
    """

    _ranks = (2, 3)
    cls_to_become: type = BatchNorm1d  # type: ignore[assignment]


class LazyBatchNorm2d(_LazyFused, torch.nn.LazyBatchNorm2d):
    """:class:`keelnorm.BatchNorm2d` that takes ``num_features`` from its first input. See :class:`LazyBatchNorm`.

    Example:
        >>> LazyBatchNorm2d()(torch.randn(4, 16, 8, 8)).shape
        torch.Size([4, 16, 8, 8])
    """

    _ranks = (4,)
    cls_to_become: type = BatchNorm2d  # type: ignore[assignment]


class LazyBatchNorm3d(_LazyFused, torch.nn.LazyBatchNorm3d):
    """:class:`keelnorm.BatchNorm3d` that takes ``num_features`` from its first input. See :class:`LazyBatchNorm`.

    Example:
        >>> LazyBatchNorm3d()(torch.randn(4, 2, 3, 3, 3)).shape
        torch.Size([4, 2, 3, 3, 3])
    """

    _ranks = (5,)
    cls_to_become: type = BatchNorm3d  # type: ignore[assignment]
