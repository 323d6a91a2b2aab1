"""The base class of the variants of batch normalization."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from keelnorm.engine import dispatch
from keelnorm.engine.activations import Activation, ActivationLike, resolve
from keelnorm.engine.arguments import Options, Padding, State, check_arguments
from keelnorm.engine.error_messages import locate
from keelnorm.engine.fusion.call import begin, passes_by
from keelnorm.engine.fusion.scope import is_inside
from keelnorm.engine.layout import dense
from keelnorm.engine.masking import check_padding, named_mask
from keelnorm.engine.normalization_steps import Normalization, is_plain
from keelnorm.engine.recomputation import is_second_run
from keelnorm.engine.recomputed_steps import padded
from keelnorm.engine.rollback import Unchanged
from keelnorm.engine.running_statistics import averaged, update_running
from keelnorm.functional import check_layer_call, refuse_jit
from keelnorm.moments import Moments, Weighting, check_weighting
from keelnorm.nn._shared.layer_base import Layer
from keelnorm.nn.batch_norm import fx_node

passes_by(__file__)
#: The key in a state_dict's metadata that says what running_var holds, if it is not the variance.
OWN_SCALE = "running_var"


class Variant(Layer):
    """A batch normalization with a training forward of its own; constructor, state and evaluation are ``torch.nn``'s.

    A subclass implements :meth:`normalize_batch`, and adds buffers or arguments if it has any. In evaluation the
    running statistics normalize, on the fused kernels. The class attributes below say how a variant differs from
    ``torch.nn``'s layers, for the code that recalibrates, merges, folds, exports or defers.

    Attributes:
        takes_mask: Whether a call may have a mask.
        own_data: Whose moments the running statistics are, if not those of all inputs of the layer; else None.
            Continues the sentence "keeps moments ...". Such a layer can't be recalibrated or adapted.
        own_scale: What ``running_var`` holds, if not the variance of the inputs; else None. Continues the sentence
            "keeps ...". Such a layer can't be recalibrated or merged.
        own_evaluation: How evaluation differs from one scale and shift per channel; else None. Continues the sentence
            "evaluates ...". Such a layer can't be folded.
        changed_by_forward: Names of plain attributes that a forward in training changes, besides buffers and deques.
    """

    #: What one value per channel is in training; see arguments.check_arguments.
    _too_few = "error"
    takes_mask: bool = False
    own_data: str | None = None
    own_scale: str | None = None
    own_evaluation: str | None = None
    changed_by_forward: tuple[str, ...] = ()

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
        """Compute ``activation(bn(x) + residual)``.

        Args:
            input: x, shape (N, C, *S).
            residual: Added before the activation; of x's shape.
            activation: None, a name or a module, as :func:`keelnorm.functional.batch_norm` lists them.
            inplace: Refused; only :class:`keelnorm.BatchNorm` and its subclasses take it.
            mask: True for values that count; shape (N,) or (N, *S).
            sample_weight: Refused, as ``inplace``.
            weighting: Refused, as ``inplace``.
            padding: The output where the mask is False: "zero", or "keep" for the value of x.
        """
        if residual is None and activation is None and mask is None and not torch.compiler.is_compiling():
            plain = sample_weight is None and not inplace
            if is_inside() and plain and weighting == "frequency" and padding == "zero":
                deferred = begin(self, input, Variant.forward)
                if deferred is not None:
                    return deferred
        return self._call(input, residual, Options(activation, inplace, mask, sample_weight, weighting, padding))

    def _call(self, x: Tensor, residual: Tensor | None, options: Options, **more: Any) -> Tensor:
        """Run a call; an error leaves the layer as it was. :meth:`check` and :meth:`compute` get ``more``."""
        refuse_jit(type(self).__name__)
        if not isinstance(x, Tensor):
            node = fx_node(self, x, residual, options, **more)
            if node is not None:
                return node
        if torch.compiler.is_compiling():
            return self._answer(x, residual, options, **more)
        try:
            with self._guard(options):
                return self._answer(x, residual, options, **more)
        except (TypeError, ValueError, RuntimeError) as error:
            locate(error, self)
            raise

    def _answer(self, x: Tensor, residual: Tensor | None, options: Options, **more: Any) -> Tensor:
        what = type(self).__name__
        mask, weighting, act = options.mask, options.weighting, resolve(what, options.activation)
        check_weighting(what, weighting)
        refused = {
            "inplace=True": options.inplace,
            "sample_weight": options.sample_weight is not None,
            f"{weighting=}": weighting != "frequency",
            "a mask": mask is not None and not self.takes_mask,
        }
        for name, asked in refused.items():
            if asked:
                raise ValueError(f"{what}: {name} has no meaning for this layer; leave it out, or use kn.BatchNorm")
        check_padding(what, options.padding)
        self.check(x, residual, **more)
        x = given = dense(x)
        counts = None
        if mask is not None:
            counts = named_mask(what, mask, x)
            # A NaN under the mask would reach the parameters' gradients as 0·NaN.
            x = padded(counts, x, None)
            residual = None if residual is None else padded(counts, residual, None)
        y = self.compute(x, residual, act, counts, **more)
        return y if counts is None else padded(counts, y, given if options.padding == "keep" else None)

    def _guard(self, options: Options) -> AbstractContextManager[None]:
        """The context that restores the layer if a call raises."""
        return Unchanged(modules=self.modules() if self._modules else (self,))

    def check(self, x: Any, residual: Any) -> None:
        """Raise unless the layer can normalize x."""
        what = type(self).__name__
        check_arguments(what, x, residual, self.weight, self.bias, self._checked(), self._ranks, self._too_few)

    def compute(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        """Run the forward of legal arguments.

        x is contiguous or channels-last, and 0 where the mask is False. ``mask`` is None, or boolean with as many
        dimensions as x, broadcastable to it.
        """
        if self.uses_batch():
            return self.normalize_batch(x, residual, act, mask)
        return self.normalize_running(x, residual, act)

    def normalize_batch(self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None) -> Tensor:
        """Normalize with the batch's moments: in training, and without running statistics always."""
        raise NotImplementedError

    def normalize_running(self, x: Tensor, residual: Tensor | None, act: Activation) -> Tensor:
        """Normalize with the running statistics."""
        return dispatch.batch_norm(x, residual, self.weight, self.bias, self._state(), act)

    def normalization(self, x: Tensor) -> Normalization | None:
        """As :meth:`keelnorm.BatchNorm.normalization`; None where the batch normalizes."""
        weight, bias = self.weight, self.bias
        own = type(self).normalize_running is not Variant.normalize_running
        if own or self.uses_batch() or x.is_inference():
            return None
        if not is_plain(weight) or not is_plain(bias):
            return None
        state = self._state()
        return Normalization(state, weight, bias) if check_layer_call(x, weight, bias, state, self._ranks) else None

    def uses_batch(self) -> bool:
        """Whether the batch's moments normalize, and not the running statistics."""
        return self.training or self.running_mean is None

    def counts(self) -> bool:
        """Whether this forward updates the running statistics: not if paused, nor in a checkpoint's second run."""
        if not (self.training and self.track_running_stats) or (self._control is not None and self._control.paused):
            return False
        # The compiler traces a checkpoint's forward once, and can't trace is_second_run.
        return torch.compiler.is_compiling() or not is_second_run()

    def update_running(self, moments: Moments) -> None:
        """Update the running statistics with a batch's moments, or pass these to an open block's pool.

        Moments and running statistics may have a row per domain, (D, C), each with its own count.
        """
        if not self.counts():
            return
        sink = None if self._control is None else self._control.sink()
        if sink is None:
            self.enter(moments, self.momentum)
        else:
            sink(moments)

    def enter(self, moments: Moments, momentum: float | None) -> None:
        """Update the running statistics with moments, in any mode; see :mod:`keelnorm.engine.running_statistics`."""
        state = self._state()._replace(momentum=momentum, sink=None)
        with torch.no_grad():  # a checkpoint counts the tensors saved for the backward
            update_running(state, moments.mean, moments.var_or_zero, moments.count, self.averaged_var, moments.squares)

    def averaged_var(self, running: Tensor, biased: Tensor, unbiased: Tensor, momentum: float | Tensor) -> Tensor:
        """The new running variance, from the old one and the batch's biased and unbiased variance."""
        return averaged(running, unbiased, momentum)

    def _state(self) -> State:
        return State(
            training=self.uses_batch(), update=False, momentum=self.momentum, eps=self.eps, what=type(self).__name__,
            running_mean=self.running_mean, running_var=self.running_var, num_batches_tracked=self.num_batches_tracked,
            updates=self._updates or self.count_skipped(), sink=None if self._control is None else self._control.sink(),
        )  # fmt: skip

    def unready(self) -> str | None:
        """What the layer lacks for evaluation, in words that follow its path; None if nothing."""
        return None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.own_scale is not None and hasattr(destination, "_metadata"):  # beside the version of the layer's class
            destination._metadata[prefix[:-1]][OWN_SCALE] = f"{type(self).__name__}, which keeps {self.own_scale}"

    def _checked(self) -> State:
        """The state for check_arguments, with ``update`` as in torch.nn: variants update the statistics themselves."""
        return self._state()._replace(update=self.training and self.track_running_stats)
