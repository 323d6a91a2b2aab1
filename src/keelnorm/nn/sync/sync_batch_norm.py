"""Batch normalization over the ranks of torch.distributed, with the result of one process with the whole batch."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keelnorm.engine import dispatch, preflight
from keelnorm.engine.activations import Activation, ActivationLike
from keelnorm.engine.arguments import Options, Padding
from keelnorm.engine.collectives import group_of
from keelnorm.engine.error_messages import describe, locate, module_path
from keelnorm.engine.masking import TooFew, without_variance
from keelnorm.engine.normalization_steps import Normalization, is_plain
from keelnorm.engine.preflight import Step, agree
from keelnorm.engine.torch_internals import is_transformed
from keelnorm.functional import check_layer_call, moments
from keelnorm.moments import Moments, Weighting
from keelnorm.nn._shared.normalize import normalize
from keelnorm.nn._shared.too_few_option import HasTooFew
from keelnorm.nn._shared.variant import Variant
from keelnorm.nn.sync.autograd import Call, Synchronized
from keelnorm.nn.sync.sync_normalization import SyncNormalization

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SyncBatchNorm(HasTooFew, Variant):
    """Batch normalization over the batches of all ranks of a process group together.

    Each rank r computes the moments (n_r, mean_r, M2_r) of its part. All ranks gather them, and each rank merges them:

        n = Σ n_r      mean = Σ n_r·mean_r / n      var = (Σ M2_r + Σ n_r·(mean_r − mean)²) / n
        y = act((x − mean) / √(var + eps) · weight + bias + residual)
        dx = weight·rstd·(g − (Σg)/n − xhat·(Σ g·xhat)/n),  both sums over all ranks

    Outputs, gradients and running statistics are then those of one process with the whole batch, however it is split.
    In evaluation the running statistics normalize, and nothing is exchanged. Without torch.distributed, or with one
    rank, the layer computes what :class:`keelnorm.BatchNorm` does.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: As :class:`keelnorm.BatchNorm`.
        process_group: The ranks that normalize together; default: all ranks.
        too_few: As :class:`keelnorm.BatchNorm`, for one value per channel over all ranks.

    Shape:
        (N, C, *S) -> (N, C, *S). N and S may differ between ranks, and N may be 0 on some. A rank without samples takes
        part in the backward too, so its empty output has to enter its loss.

    State:
        As ``torch.nn.SyncBatchNorm``, with the same state_dict. The running statistics are updated with the moments of
        all ranks (the unbiased variance of the whole count), so they stay the same on all ranks.

    Differs:
        From ``torch.nn.SyncBatchNorm``: runs on the CPU (gloo) as well; takes a residual, an activation and a mask;
        stays accurate when the mean is much larger than the standard deviation. It is not a subclass, because
        ``DistributedDataParallel`` refuses those on the CPU; it is a subclass of ``BatchNormBase``. As there, the
        gradients of weight and bias are those of the rank's own samples: ``DistributedDataParallel`` averages them over
        ranks like all others; without it, sum them.

    Numerics:
        Moments and sums are exchanged and merged in float64, and are bitwise equal on all ranks.

    Cost:
        One collective in the forward (4·C float64 values from each rank) and, if x requires a gradient, one in the
        backward (2·C). On the CPU a small collective that compares sizes precedes each. x is read once for the moments
        and once to normalize; in the backward once for the sums, once for dx, and once for dresidual if there is an
        activation. Saved: as :class:`keelnorm.BatchNorm`.

    Raises:
        TypeError, ValueError: As :class:`keelnorm.BatchNorm`; one value per channel over all ranks (found on the CPU
            only, as other devices would have to be synchronized); this process is not in the process group.
        RuntimeError: A rank does not take part within the timeout of ``init_process_group``; a second derivative, a
            transform of torch.func, or a forward-mode derivative. :func:`keelnorm.distributed.preflight` finds the
            layer at which ranks differ. Under torch.compile the graph breaks here while ranks synchronize.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> model = SyncBatchNorm.convert_sync_batchnorm(model)
        >>> type(model[1]).__name__, model(torch.randn(2, 3, 6, 6)).shape
        ('SyncBatchNorm', torch.Size([2, 8, 4, 4]))

    Source:
        Peng, Xiao, Li, Jiang, Zhang, Jia, Yu, Sun (2018), "MegDet: A Large Mini-Batch Object Detector",
        arXiv:1711.07240, cross-GPU batch normalization. The merge: Chan, Golub, LeVeque (1979).
    """

    takes_mask = True
    defers_in_training = True
    #: The attribute in which a converted layer keeps the class that it was converted from.
    CAME_FROM = "_came_from"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        too_few: TooFew = "error",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.set_too_few(too_few)
        self.process_group = process_group

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
        """Compute ``activation(bn(x) + residual)``; ranks may differ in batch size, positions and mask."""
        keywords: dict[str, Any] = {"activation": activation, "inplace": inplace, "mask": mask, "padding": padding}
        keywords |= {"sample_weight": sample_weight, "weighting": weighting}
        if torch.compiler.is_compiling() and self._group() is not None:
            from keelnorm.nn._shared.graph_break import call_uncompiled

            return call_uncompiled(SyncBatchNorm.forward, self, input, residual, **keywords)  # type: ignore[no-any-return]
        if not torch.compiler.is_compiling() and preflight.preflight_is_on():
            try:
                self._preflight(input)
            except (ValueError, RuntimeError) as error:
                locate(error, self)
                raise
        return super().forward(input, residual, **keywords)

    def _guard(self, options: Options) -> AbstractContextManager[None]:
        alone = options.mask is None and self._group() is None
        return nullcontext() if alone else super()._guard(options)  # dispatch.batch_norm needs no guard

    def normalization(self, x: Tensor) -> Normalization | None:
        """As :meth:`keelnorm.BatchNorm.normalization`; in training with the moments of all ranks."""
        if not self.uses_batch():
            return super().normalization(x)
        group, weight, bias = self._group(), self.weight, self.bias
        if x.is_inference() or not is_plain(weight) or not is_plain(bias):
            return None
        if group is not None and preflight.preflight_is_on():
            return None
        state = self._state()._replace(update=self.counts())
        if group is not None:
            return SyncNormalization(state, weight, bias, self, group)
        return Normalization(state, weight, bias) if check_layer_call(x, weight, bias, state, self._ranks) else None

    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        """Normalize with the moments of all ranks."""
        group, what = self._group(), type(self).__name__
        if group is None and mask is None:
            state = self._state()._replace(update=self.counts())
            if x.numel() == x.shape[1] > 0:
                state = without_variance(state, self.too_few)
            return dispatch.batch_norm(x, residual, self.weight, self.bias, state, act)
        if group is None:
            total = Moments.from_tensor(x, mask)
            mean, var, _ = self._normalizing(total)
            y = normalize(x, mean, var, self.weight, self.bias, self.eps, residual, act)
        else:
            if is_transformed():
                raise RuntimeError(
                    f"{what}: ranks can't be synchronized under torch.func or forward-mode differentiation; use "
                    "kn.BatchNorm there, or a process group of one rank"
                )
            total, saved, count = self.pooled(x, mask, group)
            step = self._step(x) if preflight.preflight_is_on() else None
            call = Call(act, group, what, None if residual is None else residual.dtype, step)
            y = Synchronized.apply(x, residual, self.weight, self.bias, saved, count, call)
        self.update_running(total)
        return y

    def pooled(self, x: Tensor, mask: Tensor | None, group: ProcessGroup) -> tuple[Moments, Tensor, Tensor]:
        """Pool the moments of all ranks.

        Returns:
            The pooled moments; mean, var and rstd that normalize, (3, C); and the count for the backward.
        """
        with torch.no_grad():
            total = moments(x.detach(), mask).all_reduce(group, what=type(self).__name__, step=partial(self._step, x))
            mean, var, count = self._normalizing(total)
            return total, torch.stack([mean, var, (var + self.eps).rsqrt()]), count

    def _normalizing(self, total: Moments) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance that normalize, and their count: infinite in channels where they are constants."""
        mean, var, count = total.mean, total.var_or_zero, total.count
        single = count == 1
        if self.too_few == "running" and self.running_mean is not None and self.running_var is not None:
            mean = torch.where(single, self.running_mean.to(mean.dtype), mean)
            var = torch.where(single, self.running_var.to(var.dtype), var)
            count = torch.where(single, torch.inf, count)
        # Looking at values on another device would wait for it.
        elif self.too_few != "skip" and count.device.type == "cpu" and mean.numel() > 0 and bool(single.all()):
            raise ValueError(
                f"{type(self).__name__}: one value per channel, counted over all ranks, has no variance, so it can't "
                "normalize; use larger batches, evaluate with model.eval(), or give the layer too_few='running' (which "
                "needs running statistics) or 'skip'"
            )
        return mean, var, count

    @classmethod
    def convert_sync_batchnorm(
        cls, module: torch.nn.Module, process_group: ProcessGroup | None = None
    ) -> torch.nn.Module:
        """Put a synchronized layer in the place of each batch normalization, with its parameters and buffers.

        Args:
            module: A model, or a batch normalization of torch.nn or keelnorm.
            process_group: See :class:`SyncBatchNorm`.

        Returns:
            The module itself, changed; or the new layer where the module is itself a batch normalization.

        Differs:
            From ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``: a layer whose forward is not that of batch
            normalization is refused, since the forward would be lost; a layer in several places stays one layer.

        Raises:
            TypeError: ``module`` is not a module.
            ValueError: A layer has a forward, hooks or parametrizations of its own, or is lazy. Nothing is changed.
        """
        from keelnorm.nn.sync.convert_sync import convert_sync  # which imports this module

        return convert_sync(cls, module, process_group)

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """Copy all but the process group, which can't be copied: the copy talks to the same ranks."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        memo[id(self.process_group)] = self.process_group
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def _group(self) -> ProcessGroup | None:
        """The ranks to normalize with now; None if this one is alone."""
        return group_of(self.process_group, type(self).__name__) if self.training else None

    @property
    def _too_few(self) -> str:  # type: ignore[override]
        """One value per channel on this rank is legal: other ranks may have more."""
        return self.too_few if self._group() is None else "others"

    def _step(self, x: Any) -> Step:
        """What this rank is about to do, for the others to compare."""
        legal = isinstance(x, Tensor) and x.dim() >= 2
        return Step(
            repr(module_path(self)) if module_path(self) else f"a {type(self).__name__}",
            "forward",
            x.shape[1] if legal else f"({describe(x)})",
            str(x.dtype).removeprefix("torch.") if legal else "",
            "training" if self.training else "evaluation (frozen)",
            legal and x.requires_grad and torch.is_grad_enabled(),
        )

    def _preflight(self, x: Any) -> None:
        """Compare steps before the forward; in evaluation only where autograd records, as one rank may test alone."""
        group = group_of(self.process_group, type(self).__name__)
        if group is not None and (self.training or torch.is_grad_enabled()):
            agree(self._step(x), group, type(self).__name__)
