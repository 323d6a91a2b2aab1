"""Batch normalization over the ranks of torch.distributed, as one process with the whole batch would compute it."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.engine import dispatch, preflight
from keelnorm.engine.activations import Activation, ActivationLike, is_untouched
from keelnorm.engine.arguments import State, check_arguments
from keelnorm.engine.collectives import group_of
from keelnorm.engine.error_messages import check_module, describe, locate, module_path
from keelnorm.engine.masking import Padding, TooFew, check_policy, without_variance
from keelnorm.engine.normalization_steps import Normalization, is_plain
from keelnorm.engine.preflight import Step, agree
from keelnorm.functional import Options, check_layer_call, moments
from keelnorm.moments import Moments, Weighting
from keelnorm.nn._shared.skipped_updates import CountsSkipped
from keelnorm.nn._shared.variant import Variant, normalize
from keelnorm.nn.batch_norm import FusedBatchNorm, too_few_repr
from keelnorm.nn.sync.autograd import Call, Synchronized, refuse_second_derivative, synchronized_backward

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SyncBatchNorm(Variant):
    """Batch normalization whose batch is that of all ranks of a process group together.

    Each rank r takes the moments (n_r, mean_r, M2_r) of its part, all ranks gather them, and each merges them:

        n = Σ n_r      mean = Σ n_r·mean_r / n      var = (Σ M2_r + Σ n_r·(mean_r − mean)²) / n
        y = act((x − mean) / √(var + eps) · weight + bias + residual)
        dx = weight·rstd·(g − (Σg)/n − xhat·(Σ g·xhat)/n),  both sums over all ranks

    so that outputs, gradients and running statistics are those of one process with the whole batch, whatever the ranks'
    shares. In evaluation the running statistics normalize, and nothing is exchanged. Without torch.distributed, or with
    one rank, it is :class:`keelnorm.BatchNorm`.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: As :class:`keelnorm.BatchNorm`.
        process_group: The ranks that normalize together; default: all ranks.
        too_few: As :class:`keelnorm.BatchNorm`, for one value per channel over all ranks.

    Shape:
        (N, C, *S) -> (N, C, *S). N and S may differ between ranks, and N may be 0 on some: such a rank takes part, in
        the backward too, for which its (empty) output has to enter its loss.

    State:
        As ``torch.nn.SyncBatchNorm``, with the same state_dict; the running statistics are updated with the moments of
        all ranks, the unbiased variance for the whole count, and so stay the same on all ranks.

    Differs:
        From ``torch.nn.SyncBatchNorm``: runs on the CPU (gloo) as well; takes a residual, an activation and a mask;
        keeps its digits when the mean is large against the deviation. It is no subclass of it, because
        ``DistributedDataParallel`` refuses those on the CPU; ``isinstance`` of ``_BatchNorm`` holds. As there,
        the gradients of weight and bias are those of the rank's own samples: ``DistributedDataParallel`` averages
        them over ranks, as it does all others; without it, add them up.

    Numerics:
        Moments and sums are exchanged and merged in float64, and have the same bits on all ranks.

    Cost:
        One collective in the forward (4·C values of float64 from each rank) and, where x wants a gradient, one in the
        backward (2·C); on the CPU each after a small one that compares sizes. x is read once for the moments and once
        to normalize; in the backward once for the sums, once for dx, and once more for dresidual behind an activation.
        Saved: as :class:`keelnorm.BatchNorm`.

    Raises:
        TypeError, ValueError: as :class:`keelnorm.BatchNorm`; one value per channel over all ranks (on the CPU: other
            devices would have to be waited for); a rank that is not in the process group.
        RuntimeError: a rank did not come, within the time that ``init_process_group`` was given; a second derivative,
            a transform of torch.func, or a forward-mode derivative. :func:`keelnorm.distributed.preflight` finds the
            layer where ranks part ways. Under torch.compile the graph breaks here while ranks synchronize.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> model = SyncBatchNorm.convert_sync_batchnorm(model)
        >>> type(model[1]).__name__, model(torch.randn(2, 3, 6, 6)).shape
        ('SyncBatchNorm', torch.Size([2, 8, 4, 4]))

    Source:
        Peng, Xiao, Li, Jiang, Zhang, Jia, Yu, Sun (2018), "MegDet: A Large Mini-Batch Object Detector",
        arXiv:1711.07240, cross-GPU batch normalization. The merge: Chan, Golub, LeVeque (1979).
    """

    _masks = True
    defers_in_training = True
    #: Where a layer that was made from another one remembers the class of that.
    CAME_FROM = "_came_from"
    too_few: TooFew = "error"

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

    def set_too_few(self, too_few: TooFew) -> None:
        """As :meth:`keelnorm.BatchNorm.set_too_few`."""
        check_policy(type(self).__name__, too_few)
        if too_few != self.too_few:
            self.too_few = too_few

    def forward(  # type: ignore[override]
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
        """``activation(bn(x) + residual)``; see :class:`Variant`. The ranks may differ in x's
        batch and positions, in its mask, and in which of them have one."""
        keywords: dict[str, Any] = {"activation": activation, "inplace": inplace, "mask": mask, "padding": padding}
        keywords |= {"sample_weight": sample_weight, "weighting": weighting}
        if torch.compiler.is_compiling() and self._group() is not None:
            from keelnorm.nn._shared import outside_compile

            return outside_compile.run(SyncBatchNorm.forward, self, input, residual, **keywords)  # type: ignore[no-any-return]
        if not torch.compiler.is_compiling() and preflight.preflight_is_on():
            try:
                self._compare_notes(input)
            except (ValueError, RuntimeError) as error:
                locate(error, self)
                raise
        return super().forward(input, residual, **keywords)

    def _guard(self, options: Options) -> AbstractContextManager[None]:
        alone = options.mask is None and self._group() is None
        return nullcontext() if alone else super()._guard(options)  # alone it is fused.batch_norm, which needs none

    def normalization(self, x: Tensor) -> Normalization | None:
        """As :meth:`keelnorm.BatchNorm.normalization`, with the moments of all ranks in training."""
        if not self.uses_batch():
            return super().normalization(x)
        group, weight, bias = self._group(), self.weight, self.bias
        if x.is_inference() or (group is not None and preflight.preflight_is_on()):
            return None
        if not is_plain(weight) or not is_plain(bias):
            return None
        state = self._state()._replace(update=self.counts())
        if group is not None:
            return SyncNormalization(state, weight, bias, self, group)
        return Normalization(state, weight, bias) if check_layer_call(x, weight, bias, state, self._ranks) else None

    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
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
            if dispatch.transformed():
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
        """The moments of all ranks; (mean, var, rstd) that normalize, (3, C); and the count that the backward needs."""
        with torch.no_grad():
            total = moments(x.detach(), mask).all_reduce(group, what=type(self).__name__, step=partial(self._step, x))
            mean, var, count = self._normalizing(total)
            return total, torch.stack([mean, var, (var + self.eps).rsqrt()]), count

    def _normalizing(self, total: Moments) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance that normalize, and for how many values they stand; where they are constants, infinity."""
        mean, var, count = total.mean, total.var_or_zero, total.count
        single = count == 1
        if self.too_few == "running" and self.running_mean is not None and self.running_var is not None:
            mean = torch.where(single, self.running_mean.to(mean.dtype), mean)
            var = torch.where(single, self.running_var.to(var.dtype), var)
            count = torch.where(single, torch.inf, count)
        # Other devices would have to be waited for.
        elif self.too_few != "skip" and count.device.type == "cpu" and mean.numel() > 0 and bool(single.all()):
            legal = "too_few='running' (which needs running statistics) or 'skip'"
            raise ValueError(
                f"{type(self).__name__}: one value per channel, counted over all ranks, has no variance, so it can't "
                f"normalize; use larger batches, evaluate with model.eval(), or give the layer {legal}"
            )
        return mean, var, count

    @classmethod
    def convert_sync_batchnorm(
        cls, module: torch.nn.Module, process_group: ProcessGroup | None = None
    ) -> torch.nn.Module:
        """Put a synchronized layer in the place of each batch normalization, with its parameters and buffers.

        Args:
            module: A model, or a batch normalization: of torch.nn or of keelnorm, of any kind of input.
            process_group: See :class:`SyncBatchNorm`.

        Returns:
            The module itself, changed; or the new layer where it is itself a batch normalization.

        Differs:
            From ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``: refuses a layer whose forward is not batch
            normalization's own, which would be lost; a layer in several places stays one.

        Raises:
            TypeError: what is given is no module.
            ValueError: a layer that has a forward, hooks or parametrizations of its own, or is lazy; before anything
                is changed.
        """
        check_module("convert_sync_batchnorm", module)
        new = {
            layer: cls._from(layer, name, process_group)
            for name, layer in module.named_modules()
            if isinstance(layer, _BatchNorm)
        }
        for parent in list(module.modules()):
            for name, child in parent._modules.items():
                if child in new:
                    parent._modules[name] = new[child]
        return new.get(module, module)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def _from(cls, layer: _BatchNorm, name: str, process_group: ProcessGroup | None) -> SyncBatchNorm:
        known = (_BatchNorm, torch.nn.SyncBatchNorm, FusedBatchNorm, SyncBatchNorm)
        if not any(type(layer).forward is kind.forward for kind in known):
            reason = "has a forward of its own"
        elif not is_untouched(layer.__dict__) or layer._modules:
            reason = "has hooks, parametrizations or a forward of its own"
        elif isinstance(layer, torch.nn.modules.lazy.LazyModuleMixin):
            reason = "doesn't know its channels yet; run the model once first"
        else:
            new = cls(
                layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats, process_group,
                device="meta", too_few=getattr(layer, "too_few", "error"),
            )  # fmt: skip
            new.weight, new.bias = layer.weight, layer.bias
            new.running_mean, new.running_var = layer.running_mean, layer.running_var
            new.num_batches_tracked = layer.num_batches_tracked
            if isinstance(layer, CountsSkipped):
                new._updates = layer._updates
            new._place_counts()
            vars(new)[cls.CAME_FROM] = vars(layer).get(cls.CAME_FROM, type(layer))
            return new.train(layer.training)
        raise ValueError(
            f"convert_sync_batchnorm: {name!r}, a {type(layer).__name__}, {reason}, which a synchronized layer would "
            "not have; replace it by hand, or convert the parts of the model without it"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """A process group can't be copied: the copy talks to the same ranks."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        memo[id(self.process_group)] = self.process_group
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{too_few_repr(self.too_few)}"

    def _group(self) -> ProcessGroup | None:
        """The ranks to normalize with now, or None where this one is alone."""
        return group_of(self.process_group, type(self).__name__) if self.training else None

    @property
    def _too_few(self) -> str:  # type: ignore[override]
        """One value per channel on this rank will do if other ranks have more."""
        return self.too_few if self._group() is None else "others"

    def _step(self, x: Any) -> Step:
        legal = isinstance(x, Tensor) and x.dim() >= 2
        return Step(
            repr(module_path(self)) if module_path(self) else f"a {type(self).__name__}",
            "forward",
            x.shape[1] if legal else f"({describe(x)})",
            str(x.dtype).removeprefix("torch.") if legal else "",
            "training" if self.training else "evaluation (frozen)",
            legal and x.requires_grad and torch.is_grad_enabled(),
        )

    def _compare_notes(self, x: Any) -> None:
        """The forward's preflight. In evaluation where autograd records alone: that is not a single rank's test."""
        group = group_of(self.process_group, type(self).__name__)
        if group is not None and (self.training or torch.is_grad_enabled()):
            agree(self._step(x), group, type(self).__name__)


class SyncNormalization(Normalization):
    """A synchronized batch norm in its parts."""

    __slots__ = ("count", "group", "layer")

    def __init__(
        self, state: State, weight: Tensor | None, bias: Tensor | None, layer: SyncBatchNorm, group: ProcessGroup
    ) -> None:
        super().__init__(state, weight, bias)
        self.layer, self.group = layer, group

    def run(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, act: Activation | None
    ) -> tuple[Tensor | None, Tensor]:
        check_arguments(self.state.what, x, None, weight, bias, self.state, None, "others")
        total, saved, self.count = self.layer.pooled(x, None, self.group)
        y = None if act is None else self.apply(x, None, weight, bias, saved, act)
        self.layer.update_running(total)
        return y, saved

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        saved: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        act: Activation,
        need: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        call = Call(act, self.group, self.state.what, dy.dtype, None)
        return synchronized_backward(dy, x, saved, self.count, weight, bias if act.code else None, y, None, call, need)

    def differentiable(self, *_: Any) -> Tensor:
        refuse_second_derivative(self.state.what)

    def differentiable_backward(self, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(self.state.what)
